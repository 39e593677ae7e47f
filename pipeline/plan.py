"""What an ingest will do, decided before anything is written.

Every input is opened and described. What cannot be used is set aside with its reason; the rest
must agree on one unit, one band list and one type, and get one target resolution: the one asked
for, the store's, or the coarsest native one, which is the finest that every input can deliver.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import progress, size
from pipeline.ome import SHARD_PX
from pipeline.readers import Reader, UnreadableError, open_reader
from pipeline.readers.protocol import NAMES
from pipeline.resample import SAME_SPACING, Resampled
from pipeline.sources import Source, content_of, find_sources, image_id
from pipeline.store import Store, StoreSpec

QUARTER_QUAD = re.compile(r"m_(\d{7}_(?:ne|nw|se|sw))_", re.IGNORECASE)
PYRAMID_FACTOR = 4 / 3
# Coordinate system, y and x of the centre, side: in the units of the coordinate system.
Place = tuple[str, float, float, float]
WORKER_BASE_BYTES = 300_000_000
SHARD_COPIES = 5
SHOWN_PATHS = 3


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
class Failure:
    """An input that cannot be used."""

    path: Path
    reason: str

    @property
    def image_id(self) -> str:
        """A name for the record, from the path, since there may be no content."""
        digest = hashlib.blake2b(str(self.path).encode(), digest_size=5).hexdigest()
        return f"unusable-{digest}"


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


@dataclass(frozen=True)
class _Described:
    """What a reader says about a source."""

    image_id: str
    source: Source
    unit: str
    spacing: float
    spacing_source: str
    bands: tuple[str, ...]
    dtype: str
    place: Place | None


def make_plan(
    inputs: Sequence[str],
    target: float | None,
    unit: str | None,
    source_mpp: float | None,
    source_gsd: float | None,
    region: int,
    store: Store | None,
) -> Plan:
    """Look at every input. `target` is in `unit` (um or m), both None where the user names
    neither.

    Raises a `ValueError` when no input can be used, when inputs do not fit together or into
    `store`.
    """
    notes: list[str] = []
    described: dict[str, _Described] = {}
    known = {content_of(name): name for name in store.image_states()} if store else {}
    failures: list[Failure] = []
    sources = find_sources(inputs, source_mpp, source_gsd)
    for source in progress(sources, total=len(sources), desc="looking at inputs"):
        try:
            name = image_id(source.path)
        except OSError as error:
            failures.append(Failure(source.path, str(error)))
            continue
        name = known.setdefault(content_of(name), name)
        if name in described:
            first = described[name].source.path
            notes.append(f"{source.path} has the same content as {first} and is one image with it")
            continue
        try:
            with open_reader(source.path, source_mpp=source.mpp, source_gsd=source.gsd) as reader:
                described[name] = _describe(name, source, reader)
        except (UnreadableError, OSError) as error:
            failures.append(Failure(source.path, str(error)))
    if not described:
        raise ValueError(_nothing_usable(failures))
    spec = _common_spec(list(described.values()), target, unit, region, store)
    if store is None and target is None:
        notes.append(_target_note(list(described.values()), spec))
    groups = _groups(list(described.values()))
    jobs = []
    for item in described.values():
        try:
            jobs.append(_job(item, spec, groups[item.image_id]))
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


def _target_note(items: Sequence[_Described], spec: StoreSpec) -> str:
    """Which resolution is the target where nobody named one, and what that does to the others."""
    coarsest = max(items, key=lambda item: item.spacing)
    finer = sum(item.spacing < spec.spacing * (1 - SAME_SPACING) for item in items)
    name = NAMES[spec.unit]
    which = f" (of {coarsest.source.path}), to which {finer} with finer pixels are reduced"
    return (
        f"--{name} is not given: {spec.spacing:g}, the coarsest native one"
        f"{which if finer else ''}, is used"
    )


def describe_plan(plan: Plan, done: int, stride: int | None) -> str:
    """Lines that tell the user what is going to happen."""
    spec = plan.spec
    name, sign = NAMES[spec.unit], "µm" if spec.unit == "um" else "m"
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


def _describe(name: str, source: Source, reader: Reader) -> _Described:
    place = None
    transform: list[float] | None = reader.attributes.get("spatial:transform")
    if transform:
        a, b, c, d, e, f = transform
        y, x = reader.shape[1] / 2, reader.shape[2] / 2
        size = (abs(a) + abs(b)) * min(reader.shape[1:])
        code = str(reader.attributes.get("proj:code", reader.attributes.get("proj:wkt2")))
        place = (code, d * x + e * y + f, a * x + b * y + c, size)
    return _Described(
        name,
        source,
        reader.unit,
        reader.spacing,
        reader.spacing_source,
        reader.bands,
        reader.dtype,
        place,
    )


def _common_spec(
    items: list[_Described],
    target: float | None,
    unit: str | None,
    region: int,
    store: Store | None,
) -> StoreSpec:
    first = items[0]
    kinds: dict[tuple[Any, ...], list[Path]] = {}
    if store is not None:
        kinds[store.spec.unit, store.spec.bands, store.spec.dtype] = [store.path]
    for item in items:
        kinds.setdefault((item.unit, item.bands, item.dtype), []).append(item.source.path)
    if len(kinds) > 1:
        counted = "; ".join(
            f"{_kind_text(kind)}: {', '.join(str(path) for path in paths[:SHOWN_PATHS])}"
            f"{f' and {len(paths) - SHOWN_PATHS} more' if len(paths) > SHOWN_PATHS else ''}"
            for kind, paths in kinds.items()
        )
        raise ValueError(
            f"one store holds one kind, and here are {len(kinds)}: {counted}; ingest each kind "
            "into a store of its own"
        )
    (kind,) = kinds
    if unit is not None and unit != kind[0]:
        raise ValueError(
            f"--{NAMES[unit]} is given and {first.source.path} is measured by {NAMES[kind[0]]}; "
            f"give --{NAMES[kind[0]]}"
        )
    if store is not None and target not in (None, store.spec.spacing):
        name = NAMES[kind[0]]
        raise ValueError(
            f"{store.path} has {name} {store.spec.spacing:g} and --{name} is {target:g}; one "
            "store holds one "
            "resolution, so choose another --out"
        )
    spacing = store.spec.spacing if store else target or max(item.spacing for item in items)
    return StoreSpec(kind[0], spacing, kind[1], kind[2], region)


def _kind_text(kind: tuple[Any, ...]) -> str:
    return f"{'a slide' if kind[0] == 'um' else 'aerial'}, {' '.join(kind[1])}, {kind[2]}"


def _job(item: _Described, spec: StoreSpec, group: str) -> ImageJob:
    source = item.source
    with open_reader(source.path, source_mpp=source.mpp, source_gsd=source.gsd) as reader:
        shape = Resampled(reader, spec.spacing).shape
    return ImageJob(
        item.image_id, source, shape, spec.spacing, item.spacing, item.spacing_source, group
    )


def _groups(items: list[_Described]) -> dict[str, str]:
    """The group of every image, within which splits are the same: a patient, a quarter-quad, a
    place, or itself.
    """
    groups: dict[str, str] = {}
    places: dict[tuple[str, int, int], list[tuple[Place, str]]] = {}
    for item in sorted(items, key=lambda i: i.image_id):
        quad = QUARTER_QUAD.search(item.source.path.name)
        if item.source.patient:
            groups[item.image_id] = f"patient {item.source.patient}"
        elif quad:
            groups[item.image_id] = f"quarter-quad {quad[1].lower()}"
        elif item.place:
            code, y, x, side = item.place
            row, column = math.floor(y / side), math.floor(x / side)
            near = (
                group
                for i, j in itertools.product((-1, 0, 1), repeat=2)
                for place, group in places.get((code, row + i, column + j), ())
                if _same_place(place, item.place)
            )
            groups[item.image_id] = next(near, f"place {item.image_id}")
            entry = (item.place, groups[item.image_id])
            places.setdefault((code, row, column), []).append(entry)
        else:
            groups[item.image_id] = item.image_id
    return groups


def _same_place(a: Place, b: Place) -> bool:
    """Whether two images of one coordinate system have their centres within half of the smaller
    one's side.
    """
    reach = min(a[3], b[3]) / 2
    return a[0] == b[0] and abs(a[1] - b[1]) < reach and abs(a[2] - b[2]) < reach
