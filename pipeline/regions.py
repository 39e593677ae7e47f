"""Which squares of which images are worth learning from.

Regions of one side lie on a grid of one stride, whole and inside their image, and are kept where
at least a given fraction of their pixels is tissue (slides) or valid data (aerial). The fraction
is exact: it is the sum of the counts of tissue or valid pixels over cells of 16 px, which side and
stride are multiples of. Who may see them is in `pipeline.splits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt16

CELL_PX = 16
MAX_SIDE_PX = 4096


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
