"""Who may see which regions: train, val or test.

Splits never share a group (a patient, a slide, a place on the ground). Few groups are ranked by a
hash of their name and dealt out; from 20 groups on each is placed by its own hash alone, so that
adding images moves none.

A single group, that is one slide alone, is cut across one axis into bands of train, val and test
with gaps of one region side, as tokens of a region may see as far beyond it. Val and test together
hold at least the part wanted of all regions that fit beside one another, test at least half of
that; of all such cuts, across either axis and from either end, the one is taken that leaves most
regions to learn from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from pipeline.regions import Region

HELD_OUT = 0.2
"""Part that is not trained on."""
STABLE_GROUPS = 20
MIN_REGIONS_FOR_AREA_SPLIT = 8


def split_groups(groups: Iterable[str], held_out: float = HELD_OUT) -> dict[str, str]:
    """A split for each group, by the hash of its name: the part held out is half val, half test.

    Of few groups at least one is val, and where there are three one is test.
    """
    ranked = sorted(set(groups), key=_hash_fraction)
    if held_out == 0:
        return dict.fromkeys(ranked, "train")
    if len(ranked) >= STABLE_GROUPS:
        cuts = [(g, _hash_fraction(g)) for g in ranked]
        return {
            g: "test" if u < held_out / 2 else "val" if u < held_out else "train" for g, u in cuts
        }
    each = max(math.floor(len(ranked) * held_out / 2), 1)
    num_val, num_test = each * (len(ranked) >= 2), each * (len(ranked) >= 3)
    return {
        g: "test" if i < num_test else "val" if i < num_test + num_val else "train"
        for i, g in enumerate(ranked)
    }


def assign_splits(
    regions: Sequence[Region],
    groups: Mapping[str, str],
    given: Mapping[str, str],
    held_out: float = HELD_OUT,
) -> tuple[list[Region], str]:
    """Give every region its split; returns the regions and one sentence that says how.

    `groups` names the group of every image, `given` the split of those images whose split the user
    chose, `held_out` the part of the others that is not trained on. Regions that lie in the gap of
    a split by area are left out.
    """
    present = {r.image for r in regions}
    fixed: dict[str, str] = {}
    for image in sorted(present & set(given)):
        if fixed.setdefault(groups[image], given[image]) != given[image]:
            raise ValueError(
                f"image {image} is given to split {given[image]} but its group {groups[image]} to "
                f"{fixed[groups[image]]}; splits must not share a patient or a place"
            )
    free = {groups[i] for i in present} - set(fixed)
    if len(free) == 1 and not fixed and len(present) == 1:
        return _split_by_area(regions, held_out)
    splits = {**split_groups(free, held_out), **fixed}
    by_image = [replace(r, split=splits[groups[r.image]]) for r in regions]
    if len(splits) == 1:
        return by_image, "all regions are in one group of images, so all are in one split"
    return by_image, f"split by group: {len(splits)} groups of images, no group in two splits"


def beside_one_another(regions: Sequence[Region]) -> list[Region]:
    """Regions of one image that do not overlap: those whose corners are alike modulo their side,
    of the lattice that has most of them (of several the one with most tissue).
    """
    lattices: dict[tuple[int, int], list[Region]] = {}
    for r in regions:
        lattices.setdefault((r.y % r.side, r.x % r.side), []).append(r)
    fullest = max(lattices.values(), key=lambda m: (len(m), sum(r.tissue for r in m)), default=[])
    return list(fullest)


@dataclass(frozen=True)
class Bands:
    """A cut across one axis; regions of a band begin at `start` or later and before `stop`."""

    spans: Mapping[str, tuple[int, int]]
    num_train: int

    def split(self, start: int) -> str | None:
        """Whose a region is that begins there; None in a gap."""
        found = [name for name, (low, high) in self.spans.items() if low <= start < high]
        return found[0] if found else None


def _split_by_area(regions: Sequence[Region], held_out: float) -> tuple[list[Region], str]:
    side, fitting = regions[0].side, len(beside_one_another(regions))
    corners = np.array([(r.y, r.x) for r in regions], np.int64)
    longer = int(np.argmax(np.ptp(corners, axis=0)))
    cuts: list[tuple[Bands, int, Int64[np.ndarray, " n"]]] = []
    if held_out > 0 and fitting >= MIN_REGIONS_FOR_AREA_SPLIT:
        wanted = math.ceil(held_out * fitting)
        _, lattice = np.unique(corners % side, axis=0, return_inverse=True)
        for axis in (longer, 1 - longer):
            for starts in (corners[:, axis], -corners[:, axis]):
                cuts += [(b, axis, starts) for b in _cut(starts, lattice.ravel(), side, wanted)]
    if held_out == 0:
        everything = [replace(r, split="train") for r in regions]
        return everything, "nothing is held out, as was asked for: all are train"
    if not cuts:
        everything = [replace(r, split="train") for r in regions]
        return everything, "one image with too few regions to split by area: all are train"
    # Three splits are better than two, then the most to learn from; the first of equals.
    bands, axis, starts = max(cuts, key=lambda cut: (len(cut[0].spans), cut[0].num_train))
    found = [bands.split(start) for start in starts.tolist()]
    kept = [replace(r, split=s) for r, s in zip(regions, found, strict=True) if s is not None]
    return kept, (
        f"one image, split by area along {'yx'[axis]} with gaps of {side} px: "
        f"{len(regions) - len(kept)} regions in the gaps are left out"
    )


def _cut(
    starts: Int64[np.ndarray, " n"], lattice: Int64[np.ndarray, " n"], side: int, wanted: int
) -> Iterator[Bands]:
    """All cuts with test at the far end, then val alone. `lattice` numbers what `wanted` counts:
    of regions of one lattice none overlap.
    """
    places, at = np.unique(starts, return_inverse=True)
    counts = np.zeros((lattice.max() + 1, len(places) + 1), np.int64)
    np.add.at(counts, (lattice, at.ravel() + 1), 1)
    before = counts.cumsum(axis=1)  # regions of each lattice that begin before each place
    end = len(places)

    def held(stop: int) -> Int64[np.ndarray, " places"]:
        """How many regions fit beside one another between each place and `stop`."""
        return (before[:, [stop]] - before[:, :stop]).max(axis=0)

    def train_and_val(
        stop: int, wanted: int, beyond: dict[str, tuple[int, int]]
    ) -> Iterator[Bands]:
        if not stop:
            return
        enough = np.flatnonzero(held(stop) >= max(wanted, 1))
        if not len(enough):
            return
        low = enough[-1]
        last = int(np.searchsorted(places, places[low] - 2 * side, side="right"))
        if last:
            spans = {"train": (int(places[0]), int(places[last - 1]) + 1)}
            spans["val"] = int(places[low]), int(places[stop - 1]) + 1
            yield Bands(spans | beyond, int(before[:, last].sum()))

    to_test = held(end)
    for first in np.flatnonzero(2 * to_test >= wanted)[::-1].tolist():
        stop = int(np.searchsorted(places, places[first] - 2 * side, side="right"))
        test = {"test": (int(places[first]), int(places[-1]) + 1)}
        yield from train_and_val(stop, wanted - int(to_test[first]), test)
    yield from train_and_val(end, wanted, {})


def _hash_fraction(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
