"""What is measured of the pixels that are packed: the statistics of a data set, region by region.

Sums over regions add up, so that shards are measured on their own and merged in the index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64

from model.design import WindowsBelow
from model.haar import INTERPOLATION_MARGIN, details, predicted, zero_mean
from pipeline.draws import RegionLevels

EXTREME = 1e-3
"""The quantile at either end of the values, outside of which hardly any lie."""

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
