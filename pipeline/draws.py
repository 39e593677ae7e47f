"""From the pixels of one region to what packs hold: exact area means at the cells of a draw.

Means are sums of integers over whole cells, divided once; nothing passes through the rounded
pyramid of the store. Mollified pixels are such integers too: fixed point, as packs hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt16, UInt32

from model.design import CascadeDesign, Extent, PatchDesign, PointDesign, WindowsBelow
from model.haar import INTERPOLATION_MARGIN, details, predicted, zero_mean
from model.mollifier import mollify
from pipeline.packfile import ABSENT, PART_SCALE

EXTREME = 1e-3
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
        """Fine cells, parents with a margin, and the valid parts of the inner parents, which are 0
        outside the region.
        """
        (y, x), (h, w), n = corner, block.shape(extent), block.octaves
        fine = self.levels.continued(block.fine, (y << n, x << n), (h << n, w << n), scale)
        around = (h + 2 * margin, w + 2 * margin)
        parents = self.levels.continued(block.parents, (y - margin, x - margin), around, scale)
        parts = self.parts[block.parents]
        weight = np.zeros((h, w), np.uint16)
        top, left = max(y, 0), max(x, 0)
        inside = parts[top : y + h, left : x + w]
        weight[top - y : top - y + inside.shape[0], left - x : left - x + inside.shape[1]] = (
            np.rint(inside * PART_SCALE)
        )
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


Energy = tuple[float, Float64[np.ndarray, "c c"]]
"""How many vectors, and the sum of their outer products."""


@dataclass(frozen=True)
class Moments:
    """Sums from which a data set's statistics follow; those of several regions add up.

    pixels, total: count and outer products of the pixels, and their per-band sum. details: the
    same of each octave's detail. residuals: of what is left of it below the top lattice without
    what the parents of its block of octaves predict; none without blocks. region_means: per-band
    mean of every region. low, high: of the values of each level, outside of which hardly any lie.
    """

    pixels: Energy
    total: Float64[np.ndarray, " c"]
    details: list[Energy]
    residuals: list[Energy]
    region_means: list[Float64[np.ndarray, " c"]]
    low: Float64[np.ndarray, "levels c"]
    high: Float64[np.ndarray, "levels c"]

    @classmethod
    def of(
        cls, levels: RegionLevels, blocks: Sequence[WindowsBelow] = (), side: int = 1024
    ) -> "Moments":
        """Moments of one region; what is finer than a square of `side` cells is measured on its
        central one.
        """
        coarse = len(levels.sums) - 1
        # Pixel moments from every second pixel each way: a quarter of 4096^2 is plenty.
        pixels = levels.sums[0][::2, ::2][levels.valid[0][::2, ::2]] / levels.steps(0)
        octaves = []
        for level in range(coarse):
            fine, parents, valid = _central(levels, level, side)
            octaves.append(_energy((fine - _repeat(parents))[_repeat(valid)]))
        residuals: list[Energy] = []
        for block in reversed(blocks):
            residuals += _residuals(levels, block, side)
        means, valid = levels.means(coarse), levels.valid[coarse]
        while min(valid.shape) > 1:
            h, w = valid.shape[0] // 2 * 2, valid.shape[1] // 2 * 2
            parents = means[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean(axis=(1, 3))
            whole = np.all(valid[:h, :w].reshape(h // 2, 2, w // 2, 2), axis=(1, 3))
            octaves.append(_energy((means[:h, :w] - _repeat(parents))[_repeat(whole)]))
            means, valid = parents, whole
        means_of_region = [pixels.mean(axis=0)] if len(pixels) else []
        low, high = _extremes(levels)
        total = pixels.sum(axis=0)
        return cls(_energy(pixels), total, octaves, residuals, means_of_region, low, high)

    def __add__(self, other: "Moments") -> "Moments":
        def merge(a: Energy, b: Energy) -> Energy:
            return a[0] + b[0], a[1] + b[1]

        return Moments(
            merge(self.pixels, other.pixels),
            self.total + other.total,
            [merge(a, b) for a, b in zip(self.details, other.details, strict=True)],
            [merge(a, b) for a, b in zip(self.residuals, other.residuals, strict=True)],
            self.region_means + other.region_means,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    def mean(self) -> Float64[np.ndarray, " c"]:
        """Per-band mean of the pixels."""
        return self.total / max(self.pixels[0], 1.0)

    def colour(self) -> Float64[np.ndarray, "c c"]:
        """The symmetric square root of the bands' covariance: pixel = mean + colour u.

        Colours that hardly vary are given a hundredth of the largest deviation, so that u, and
        the noise added to it, never blow up what is only rounding.
        """
        count = max(self.pixels[0], 1.0)
        covariance = self.pixels[1] / count - np.outer(self.mean(), self.mean())
        values, vectors = np.linalg.eigh(covariance)
        deviations = np.sqrt(np.maximum(values, 0.0))
        deviations = np.maximum(deviations, max(0.01 * deviations.max(), 1e-3))
        return (vectors * deviations) @ vectors.T

    def signal(self) -> tuple[float, ...]:
        """Variance of u's detail in every octave, then of the mean of u over a region."""
        apart = np.stack(self.region_means) - self.mean()
        of_means = self._variance(_energy(apart))
        return (*(self._variance(energy) for energy in self.details), of_means)

    def residual(self) -> tuple[float, ...]:
        """Variance of what the parents of its block leave of u's detail, fine to coarse."""
        return tuple(self._variance(energy) for energy in self.residuals)

    def _variance(self, energy: Energy) -> float:
        whiten = np.linalg.inv(self.colour())
        return float(np.trace(whiten @ energy[1] @ whiten.T) / max(energy[0], 1.0) / len(whiten))


def _energy(values: Float64[np.ndarray, "*n c"]) -> Energy:
    flat = values.reshape(-1, values.shape[-1])
    return float(len(flat)), flat.T @ flat


def _repeat(parents: np.ndarray, levels: int = 1) -> np.ndarray:
    return parents.repeat(1 << levels, axis=0).repeat(1 << levels, axis=1)


def _central(
    levels: RegionLevels, level: int, block: int
) -> tuple[
    Float64[np.ndarray, "h w c"], Float64[np.ndarray, "hp wp c"], Bool[np.ndarray, "hp wp"]
]:
    """A central block of a level, its parents, and which parents are valid."""
    h, w = levels.valid[level + 1].shape
    side_y, side_x = min(h, block // 2), min(w, block // 2)
    y, x = (h - side_y) // 2, (w - side_x) // 2
    parents = levels.sums[level + 1][y : y + side_y, x : x + side_x] / levels.steps(level + 1)
    fine = levels.sums[level][2 * y : 2 * (y + side_y), 2 * x : 2 * (x + side_x)]
    return (
        fine / levels.steps(level),
        parents,
        levels.valid[level + 1][y : y + side_y, x : x + side_x],
    )


def _extremes(
    levels: RegionLevels, most: int = 1 << 18
) -> tuple[Float64[np.ndarray, "levels c"], Float64[np.ndarray, "levels c"]]:
    """The quantiles of a thousandth at either end, of every level and band."""
    found = []
    for level, sums in enumerate(levels.sums):
        step = max(int(np.sqrt(sums.shape[0] * sums.shape[1] / most)), 1)
        valid = levels.valid[level][::step, ::step]
        values = sums[::step, ::step][valid if valid.any() else ~valid] / levels.steps(level)
        found.append(np.quantile(values, (EXTREME, 1 - EXTREME), axis=0))
    return np.stack([pair[0] for pair in found]), np.stack([pair[1] for pair in found])


def _residuals(levels: RegionLevels, block: WindowsBelow, side: int) -> list[Energy]:
    """Of the details of a block's octaves, fine to coarse, on a central square of `side` fine
    cells.
    """
    n, margin = block.octaves, INTERPOLATION_MARGIN
    height, width = levels.sums[block.parents].shape[:2]
    h, w = min(height, max(side >> n, 1)), min(width, max(side >> n, 1))
    y, x = (height - h) // 2, (width - w) // 2
    rows, columns = (
        np.clip(np.arange(first - margin, first + extent + margin), 0, most - 1)
        for first, extent, most in ((y, h, height), (x, w, width))
    )
    parents = levels.sums[block.parents][np.ix_(rows, columns)] / levels.steps(block.parents)
    fine = levels.sums[block.fine][y << n : (y + h) << n, x << n : (x + w) << n]
    values, around = (
        torch.from_numpy(part.transpose(2, 0, 1).copy())[None]
        for part in (fine / levels.steps(block.fine), parents)
    )
    left = zero_mean(values, n) - predicted(around, n, margin)
    whole = _repeat(levels.valid[block.parents][y : y + h, x : x + w], n)
    parts = [octave[0].permute(1, 2, 0).numpy()[whole] for octave in details(left, n)]
    return [_energy(part) for part in reversed(parts)]
