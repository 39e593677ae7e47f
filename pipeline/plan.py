"""What an ingest will do, decided before anything is written.

Every input is opened and described (`pipeline.look`). What cannot be used is set aside with its
reason; the rest is of one kind and gets one target resolution: the one asked for, the store's, or
the coarsest native one, which is the finest that every input can deliver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pipeline.console import size
from pipeline.look import Described, Failure, choose_kind, describe_all, groups_of
from pipeline.ome import SHARD_PX
from pipeline.readers import UnreadableError
from pipeline.readers.protocol import NAMES, SIGNS, SpacingUnit
from pipeline.resample import SAME_SPACING, FinerThanFileError, choose_sampling
from pipeline.sources import Labels, Source
from pipeline.store import Store, StoreSpec
from pipeline.table import find_sources

PYRAMID_FACTOR = 4 / 3
WORKER_BASE_BYTES = 300_000_000
SHARD_COPIES = 5


@dataclass(frozen=True)
class ImageJob:
    """One image to bring into a store; `spacing` is the target, `shape` (c, h, w) that of its
    level 0 there.
    """

    image_id: str
    source: Source
    shape: tuple[int, int, int]
    spacing: float
    native_spacing: float
    spacing_source: str
    group: str


@dataclass(frozen=True)
class Plan:
    """All jobs, done before or not, what failed before it began, and what the store will be."""

    spec: StoreSpec
    jobs: tuple[ImageJob, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]

    @property
    def shard_bytes(self) -> int:
        """Bytes of one full shard of level 0."""
        return len(self.spec.bands) * SHARD_PX**2 * (2 if self.spec.dtype == "uint16" else 1)

    @property
    def worker_bytes(self) -> int:
        """About what one worker needs at most."""
        return WORKER_BASE_BYTES + SHARD_COPIES * self.shard_bytes


def make_plan(
    inputs: Sequence[str],
    target: float | None,
    unit: str | None,
    source_mpp: float | None,
    source_gsd: float | None,
    region: int,
    store: Store | None,
    labels: Labels = "csv",
) -> Plan:
    """Look at every input. `target` is in `unit` (um, m or px), both None where the user names
    neither.

    Raises a `ValueError` when no input can be used, when inputs do not fit together or into
    `store`.
    """
    plain = unit == "px" or (store is not None and store.spec.unit == "px")
    sources = find_sources(inputs, source_mpp, source_gsd, plain, labels)
    described, failures, notes = describe_all(sources, store)
    if not described:
        raise ValueError(_nothing_usable(failures))
    kind, others = choose_kind(described, unit, store)
    failures += others
    items = [item for item in described if item.kind == kind]
    if not items:
        raise ValueError(_nothing_usable(failures))
    spec = _common_spec(items, target, region, store)
    if store is None and target is None:
        notes.append(_target_note(items, spec))
    groups = groups_of(items)
    jobs = []
    for item in items:
        try:
            jobs.append(_job(item, spec, groups[item.image_id], store))
        except UnreadableError as error:
            failures.append(Failure(item.source.path, str(error)))
    if not jobs:
        raise ValueError(_nothing_usable(failures))
    return Plan(spec, tuple(jobs), tuple(failures), tuple(notes))


def _nothing_usable(failures: Sequence[Failure]) -> str:
    if len(failures) == 1:
        return failures[0].reason
    reasons = "".join(f"\n  {failure.reason}" for failure in failures)
    return f"none of {len(failures)} inputs can be used:{reasons}"


def _target_note(items: Sequence[Described], spec: StoreSpec) -> str:
    """Which resolution is the target where nobody named one, and what that does to the others."""
    coarsest = max(items, key=lambda item: item.native.spacing)
    finer = sum(item.native.spacing < spec.spacing * (1 - SAME_SPACING) for item in items)
    name = NAMES[spec.unit]
    which = f" (of {coarsest.source.path}), to which {finer} with finer pixels are reduced"
    return (
        f"--{name} is not given: {spec.spacing:g}, the coarsest native one"
        f"{which if finer else ''}, is used"
    )


def describe_plan(plan: Plan, done: int, stride: int | None) -> str:
    """Lines that tell the user what is going to happen."""
    spec = plan.spec
    name, sign = NAMES[spec.unit], SIGNS[spec.unit]
    lines = [
        f"images: {len(plan.jobs)}, {done} of them already done; "
        f"cannot be used: {len(plan.failures)}",
        f"target: {name} {spec.spacing:g} {sign}, {' '.join(spec.bands)}, {spec.dtype}",
    ]
    if spec.region:
        step = stride or spec.region
        count = sum(
            max((j.shape[1] - spec.region) // step + 1, 0)
            * max((j.shape[2] - spec.region) // step + 1, 0)
            for j in plan.jobs
        )
        lines.append(f"regions: at most {count} of {spec.region} px on a grid of {step} px")
    else:
        lines.append("regions: the largest power of two up to 4096 px for which some passes")
    lines.append(
        f"memory: about {size(plan.worker_bytes)} for each worker, whatever the size of an image"
    )
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"cannot be used: {failure.reason}" for failure in plan.failures]
    return "\n".join(lines)


def needed_bytes(jobs: Sequence[ImageJob], spec: StoreSpec) -> int:
    """An upper bound of what `jobs` take on disk: their pixels before compression."""
    depth = 2 if spec.dtype == "uint16" else 1
    return int(sum(j.shape[0] * j.shape[1] * j.shape[2] for j in jobs) * depth * PYRAMID_FACTOR)


def _common_spec(
    items: Sequence[Described], target: float | None, region: int, store: Store | None
) -> StoreSpec:
    unit, bands, dtype = items[0].kind
    if store is not None and target not in (None, store.spec.spacing):
        name = NAMES[unit]
        raise ValueError(
            f"{store.path} has {name} {store.spec.spacing:g} and --{name} is {target:g}; one "
            "store holds one resolution, so choose another --out"
        )
    spacing = store.spec.spacing if store else target or max(i.native.spacing for i in items)
    kind = cast(Literal["uint8", "uint16"], dtype)
    return StoreSpec(cast(SpacingUnit, unit), spacing, bands, kind, region)


def _job(item: Described, spec: StoreSpec, group: str, store: Store | None) -> ImageJob:
    native = item.native
    try:
        shape = choose_sampling(native, spec.spacing).shape
    except FinerThanFileError as error:
        if store is None:
            raise
        name = NAMES[native.unit]
        raise UnreadableError(
            f"{native.path} has {name} {native.spacing:g} and {store.path} has "
            f"{store.spec.spacing:g}, finer than the file, which would invent detail; ingest it "
            f"with --{name} {native.spacing:g} or more into a store of its own"
        ) from error
    return ImageJob(
        item.image_id,
        item.source,
        shape,
        spec.spacing,
        native.spacing,
        item.spacing_source,
        group,
    )
