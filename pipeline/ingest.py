"""Slides and aerial images in, a dataset store out: python -m pipeline.ingest.

The plan comes first, then images shard by shard on Dask workers, then one region table for all of
them, a preview of each, and a summary. Whatever was finished before the process died stays
finished: the same command again does the rest.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.cluster import connect
from pipeline.console import (
    EXIT_DONE,
    EXIT_PARTIAL,
    progress,
    run,
    say,
    say_plan,
    write_bytes_atomic,
)
from pipeline.coordinate import choose_regions, count_shards, run_jobs, run_previews
from pipeline.lock import hold_lock
from pipeline.plan import Plan, describe_plan, make_plan, needed_bytes
from pipeline.regions import CELL_PX
from pipeline.sources import Labels
from pipeline.store import Store

LOCK_NAME = ".ingest.lock"
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
    # A process killed at its very start leaves a folder with nothing but a lock.
    begun = out.exists() and any(not i.name.startswith(LOCK_NAME) for i in out.iterdir())
    store = Store.open(out) if begun else None
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
    with hold_lock(out / LOCK_NAME):
        store = store or Store.create(out, plan.spec, {"program": "pipeline.ingest"})
        _sweep(store, plan, missing)
        _relabel(store, plan, done)
        for failure in plan.failures:
            store.write_image_state(
                failure.image_id,
                {
                    "image": failure.image_id,
                    "state": "failed",
                    "reason": failure.reason,
                    "source": str(failure.path),
                },
            )
        cluster, logs = options.cluster if missing else "inline", out.parent / "slurm-logs"
        with connect(cluster, options.workers, logs) as workers:
            total = sum(count_shards(job) for job in missing)
            for _ in progress(run_jobs(store, missing, workers), total=total, desc="shards"):
                pass
            try:
                fraction = options.min_tissue
                if fraction is None:
                    fraction = MIN_FRACTIONS[store.spec.unit]
                store, how = choose_regions(store, region, options.stride, fraction)
            finally:
                _write_log(store)
            names = store.image_ids()
            for _ in progress(run_previews(store, workers), total=len(names), desc="previews"):
                pass
    return _summarise(store, plan, how)


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


def _sweep(store: Store, plan: Plan, missing: Sequence[object]) -> None:
    """Remove what killed processes left half-written, and old failures of inputs that are tried
    again.
    """
    names = {job.image_id for job in plan.jobs} if missing else set()
    for name in names:
        for leftover in store.image_path(name).rglob("*.partial"):
            leftover.unlink()
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


def _write_log(store: Store) -> None:
    lines = [json.dumps(state, sort_keys=True) for state in store.image_states().values()]
    write_bytes_atomic(store.path / "images.jsonl", ("\n".join(lines) + "\n").encode())


def _summarise(store: Store, plan: Plan, how: str) -> int:
    """Write `summary.md`, say where to look, return the exit code."""
    states = store.image_states()
    regions = store.regions()
    ends = Counter(state["state"] for state in states.values())
    splits = Counter(region.split for region in regions)
    counted = (
        ", ".join(f"{splits[s]} {s}" for s in ("train", "val", "test") if splits[s]) or "none"
    )
    lines = [
        f"images: {ends['ok']} ok, {ends['empty']} empty, {ends['failed']} failed",
        f"regions of {store.spec.region} px{'' if plan.spec.region else AUTO}: {len(regions)} "
        f"({counted}); {how}",
    ]
    ours = {job.image_id for job in plan.jobs} | {f.image_id for f in plan.failures}
    failed = sorted(
        (s for name, s in states.items() if s["state"] == "failed" and name in ours),
        key=lambda s: str(s["source"]),
    )
    notable = [s for s in states.values() if s["state"] != "ok"]
    details = [f"- {s['state']}: {_name_reason(s)}" for s in notable]
    text = "\n".join(["# What is in this store", "", *(f"- {line}" for line in lines), *details])
    write_bytes_atomic(store.path / "summary.md", (text + os.linesep).encode())
    for line in lines + [f"failed: {_name_reason(s)}" for s in failed]:
        say(line)
    say(
        f"look at {store.path / 'previews'} (train green, val blue, test orange), then at "
        f"{store.path / 'summary.md'}"
    )
    return EXIT_PARTIAL if failed else EXIT_DONE


def _name_reason(state: Mapping[str, Any]) -> str:
    """Why an image ended as it did, with its path, which most reasons already name."""
    source, reason = str(state["source"]), str(state["reason"])
    return reason if source in reason else f"{source}: {reason}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(Options, ingest, argv, prog="python -m pipeline.ingest")


if __name__ == "__main__":
    raise SystemExit(main())
