"""The README is run: every command in it, on a phantom so small that all take a minute.

What a command shows is what is run, except that options in SMALLER replace those of the same name
or are added. A command that cannot be run here stands in ELSEWHERE with the reason; anything else
that is indented or fenced must be a folder of the annotated tree.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, parses, take_apart
from processes import ENVIRONMENT

from jobs.cli import STAGES
from pipeline.phantom import draw_slide

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

ELSEWHERE = {
    "make demo": "takes 10 minutes; tests/test_demo.py runs it smaller, and kills it",
    "make demo SLIDES=path/to/slide.svs OUT=out": "the same, with a slide that is not here",
    "make demo SLIDES=scan.tif SOURCE_MPP=0.25": "the same, with a slide that is not here",
    "make demo SLIDES=chips/ SIZE=2048": "the same, with a folder that is not here",
    "make compare": "takes hours; tests/test_compare.py runs it smaller",
    "make test": "is what runs this test",
    "deepspeed --no_local_rank --module jobs.train packs --run run": (
        "tests/test_train.py runs this launcher, with two ranks"
    ),
}
SMALLER: dict[str, dict[str, tuple[str, ...]]] = {
    "pipeline.ingest": {"--cluster": ("inline",), "--min-tissue": ("0",)},
    "conditioning.pretrain": {
        "--steps": ("2",),
        "--batch-size": ("8",),
        "--input-size": ("32",),
        "--dim": ("16",),
    },
    "conditioning.embed": {},
    "pipeline.pack": {"--points": ("24000",), "--packs-per-region": ("2",)},
    "jobs.train": {"--preset": ("tiny",), "--steps": ("2",), "--batch": ("2",)},
    "jobs.sample": {"--size": ("512",), "--steps": ("2",)},
    "pipeline.export": {},
    "jobs.evaluate": {},
    "jobs.report": {},
    "jobs.info": {},
    "jobs.doctor": {},
}
RUN_OF_ITS_OWN = {"torchrun": "run-by-torchrun"}
GOOD = {"jobs.doctor": (0, 3)}


def shown() -> list[str]:
    """The commands of all indented and fenced blocks, without the comments beside them."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    lines = [*re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE), *"".join(fenced).splitlines()]
    commands = [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines if line.strip()]
    return [command for command in commands if not re.match(r"\S+/\s{2,}\S", command)]


def smaller(command: Command) -> list[str]:
    """The command's arguments with those of SMALLER in their place."""
    wanted = dict(SMALLER[command.module])
    if command.launcher[0] in RUN_OF_ITS_OWN:
        wanted["--run"] = (RUN_OF_ITS_OWN[command.launcher[0]],)
    kept: list[str] = []
    replaced = False
    for word in command.arguments:
        replaced = word in wanted or (replaced and not word.startswith("--"))
        if not replaced:
            kept.append(word)
    return [*kept, *(word for option, values in wanted.items() for word in (option, *values))]


def named(word: str, folder: Path) -> str:
    """FOLDER/NAME.zarr as the image that was painted there."""
    where, name, _ = word.partition("/NAME.zarr")
    return str(next((folder / where).glob("*.zarr"))) if name else word


def launch(command: Command, arguments: list[str]) -> None:
    """Run a command under its launcher, with two ranks where the README has more."""
    launcher = [re.sub(r"^\d+$", "2", word) for word in command.launcher]
    program = str(Path(sys.executable).with_name(launcher[0]))
    words = [program, *launcher[1:], command.module, *arguments]
    done = subprocess.run(
        words, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


@pytest.fixture
def same_environment() -> Iterator[None]:
    """What training in this process adds to the environment is removed again."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("same_environment")
def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slides").mkdir()
    draw_slide(tmp_path / "slides" / "a.tif", height_px=768, width_px=768, mpp=0.5, seed=0)
    monkeypatch.chdir(tmp_path)
    used = set()
    for line in shown():
        if line in ELSEWHERE:
            used.add(line)
            continue
        command = take_apart(line)
        assert command is not None, f"nothing runs {line!r}; make a test run it, or explain"
        assert command.module in SMALLER, f"{line!r} is not run; say in SMALLER how it is small"
        arguments = [named(word, tmp_path) for word in smaller(command)]
        if command.launcher[0] == "python":
            code = importlib.import_module(command.module).main(arguments)
            assert code in GOOD.get(command.module, (0,)), line
        else:
            launch(command, arguments)
    assert used == set(ELSEWHERE)


def test_the_readme_shows_what_parses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there, not made smaller."""
    for line in shown():
        command = take_apart(line)
        if command is not None:
            assert parses(command, monkeypatch), f"{line}\n{capsys.readouterr().err}"


def test_every_option_that_the_readme_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for module, _ in STAGES.values():
        importlib.import_module(module).main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    prose = re.findall(r"`([^`\n]+)`", README)
    named = {option for text in prose for option in re.findall(r"--[a-z][a-z_-]*", text)}
    assert named and named <= known


def test_every_target_that_the_readme_names_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stages that its recipe runs take their options."""
    in_blocks = {line for line in ELSEWHERE if line.startswith("make ")}
    for line in sorted(set(re.findall(r"`(make \w[^`]*)`", README)) | in_blocks):
        words = [*shlex.split(line), "--dry-run", "--no-print-directory"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        recipes = done.stdout.replace("\\\n", " ")
        stages = re.findall(r"python (-m (?:pipeline|conditioning|jobs)\..*)", recipes)
        assert stages or line.split()[1] not in ("demo", "compare")
        for stage in stages:
            command = take_apart(f"python {stage}")
            assert command is not None and parses(command, monkeypatch), stage
