"""From the pixels of one region to what packs hold: exact area means at the cells of a draw.

Means are sums of integers over whole cells, divided once; nothing passes through the rounded pyramid of the store.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt16, UInt32

from model.haar import slope_detail
from pipeline.packfile import ABSENT


@dataclass(frozen=True)
class RegionLevels:
    """Sums over the cells of every level 0 ... coarse of one region, and which cells are wholly valid.

    sums[l]: channels-last integers; a cell's mean is sums[l] / 4^l.
    """

    sums: list[UInt32[np.ndarray, "h w c"]]
    valid: list[Bool[np.ndarray, "h w"]]

    @classmethod
    def of(
        cls, pixels: np.ndarray, valid: Bool[np.ndarray, "h w"], coarse_level: int
    ) -> "RegionLevels":
        """Levels of channel-first uint8 or uint16 pixels; sides must be multiples of 2^coarse_level."""
        sums = [np.ascontiguousarray(pixels.transpose(1, 2, 0)).astype(np.uint32)]
        masks = [valid]
        for _ in range(coarse_level):
            fine, mask = sums[-1], masks[-1]
            sums.append(fine[::2, ::2] + fine[::2, 1::2] + fine[1::2, ::2] + fine[1::2, 1::2])
            masks.append(mask[::2, ::2] & mask[::2, 1::2] & mask[1::2, ::2] & mask[1::2, 1::2])
        return cls(sums, masks)

    def means(self, level: int) -> Float64[np.ndarray, "h w c"]:
        """Area means of one level, in pixel values."""
        return self.sums[level] / 4.0**level

    def fixed_point(
        self, level: int, y: int, x: int, height: int, width: int, scale: int
    ) -> UInt16[np.ndarray, "height width c"]:
        """Means x scale of a window that may stick out of the region; `ABSENT` where cells are absent."""
        values = self.sums[level]
        h, w, c = values.shape
        out = np.full((height, width, c), ABSENT, np.uint16)
        top, left, bottom, right = max(y, 0), max(x, 0), min(y + height, h), min(x + width, w)
        if top >= bottom or left >= right:
            return out
        inside = values[top:bottom, left:right] * (scale / 4.0**level)
        fixed = np.minimum(np.rint(inside), ABSENT - 1).astype(np.uint16)
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
                        self.fixed_point(level, *origin, window, window, scale)
                        for level, origin in enumerate(chain.tolist())
                    ]
                )
                for chain in origins
            ]
        )

    def lattice(self, scale: int) -> UInt16[np.ndarray, "hl wl c"]:
        """The whole coarse level, fixed point."""
        level = len(self.sums) - 1
        return self.fixed_point(level, 0, 0, *self.sums[level].shape[:2], scale)


@dataclass
class Moments:
    """Sums from which a data set's statistics follow; those of several regions add up.

    count, total, squares: pixels and per-band sums of values and of squares. detail, residual: (count, sum of squares
    per band) of each octave's detail, and of the detail that slopes do not predict.
    """

    count: float
    total: Float64[np.ndarray, " c"]
    squares: Float64[np.ndarray, " c"]
    details: list[tuple[float, Float64[np.ndarray, " c"]]]
    residuals: list[tuple[float, Float64[np.ndarray, " c"]]]
    region_means: list[Float64[np.ndarray, " c"]]

    @classmethod
    def of(cls, levels: RegionLevels, block: int = 1024) -> "Moments":
        """Moments of one region; details finer than a block are measured on its central block."""
        coarse = len(levels.sums) - 1
        pixels = levels.sums[0][levels.valid[0]].astype(np.float64)
        details, residuals = [], []
        for level in range(coarse):
            fine, parents, valid = _central(levels, level, block)
            expected = np.repeat(np.repeat(parents, 2, axis=0), 2, axis=1)
            detail = fine - expected
            left = detail - _slopes(parents, valid)
            seen = np.repeat(np.repeat(valid, 2, axis=0), 2, axis=1)
            details.append(_energy(detail[seen]))
            residuals.append(_energy(left[seen]))
        means, valid = levels.means(coarse), levels.valid[coarse]
        while min(means.shape[:2]) > 1:
            h, w = means.shape[0] // 2 * 2, means.shape[1] // 2 * 2
            blocks = means[:h, :w].reshape(h // 2, 2, w // 2, 2, -1)
            whole = valid[:h, :w].reshape(h // 2, 2, w // 2, 2).all(axis=(1, 3))
            parents = blocks.mean(axis=(1, 3))
            detail = (blocks - parents[:, None, :, None]).transpose(0, 2, 1, 3, 4)[whole]
            details.append(_energy(detail.reshape(-1, means.shape[2])))
            means, valid = parents, whole
        return cls(
            float(len(pixels)),
            pixels.sum(axis=0),
            np.square(pixels).sum(axis=0),
            details,
            residuals,
            [pixels.mean(axis=0)] if len(pixels) else [],
        )

    def __add__(self, other: "Moments") -> "Moments":
        def merge(
            a: list[tuple[float, Float64[np.ndarray, " c"]]],
            b: list[tuple[float, Float64[np.ndarray, " c"]]],
        ) -> list[tuple[float, Float64[np.ndarray, " c"]]]:
            return [(m + n, u + v) for (m, u), (n, v) in zip(a, b, strict=True)]

        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            merge(self.details, other.details),
            merge(self.residuals, other.residuals),
            self.region_means + other.region_means,
        )

    def mean_std(self) -> tuple[Float64[np.ndarray, " c"], Float64[np.ndarray, " c"]]:
        """Per-band mean and deviation of the pixels; a constant band has deviation 1."""
        mean = self.total / max(self.count, 1.0)
        std = np.sqrt(np.maximum(self.squares / max(self.count, 1.0) - mean**2, 0.0))
        return mean, np.where(std > 0, std, 1.0)

    def signal(self) -> tuple[float, ...]:
        """Standardised detail variance of every octave, then the variance of the region's mean."""
        mean, std = self.mean_std()
        of_means = np.square((np.stack(self.region_means) - mean) / std).mean()
        return (*(self._standardised(pair) for pair in self.details), float(of_means))

    def residual(self) -> tuple[float, ...]:
        """Standardised variance of what slopes leave of each detail below the lattice."""
        return tuple(self._standardised(pair) for pair in self.residuals)

    def _standardised(self, pair: tuple[float, Float64[np.ndarray, " c"]]) -> float:
        _, std = self.mean_std()
        return float((pair[1] / max(pair[0], 1.0) / std**2).mean())


def _energy(values: Float64[np.ndarray, "n c"]) -> tuple[float, Float64[np.ndarray, " c"]]:
    return float(len(values)), np.square(values).sum(axis=0)


def _central(
    levels: RegionLevels, level: int, block: int
) -> tuple[
    Float64[np.ndarray, "h w c"], Float64[np.ndarray, "hp wp c"], Bool[np.ndarray, "hp wp"]
]:
    """A central block of a level, its parents, and which parents are valid."""
    h, w = levels.valid[level + 1].shape
    side_y, side_x = min(h, block // 2), min(w, block // 2)
    y, x = (h - side_y) // 2, (w - side_x) // 2
    parents = levels.sums[level + 1][y : y + side_y, x : x + side_x] / 4.0 ** (level + 1)
    fine = levels.sums[level][2 * y : 2 * (y + side_y), 2 * x : 2 * (x + side_x)] / 4.0**level
    return fine, parents, levels.valid[level + 1][y : y + side_y, x : x + side_x]


def _slopes(
    parents: Float64[np.ndarray, "hp wp c"], valid: Bool[np.ndarray, "hp wp"]
) -> Float64[np.ndarray, "h w c"]:
    padded = torch.from_numpy(np.pad(parents, ((1, 1), (1, 1), (0, 0))))[None]
    present = torch.from_numpy(np.pad(valid, 1).astype(np.float64))[None, :, :, None]
    return slope_detail(padded, present)[0].numpy()
