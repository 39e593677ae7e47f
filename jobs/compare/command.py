"""python -m jobs.compare: contestants on equal terms, from one store to their Crop FIDs.

All learn from one store under one encoder, one after the other so that each has the machine alone,
for the same CPU time; all paint the same regions, which none was trained on (those of test, then
of val, by whose error trainings choose among averages of their weights), with the same seeds and
at the same size; all are evaluated by the same protocol against all real crops of test and val.
What differs (presets, draws, options) stands in the file that describes the comparison.

Seed by seed, all contestants of one before the next, and the table is written after each: what was
finished is complete. Every stage is a command, printed first and recorded in OUT/stages.json: the
same command after a kill goes on where it was.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.compare.contest import Comparison, Contestant, read_comparison
from jobs.record import generated_by_others
from jobs.stages import Progress
from pipeline import console
from pipeline.packfile import PackSet
from pipeline.splits import beside_one_another
from pipeline.store import Region, Store

FREE_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Compare:
    """Train, paint and evaluate contestants on equal terms; the same command resumes.

        python -m jobs.compare docs/compare/two_cores.toml --out compare
        python -m jobs.compare docs/compare/two_cores.toml --out compare --slides slides/

    The file says what is shared (CPU minutes, seeds, images, sizes) and what each contestant has
    of its own.
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
    """Where things lie: shared ones, a folder for each contestant, and in it one for each seed.

    OUT/dataset.zarr, OUT/encoder, OUT/NAME/packs, OUT/NAME/seed-S/run, images, metrics.json and
    crops.npz.
    """

    out: Path

    @property
    def store(self) -> str:
        return str(self.out / "dataset.zarr")

    def packs(self, contestant: Contestant) -> str:
        return str(self.out / contestant.name / "packs")

    def of(self, contestant: Contestant, seed: int, part: str = "") -> str:
        return str(self.out / contestant.name / f"seed-{seed}" / part)


def _check_machine(comparison: Comparison) -> None:
    """A `ValueError` where trainings cannot be limited by CPU time."""
    import torch

    if torch.cuda.is_available():
        raise ValueError(
            f"cpu_minutes = {comparison.cpu_minutes:g} compares CPU time, but trainings would use "
            f"{torch.cuda.get_device_name(0)}; hide it (CUDA_VISIBLE_DEVICES=) to compare on CPUs"
        )


def compare(options: Compare) -> int:
    """Run the command; returns its exit code."""
    comparison = read_comparison(options.config)
    slides = list(options.slides or comparison.slides)
    names = [contestant.name for contestant in comparison.contestants]
    trained = len(names) * len(comparison.seeds) * comparison.cpu_minutes
    begun = (options.out / "dataset.zarr").is_dir()
    console.say_plan(
        f"compare: {' against '.join(names)} on {', '.join(slides) or 'a phantom slide'}: "
        f"{comparison.cpu_minutes:g} CPU minutes of training each, seeds "
        f"{', '.join(map(str, comparison.seeds))} ({trained:g} CPU minutes in all), "
        f"{comparison.images} regions that were held out, painted at "
        f"{comparison.size}x{comparison.size} px, evaluated by jobs.evaluate; -> {options.out}",
        options.out,
        0 if begun else FREE_BYTES,
    )
    progress = Progress(options.out / "stages.json", "comparison")
    claims = {"slides": sorted(slides), "cpu_minutes": comparison.cpu_minutes}
    for name, value in claims.items():
        progress.check_claim(name, value)
    _check_machine(comparison)
    for contestant in comparison.contestants:
        console.say(
            f"  {contestant.name}: --preset {contestant.preset}; pack "
            f"{' '.join(contestant.pack) or '-'}; train {' '.join(contestant.train) or '-'}; "
            f"sample {' '.join((*comparison.sample, *contestant.sample)) or '-'}"
        )
    if options.dry_run:
        return console.EXIT_DONE
    for name, value in claims.items():
        progress.claim(name, value)
    folders = Folders(options.out)
    encoder = _prepare(comparison, slides, folders, progress)
    regions = held_out(Store.open(Path(folders.store)).regions(), comparison.images)
    console.say(
        "compare: held out are regions " + ", ".join(f"{r.index} ({r.split})" for r in regions)
    )
    for contestant in comparison.contestants:
        packs = folders.packs(contestant)
        arguments = [folders.store, "--encoder", encoder, "--out", packs, *contestant.pack]
        progress.run("pipeline.pack", arguments, f"pack {contestant.name}", contestant.name)
    footprint = common_footprint(comparison, folders)
    for number, seed in enumerate(comparison.seeds):
        for contestant in comparison.contestants:
            stages = SeedStages(comparison, contestant, seed, folders, progress)
            stages.train()
            stages.paint(regions)
            stages.evaluate(footprint)
        _conclude(comparison, comparison.seeds[: number + 1], folders, regions)
    return progress.code


def held_out_apart(regions: Sequence[Region]) -> list[Region]:
    """Regions that were not trained on and do not overlap: those of test first, then of val; among
    them those that fit beside one another, then the fullest.
    """
    parts: dict[tuple[str, str], list[Region]] = {}
    for region in regions:
        if region.split != "train":
            parts.setdefault((region.image, region.split), []).append(region)
    fitting = {r.index for members in parts.values() for r in beside_one_another(members)}
    ranked = sorted(
        (region for members in parts.values() for region in members),
        key=lambda r: (r.split != "test", r.index not in fitting, -r.tissue, r.index),
    )
    chosen: list[Region] = []
    for region in ranked:
        apart = all(
            region.image != other.image
            or max(abs(region.y - other.y), abs(region.x - other.x)) >= region.side
            for other in chosen
        )
        if apart:
            chosen.append(region)
    return chosen


def held_out(regions: Sequence[Region], wanted: int) -> list[Region]:
    """So many of `held_out_apart`, in the order of the store."""
    chosen = held_out_apart(regions)[:wanted]
    if len(chosen) < wanted:
        raise ValueError(
            f"the store has {len(chosen)} regions apart that were not trained on and the "
            f"comparison wants {wanted}; ingest with a larger --held-out, smaller regions or more "
            "slides, or ask for fewer images"
        )
    return sorted(chosen, key=lambda region: region.index)


def common_footprint(comparison: Comparison, folders: Folders) -> int:
    """The finest tokens that condition every contestant; a `ValueError` where there are none."""
    read = {
        contestant.name: {
            footprint
            for footprint, _, _ in PackSet.open(Path(folders.packs(contestant))).settings.lattices
        }
        for contestant in comparison.contestants
    }
    common = set.intersection(*read.values())
    if not common:
        each = "; ".join(f"{name}: {sorted(found)}" for name, found in read.items())
        raise ValueError(
            f"no footprint of tokens conditions all contestants ({each} px), so that nothing says "
            "alike how each follows its condition; embed with a --footprint that all read"
        )
    return min(common)


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


@dataclass(frozen=True)
class SeedStages:
    """What one contestant does with one seed."""

    comparison: Comparison
    contestant: Contestant
    seed: int
    folders: Folders
    progress: Progress

    def _place(self, part: str) -> str:
        return self.folders.of(self.contestant, self.seed, part)

    def _name(self, stage: str) -> str:
        return f"{stage} {self.contestant.name} seed {self.seed}"

    def _run(self, module: str, arguments: Sequence[str], name: str) -> None:
        branch = f"{self.contestant.name}/seed {self.seed}"
        self.progress.run(module, arguments, name, branch)

    def train(self) -> None:
        name = self._name("train")
        arguments = [
            *(self.folders.packs(self.contestant), "--run", self._place("run")),
            *("--preset", self.contestant.preset, "--seed", str(self.seed)),
            *("--max-cpu-minutes", str(self.comparison.cpu_minutes), *self.contestant.train),
        ]
        self._run("jobs.train", arguments, name)

    def paint(self, regions: Sequence[Region]) -> None:
        images, name = self._place("images"), self._name("sample")
        arguments = [
            *(self._place("run"), "--condition", self.folders.store, "--out", images),
            *("--region", *(str(region.index) for region in regions), "--seed", str(self.seed)),
            *("--size", str(self.comparison.size), "--format", "zarr"),
            *(*self.comparison.sample, *self.contestant.sample),
        ]
        self.progress.check(name, arguments, "jobs.sample")
        changed = self.progress.has_changed(name, arguments, "jobs.sample")
        if changed or generated_by_others(Path(images), Path(self._place("run"))):
            shutil.rmtree(images, ignore_errors=True)
            self.progress.forget_after(name)
        self._run("jobs.sample", arguments, name)

    def evaluate(self, footprint_px: int) -> None:
        arguments = [
            *("--real", self.folders.store, "--generated", self._place("images")),
            *("--out", self._place("metrics.json"), "--keep", self._place("crops.npz")),
            *("--footprint", str(footprint_px), *self.comparison.evaluate),
        ]
        self._run("jobs.evaluate", arguments, self._name("evaluate"))


def _conclude(
    comparison: Comparison, seeds: Sequence[int], folders: Folders, regions: Sequence[Region]
) -> None:
    """Write and print the table of these seeds, and draw the picture of the first."""
    from jobs.compare.picture import draw_picture
    from jobs.compare.scoreboard import compare_pairs, hardware, read_score
    from jobs.compare.table import to_markdown

    contestants = comparison.contestants
    facts = {
        "hardware": hardware(),
        "cpu_minutes": comparison.cpu_minutes,
        "seeds": list(seeds),
        "regions": [{"index": region.index, "split": region.split} for region in regions],
        "size_px": comparison.size,
        "contestants": [
            read_score(one, [Path(folders.of(one, seed)) for seed in seeds], comparison)
            for one in contestants
        ],
        "pairs": compare_pairs(
            {
                one.name: [Path(folders.of(one, seed, "crops.npz")) for seed in seeds]
                for one in contestants
            }
        ),
    }
    console.write_json_atomic(folders.out / "compare.json", facts)
    table = to_markdown(json.loads(json.dumps(facts)))
    console.write_bytes_atomic(folders.out / "compare.md", table.encode())
    store = Store.open(Path(folders.store))
    painted = [Path(folders.of(one, seeds[0])) for one in contestants]
    draw_picture(folders.out / "compare.png", store, regions[0], painted, comparison.size)
    left = len(comparison.seeds) - len(seeds)
    console.say(
        f"\n{table}\ncompare: {'done' if not left else f'{left} more seeds to come'}, "
        f"{folders.out / 'compare.png'}, compare.md, compare.json"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Compare, compare, argv, prog="python -m jobs.compare")
