"""Which squares of which images are worth learning from, and who may see them.

Regions of one side lie on a grid of one stride, whole and inside their image, and are kept where
at least a given fraction of their pixels is tissue (slides) or valid data (aerial). The fraction
is exact: it is the sum of the counts of tissue or valid pixels over cells of 16 px, which side and
stride are multiples of.

Splits never share a group (a patient, a slide, a place on the ground). Few groups are ranked by a
hash of their name and dealt out; from 20 groups on each is placed by its own hash alone, so that
adding images moves none. A single group, that is one slide alone, is split by area along its
longer axis, with a gap of one region side between the splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, UInt16

CELL_PX = 16
MAX_SIDE_PX = 4096
VAL_FRACTION = TEST_FRACTION = 0.1
STABLE_GROUPS = 20
MIN_REGIONS_FOR_AREA_SPLIT = 8
MIN_SLOTS_FOR_VAL, MIN_SLOTS_FOR_TEST = 3, 5


@dataclass(frozen=True)
class Region:
    """A square of one image: corner (y, x) and side in level-0 px; `tissue` is its tissue or valid
    fraction.

    `index` is the row of the region table: the K of `--region K`. `split` is train, val or test.
    """

    index: int
    image: str
    y: int
    x: int
    side: int
    tissue: float
    split: str


@dataclass(frozen=True)
class Coverage:
    """Where an image of height × width px has tissue or valid data: how many pixels of each cell
    of 16 px.
    """

    height: int
    width: int
    counts: UInt16[np.ndarray, "gy gx"]


def grid_fractions(coverage: Coverage, side: int, stride: int) -> Float64[np.ndarray, "ny nx"]:
    """The tissue or valid fraction of every region on the grid: entry (i, j) is the one at (i, j)
    · stride.
    """
    if side % CELL_PX or stride % CELL_PX or min(side, stride) <= 0:
        raise ValueError(
            f"region side {side} and stride {stride} must be positive multiples of {CELL_PX} px, "
            "the cell of the tissue mask; round them"
        )
    rows = max((coverage.height - side) // stride + 1, 0)
    columns = max((coverage.width - side) // stride + 1, 0)
    total = np.zeros(np.add(coverage.counts.shape, 1), np.int64)
    total[1:, 1:] = coverage.counts.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    y = np.arange(rows)[:, None] * (stride // CELL_PX)
    x = np.arange(columns)[None, :] * (stride // CELL_PX)
    span = side // CELL_PX
    inside = total[y + span, x + span] - total[y, x + span] - total[y + span, x] + total[y, x]
    return inside / side**2


def find_regions(
    coverages: Mapping[str, Coverage], side: int, stride: int, min_tissue: float
) -> list[Region]:
    """All regions that pass, sorted by (image, y, x), their split still empty."""
    regions: list[Region] = []
    for image in sorted(coverages):
        coverage = coverages[image]
        fractions = grid_fractions(coverage, side, stride)
        for row, column in np.argwhere(fractions >= min_tissue).tolist():
            regions.append(
                Region(
                    index=len(regions),
                    image=image,
                    y=row * stride,
                    x=column * stride,
                    side=side,
                    tissue=float(fractions[row, column]),
                    split="",
                )
            )
    return regions


def largest_passing_side(
    coverages: Mapping[str, Coverage], stride: int | None, min_tissue: float
) -> int | None:
    """The largest power of two from 4096 down to 16 px for which some region passes; None when
    there is none.
    """
    side = MAX_SIDE_PX
    while side >= CELL_PX:
        if any(
            (grid_fractions(c, side, stride or side) >= min_tissue).any()
            for c in coverages.values()
        ):
            return side
        side //= 2
    return None


def split_groups(groups: Iterable[str]) -> dict[str, str]:
    """A split for each group, by the hash of its name: about 80 % train, 10 % val, 10 % test."""
    ranked = sorted(set(groups), key=_hash_fraction)
    if len(ranked) >= STABLE_GROUPS:
        cuts = [(g, _hash_fraction(g)) for g in ranked]
    else:
        num_val, num_test = int(len(ranked) >= 2), int(len(ranked) >= 3)
        return {
            g: "test" if i < num_test else "val" if i < num_test + num_val else "train"
            for i, g in enumerate(ranked)
        }
    return {
        g: "test" if u < TEST_FRACTION else "val" if u < TEST_FRACTION + VAL_FRACTION else "train"
        for g, u in cuts
    }


def assign_splits(
    regions: Sequence[Region], groups: Mapping[str, str], given: Mapping[str, str]
) -> tuple[list[Region], str]:
    """Give every region its split; returns the regions and one sentence that says how.

    `groups` names the group of every image, `given` the split of those images whose split the user
    chose. Regions that lie in the gap of a split by area are left out.
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
        return _split_by_area(regions)
    splits = {**split_groups(free), **fixed}
    by_image = [replace(r, split=splits[groups[r.image]]) for r in regions]
    if len(splits) == 1:
        return by_image, "all regions are in one group of images, so all are in one split"
    return by_image, f"split by group: {len(splits)} groups of images, no group in two splits"


def _split_by_area(regions: Sequence[Region]) -> tuple[list[Region], str]:
    side = regions[0].side
    corners = np.array([(r.y, r.x) for r in regions])
    axis = int(np.argmax(np.ptp(corners, axis=0)))
    low, high = int(corners[:, axis].min()), int(corners[:, axis].max()) + side
    slots = (high - low) // side
    if _count_disjoint(regions) < MIN_REGIONS_FOR_AREA_SPLIT or slots < MIN_SLOTS_FOR_VAL:
        everything = [replace(r, split="train") for r in regions]
        return everything, "one image with too few regions to split by area: all are train"
    band = max(1, slots // 10) * side
    bands = {"test": (high - band, high)} if slots >= MIN_SLOTS_FOR_TEST else {}
    val_high = high - band - side if bands else high
    bands["val"] = (val_high - band, val_high)
    bands["train"] = (low, val_high - band - side)
    kept = []
    for region, corner in zip(regions, corners[:, axis].tolist(), strict=True):
        for split, (start, stop) in bands.items():
            if start <= corner and corner + side <= stop:
                kept.append(replace(region, split=split))
    return kept, (
        f"one image, split by area along {'yx'[axis]} with gaps of {side} px: "
        f"{len(regions) - len(kept)} regions in the gaps are left out"
    )


def _count_disjoint(regions: Sequence[Region]) -> int:
    """How many regions a greedy walk keeps without overlap."""
    chosen: list[Region] = []
    for r in regions:
        if all(max(abs(r.y - c.y), abs(r.x - c.x)) >= r.side for c in chosen):
            chosen.append(r)
            if len(chosen) == MIN_REGIONS_FOR_AREA_SPLIT:
                break
    return len(chosen)


def _hash_fraction(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
