"""python -m jobs.compare: contestants on equal terms, from one store to their Crop FIDs.

All learn from one store under one encoder, one after the other so that each has the machine alone,
for the same wall time; all paint the same regions, which none was trained on, with the same seed
and at the same size; all are evaluated by the same protocol. What differs (presets, draws,
options) stands in the file that describes the comparison. Every stage is a command, printed first
and recorded in OUT/stages.json: the same command after a kill goes on where it was.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.compare.contest import Comparison, Contestant, read_comparison
from jobs.stages import Progress
from pipeline import console
from pipeline.store import Region, Store

FREE_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Compare:
    """Train, paint and evaluate contestants on equal terms; the same command resumes.

        python -m jobs.compare docs/compare/two_cores.toml --out compare
        python -m jobs.compare docs/compare/two_cores.toml --out compare --slides slides/

    The file says what is shared (minutes, images, sizes) and what each contestant has of its own.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """The TOML file that describes the comparison; docs/compare has some."""
    out: Path
    """Folder of everything that the comparison makes."""
    slides: tuple[str, ...] = ()
    """Slides, GeoTIFFs or folders, instead of those of the file."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True)
class Folders:
    """Where things lie: shared ones, and a folder for each contestant."""

    out: Path

    @property
    def store(self) -> str:
        return str(self.out / "dataset.zarr")

    def of(self, contestant: Contestant, part: str) -> str:
        return str(self.out / contestant.name / part)


def compare(options: Compare) -> int:
    """Run the command; returns its exit code."""
    comparison = read_comparison(options.config)
    slides = list(options.slides or comparison.slides)
    names = [contestant.name for contestant in comparison.contestants]
    trained = len(names) * comparison.minutes
    begun = (options.out / "dataset.zarr").is_dir()
    console.say_plan(
        f"compare: {' against '.join(names)} on {', '.join(slides) or 'a phantom slide'}: "
        f"{comparison.minutes:g} minutes of training each ({trained:g} in all), "
        f"{comparison.images} regions that were held out, painted at "
        f"{comparison.size}x{comparison.size} px, evaluated by jobs.evaluate; -> {options.out}",
        options.out,
        0 if begun else FREE_BYTES,
    )
    for contestant in comparison.contestants:
        console.say(
            f"  {contestant.name}: --preset {contestant.preset}; pack "
            f"{' '.join(contestant.pack) or '-'}; train {' '.join(contestant.train) or '-'}; "
            f"sample {' '.join((*comparison.sample, *contestant.sample)) or '-'}"
        )
    if options.dry_run:
        return console.EXIT_DONE
    progress = Progress(options.out / "stages.json", "comparison")
    progress.claim("slides", sorted(slides))
    folders = Folders(options.out)
    encoder = _prepare(comparison, slides, folders, progress)
    regions = held_out(Store.open(Path(folders.store)).regions(), comparison.images)
    console.say(f"compare: held out are regions {', '.join(str(r.index) for r in regions)}")
    for contestant in comparison.contestants:
        progress.run(
            "pipeline.pack",
            [
                *(folders.store, "--encoder", encoder, "--out", folders.of(contestant, "packs")),
                *contestant.pack,
            ],
            f"pack {contestant.name}",
        )
    for contestant in comparison.contestants:
        _train(comparison, contestant, folders, progress)
    code = console.EXIT_DONE
    for contestant in comparison.contestants:
        code = max(code, _paint_and_evaluate(comparison, contestant, folders, regions, progress))
    _conclude(comparison, folders, regions)
    return code


def held_out(regions: Sequence[Region], wanted: int) -> list[Region]:
    """The `wanted` fullest regions that were not trained on and do not overlap."""
    chosen: list[Region] = []
    for region in sorted(regions, key=lambda r: (r.split == "train", -r.tissue, r.index)):
        apart = all(
            region.image != other.image
            or max(abs(region.y - other.y), abs(region.x - other.x)) >= region.side
            for other in chosen
        )
        if region.split != "train" and apart and len(chosen) < wanted:
            chosen.append(region)
    if len(chosen) < wanted:
        raise ValueError(
            f"the store has {len(chosen)} regions apart that were not trained on and the "
            f"comparison wants {wanted}; ingest smaller regions or more slides, or ask for fewer "
            "images"
        )
    return sorted(chosen, key=lambda region: region.index)


def _prepare(
    comparison: Comparison, slides: list[str], folders: Folders, progress: Progress
) -> str:
    """The shared store, embedded; returns the encoder's name."""
    if not slides:
        slides = [str(folders.out / "phantom.tif")]
        progress.run("pipeline.phantom", ["slide", "--out", slides[0]])
    progress.run("pipeline.ingest", [*slides, "--out", folders.store, *comparison.ingest])
    encoder = comparison.encoder
    if encoder is None:
        encoder = str(folders.out / "encoder")
        arguments = [folders.store, "--out", encoder, *comparison.pretrain]
        progress.run("conditioning.pretrain", arguments)
    progress.run("conditioning.embed", [folders.store, "--encoder", encoder, *comparison.embed])
    return encoder


def _train(
    comparison: Comparison, contestant: Contestant, folders: Folders, progress: Progress
) -> None:
    name = f"train {contestant.name}"
    arguments = [
        *(folders.of(contestant, "packs"), "--run", folders.of(contestant, "run")),
        *("--preset", contestant.preset, "--max-minutes", str(comparison.minutes)),
        *contestant.train,
    ]
    if not progress.is_done(name, arguments, "jobs.train"):
        progress.forget_after(name)
        shutil.rmtree(folders.of(contestant, "images"), ignore_errors=True)  # by other weights
    progress.run("jobs.train", arguments, name)


def _paint_and_evaluate(
    comparison: Comparison,
    contestant: Contestant,
    folders: Folders,
    regions: Sequence[Region],
    progress: Progress,
) -> int:
    images, name = folders.of(contestant, "images"), f"sample {contestant.name}"
    arguments = [
        *(folders.of(contestant, "run"), "--condition", folders.store, "--out", images),
        *("--region", *(str(region.index) for region in regions)),
        *("--size", str(comparison.size), "--format", "zarr"),
        *(*comparison.sample, *contestant.sample),
    ]
    if progress.has_changed(name, arguments, "jobs.sample"):
        shutil.rmtree(images, ignore_errors=True)
    progress.run("jobs.sample", arguments, name)
    return progress.run(
        "jobs.evaluate",
        [
            *("--real", folders.store, "--generated", images),
            *("--out", folders.of(contestant, "metrics.json"), *comparison.evaluate),
        ],
        f"evaluate {contestant.name}",
    )


def _conclude(comparison: Comparison, folders: Folders, regions: Sequence[Region]) -> None:
    """Write and print the table, and draw the picture."""
    from jobs.compare.scoreboard import draw_picture, hardware, read_score, to_markdown

    scores = [
        read_score(contestant, folders.out / contestant.name, comparison)
        for contestant in comparison.contestants
    ]
    facts = {
        "hardware": hardware(),
        "minutes": comparison.minutes,
        "regions": [region.index for region in regions],
        "size_px": comparison.size,
        "contestants": scores,
    }
    console.write_json_atomic(folders.out / "compare.json", facts)
    table = to_markdown(json.loads(json.dumps(facts)))
    console.write_bytes_atomic(folders.out / "compare.md", table.encode())
    store = Store.open(Path(folders.store))
    painted = [Path(folders.of(contestant, "")) for contestant in comparison.contestants]
    draw_picture(folders.out / "compare.png", store, regions[0], painted, comparison.size)
    console.say(
        f"\n{table}\ncompare: done, {folders.out / 'compare.png'}, compare.md, compare.json"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Compare, compare, argv, prog="python -m jobs.compare")
