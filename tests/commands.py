"""Commands as documents show them: taken apart, and parsed without being run."""

import importlib
import shlex
from dataclasses import dataclass

import pytest

from jobs.cli import STAGES
from pipeline import console

LAUNCHERS = {"deepspeed": "--module", "torchrun": "-m", "python": "-m"}


@dataclass(frozen=True)
class Command:
    """`launcher` stands before the module, in words; it is python -m where there is no other."""

    launcher: tuple[str, ...]
    module: str
    arguments: tuple[str, ...]


def take_apart(line: str) -> Command | None:
    """The stage that a line runs; None where it runs none."""
    words = shlex.split(line)
    if words[0] == "gigabrush" and words[1:] and words[1] in STAGES:
        return Command(("python", "-m"), STAGES[words[1]][0], tuple(words[2:]))
    flag = LAUNCHERS.get(words[0])
    if flag not in words:
        return None
    place = words.index(flag) + 1
    place += words[place] == "--"  # torchrun takes --run for an option of its own without it
    return Command(tuple(words[:place]), words[place], tuple(words[place + 1 :]))


def parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the module's own options take the arguments."""
    parse = console.tyro.cli

    def only_parse(*arguments: object, **options: object) -> None:
        parse(*arguments, **options)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(console.tyro, "cli", only_parse)
        return importlib.import_module(command.module).main(command.arguments) == 0
