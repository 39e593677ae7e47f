"""From the pixels of one region to what packs hold: exact area means at the cells of a draw.

Means are sums of integers over whole cells, divided once; nothing passes through the rounded
pyramid of the store. Mollified pixels are such integers too: fixed point, as packs hold them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt16, UInt32

from model.design import Design, Extent, PointDesign, WindowDesign
from model.haar import slope_detail
from model.mollifier import mollify
from pipeline.packfile import ABSENT


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

    def windows(
        self, origins: Int64[np.ndarray, "chains levels 2"], window: int, scale: int
    ) -> UInt16[np.ndarray, "chains levels w w c"]:
        """The windows of one draw, fixed point."""
        return np.stack(
            [
                np.stack(
                    [
                        self.fixed_point(level, (int(y), int(x)), (window, window), scale)
                        for level, (y, x) in enumerate(chain)
                    ]
                )
                for chain in origins
            ]
        )

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

    def values(
        self, design: Design, extent: Extent, key: tuple[int, ...], scale: int
    ) -> UInt16[np.ndarray, "*cells c"]:
        """The values of one draw, fixed point, in the order of its cells."""
        if isinstance(design, PointDesign):
            return self.points(design.cells(extent, key), scale)
        assert isinstance(design, WindowDesign)
        return self.windows(design.draw(extent, key), design.window, scale)

    def _fixed(
        self, sums: UInt32[np.ndarray, "*n c"], level: int, scale: int
    ) -> UInt16[np.ndarray, "*n c"]:
        fixed = np.rint(sums * (scale / self.steps(level)))
        return np.minimum(fixed, ABSENT - 1).astype(np.uint16)

    def lattice(self, scale: int) -> UInt16[np.ndarray, "hl wl c"]:
        """The whole coarse level, fixed point."""
        level = len(self.sums) - 1
        return self.fixed_point(level, (0, 0), self.valid[level].shape, scale)


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

    pixels, total: count and outer products of the pixels, and their per-band sum. details,
    residuals: the same of each octave's detail, and of the detail that slopes do not predict.
    region_means: per-band mean of every region.
    """

    pixels: Energy
    total: Float64[np.ndarray, " c"]
    details: list[Energy]
    residuals: list[Energy]
    region_means: list[Float64[np.ndarray, " c"]]

    @classmethod
    def of(cls, levels: RegionLevels, block: int = 1024) -> "Moments":
        """Moments of one region; details finer than a block are measured on its central block."""
        coarse = len(levels.sums) - 1
        # Pixel moments from every second pixel each way: a quarter of 4096^2 is plenty.
        pixels = levels.sums[0][::2, ::2][levels.valid[0][::2, ::2]] / levels.steps(0)
        details, residuals = [], []
        for level in range(coarse):
            fine, parents, valid = _central(levels, level, block)
            detail = fine - _repeat(parents)
            seen = _repeat(valid)
            details.append(_energy(detail[seen]))
            residuals.append(_energy((detail - _slopes(parents, valid))[seen]))
        means, valid = levels.means(coarse), levels.valid[coarse]
        while min(valid.shape) > 1:
            h, w = valid.shape[0] // 2 * 2, valid.shape[1] // 2 * 2
            parents = means[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean(axis=(1, 3))
            whole = np.all(valid[:h, :w].reshape(h // 2, 2, w // 2, 2), axis=(1, 3))
            details.append(_energy((means[:h, :w] - _repeat(parents))[_repeat(whole)]))
            means, valid = parents, whole
        means_of_region = [pixels.mean(axis=0)] if len(pixels) else []
        return cls(_energy(pixels), pixels.sum(axis=0), details, residuals, means_of_region)

    def __add__(self, other: "Moments") -> "Moments":
        def merge(a: Energy, b: Energy) -> Energy:
            return a[0] + b[0], a[1] + b[1]

        return Moments(
            merge(self.pixels, other.pixels),
            self.total + other.total,
            [merge(a, b) for a, b in zip(self.details, other.details, strict=True)],
            [merge(a, b) for a, b in zip(self.residuals, other.residuals, strict=True)],
            self.region_means + other.region_means,
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
        """Variance of what slopes leave of u's detail in each octave below the lattice."""
        return tuple(self._variance(energy) for energy in self.residuals)

    def _variance(self, energy: Energy) -> float:
        whiten = np.linalg.inv(self.colour())
        return float(np.trace(whiten @ energy[1] @ whiten.T) / max(energy[0], 1.0) / len(whiten))


def _energy(values: Float64[np.ndarray, "*n c"]) -> Energy:
    flat = values.reshape(-1, values.shape[-1])
    return float(len(flat)), flat.T @ flat


def _repeat(parents: np.ndarray) -> np.ndarray:
    return parents.repeat(2, axis=0).repeat(2, axis=1)


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


def _slopes(
    parents: Float64[np.ndarray, "hp wp c"], valid: Bool[np.ndarray, "hp wp"]
) -> Float64[np.ndarray, "h w c"]:
    padded = torch.from_numpy(np.pad(parents, ((1, 1), (1, 1), (0, 0))))[None]
    present = torch.from_numpy(np.pad(valid, 1).astype(np.float64))[None, :, :, None]
    return slope_detail(padded, present)[0].numpy()
