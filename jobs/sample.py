"""python -m jobs.sample: paint large images with a trained run, each after the tokens of a region.

An image is painted tile by tile in fields on disk, written as OME-Zarr, then exported. A killed
command goes on with the step it was in, and images that are done are kept.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from conditioning.encoders import choose_device
from conditioning.layout import Fill, condition_of, in_words, lay_out
from conditioning.tokens import from_store, to_condition, with_labels
from jobs.painting import SOLVERS, Recipe, paint, painting_seconds
from jobs.run import Run, RunConfig
from model.config import DenoiserConfig
from model.family import Denoiser, make_painter
from model.generate import ArrayField
from pipeline import console
from pipeline.export import export_image
from pipeline.ome import OmeImage
from pipeline.plan import PYRAMID_FACTOR
from pipeline.store import UNITS, Region, Store

SUFFIXES = {"ome-tiff": ".ome.tif", "tiff": ".tif", "cog": ".cog.tif"}
SCALES = {2.0**-level: level for level in range(4)}


@dataclass(frozen=True)
class Sample:
    """Paint images after the conditions of regions; the same command resumes.

        python -m jobs.sample run --condition dataset.zarr --out images
        python -m jobs.sample run --condition dataset.zarr --out images --region 0 5 --seed 7
        python -m jobs.sample run --condition dataset.zarr --out images --size 4096x8192

    Each becomes an OME-Zarr image, and the files that --format names.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    condition: Path
    """The dataset store whose regions condition the images; embedded by the run's encoder."""
    out: Path
    """Folder of the images."""
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
    """Resolution of the painted image over the training's: 1, 0.5, 0.25 or 0.125."""
    steps: int = 20
    """Evaluations of the denoiser; guidance evaluates twice in each. Both papers took 50."""
    seed: int = 0
    """Another seed paints another image after the same condition."""
    guidance: float = 1.5
    """Classifier-free guidance; 1 is the condition alone, and twice as fast. Patch diffusion was
    published with 3."""
    solver: Literal["dpm++2m", "ddim"] = "dpm++2m"
    """How a step is taken: of second order, or of first."""
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
    """A sample command, resolved: one recipe, several regions."""

    config: RunConfig
    regions: tuple[Region, ...]
    recipe: Recipe
    size_px: tuple[int, int]
    tile: int
    device: torch.device


def make_plan(options: Sample, store: Store) -> Plan:
    """Resolve the options against the run and the store."""
    config = Run(options.run).config()
    spec = store.spec
    if (spec.unit, spec.spacing, spec.bands) != (
        config.packs.unit,
        config.packs.spacing,
        config.packs.bands,
    ):
        raise ValueError(
            f"{options.condition} holds {','.join(spec.bands)} at {spec.spacing:g} {spec.unit}, "
            f"the run was trained on {','.join(config.packs.bands)} at "
            f"{config.packs.spacing:g} {config.packs.unit}; ingest again to match"
        )
    if options.scale not in SCALES:
        raise ValueError(f"--scale takes 1, 0.5, 0.25 or 0.125, not {options.scale:g}")
    _check_label(options.label, config)
    regions = store.regions()
    unknown = [k for k in options.region if not 0 <= k < len(regions)]
    if unknown:
        raise ValueError(
            f"--region {unknown[0]} does not exist; {options.condition} has regions 0 to "
            f"{len(regions) - 1}"
        )
    chosen = [regions[k] for k in options.region]
    if not chosen:
        chosen = [min(regions, key=lambda region: (region.split == "train", region.index))]
    height, width = _size(options.size, chosen[0].side)
    chosen = _share(options.share, chosen)
    level, coarse = SCALES[options.scale], config.denoiser.cell_px
    device = choose_device(options.device)
    overlap = config.denoiser.overlap(options.overlap, height, width, level)
    # The field is whole coarse cells; what lies beyond the asked size is painted and cut off.
    recipe = Recipe(
        -(-height // coarse) * coarse >> level,
        -(-width // coarse) * coarse >> level,
        options.steps,
        options.seed,
        options.guidance,
        options.solver,
        level,
        overlap,
    )
    if options.steps < 1:
        raise ValueError(f"--steps takes a positive number, not {options.steps}")
    tile = _tile(options.tile, device, config.denoiser)
    return Plan(config, tuple(chosen), recipe, (height, width), tile, device)


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


def _label(options: Sample, store: Store, plan: Plan, region: Region) -> str | None:
    """The class that an image is painted as; None where the run knows none for it."""
    label = options.label or store.classes().get(region.image)
    return label if label in plan.config.packs.classes else None


def _size(text: str, side: int) -> tuple[int, int]:
    if text == "region":
        return side, side
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--size takes a side like 4096 or HxW like 4096x8192, not {text!r}")
    return int(parts[0]), int(parts[-1])


def _share(text: str, regions: list[Region]) -> list[Region]:
    """Every N-th region from the K-th on."""
    number, slash, shares = text.partition("/")
    if not (slash and number.isdecimal() and shares.isdecimal() and int(number) >= 1):
        raise ValueError(f"--share takes K/N like 2/5, not {text!r}")
    if int(number) > int(shares):
        raise ValueError(f"--share {text} asks for more than the last of {shares} shares")
    if int(shares) > len(regions):
        raise ValueError(
            f"--share {text} leaves shares without a region: there are {len(regions)}; name more "
            "with --region or ask for fewer shares (SLURM: --array)"
        )
    return regions[int(number) - 1 :: int(shares)]


def _tile(text: str, device: torch.device, denoiser: DenoiserConfig) -> int:
    if text == "auto":
        return denoiser.tile_px(device.type == "cuda")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--tile takes auto or a side in pixels, not {text!r}")
    return int(text)


def sample(options: Sample) -> int:
    """Run the command; returns its exit code."""
    store = Store.open(options.condition)
    plan = make_plan(options, store)
    recipe, channels = plan.recipe, len(plan.config.packs.bands)
    fields = 4 if SOLVERS[options.solver].remembers else 2
    work_bytes = 4 * fields * channels * recipe.height * recipe.width
    console.say_plan(
        f"sample: {len(plan.regions)} images of {plan.size_px[0]}x{plan.size_px[1]} px at scale "
        f"{options.scale:g}, {recipe.steps} steps of {recipe.solver}, guidance "
        f"{recipe.guidance:g}, tiles of {plan.tile} on {plan.device}"
        + ("" if recipe.overlap is None else f", windows overlapping by {recipe.overlap:g}"),
        options.out,
        _needed_bytes(options, plan, work_bytes),
    )
    if options.dry_run:
        return console.EXIT_DONE
    run = Run(options.run)
    denoiser = run.load_denoiser(device=plan.device)
    for region in plan.regions:
        name = _name(options, region)
        identity = _identity(options, run, store, plan, region)
        record = options.out / f"{name}.json"
        if record.is_file():
            _check_same(record, identity)
            console.say(f"sample: {name} is already done")
        else:
            layout = _layout(options, store, plan, region)
            if continued := in_words(layout, plan.size_px):
                console.say(f"sample: region {region.index}: {continued}")
            cost = _paint(options, store, denoiser, plan, region, name, identity)
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


def _name(options: Sample, region: Region) -> str:
    return f"{region.image}_region{region.index}_seed{options.seed}"


def _needed_bytes(options: Sample, plan: Plan, work_bytes: int) -> int:
    """Most that the images not yet painted take: pixels, exports, the fields of one painting."""
    todo = [r for r in plan.regions if not (options.out / f"{_name(options, r)}.json").is_file()]
    packs = plan.config.packs
    values = len(packs.bands) * plan.recipe.height * plan.recipe.width
    pixel_bytes = int(PYRAMID_FACTOR * np.dtype(packs.dtype).itemsize * values)
    files = 1 + sum({"zarr": 0, "cog": 2}.get(kind, 1) for kind in options.format)
    there = sum(
        _disk_bytes(options.out / f"{prefix}{_name(options, r)}{suffix}")
        for r in todo
        for prefix, suffix in ((".work-", ""), ("", ".zarr"))
    )
    return max(len(todo) * files * pixel_bytes + (work_bytes if todo else 0) - there, 0)


def _disk_bytes(folder: Path) -> int:
    """What a folder takes on its disk; 0 where there is none."""
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def _identity(
    options: Sample, run: Run, store: Store, plan: Plan, region: Region
) -> dict[str, Any]:
    """Everything that an image follows from; another value makes another image."""
    state = run.state()
    return {
        "run": str(run.path.resolve()),
        "checkpoint": state.checkpoint if state else None,
        "store_fingerprint": store.fingerprint(),
        "region": asdict(region),
        "recipe": plan.recipe.to_json(),
        "size_px": list(plan.size_px),
        "label": _label(options, store, plan, region),
        "layout": [[r.index for r in row] for row in _layout(options, store, plan, region)],
    }


def _layout(options: Sample, store: Store, plan: Plan, region: Region) -> list[list[Region]]:
    return lay_out(store.regions(), region, plan.size_px, options.fill, options.seed)


def _check_same(record: Path, identity: dict[str, Any]) -> None:
    there = json.loads(record.read_text())["identity"]
    for name, value in identity.items():
        if there.get(name) != value:
            raise ValueError(
                f"{record.with_suffix('')} was painted with {name} = {there.get(name)}, this "
                f"command asks for {value}; choose another --out or --seed"
            )


def _paint(
    options: Sample,
    store: Store,
    denoiser: Denoiser,
    plan: Plan,
    region: Region,
    name: str,
    identity: dict[str, Any],
) -> dict[str, float]:
    """Paint one image and write it as OME-Zarr; what that cost."""
    _forget_peak_memory()
    recipe = plan.recipe
    work = options.out / f".work-{name}"
    begun = work / "identity.json"
    if not begun.is_file() or json.loads(begun.read_text()) != identity:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(options.out / f"{name}.zarr", ignore_errors=True)
        console.write_json_atomic(begun, identity)
    layout = _layout(options, store, plan, region)
    lattices = condition_of(partial(from_store, store, plan.config.packs), layout, plan.size_px)
    condition = to_condition([lattices], plan.config.token_scale(), [True])
    label = _label(options, store, plan, region)
    condition = with_labels(condition, plan.config.packs.classes, [label], [True])
    painter = make_painter(
        denoiser,
        condition.to(plan.device),
        guidance=options.guidance,
        tile=plan.tile,
        level=recipe.level,
        overlap=recipe.overlap,
    )
    cells = recipe.height * recipe.width
    with console.counter(total=cells * recipe.steps, desc=f"sample {name}") as count:
        field = paint(denoiser, painter, recipe, work, lambda step, n: count(step * cells, n))
    painted = time.monotonic()
    attributes = {**_place(store, region, 2**recipe.level), "gigabrush": identity}
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


def _place(store: Store, region: Region, scale: int) -> dict[str, Any]:
    """The region's place on the ground, for an image whose pixels are `scale` times as large."""
    attributes = store.image(region.image).attributes
    if "spatial:transform" not in attributes:
        return {}
    a, b, c, d, e, f = attributes["spatial:transform"]
    corner = (c + a * region.x + b * region.y, f + d * region.x + e * region.y)
    transform = [a * scale, b * scale, corner[0], d * scale, e * scale, corner[1]]
    kept: dict[str, Any] = {
        key: attributes[key] for key in ("proj:code", "proj:wkt2") if key in attributes
    }
    return {**kept, "spatial:transform": transform}


def _write_image(plan: Plan, field: ArrayField, path: Path, attributes: dict[str, Any]) -> None:
    """The painted field as an OME-Zarr image of the store's dtype, shard by shard."""
    packs, level = plan.config.packs, plan.recipe.level
    height, width = (-(-extent >> level) for extent in plan.size_px)
    image = OmeImage.create(
        path,
        (len(packs.bands), height, width),
        packs.dtype,
        packs.spacing * 2**level,
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
