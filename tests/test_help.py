"""What --help teaches is true: its examples are commands that parse."""

import importlib
import re

import pytest
from commands import parses, take_apart

from jobs.cli import CHAIN, LOOKING, STAGES, main, usage

EXAMPLE = re.compile(r"^ {4}(\S+ .*)$", re.MULTILINE)

BOX = re.compile(r"^\W* (?:positional arguments|options) ", re.MULTILINE)


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_a_sentence_then_examples_that_parse_then_options(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = STAGES[stage][0]
    assert importlib.import_module(module).main(["--help"]) == 0
    text = capsys.readouterr().out
    usage_line, sentence = text.split("\n\n")[:2]
    assert usage_line.startswith(f"usage: python -m {module} ")
    assert re.fullmatch(r"[A-Z][^.]*\.", " ".join(sentence.split())), sentence
    before_options = BOX.split(text)[0]
    examples = EXAMPLE.findall(before_options)
    assert 1 <= len(examples) <= 3
    for example in examples:
        command = take_apart(example)
        assert command is not None and command.module == module, example
        assert parses(command, monkeypatch), f"{example}\n{capsys.readouterr().err}"


def test_an_example_gone_stale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for example in ("python -m jobs.info", "gigabrush pack x --encoder e --out o --pionts 1"):
        command = take_apart(example)
        assert command is not None and not parses(command, monkeypatch)


def test_every_stage_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^  (\w+) ", usage(), re.MULTILINE)
    assert sorted(listed) == sorted(STAGES)
    assert tuple(listed[: len(CHAIN + LOOKING)]) == CHAIN + LOOKING
    assert main(["--version"]) == 0
    assert re.fullmatch(r"gigabrush \d+\.\d+\S*\n", capsys.readouterr().out)
