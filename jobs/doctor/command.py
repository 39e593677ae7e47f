"""python -m jobs.doctor: whether the chain can run on this machine, and what else it could use."""

import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from jobs.doctor.machine import DISTRIBUTION, Item, examine
from jobs.record import commit
from pipeline import console

NAME_WIDTH = 34


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has, what is missing, what for, and how to get it.

        python -m jobs.doctor
        python -m jobs.doctor --folder /scratch
        python -m jobs.doctor --json

    ok: it is here. missing: the chain from slides to images needs it; the exit code is 3. absent:
    only what is named beside it needs it. Nothing is changed and nothing is fetched.
    """

    folder: Path = Path(".")
    """Where you would work; its disk is looked at."""
    json: bool = False
    """Print JSON, for programs."""


def doctor(options: Doctor) -> int:
    """Run the command; returns its exit code."""
    if not options.folder.is_dir():
        raise ValueError(f"--folder {options.folder} is not a folder; name one that exists")
    items = list(examine(options.folder))
    counts = Counter(item.state for item in items)
    can_run = counts["missing"] == 0
    if options.json:
        content = {
            "version": version(),
            "commit": commit(),
            "can_run": can_run,
            "items": [asdict(item) for item in items],
        }
        console.say(json.dumps(content, indent=2))
        return console.EXIT_DONE if can_run else console.EXIT_PARTIAL
    console.say(f"{DISTRIBUTION} {version()}, commit {commit()}")
    for section, members in groupby(items, lambda item: item.section):
        console.say(f"\n{section}")
        for item in members:
            console.say(f"  {item.state:<9}{item.name:<{NAME_WIDTH}}{_describe(item)}")
    console.say(
        f"\n{counts['ok']} ok, {counts['missing']} missing, {counts['absent']} absent: "
        + (
            "the chain from slides to images can run here; try make demo"
            if can_run
            else "the chain from slides to images cannot run here before what is missing is"
        )
    )
    return console.EXIT_DONE if can_run else console.EXIT_PARTIAL


def version() -> str:
    """The installed version, or a sentence that there is none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _describe(item: Item) -> str:
    if item.state == "ok":
        return item.found
    return f"{item.found}; for {item.purpose}; get it: {item.remedy}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return console.run(Doctor, doctor, argv, prog="python -m jobs.doctor")
