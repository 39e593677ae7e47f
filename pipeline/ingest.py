"""Slides and aerial images in, a dataset store out: python -m pipeline.ingest.

The plan comes first, then images shard by shard on Dask workers, then one region table for all of
them, a preview of each, a sheet of all previews, and a summary. Whatever was finished before the
process died, or the disk was full, stays finished: the same command again does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cluster import connect
from pipeline.console import (
    EXIT_DONE,
    EXIT_PARTIAL,
    free_bytes,
    is_disk_full,
    progress,
    run,
    say,
    say_plan,
    size,
)
from pipeline.coordinate import (
    choose_regions,
    count_shards,
    failure_state,
    run_jobs,
    run_previews,
)
from pipeline.lock import hold_lock
from pipeline.plan import ImageJob, Plan, describe_plan, make_plan, needed_bytes
from pipeline.preview import draw_contact_sheet
from pipeline.regions import CELL_PX
from pipeline.sources import Labels
from pipeline.splits import HELD_OUT
from pipeline.store import Store
from pipeline.summary import summarise, write_log

LOCK_NAME = ".ingest.lock"
SWEPT = ("states", "coverage", "previews", "outlines")
AUTO = " (auto: the largest power of two of which one passes)"
MIN_FRACTIONS = {"um": 0.25, "m": 0.9, "px": 0.9}  # glass is content, missing data is not


@dataclass(frozen=True)
class Options:
    """Ingest slides or aerial images into a dataset store.

        python -m pipeline.ingest slides/ --out dataset.zarr --region auto
        python -m pipeline.ingest 'naip/m_*.tif' --out naip.zarr --gsd 0.6 --region 1024
        python -m pipeline.ingest faces/ --out faces.zarr --pixels 1 --labels folders --region 1024

    The same command again finishes what is missing and repeats nothing.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT ...")]
    """Files, folders, globs, or CSV files with columns path,mpp,gsd,patient,split,label (mpp and
    gsd are the source's). A folder is searched for names that end like an image's (.svs, .ndpi,
    .tif, .png ...) and for files without an ending that begin like one.
    """
    out: Path
    """The store to make or to continue, such as dataset.zarr."""
    mpp: float | None = None
    """Target resolution of slides in µm per pixel; without it, the coarsest native one."""
    gsd: float | None = None
    """Target resolution of aerial images in m per pixel."""
    pixels: float | None = None
    """Plain pictures (faces, photographs), measured by pixels: how many of a file's become one.
    1 keeps them as they are.
    """
    source_mpp: float | None = None
    """What a slide's pixels measure in µm, instead of what its file says or lacks."""
    source_gsd: float | None = None
    """What an aerial image's pixels measure in m, instead of what its file says or lacks."""
    labels: Labels = "csv"
    """Where classes come from: csv (its column label), or folders: an image's class is the name
    of the folder that it lies in, unless a CSV says another.
    """
    region: str = "4096"
    """Side in px of the regions to learn from; auto: the largest power of two that passes."""
    stride: int | None = None
    """Step of the grid of regions in px; without it, their side: no two overlap."""
    min_tissue: float | None = None
    """Least fraction of a region, 0 to 1, that is tissue (slides; by default 0.25) or valid data
    (aerial; by default 0.9).
    """
    held_out: float = HELD_OUT
    """Part that is not trained on, half of it val and half test: of the groups (patients, slides,
    places), or of a lone slide's regions, where gaps between the splits come on top."""
    cluster: str = "local"
    """Where work runs: inline, local, slurm, or a Dask scheduler's address tcp://HOST:PORT."""
    workers: int | None = None
    """Number of worker processes (local: one per core) or jobs (slurm: 1); at an address, how
    many to wait for.
    """
    dry_run: bool = False
    """Print the plan and stop."""


def ingest(options: Options) -> int:
    """Do what `options` say; returns the exit code."""
    region = _check(options)
    out = options.out
    store = None if _is_fresh(out) else Store.open(out)
    targets = {"um": options.mpp, "m": options.gsd, "px": options.pixels}
    unit = next((unit for unit, target in targets.items() if target is not None), None)
    plan = make_plan(
        options.inputs,
        targets[unit] if unit else None,
        unit,
        options.source_mpp,
        options.source_gsd,
        region,
        store,
        options.labels,
    )
    done = _done_before(plan, store)
    missing = [job for job in plan.jobs if job.image_id not in done]
    say_plan(describe_plan(plan, len(done), options.stride), out, needed_bytes(missing, plan.spec))
    largest = max(min(job.shape[1:]) for job in plan.jobs)
    if region > largest:
        raise ValueError(
            f"no image is as large as --region {region}: the largest has a shorter side of "
            f"{largest} px at the target "
            "resolution; give a smaller --region, or auto"
        )
    if options.dry_run:
        return EXIT_PARTIAL if plan.failures else EXIT_DONE
    try:
        with hold_lock(out / LOCK_NAME) as check_lock:
            return _ingest(options, plan, missing, done, store, region, check_lock)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ValueError(
            f"the disk of {out} is full ({size(free_bytes(out))} free); what is finished is kept, "
            "so make room and run the same command again"
        ) from error


def _ingest(
    options: Options,
    plan: Plan,
    missing: Sequence[ImageJob],
    done: Set[str],
    store: Store | None,
    region: int,
    check_lock: Callable[[], None],
) -> int:
    """What is done while the lock is held: everything that is written."""
    out = options.out
    store = store or Store.create(out, plan.spec, {"program": "pipeline.ingest"})
    _sweep(store, plan)
    _relabel(store, plan, done)
    for failure in plan.failures:
        store.write_image_state(failure.image_id, failure_state(failure))
    cluster, logs = options.cluster if missing else "inline", out.parent / "slurm-logs"
    with connect(cluster, options.workers, logs) as workers:
        if workers.dashboard:
            say(f"dashboard: {workers.dashboard}")
        total = sum(count_shards(job) for job in missing)
        for _ in progress(run_jobs(store, missing, workers), total=total, desc="shards"):
            check_lock()
        try:
            fraction = options.min_tissue
            if fraction is None:
                fraction = MIN_FRACTIONS[store.spec.unit]
            store, how = choose_regions(store, region, options.stride, fraction, options.held_out)
        finally:
            write_log(store)
        names = store.image_ids()
        for _ in progress(run_previews(store, workers), total=len(names), desc="previews"):
            check_lock()
    draw_contact_sheet(store)
    ours = {job.image_id for job in plan.jobs} | {f.image_id for f in plan.failures}
    return EXIT_PARTIAL if summarise(store, ours, "" if region else AUTO, how) else EXIT_DONE


def _is_fresh(out: Path) -> bool:
    """Whether there is no store yet, nor anything else but what a process killed at its very start
    leaves: a lock and empty groups.
    """
    if not out.exists():
        return True
    for item in out.iterdir():
        if item.name in ("images", "embeddings"):
            remains = all(i.name == "zarr.json" or i.suffix == ".partial" for i in item.iterdir())
        else:
            remains = item.name.startswith(LOCK_NAME) or item.suffix == ".partial"
        if not remains:
            return False
    return True


def _check(options: Options) -> int:
    """The wanted side of regions, 0 for auto; a `ValueError` for options that make no sense."""
    if not options.inputs:
        raise ValueError("no input is named; name files, folders, globs or a CSV")
    targets = {"--mpp": options.mpp, "--gsd": options.gsd, "--pixels": options.pixels}
    given = [name for name, target in targets.items() if target is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both given and a store has one unit; give one"
        )
    lengths = {
        **targets,
        "--source-mpp": options.source_mpp,
        "--source-gsd": options.source_gsd,
    }
    for name, value in lengths.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value} and must be a positive length")
    if options.min_tissue is not None and not 0 <= options.min_tissue <= 1:
        raise ValueError(f"--min-tissue is {options.min_tissue} and must lie between 0 and 1")
    if not 0 <= options.held_out < 1:
        raise ValueError(f"--held-out is {options.held_out} and must lie between 0 and 1")
    if options.region != "auto" and not options.region.isdigit():
        raise ValueError(f"--region is {options.region!r} and must be a number of pixels or auto")
    sides = {"--region": 0 if options.region == "auto" else int(options.region)}
    if options.stride is not None:
        sides["--stride"] = options.stride
    for name, side in sides.items():
        if side % CELL_PX or side < 0 or (name == "--stride" and side == 0):
            raise ValueError(f"{name} is {side} and must be a positive multiple of {CELL_PX} px")
    return sides["--region"]


def _done_before(plan: Plan, store: Store | None) -> set[str]:
    """The images of `plan` that need nothing more; a `ValueError` when they were made from other
    pixels' sizes.
    """
    done = set()
    for job in plan.jobs:
        state = store.image_state(job.image_id) if store else None
        if state is None or state["state"] == "failed":
            continue
        if state["state"] == "ok" and not _is_whole(store, job.image_id):
            continue
        if not math.isclose(state["native_spacing"], job.native_spacing, rel_tol=1e-6):
            raise ValueError(
                f"{job.source.path} was ingested as having pixels of {state['native_spacing']:g} "
                "and is now said to have "
                f"{job.native_spacing:g}; choose another --out"
            )
        done.add(job.image_id)
    return done


def _is_whole(store: Store | None, image_id: str) -> bool:
    """Whether an image that ended well still has all its shards."""
    try:
        return store is not None and store.image(image_id).is_complete()
    except (ValueError, OSError):
        return False


def _sweep(store: Store, plan: Plan) -> None:
    """Remove what killed processes left half-written, and old failures of inputs that are tried
    again.
    """
    names = [job.image_id for job in plan.jobs]
    folders = [store.image_path(name) for name in names]
    folders += [store.path / name for name in SWEPT]
    for folder in folders:
        for leftover in folder.rglob("*.partial"):
            leftover.unlink(missing_ok=True)
    for leftover in store.path.glob("*.partial"):
        if not leftover.name.startswith(LOCK_NAME):
            leftover.unlink(missing_ok=True)
    paths = {str(job.source.path) for job in plan.jobs} | {str(f.path) for f in plan.failures}
    for name, state in store.image_states().items():
        if state["state"] == "failed" and state["source"] in paths:
            store.remove_image_state(name)


def _relabel(store: Store, plan: Plan, done: Set[str]) -> None:
    """Record the classes that a CSV now gives to images which were brought in before."""
    for job in plan.jobs:
        state = store.image_state(job.image_id) if job.image_id in done else None
        if state is not None and job.source.label not in (None, state.get("label")):
            store.write_image_state(job.image_id, {**state, "label": job.source.label})


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(Options, ingest, argv, prog="python -m pipeline.ingest")


if __name__ == "__main__":
    raise SystemExit(main())
