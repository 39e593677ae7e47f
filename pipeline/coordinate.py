"""The coordinator's part of an ingest: hands tasks to workers, records how every image ends,
chooses the regions.

At most `capacity` tasks are in flight, whatever the number of images. A task that dies takes
nothing with it: of several images each is tried again alone, and one that dies alone is recorded
as failed, with the reason. Only a full disk ends the run, as it would end every image after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster import Workers
from pipeline.console import is_disk_full, say
from pipeline.ome import SHARD_PX
from pipeline.plan import Failure, ImageJob
from pipeline.preview import draw_previews
from pipeline.regions import (
    MAX_SIDE_PX,
    Coverage,
    Region,
    find_regions,
    largest_passing_side,
)
from pipeline.splits import assign_splits
from pipeline.store import Store
from pipeline.work import Outcome, finish_image, ingest_images, ingest_shard, open_template

BATCH_IMAGES = 64
Task = tuple[Callable[..., Any], tuple[Any, ...]]


def count_shards(job: ImageJob) -> int:
    """How many level-0 shards an image has."""
    _, height, width = job.shape
    return -(-height // SHARD_PX) * -(-width // SHARD_PX)


def run_jobs(store: Store, jobs: Sequence[ImageJob], workers: Workers) -> Iterator[Outcome]:
    """Bring all images in; yields an outcome for each shard, and records each image that ends."""
    seconds = dict.fromkeys((job.image_id for job in jobs), 0.0)
    nodes: dict[str, set[str]] = {job.image_id: set() for job in jobs}
    by_id = {job.image_id: job for job in jobs}
    left: dict[str, int] = {}
    ready: deque[Task] = deque()
    ended: set[str] = set()

    def end(outcome: Outcome) -> None:
        if outcome.image_id not in ended:
            ended.add(outcome.image_id)
            name = outcome.image_id
            _record(store, by_id[name], outcome, seconds[name], nodes[name])

    def tasks() -> Iterator[Task]:
        for batch in _batches([job for job in jobs if count_shards(job) == 1]):
            yield ingest_images, (store.path, batch)
        for job in jobs:
            if count_shards(job) == 1:
                continue
            try:
                image = open_template(store.path, job)
            except (ValueError, OSError) as error:
                if is_disk_full(error):
                    raise
                end(Outcome(job.image_id, "failed", str(error), 0.0))
                continue
            missing = [key for key in image.shard_keys() if not image.has_shard(key)]
            left[job.image_id] = len(missing)
            if not missing:
                yield finish_image, (store.path, job)
            for key in missing:
                if job.image_id in ended:
                    break
                yield ingest_shard, (store.path, job, key)

    waiting, in_flight, exhausted = tasks(), 0, False
    while True:
        while in_flight < workers.capacity and not (exhausted and not ready):
            task = ready.popleft() if ready else next(waiting, None)
            if task is None:
                exhausted = True
                continue
            workers.submit(task[0], *task[1])
            in_flight += 1
        if in_flight == 0:
            return
        arguments, result = workers.next_result()
        in_flight -= 1
        if isinstance(result, Exception) and is_disk_full(result):
            raise result
        if isinstance(result, Exception) and isinstance(arguments[1], list) and arguments[1][1:]:
            ready.extend((ingest_images, (store.path, [job])) for job in arguments[1])
            continue
        for outcome in _outcomes(arguments, result):
            job = by_id[outcome.image_id]
            seconds[outcome.image_id] += outcome.seconds
            nodes[outcome.image_id].add(outcome.node)
            if outcome.state != "working":
                end(outcome)
            elif outcome.image_id not in ended:
                left[outcome.image_id] -= 1
                if left[outcome.image_id] == 0:
                    ready.append((finish_image, (store.path, job)))
            if (result is not None and len(arguments) == 3) or count_shards(job) == 1:
                yield outcome


class Coverages(Mapping[str, Coverage]):
    """Where every image that is ok has tissue or valid data, read when it is asked for: those of a
    thousand slides are more than memory holds.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        states = store.image_states().items()
        self._shapes = {name: s["shape"] for name, s in states if s["state"] == "ok"}

    def __getitem__(self, name: str) -> Coverage:
        _, height, width = self._shapes[name]
        return Coverage(height, width, self._store.coverage(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def choose_regions(
    store: Store, side: int, stride: int | None, min_tissue: float, held_out: float
) -> tuple[Store, str]:
    """Write the region table of all images that are ok; `side` 0 stands for the largest that
    passes, `held_out` is the part that is not trained on.

    Returns the store with its side set and a sentence on how the regions were split. Raises a
    `ValueError` when regions of the wanted side pass nowhere and smaller ones would.
    """
    states = {name: s for name, s in store.image_states().items() if s["state"] == "ok"}
    coverages = Coverages(store)
    chosen = side or largest_passing_side(coverages, stride, min_tissue) or MAX_SIDE_PX
    regions = find_regions(coverages, chosen, stride or chosen, min_tissue)
    if not regions:
        smaller = largest_passing_side(coverages, stride, min_tissue)
        if smaller:
            raise ValueError(
                f"no region of {chosen} px has a fraction of {min_tissue:g} of tissue or valid "
                "data, and regions of "
                f"{smaller} px have; the images are kept, run the same command with --region "
                f"{smaller} or auto"
            )
        how = "no region passes"
    else:
        groups = {name: s["group"] for name, s in states.items()}
        given = {name: s["split"] for name, s in states.items() if s["split"]}
        regions, how = assign_splits(regions, groups, given, held_out)
    settings: dict[str, Any] = {"stride": stride or chosen, "min_tissue": min_tissue}
    settings |= {"held_out": held_out, "split": how}
    store = Store.create(
        store.path, replace(store.spec, region=chosen), {**store.provenance, **settings}
    )
    store.write_regions(regions)
    return store, how


def run_previews(store: Store, workers: Workers) -> Iterator[str]:
    """Draw what previews are missing; yields the names of images."""
    regions: dict[str, list[Region]] = {name: [] for name in store.image_ids()}
    for region in store.regions():
        regions[region.image].append(region)
    items = list(regions.items())
    batches = [items[i : i + BATCH_IMAGES] for i in range(0, len(items), BATCH_IMAGES)]
    in_flight = 0
    for batch in [*batches, None]:
        while in_flight and (batch is None or in_flight >= workers.capacity):
            (_, drawn), result = workers.next_result()
            in_flight -= 1
            if isinstance(result, Exception) and is_disk_full(result):
                raise result
            if isinstance(result, Exception):
                say(f"previews of {', '.join(name for name, _ in drawn)} failed: {result}")
            yield from (name for name, _ in drawn)
        if batch is not None:
            workers.submit(draw_previews, store.path, batch)
            in_flight += 1


def _batches(jobs: list[ImageJob]) -> Iterator[list[ImageJob]]:
    """Small images in lists of at most one shard's pixels and 64 images."""
    batch: list[ImageJob] = []
    pixels = 0
    for job in jobs:
        size = job.shape[1] * job.shape[2]
        if batch and (pixels + size > SHARD_PX**2 or len(batch) == BATCH_IMAGES):
            yield batch
            batch, pixels = [], 0
        batch.append(job)
        pixels += size
    if batch:
        yield batch


def _outcomes(arguments: tuple[Any, ...], result: Any) -> list[Outcome]:
    """What a task says; for one that died, that its images failed."""
    if not isinstance(result, Exception):
        return list(result)
    jobs = arguments[1] if isinstance(arguments[1], list) else [arguments[1]]
    reason = f"the task ended with {type(result).__name__}: {result}"
    return [Outcome(job.image_id, "failed", reason, 0.0) for job in jobs]


def failure_state(failure: Failure) -> dict[str, Any]:
    """The record of an input that was never opened, or cannot be used."""
    return _unknown(failure.image_id, failure.path) | {
        "state": "failed",
        "reason": failure.reason,
        "seconds": 0.0,
    }


def _unknown(image_id: str, path: Path) -> dict[str, Any]:
    """The record of an image of which nothing is known yet but the file."""
    names = ("state", "reason", "shape", "spacing", "native_spacing", "spacing_source", "group")
    more = ("patient", "split", "label", "seconds", "nodes", "tissue")
    try:
        size = path.stat().st_size
    except OSError:
        size = None
    return {
        **dict.fromkeys(names + more),
        "image": image_id,
        "source": str(path),
        "source_bytes": size,
        "bytes": 0,
    }


def _record(
    store: Store, job: ImageJob, outcome: Outcome, seconds: float, nodes: set[str]
) -> None:
    folder: Path = store.image_path(job.image_id)
    store.write_image_state(
        job.image_id,
        {
            **_unknown(job.image_id, job.source.path),
            "state": outcome.state,
            "reason": outcome.reason,
            "shape": list(job.shape),
            "spacing": job.spacing,
            "native_spacing": job.native_spacing,
            "spacing_source": job.spacing_source,
            "group": job.group,
            "patient": job.source.patient,
            "split": job.source.split,
            "label": job.source.label,
            "seconds": round(seconds, 3),
            "nodes": sorted(nodes),
            "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
            **outcome.facts,
        },
    )
