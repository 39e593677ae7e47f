"""What the inputs of an ingest are: each opened and described once, sorted by kind and by group.

A kind is what all images of one store share: the unit, the names of the bands, the type. It is the
store's where there is one; otherwise the unit that was asked for (--mpp, --gsd, --pixels), and in
it what more than half of the files are. Files of other kinds are set aside then, one by one. Where
nobody asked and files are of several kinds, nothing is guessed. A group is what no split cuts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import progress
from pipeline.readers import Reader, UnreadableError
from pipeline.readers.protocol import NAMES
from pipeline.resample import Native
from pipeline.sources import Source, content_of, image_id
from pipeline.store import Store

QUARTER_QUAD = re.compile(r"m_(\d{7}_(?:ne|nw|se|sw))_", re.IGNORECASE)
SHOWN_PATHS = 3
# Coordinate system, y and x of the centre, side: in the units of the coordinate system.
Place = tuple[str, float, float, float]
Kind = tuple[str, tuple[str, ...], str]  # unit, bands, type


@dataclass(frozen=True)
class Described:
    """What a reader says about a source."""

    image_id: str
    source: Source
    native: Native
    spacing_source: str
    kind: Kind
    place: Place | None


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


def describe_all(
    sources: Sequence[Source], store: Store | None
) -> tuple[list[Described], list[Failure], list[str]]:
    """What the readers say of each content, the sources that have no reader, and which contents
    came twice.
    """
    notes: list[str] = []
    described: dict[str, Described] = {}
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


def _describe(name: str, source: Source, reader: Reader) -> Described:
    place = None
    transform: list[float] | None = reader.attributes.get("spatial:transform")
    if transform:
        a, b, c, d, e, f = transform
        y, x = reader.shape[1] / 2, reader.shape[2] / 2
        size = (abs(a) + abs(b)) * min(reader.shape[1:])
        code = str(reader.attributes.get("proj:code", reader.attributes.get("proj:wkt2")))
        place = (code, d * x + e * y + f, a * x + b * y + c, size)
    return Described(
        name,
        source,
        Native.of(reader),
        reader.spacing_source,
        (reader.unit, reader.bands, reader.dtype),
        place,
    )


def choose_kind(
    items: Sequence[Described], unit: str | None, store: Store | None
) -> tuple[Kind, list[Failure]]:
    """The kind of the store, and why files of other kinds do not fit into it."""
    kinds: dict[Kind, list[Described]] = {}
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


def _mixture(kinds: dict[Kind, list[Described]]) -> str:
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


def groups_of(items: Sequence[Described]) -> dict[str, str]:
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
