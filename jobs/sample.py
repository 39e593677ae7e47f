"""python -m jobs.sample: paint large images with a trained run, each after the tokens of a region,
or after a vector that the run's latent model draws (`jobs.subject`).

An image is painted tile by tile in fields on disk, written as OME-Zarr, then exported. A killed
command goes on with the step it was in, and images that are done are kept.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from conditioning.encoders import choose_device
from conditioning.layout import Fill
from jobs.painting import Recipe, paint, painting_seconds
from jobs.run import Run, RunConfig
from jobs.subject import RegionSubject, Subject, regions_for, subjects_without_condition
from model.config import DenoiserConfig
from model.family import Denoiser, make_painter
from model.generate import ArrayField
from model.lattice import at_level
from model.solver import make_solver
from pipeline import console
from pipeline.export import export_image
from pipeline.ome import OmeImage
from pipeline.plan import PYRAMID_FACTOR
from pipeline.store import UNITS, Store

SUFFIXES = {"ome-tiff": ".ome.tif", "tiff": ".tif", "cog": ".cog.tif"}
SCALES = {2.0**-level: level for level in range(-2, 4)}


@dataclass(frozen=True)
class Sample:
    """Paint images after the conditions of regions, or after none; the same command resumes.

        python -m jobs.sample run --condition dataset.zarr --out images
        python -m jobs.sample run --condition dataset.zarr --out images --region 5 --size 2048x4096
        python -m jobs.sample run --unconditional 4 --out images

    Each becomes an OME-Zarr image, and the files that --format names.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path
    """Folder of the images."""
    condition: Path | None = None
    """The dataset store whose regions condition the images; embedded by the run's encoder."""
    unconditional: int | None = None
    """Instead: so many images after no condition, of the seeds --seed and following; the run needs
    python -m jobs.latents first."""
    region: tuple[int, ...] = ()
    """Rows K of the store's region table; by default the first region that was not trained on."""
    size: str = "region"
    """Side in pixels, or HxW; by default the region's. A larger image continues its condition."""
    fill: Fill = "reflect"
    """What conditions the part of an image beyond its region: reflect mirrors the region's tokens,
    regions lays those of other regions beside it."""
    label: str | None = None
    """Class that the images are to be of, by its name; by default that of their region, if it has
    one."""
    scale: float = 1.0
    """Resolution of the painted image over the training's: 1, 0.5, 0.25, 0.125; 2 and 4 too where
    the run's noise is mollified (preset paper)."""
    steps: int = 20
    """Evaluations of the denoiser; guidance evaluates twice in each. Both papers took 50."""
    seed: int = 0
    """Another seed paints another image after the same condition."""
    guidance: float = 1.5
    """Classifier-free guidance; 1 is the condition alone, and twice as fast. Patch diffusion was
    published with 3."""
    solver: Literal["dpm++2m", "ddim", "ancestral"] = "dpm++2m"
    """How a step is taken: of second order, of first, or with fresh noise (which wants 100
    steps)."""
    eta: float | None = None
    """With --solver ddim: how much fresh noise a step adds, from 0 (none, the default) to 1
    (ancestral)."""
    tile: str = "auto"
    """Side of a tile in pixels, a multiple of the coarse cell; auto suits the device."""
    overlap: float | None = None
    """Patch diffusion only: how much of a window its neighbours overlap; by default 0.75, as
    published."""
    format: tuple[Literal["ome-tiff", "tiff", "cog", "zarr"], ...] = ("ome-tiff",)
    """What to write beside the OME-Zarr image."""
    share: str = "1/1"
    """K/N paints the K-th of N shares of the regions: several jobs paint side by side."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True)
class Plan:
    """A sample command, resolved: one recipe, several subjects."""

    config: RunConfig
    subjects: tuple[Subject, ...]
    recipe: Recipe
    size_px: tuple[int, int]
    tile: int
    device: torch.device


def make_plan(options: Sample) -> Plan:
    """Resolve the options against the run and the store."""
    config = Run(options.run).config()
    if options.scale not in SCALES:
        raise ValueError(f"--scale takes 4, 2, 1, 0.5, 0.25 or 0.125, not {options.scale:g}")
    _check_label(options.label, config)
    subjects = _share(options.share, _subjects(options, config))
    size_px = subjects[0].size_px
    level, coarse = SCALES[options.scale], config.denoiser.cell_px
    device = choose_device(options.device)
    overlap = config.denoiser.overlap(options.overlap, *size_px, level)
    make_solver(options.solver, options.eta)
    # The field is whole coarse cells; what lies beyond the asked size is painted and cut off.
    recipe = Recipe(
        at_level(-(-size_px[0] // coarse) * coarse, level),
        at_level(-(-size_px[1] // coarse) * coarse, level),
        options.steps,
        options.seed,
        options.guidance,
        options.solver,
        level,
        overlap,
        options.eta or None,
    )
    if options.steps < 1:
        raise ValueError(f"--steps takes a positive number, not {options.steps}")
    tile = _tile(options.tile, device, config.denoiser, level)
    return Plan(config, tuple(subjects), recipe, size_px, tile, device)


def _subjects(options: Sample, config: RunConfig) -> Sequence[Subject]:
    """What is to be painted after; a `ValueError` for options that contradict each other."""
    if options.unconditional is not None:
        if options.condition is not None or options.region:
            raise ValueError(
                "--unconditional paints after no region; leave --condition and --region out, or "
                "--unconditional"
            )
        size_px = _size(options.size, config.packs.side_px)
        run, number = Run(options.run), options.unconditional
        return subjects_without_condition(
            run, config, number, options.seed, size_px, options.label
        )
    if options.condition is None:
        raise ValueError(
            "--condition is missing: name the dataset store whose regions the images are painted "
            "after, or ask for --unconditional N images of a run with a latent model"
        )
    store = Store.open(options.condition)
    regions = regions_for(store, config, options.region)
    size_px = _size(options.size, regions[0].side)
    return [
        RegionSubject(store, config, region, options.seed, size_px, options.fill, options.label)
        for region in regions
    ]


def _check_label(label: str | None, config: RunConfig) -> None:
    """A `ValueError` for a class that the run does not know."""
    if label is None:
        return
    if not config.denoiser.classes:
        raise ValueError(
            f"--label {label} was asked for, but the run was trained without labels; ingest a CSV "
            "with a column label, pack and train again, or leave --label out"
        )
    if label not in config.packs.classes:
        raise ValueError(
            f"--label {label} is none of the run's classes, which are "
            f"{', '.join(config.packs.classes)}"
        )


def _size(text: str, side: int) -> tuple[int, int]:
    if text == "region":
        return side, side
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--size takes a side like 4096 or HxW like 4096x8192, not {text!r}")
    return int(parts[0]), int(parts[-1])


def _share(text: str, subjects: Sequence[Subject]) -> Sequence[Subject]:
    """Every N-th image from the K-th on."""
    number, slash, shares = text.partition("/")
    if not (slash and number.isdecimal() and shares.isdecimal() and int(number) >= 1):
        raise ValueError(f"--share takes K/N like 2/5, not {text!r}")
    if int(number) > int(shares):
        raise ValueError(f"--share {text} asks for more than the last of {shares} shares")
    if int(shares) > len(subjects):
        raise ValueError(
            f"--share {text} leaves shares without an image: there are {len(subjects)}; name more "
            "with --region (or --unconditional) or ask for fewer shares (SLURM: --array)"
        )
    return subjects[int(number) - 1 :: int(shares)]


def _tile(text: str, device: torch.device, denoiser: DenoiserConfig, level: int) -> int:
    if text == "auto":
        suits = denoiser.tile_px(device.type == "cuda")
        return max(suits, at_level(denoiser.cell_px, level))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--tile takes auto or a side in pixels, not {text!r}")
    return int(text)


def sample(options: Sample) -> int:
    """Run the command; returns its exit code."""
    plan = make_plan(options)
    recipe, channels = plan.recipe, len(plan.config.packs.bands)
    fields = 4 if recipe.make_solver().remembers else 2
    work_bytes = 4 * fields * channels * recipe.height * recipe.width
    console.say_plan(
        f"sample: {len(plan.subjects)} images of {plan.size_px[0]}x{plan.size_px[1]} px at scale "
        f"{options.scale:g}, {recipe.steps} steps of {recipe.solver}"
        + ("" if recipe.eta is None else f" with eta {recipe.eta:g}")
        + f", guidance {recipe.guidance:g}, tiles of {plan.tile} on {plan.device}"
        + ("" if recipe.overlap is None else f", windows overlapping by {recipe.overlap:g}"),
        options.out,
        _needed_bytes(options, plan, work_bytes),
    )
    if options.dry_run:
        return console.EXIT_DONE
    run = Run(options.run)
    denoiser = run.load_denoiser(device=plan.device)
    for subject in plan.subjects:
        name = subject.name
        identity = _identity(run, plan, subject)
        record = options.out / f"{name}.json"
        if record.is_file():
            _check_same(record, identity)
            console.say(f"sample: {name} is already done")
        else:
            if words := subject.in_words():
                console.say(f"sample: {words}")
            cost = _paint(options, denoiser, plan, subject, identity)
            console.write_json_atomic(
                record, {"image": f"{name}.zarr", "identity": identity, **cost}
            )
        for kind in options.format:
            if kind != "zarr":
                target = options.out / f"{name}{SUFFIXES[kind]}"
                export_image(options.out / f"{name}.zarr", target, format=kind)
        shutil.rmtree(options.out / f".work-{name}", ignore_errors=True)
    console.say(f"sample: done, {options.out}")
    return console.EXIT_DONE


def _needed_bytes(options: Sample, plan: Plan, work_bytes: int) -> int:
    """Most that the images not yet painted take: pixels, exports, the fields of one painting."""
    names = [subject.name for subject in plan.subjects]
    todo = [name for name in names if not (options.out / f"{name}.json").is_file()]
    packs = plan.config.packs
    values = len(packs.bands) * plan.recipe.height * plan.recipe.width
    pixel_bytes = int(PYRAMID_FACTOR * np.dtype(packs.dtype).itemsize * values)
    files = 1 + sum({"zarr": 0, "cog": 2}.get(kind, 1) for kind in options.format)
    there = sum(
        _disk_bytes(options.out / f"{prefix}{name}{suffix}")
        for name in todo
        for prefix, suffix in ((".work-", ""), ("", ".zarr"))
    )
    return max(len(todo) * files * pixel_bytes + (work_bytes if todo else 0) - there, 0)


def _disk_bytes(folder: Path) -> int:
    """What a folder takes on its disk; 0 where there is none."""
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def _identity(run: Run, plan: Plan, subject: Subject) -> dict[str, Any]:
    """Everything that an image follows from; another value makes another image."""
    state = run.state()
    return {
        "run": str(run.path.resolve()),
        "checkpoint": state.checkpoint if state else None,
        "recipe": replace(plan.recipe, seed=subject.seed).to_json(),
        "size_px": list(plan.size_px),
        **subject.identity(),
    }


def _check_same(record: Path, identity: dict[str, Any]) -> None:
    there = json.loads(record.read_text())["identity"]
    for name, value in identity.items():
        if there.get(name) != value:
            raise ValueError(
                f"{record.with_suffix('')} was painted with {name} = {there.get(name)}, this "
                f"command asks for {value}; choose another --out or --seed"
            )


def _paint(
    options: Sample, denoiser: Denoiser, plan: Plan, subject: Subject, identity: dict[str, Any]
) -> dict[str, float]:
    """Paint one image and write it as OME-Zarr; what that cost."""
    _forget_peak_memory()
    name, recipe = subject.name, replace(plan.recipe, seed=subject.seed)
    work = options.out / f".work-{name}"
    begun = work / "identity.json"
    if not begun.is_file() or json.loads(begun.read_text()) != identity:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(options.out / f"{name}.zarr", ignore_errors=True)
        console.write_json_atomic(begun, identity)
    painter = make_painter(
        denoiser,
        subject.condition().to(plan.device),
        guidance=options.guidance,
        tile=plan.tile,
        level=recipe.level,
        overlap=recipe.overlap,
        sampling=plan.config.packs.sampling(),
    )
    cells = recipe.height * recipe.width
    with console.counter(total=cells * recipe.steps, desc=f"sample {name}") as count:
        field = paint(denoiser, painter, recipe, work, lambda step, n: count(step * cells, n))
    painted = time.monotonic()
    attributes = {**subject.place(2.0**recipe.level), "gigabrush": identity}
    _write_image(plan, field, options.out / f"{name}.zarr", attributes)
    return {
        "seconds": round(painting_seconds(work) + time.monotonic() - painted, 1),
        "peak_memory_gb": round(_peak_memory_bytes() / 1e9, 2),
    }


def _forget_peak_memory() -> None:
    """Begin a new peak: this process may have trained before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> int:
    """The most that was resident since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def _write_image(plan: Plan, field: ArrayField, path: Path, attributes: dict[str, Any]) -> None:
    """The painted field as an OME-Zarr image of the store's dtype, shard by shard."""
    packs, level = plan.config.packs, plan.recipe.level
    height, width = (at_level(extent, level) for extent in plan.size_px)
    image = OmeImage.create(
        path,
        (len(packs.bands), height, width),
        packs.dtype,
        packs.spacing * 2.0**level,
        UNITS[packs.unit],
        packs.bands,
        attributes,
    )
    limit = np.iinfo(packs.dtype).max
    for key in image.shard_keys():
        if image.has_shard(key):
            continue
        y, x, rows, columns = image.shard_box(key)
        painted = field.array[:, y : y + rows, x : x + columns].transpose(1, 2, 0)
        pixels = plan.config.statistics.to_pixels(painted)
        rounded = np.clip(np.rint(pixels), 0, limit).astype(packs.dtype)
        image.write_shard(key, rounded.transpose(2, 0, 1))
    image.finish()


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Sample, sample, argv, prog="python -m jobs.sample")


if __name__ == "__main__":
    raise SystemExit(main())
