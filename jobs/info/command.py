"""python -m jobs.info: what a path of this project is, in a few lines.

Nothing is loaded but the few files in which stores, packs, runs, encoders and images describe
themselves, so that it answers within seconds, also on a node without torch and while a job is
writing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from conditioning.card import CARD_NAME
from jobs.info.describe import (
    Summary,
    describe_encoder,
    describe_image,
    describe_packs,
    describe_run,
    describe_store,
)
from jobs.record import CONFIG_NAME
from pipeline import console
from pipeline.packfile import INDEX_NAME, PLAN_NAME

LABEL_WIDTH = 12
MOST_INSIDE = 8


@dataclass(frozen=True)
class Info:
    """Say what a store, a run, packs, an encoder or an OME-Zarr image holds.

        python -m jobs.info dataset.zarr
        python -m jobs.info run --json
        python -m jobs.info images/NAME.zarr

    It reads and never writes, so it can be asked while a job is at work there.
    """

    path: Positional[Path]
    """Folder of a store, a run, packs, an encoder or an image."""
    json: bool = False
    """Print JSON, for programs."""


def recognise(path: Path) -> Callable[[Path], Summary] | None:
    """What describes `path`; None where nothing does."""
    attributes = _zarr_attributes(path)
    if "ome" in attributes:
        return describe_image
    if "schema" in attributes.get("gigabrush", {}):
        return describe_store
    if (path / INDEX_NAME).is_file() or (path / PLAN_NAME).is_file():
        return describe_packs
    if (path / CARD_NAME).is_file():
        return describe_encoder
    return describe_run if (path / CONFIG_NAME).is_file() else None


def info(options: Info) -> int:
    """Run the command; returns its exit code."""
    describe = recognise(options.path)
    if describe is None:
        raise ValueError(_refusal(options.path))
    summary = describe(options.path)
    if options.json:
        facts = {"kind": summary.kind, "path": str(summary.path), **summary.facts}
        console.say(json.dumps(facts, indent=2))
        return console.EXIT_DONE
    console.say(f"{summary.path}: {summary.kind}")
    for label, text in summary.lines:
        first, *others = text.split("\n")
        console.say(f"  {label:<{LABEL_WIDTH}}{first}")
        for other in others:
            console.say(f"  {'':<{LABEL_WIDTH}}{other}")
    return console.EXIT_DONE


def _zarr_attributes(path: Path) -> dict[str, Any]:
    file = path / "zarr.json"
    return json.loads(file.read_text()).get("attributes", {}) if file.is_file() else {}


def _refusal(path: Path) -> str:
    """What was looked for, and what of it lies one folder deeper."""
    if not path.exists():
        return f"{path} does not exist; name a store, a run, packs, an encoder or an image.zarr"
    inside = [p.name for p in sorted(path.iterdir()) if recognise(p)] if path.is_dir() else []
    looked = (
        f"{path} is neither a store nor an image (zarr.json), packs ({INDEX_NAME}), "
        f"a finished encoder ({CARD_NAME}) or a run ({CONFIG_NAME})"
    )
    if not inside:
        return looked
    more = " and more" if len(inside) > MOST_INSIDE else ""
    return f"{looked}; it contains {', '.join(inside[:MOST_INSIDE])}{more}, name one of them"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return console.run(Info, info, argv, prog="python -m jobs.info")
