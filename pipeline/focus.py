"""How much fine detail a slide shows, which is what being out of focus takes away.

The detail of a cell is the root mean square of what 2×2 means leave over: the deviation of pixels
of about 1 µm from the means of four, over all three colours, in grey levels of 255. In focus,
tissue of any stain has 15 and more there, pale stroma included, and four times coarser about as
much; blurred by 2 µm and more it has less than half of what is four times coarser, whatever its
contrast, and blurred by 4 µm a few grey levels in all. Ink on the cover slip is as far out of
focus as blurred tissue. So an area is in focus where the fine detail is above a floor and above a
share of the coarse. Both are averaged over the coloured cells of a window of about 100 µm, in
blocks of 4 × 4 cells, so that a pale spot is judged with what is around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt
from scipy.ndimage import uniform_filter

from pipeline.regions import CELL_PX

CELL_LEVEL = CELL_PX.bit_length() - 1
BLOCK_CELLS = 4
COARSER_LEVELS = 2
STRIP_VALUES = 1 << 16


def detail_level(spacing_um: float, detail_um: float) -> int:
    """The level of the pyramid whose pixels are nearest to `detail_um`; 1 or 2, so that level 0 is
    never read again and the coarser detail is still that of two cells.
    """
    return int(np.clip(round(np.log2(detail_um / spacing_um)), 1, CELL_LEVEL - COARSER_LEVELS))


def halved_with_detail(
    values: Float32[np.ndarray, "c h w"],
) -> tuple[Float32[np.ndarray, "c h2 w2"], Float32[np.ndarray, "h2 w2"]]:
    """The 2×2 means, and what they leave over: the mean square deviation, summed over bands (the
    mean of squares less the square of the mean).
    """
    mean, squares = _means(values), np.einsum("chw,chw->hw", values, values)
    energy = _means(squares[None])[0] - np.einsum("chw,chw->hw", mean, mean)
    return mean, np.maximum(energy, 0)


def _means(values: Float32[np.ndarray, "c h w"]) -> Float32[np.ndarray, "c h2 w2"]:
    pairs = values[:, ::2] + values[:, 1::2]
    return (pairs[:, :, ::2] + pairs[:, :, 1::2]) * np.float32(0.25)


def cell_details(
    pixels: UInt[np.ndarray, "3 h w"], level: int, fine: int
) -> tuple[Float32[np.ndarray, "gy gx"], Float32[np.ndarray, "gy gx"]]:
    """Mean square detail of every cell of 16 px, at level `fine` and two levels above.

    `pixels` are of `level`, not coarser than `fine`, and begin at the corner of a pair of cells;
    what they fill in part is filled up with their edges.
    """
    side = CELL_PX >> level
    gy, gx = (-(-n // side) for n in pixels.shape[1:])
    pad = [(0, -n % (2 * side)) for n in pixels.shape[1:]]
    pixels = np.pad(pixels, [(0, 0), *pad], mode="edge")
    rows = 2 * side * max(1, STRIP_VALUES // (2 * side * pixels.shape[2]))  # kept in the cache
    strips = [
        _strip_details(pixels[:, top : top + rows], level, fine)
        for top in range(0, pixels.shape[1], rows)
    ]
    first, second = (np.concatenate(parts)[:gy, :gx] for parts in zip(*strips, strict=True))
    return first, second


def _strip_details(
    pixels: UInt[np.ndarray, "3 h w"], level: int, fine: int
) -> tuple[Float32[np.ndarray, "gy gx"], Float32[np.ndarray, "gy gx"]]:
    values = pixels * np.float32(255 / np.iinfo(pixels.dtype).max)
    found: dict[int, Float32[np.ndarray, "gy gx"]] = {}
    for k in range(level, fine + COARSER_LEVELS + 1):
        if k not in (fine, fine + COARSER_LEVELS):
            values = _means(values)
            continue
        values, energy = halved_with_detail(values)
        span = CELL_PX >> (k + 1)
        if span == 0:
            energy = energy.repeat(2, axis=0).repeat(2, axis=1)
        elif span > 1:
            height, width = energy.shape
            squares = energy.reshape(height // span, span, width // span, span)
            energy = squares.mean(axis=(1, 3))
        found[k] = energy
    return found[fine], found[fine + COARSER_LEVELS]


@dataclass
class FocusMap:
    """Sums over the coloured cells of every block of 4 × 4, to be filled part by part: their
    number, their fine and coarse detail, and how many look like ink.
    """

    count: Float64[np.ndarray, "by bx"]
    fine: Float64[np.ndarray, "by bx"]
    coarse: Float64[np.ndarray, "by bx"]
    inky: Float64[np.ndarray, "by bx"]

    @classmethod
    def empty(cls, rows: int, columns: int) -> FocusMap:
        """For an image of `rows` × `columns` cells."""
        shape = (-(-rows // BLOCK_CELLS), -(-columns // BLOCK_CELLS))
        return cls(*(np.zeros(shape) for _ in range(4)))

    def add(
        self,
        y: int,
        x: int,
        coloured: Bool[np.ndarray, "gy gx"],
        inky: Bool[np.ndarray, "gy gx"],
        fine: Float32[np.ndarray, "gy gx"],
        coarse: Float32[np.ndarray, "gy gx"],
    ) -> None:
        """Take in the cells from (y, x) on, a corner of a block."""
        top, left = y // BLOCK_CELLS, x // BLOCK_CELLS
        weight = coloured.astype(np.float64)
        parts = (
            (self.count, weight),
            (self.fine, weight * fine),
            (self.coarse, weight * coarse),
            (self.inky, weight * inky),
        )
        for whole, part in parts:
            starts = (np.arange(0, n, BLOCK_CELLS) for n in part.shape)
            sums = part
            for axis, edges in enumerate(starts):
                sums = np.add.reduceat(sums, edges, axis=axis)
            whole[top : top + sums.shape[0], left : left + sums.shape[1]] = sums

    def in_focus(
        self, window_px: float, min_detail: float, min_ratio: float
    ) -> Bool[np.ndarray, "by bx"]:
        """Which blocks are sharp, over a window of about `window_px`; one without any coloured
        cell nearby is not.
        """
        side = max(1, round(window_px / (CELL_PX * BLOCK_CELLS))) | 1

        def around(sums: Float64[np.ndarray, "by bx"]) -> Float64[np.ndarray, "by bx"]:
            return uniform_filter(sums, side, mode="constant")

        count = np.maximum(around(self.count), 1e-9)
        fine, coarse = around(self.fine) / count, around(self.coarse) / count
        return (fine >= min_detail**2) & (fine >= min_ratio**2 * coarse)
