"""What an ingest will do, decided before anything is written.

Every input is opened and described. What cannot be used is set aside with its reason; the rest
must be of one kind, which is one unit, one band list and one type, and get one target resolution:
the one asked for, the store's, or the coarsest native one, which is the finest that every input
can deliver. The kind is the store's where there is one; otherwise the unit that was asked for
(--mpp, --gsd, --pixels), and in it what more than half of the files are. Then the others are set
aside too, one by one. Where nobody asked and files are of several kinds, nothing is guessed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pipeline.console import progress, size
from pipeline.ome import SHARD_PX
from pipeline.readers import Reader, UnreadableError
from pipeline.readers.protocol import NAMES, SIGNS, SpacingUnit
from pipeline.resample import SAME_SPACING, FinerThanFileError, Native, choose_sampling
from pipeline.sources import Labels, Source, content_of, image_id
from pipeline.store import Store, StoreSpec
from pipeline.table import find_sources

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


Kind = tuple[str, tuple[str, ...], str]  # unit, bands, type


@dataclass(frozen=True)
class _Described:
    """What a reader says about a source."""

    image_id: str
    source: Source
    native: Native
    spacing_source: str
    kind: Kind
    place: Place | None


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
    described, failures, notes = _describe_all(sources, store)
    if not described:
        raise ValueError(_nothing_usable(failures))
    kind, others = _choose_kind(described, unit, store)
    failures += others
    items = [item for item in described if item.kind == kind]
    if not items:
        raise ValueError(_nothing_usable(failures))
    spec = _common_spec(items, target, region, store)
    if store is None and target is None:
        notes.append(_target_note(items, spec))
    groups = _groups(items)
    jobs = []
    for item in items:
        try:
            jobs.append(_job(item, spec, groups[item.image_id], store))
        except UnreadableError as error:
            failures.append(Failure(item.source.path, str(error)))
    if not jobs:
        raise ValueError(_nothing_usable(failures))
    return Plan(spec, tuple(jobs), tuple(failures), tuple(notes))


def _describe_all(
    sources: Sequence[Source], store: Store | None
) -> tuple[list[_Described], list[Failure], list[str]]:
    """What the readers say of each content, the sources that have no reader, and which contents
    came twice.
    """
    notes: list[str] = []
    described: dict[str, _Described] = {}
    known = {content_of(name): name for name in store.image_states()} if store else {}
    failures: list[Failure] = []
    for source in progress(sources, total=len(sources), desc="looking at inputs"):
        try:
            if not source.path.is_file():
                raise UnreadableError(f"{source.path} is not a file; check the path")
            name = image_id(source.path)
            name = known.setdefault(content_of(name), name)
            if name in described:
                notes.append(_same_content(source, described[name].source))
                continue
            with source.open() as reader:
                described[name] = _describe(name, source, reader)
        except UnreadableError as error:
            failures.append(Failure(source.path, str(error)))
        except OSError as error:
            reason = f"{source.path} cannot be read: {error.strerror or error}"
            failures.append(Failure(source.path, reason))
    return list(described.values()), failures, notes


def _same_content(source: Source, first: Source) -> str:
    """A note that two sources are one image, and what of the second is not used."""
    unused = [
        f"{key} {getattr(source, key)}"
        for key in ("patient", "split", "label")
        if getattr(source, key) not in (None, getattr(first, key))
    ]
    return (
        f"{source.path} has the same content as {first.path} and is one image with it"
        f"{f', so that its {unused[0]} is not used' if unused else ''}"
    )


def _nothing_usable(failures: Sequence[Failure]) -> str:
    if len(failures) == 1:
        return failures[0].reason
    reasons = "".join(f"\n  {failure.reason}" for failure in failures)
    return f"none of {len(failures)} inputs can be used:{reasons}"


def _target_note(items: Sequence[_Described], spec: StoreSpec) -> str:
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
        Native.of(reader),
        reader.spacing_source,
        (reader.unit, reader.bands, reader.dtype),
        place,
    )


def _choose_kind(
    items: Sequence[_Described], unit: str | None, store: Store | None
) -> tuple[Kind, list[Failure]]:
    """The kind of the store, and why files of other kinds do not fit into it."""
    kinds: dict[Kind, list[_Described]] = {}
    for item in items:
        kinds.setdefault(item.kind, []).append(item)
    wanted = {kind: found for kind, found in kinds.items() if unit in (None, kind[0])}
    if not wanted:
        first = items[0]
        raise ValueError(
            f"--{NAMES[unit or '']} is given and {first.source.path} is measured by "
            f"{NAMES[first.kind[0]]}; give --{NAMES[first.kind[0]]}"
        )
    if store is not None:
        chosen: Kind = (store.spec.unit, store.spec.bands, store.spec.dtype)
        why = f"{store.path} holds {_kind_text(chosen)}"
    else:
        chosen = max(wanted, key=lambda kind: len(wanted[kind]))
        count, of = len(wanted[chosen]), sum(map(len, wanted.values()))
        if len(wanted) > 1 and (unit is None or 2 * count <= of):
            raise ValueError(_mixture(wanted))
        why = f"{count} of {of} inputs of its unit are {_kind_text(chosen)}"
    failures = []
    for kind, found in kinds.items():
        reason = why
        if store is None and unit is not None and kind[0] != unit:
            reason = f"--{NAMES[unit]} asks for images measured by {NAMES[unit]}"
        failures += [
            Failure(
                item.source.path,
                f"{item.source.path} is {_kind_text(kind)}, and {reason}; one store holds one "
                "kind, so ingest it into a store of its own",
            )
            for item in found
            if kind != chosen
        ]
    return chosen, failures


def _mixture(kinds: dict[Kind, list[_Described]]) -> str:
    counted = "; ".join(
        f"{_kind_text(kind)}: {', '.join(str(i.source.path) for i in found[:SHOWN_PATHS])}"
        f"{f' and {len(found) - SHOWN_PATHS} more' if len(found) > SHOWN_PATHS else ''}"
        for kind, found in kinds.items()
    )
    return (
        f"one store holds one kind, and here are {len(kinds)}: {counted}; ingest each kind "
        "into a store of its own"
    )


def _kind_text(kind: Kind) -> str:
    what = {"um": "a slide", "m": "aerial", "px": "plain"}[kind[0]]
    return f"{what}, {' '.join(kind[1])}, {kind[2]}"


def _common_spec(
    items: Sequence[_Described], target: float | None, region: int, store: Store | None
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


def _job(item: _Described, spec: StoreSpec, group: str, store: Store | None) -> ImageJob:
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


def _groups(items: Sequence[_Described]) -> dict[str, str]:
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
