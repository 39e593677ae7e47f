"""python -m jobs.sample: paint large images with a trained run, each after the tokens of a region,
or after a vector that the run's latent model draws (`jobs.subject`), and under what is given of it
(`jobs.sample.given`).

An image is painted tile by tile in fields on disk, written as OME-Zarr, then exported. A killed
command goes on with the step it was in, and images that are done are kept.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.painting import paint, painting_seconds, work_of
from jobs.run import Run
from jobs.sample.options import Sample
from jobs.sample.plan import Plan, make_plan
from jobs.subject import Subject
from model.family import Denoiser, generated_level, make_passes, mollifier_of
from model.generate import ArrayField
from model.lattice import at_level
from pipeline import console
from pipeline.export import export_image
from pipeline.ome import OmeImage
from pipeline.plan import PYRAMID_FACTOR
from pipeline.store import UNITS

SUFFIXES = {"ome-tiff": ".ome.tif", "tiff": ".tif", "cog": ".cog.tif"}


def sample(options: Sample) -> int:
    """Run the command; returns its exit code."""
    plan = make_plan(options)
    recipe, channels = plan.recipe, len(plan.config.packs.bands)
    fields = 4 if recipe.make_solver().remembers else 2
    finer = max(recipe.level - generated_level(plan.config.denoiser, recipe.level), 0)
    cells = recipe.height * recipe.width << 2 * finer
    # Coarser passes take a fifteenth of the finest, and means of it no more than one field.
    work_bytes = 4 * channels * (fields * cells * 16 // 15 + (cells >> 2 if finer else 0))
    console.say_plan(
        f"sample: {len(plan.subjects)} images of {plan.size_px[0]}x{plan.size_px[1]} px at scale "
        f"{options.scale:g}, "
        + ("" if recipe.steps is None else f"{recipe.steps} steps of ")
        + recipe.solver
        + ("" if recipe.eta is None else f" with eta {recipe.eta:g}")
        + f", guidance {recipe.guidance:g}"
        + ("" if recipe.autoguidance is None else f", autoguidance {recipe.autoguidance:g}")
        + f", tiles of {plan.tile} on {plan.device}"
        + ("" if recipe.overlap is None else f", windows overlapping by {recipe.overlap:g}")
        + ("" if plan.given is None else f", {plan.given.in_words()}"),
        options.out,
        _needed_bytes(options, plan, work_bytes),
    )
    if options.dry_run:
        return console.EXIT_DONE
    run = Run(options.run)
    denoiser = run.load_denoiser(device=plan.device)
    early = run.load_early(device=plan.device) if plan.is_autoguided else None
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
            cost = _paint(options, denoiser, early, plan, subject, identity)
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
        "given": plan.given.identity() if plan.given else None,
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
    options: Sample,
    denoiser: Denoiser,
    early: Denoiser | None,
    plan: Plan,
    subject: Subject,
    identity: dict[str, Any],
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
    passes = make_passes(
        denoiser,
        subject.condition().to(plan.device),
        guidance=options.guidance,
        tile=plan.tile,
        level=recipe.level,
        steps=recipe.steps,
        overlap=recipe.overlap,
        sampling=plan.config.packs.sampling(),
        values=plan.config.value_range(),
        early=early,
        autoguidance=recipe.autoguidance,
    )
    total = sum(work_of(trajectory, recipe) for trajectory in passes)
    with console.counter(total=total, desc=f"sample {name}") as count:
        field = paint(
            passes,
            recipe,
            channels=denoiser.config.channels,
            mollifier_sigma_px=mollifier_of(denoiser),
            work=work,
            report=count,
            edit=plan.given.edit if plan.given else None,
            device=plan.device.type,
        )
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
