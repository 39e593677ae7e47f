"""From the pixels of one region to what packs hold: exact area means at the cells of a draw.

Means are sums of integers over whole cells, divided once; nothing passes through the rounded
pyramid of the store. Mollified pixels are such integers too: fixed point, as packs hold them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt16, UInt32

from model.design import CascadeDesign, Extent, PatchDesign, PointDesign, WindowsBelow
from model.mollifier import mollify
from pipeline.packfile import ABSENT, PART_SCALE

LEAST_PART = 0.5
"""Of a top cell that must be valid for it to be learned from."""


@dataclass(frozen=True)
class RegionLevels:
    """Sums over the cells of every level 0 ... coarse of one region, and which cells are wholly
    valid.

    sums[l]: channels-last integers; a cell's mean is sums[l] / (4^l unit). unit: steps of a pixel
    value that these integers count.
    """

    sums: list[UInt32[np.ndarray, "_ _ c"]]
    valid: list[Bool[np.ndarray, "_ _"]]
    unit: int = 1

    @classmethod
    def of(
        cls,
        pixels: np.ndarray,
        valid: Bool[np.ndarray, "h w"],
        coarse_level: int,
        unit: int = 1,
    ) -> "RegionLevels":
        """Levels of channel-first uint8 or uint16 pixels; sides must be multiples of
        2^coarse_level, which is 8 at most: sums have 32 bits.
        """
        assert 0 <= coarse_level <= 8
        sums = [np.ascontiguousarray(pixels.transpose(1, 2, 0)).astype(np.uint32)]
        masks = [valid]
        for _ in range(coarse_level):
            fine, mask = sums[-1], masks[-1]
            sums.append(fine[::2, ::2] + fine[::2, 1::2] + fine[1::2, ::2] + fine[1::2, 1::2])
            masks.append(mask[::2, ::2] & mask[::2, 1::2] & mask[1::2, ::2] & mask[1::2, 1::2])
        return cls(sums, masks, unit)

    def means(self, level: int) -> Float64[np.ndarray, "h w c"]:
        """Area means of one level, in pixel values."""
        return self.sums[level] / self.steps(level)

    def steps(self, level: int) -> float:
        """A cell's sum over its mean."""
        return self.unit * 4.0**level

    def fixed_point(
        self, level: int, corner: tuple[int, int], shape: tuple[int, int], scale: int
    ) -> UInt16[np.ndarray, "hw ww c"]:
        """Means x scale of a window that may stick out of the region; `ABSENT` where cells are
        absent.
        """
        values, (y, x), (height, width) = self.sums[level], corner, shape
        h, w, c = values.shape
        out = np.full((height, width, c), ABSENT, np.uint16)
        top, left, bottom, right = max(y, 0), max(x, 0), min(y + height, h), min(x + width, w)
        if top >= bottom or left >= right:
            return out
        fixed = self._fixed(values[top:bottom, left:right], level, scale)
        fixed[~self.valid[level][top:bottom, left:right]] = ABSENT
        out[top - y : bottom - y, left - x : right - x] = fixed
        return out

    def continued(
        self, level: int, corner: tuple[int, int], shape: tuple[int, int], scale: int
    ) -> UInt16[np.ndarray, "hw ww c"]:
        """Means x scale of a window; cells outside the region have the values of the nearest."""
        sums = self.sums[level]
        rows, columns = (
            np.clip(np.arange(first, first + side), 0, extent - 1)
            for first, side, extent in zip(corner, shape, sums.shape[:2], strict=True)
        )
        return self._fixed(sums[np.ix_(rows, columns)], level, scale)

    def points(self, cells: Int64[np.ndarray, "n 3"], scale: int) -> UInt16[np.ndarray, "n c"]:
        """Means x scale of single cells (level, y, x); `ABSENT` where cells are absent."""
        out = np.full((len(cells), self.sums[0].shape[2]), ABSENT, np.uint16)
        for level, valid in enumerate(self.valid):
            (of_level,) = np.nonzero(cells[:, 0] == level)
            y, x = cells[of_level, 1], cells[of_level, 2]
            inside = (y >= 0) & (y < valid.shape[0]) & (x >= 0) & (x < valid.shape[1])
            of_level, y, x = of_level[inside], y[inside], x[inside]
            fixed = self._fixed(self.sums[level][y, x], level, scale)
            fixed[~valid[y, x]] = ABSENT
            out[of_level] = fixed
        return out

    def payload(
        self, design: PointDesign | PatchDesign, extent: Extent, key: tuple[int, ...], scale: int
    ) -> bytes:
        """The values of one draw, fixed point, in the order of its cells."""
        if isinstance(design, PatchDesign):
            y, x = design.draw(extent, key).tolist()
            return self.fixed_point(0, (y, x), (design.window, design.window), scale).tobytes()
        return self.points(design.cells(extent, key), scale).tobytes()

    def _fixed(
        self, sums: UInt32[np.ndarray, "*n c"], level: int, scale: int
    ) -> UInt16[np.ndarray, "*n c"]:
        fixed = np.rint(sums * (scale / self.steps(level)))
        return np.minimum(fixed, ABSENT - 1).astype(np.uint16)

    def lattice(self, scale: int) -> UInt16[np.ndarray, "hl wl c"]:
        """The whole coarse level, fixed point."""
        level = len(self.sums) - 1
        return self.fixed_point(level, (0, 0), self.valid[level].shape, scale)


@dataclass(frozen=True)
class CascadeLevels:
    """The levels of a region whose holes are filled, and how much of each cell is not.

    levels: of the filled pixels, so that area means are means of area means everywhere. parts[l]:
    the valid part of every cell.
    """

    levels: RegionLevels
    parts: list[Float32[np.ndarray, "_ _"]]

    @classmethod
    def of(
        cls, pixels: np.ndarray, valid: Bool[np.ndarray, "h w"], coarse_level: int
    ) -> "CascadeLevels":
        """Levels of channel-first pixels; sides must be multiples of 2^coarse_level."""
        parts = [valid.astype(np.float32)]
        for _ in range(coarse_level):
            parts.append((_quarter(parts[-1]) / 4).astype(np.float32))
        whole = pixels if valid.all() else filled(pixels, valid, coarse_level)
        return cls(RegionLevels.of(whole, valid, coarse_level), parts)

    def lattice(self, scale: int) -> UInt16[np.ndarray, "hl wl c"]:
        """The top level, fixed point; `ABSENT` where less than half of a cell is valid."""
        parts = self.parts[-1]
        values = self.levels.continued(len(self.parts) - 1, (0, 0), parts.shape, scale)
        values[parts < LEAST_PART] = ABSENT
        return values

    def payload(
        self, design: CascadeDesign, extent: Extent, key: tuple[int, ...], scale: int
    ) -> bytes:
        """All windows of one draw, block after block (see `pipeline.packfile.WindowLayout`)."""
        return b"".join(
            self._window(block, design.margin, extent, (int(y), int(x)), scale)
            for block, origins in zip(design.blocks, design.draw(extent, key), strict=True)
            for y, x in origins
        )

    def _window(
        self,
        block: WindowsBelow,
        margin: int,
        extent: Extent,
        corner: tuple[int, int],
        scale: int,
    ) -> bytes:
        """Fine cells, parents with a margin, and the valid parts of the inner parents."""
        (y, x), (h, w), n = corner, block.shape(extent), block.octaves
        fine = self.levels.continued(block.fine, (y << n, x << n), (h << n, w << n), scale)
        around = (h + 2 * margin, w + 2 * margin)
        parents = self.levels.continued(block.parents, (y - margin, x - margin), around, scale)
        parts = self.parts[block.parents][y : y + h, x : x + w]
        weight = np.rint(parts * PART_SCALE).astype(np.uint16)
        return fine.tobytes() + parents.tobytes() + weight.tobytes()


def filled(pixels: np.ndarray, valid: Bool[np.ndarray, "h w"], coarse_level: int) -> np.ndarray:
    """Channel-first pixels whose holes have the mean of what is valid in the smallest dyadic cell
    around them that has any; of the whole region, where none up to `coarse_level` has.
    """
    sums = [np.where(valid, pixels, 0).astype(np.float64)]
    counts = [valid.astype(np.float64)]
    for _ in range(coarse_level):
        sums.append(np.stack([_quarter(band) for band in sums[-1]]))
        counts.append(_quarter(counts[-1]))
    total = max(counts[-1].sum(), 1.0)
    values = np.broadcast_to(sums[-1].sum(axis=(1, 2), keepdims=True) / total, sums[-1].shape)
    for total_of_cell, count in zip(reversed(sums), reversed(counts), strict=True):
        if values.shape != total_of_cell.shape:
            values = values.repeat(2, axis=1).repeat(2, axis=2)
        values = np.where(count > 0, total_of_cell / np.maximum(count, 1), values)
    return np.where(valid, pixels, np.rint(values).astype(pixels.dtype))


def _quarter(values: np.ndarray) -> np.ndarray:
    """Sums over four siblings."""
    return values[::2, ::2] + values[::2, 1::2] + values[1::2, ::2] + values[1::2, 1::2]


def mollified(
    pixels: np.ndarray, valid: Bool[np.ndarray, "h w"], sigma_px: float, scale: int
) -> UInt16[np.ndarray, "c h w"]:
    """Channel-first pixels, smoothed, in fixed point; only valid ones count."""
    mask = None if valid.all() else valid
    out = np.empty(pixels.shape, np.uint16)
    for band, values in enumerate(pixels):
        smooth = mollify(values[..., None].astype(np.float32), sigma_px, mask)[..., 0]
        out[band] = np.clip(np.rint(smooth * scale), 0, ABSENT - 1)
    return out
