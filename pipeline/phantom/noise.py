"""Randomness as a function of place: the ground that both phantoms stand on.

Nothing here holds a state. A hash turns (seed, stream, row, column) into a number, so that any
window of a picture can be drawn alone and equals the crop of the whole. Smooth fields are uniform
cubic B-splines over hashed lattice values; things (cells, glands, trees) stand on jittered
lattices. Positions are physical, in µm or m, so that the same seed shows the same scene at every
resolution.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt64

SPLINE_STD = float(np.sqrt(1 / 3) * 0.479365)
"""Standard deviation of a two-dimensional B-spline over values uniform in [-1, 1]."""

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def _mix(state: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keyed_uniform(
    seed: int, stream: int, row: Int[np.ndarray, "..."], column: Int[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Numbers uniform in [0, 1), independent over seed, stream, row and column; float64, broadcast
    shape.
    """
    key = np.uint64((seed * GOLDEN + (stream + 1) * 0xD1B54A32D192ED03) & MASK)
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(row, np.int64).astype(np.uint64) + key)
        state = _mix(state ^ (np.asarray(column, np.int64).astype(np.uint64) * np.uint64(GOLDEN)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_number(seed: int, stream: int, index: int = 0) -> float:
    """One number in [0, 1) for a whole scene."""
    return float(keyed_uniform(seed, stream, np.full(1, index), np.full(1, index))[0])


@dataclass(frozen=True)
class SmoothNoise:
    """A stationary smooth field of mean 0 and standard deviation 1.

    B-spline Σ_ij β³(y/λ − i) β³(x/λ − j) n_ij / σ with n_ij uniform in [-1, 1]; λ is the lattice
    pitch, in the unit of the positions it is asked for.
    """

    seed: int
    stream: int
    wavelength: float

    def at(
        self, y: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """The field at positions `y`, `x`; each value depends on its own position alone."""
        row, column = np.floor(y / self.wavelength), np.floor(x / self.wavelength)
        weights_y, weights_x = (
            _spline(y / self.wavelength - row),
            _spline(x / self.wavelength - column),
        )
        if row.size == 0:
            return np.zeros(np.shape(y))
        top, left = int(row.min()) - 1, int(column.min()) - 1
        rows = np.arange(top, int(row.max()) + 3)
        columns = np.arange(left, int(column.max()) + 3)
        lattice = keyed_uniform(self.seed, self.stream, rows[:, None], columns[None, :])
        first = (row.astype(np.int64) - 1 - top) * columns.size + (
            column.astype(np.int64) - 1 - left
        )
        lattice = (2 * lattice - 1).ravel()
        total = np.zeros(np.shape(y))
        for i, weight_y in enumerate(weights_y):
            along_x = np.zeros(np.shape(y))
            for j, weight_x in enumerate(weights_x):
                along_x += weight_x * lattice.take(first + (i * columns.size + j))
            total += weight_y * along_x
        return total / SPLINE_STD


def _spline(t: Float[np.ndarray, "*shape"]) -> tuple[Float[np.ndarray, "*shape"], ...]:
    """The four weights of a uniform cubic B-spline at offset `t` in [0, 1)."""
    s = 1 - t
    return (
        s * s * s / 6,
        (3 * t * t * t - 6 * t * t + 4) / 6,
        (3 * s * s * s - 6 * s * s + 4) / 6,
        t * t * t / 6,
    )


@dataclass(frozen=True)
class Sites:
    """Points of a jittered lattice, in rows: where they are and which lattice cell each belongs
    to.
    """

    y: Float[np.ndarray, "n"]
    x: Float[np.ndarray, "n"]
    row: Int[np.ndarray, "n"]
    column: Int[np.ndarray, "n"]
    seed: int
    stream: int

    def uniform(self, attribute: int) -> Float[np.ndarray, "n"]:
        """One number in [0, 1) a site for each `attribute` (0 to 61), the same in whatever window
        it is met.
        """
        return keyed_uniform(self.seed, self.stream * 64 + attribute + 2, self.row, self.column)

    def where(self, chosen: np.ndarray) -> "Sites":
        """The sites that `chosen` (booleans or indices) selects."""
        return Sites(
            self.y[chosen],
            self.x[chosen],
            self.row[chosen],
            self.column[chosen],
            self.seed,
            self.stream,
        )


def jittered_sites(
    seed: int, stream: int, pitch: float, jitter: float, box: tuple[float, float, float, float]
) -> Sites:
    """Every site of the lattice of side `pitch` that can lie in `box` (y0, x0, y1, x1).

    A site is displaced from the middle of its cell by at most `jitter` / 2 cells along each axis.
    Sites outside the box may be returned; none inside is missed.
    """
    y0, x0, y1, x1 = box
    rows = np.arange(int(np.floor(y0 / pitch)) - 1, int(np.floor(y1 / pitch)) + 2)
    columns = np.arange(int(np.floor(x0 / pitch)) - 1, int(np.floor(x1 / pitch)) + 2)
    row, column = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    shift_y = keyed_uniform(seed, stream * 64, row, column) - 0.5
    shift_x = keyed_uniform(seed, stream * 64 + 1, row, column) - 0.5
    y = (row + 0.5 + jitter * shift_y) * pitch
    x = (column + 0.5 + jitter * shift_x) * pitch
    return Sites(y, x, row, column, seed, stream)


@dataclass(frozen=True)
class Texture:
    """A periodic table of smooth noise (mean 0, deviation 1) to be read at any position, linearly
    interpolated.
    """

    table: Float[np.ndarray, "n n"]

    @classmethod
    def drawn(cls, seed: int, stream: int, size: int = 512) -> "Texture":
        """A table of `size` (a power of two) independent nodes a side, lightly smoothed."""
        index = np.arange(size)
        table = keyed_uniform(seed, stream, index[:, None], index[None, :]) - 0.5
        for axis in (0, 1):
            table = 0.5 * table + 0.25 * (np.roll(table, 1, axis) + np.roll(table, -1, axis))
        return cls((table / table.std()).astype(np.float32))

    def at(
        self, v: Float[np.ndarray, "*shape"], u: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """The texture at row `v`, column `u`, in nodes; it repeats after the size of the table."""
        size = self.table.shape[0]
        flat = self.table.ravel()
        floor_v, floor_u = np.floor(v), np.floor(u)
        weight_v, weight_u = (v - floor_v).astype(np.float32), (u - floor_u).astype(np.float32)
        top = (floor_v.astype(np.int32) & (size - 1)) * size
        bottom = ((floor_v.astype(np.int32) + 1) & (size - 1)) * size
        left = floor_u.astype(np.int32) & (size - 1)
        right = (left + 1) & (size - 1)
        above = flat.take(top + left)
        above += weight_u * (flat.take(top + right) - above)
        below = flat.take(bottom + left)
        below += weight_u * (flat.take(bottom + right) - below)
        return above + weight_v * (below - above)


def smoothstep(
    values: Float[np.ndarray, "*shape"], low: float, high: float
) -> Float[np.ndarray, "*shape"]:
    """0 below `low`, 1 above `high`, 3t² − 2t³ between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
