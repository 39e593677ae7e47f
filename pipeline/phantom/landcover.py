"""What covers the ground of the aerial scene: blocks between roads, parcels inside blocks, a river
and a lake.

Roads are two families of lines of a jittered lattice, in coordinates that are turned and gently
bent. A block between four roads is farmland, meadow, forest or village; farmland is cut into
strips. Everything is decided point by point, from the point's own coordinates, so the renderer
asks it at pixels and the trees ask it at their sites.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.phantom.noise import SmoothNoise, keyed_number, keyed_uniform

Length = TypeVar("Length", float, np.ndarray)

FARMLAND, MEADOW, FOREST, VILLAGE = range(4)
BLOCK_SHARES = (0.50, 0.13, 0.15, 0.22)
BLOCK_M = 330.0
ROAD_HALF_WIDTH_M = 4.0
PLOT_M, STREET_HALF_WIDTH_M = 25.0, 2.6
STREET_PITCH_M = 3 * PLOT_M
RIVER_HALF_WIDTH_M = 13.0


@dataclass(frozen=True)
class Frame:
    """Coordinates of points, in metres: bent street coordinates `v`, `u`, and the distance to
    water (negative in it).
    """

    v: Float[np.ndarray, "..."]
    u: Float[np.ndarray, "..."]
    water: Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Ground:
    """What lies at points: block, parcel, house plot with the offset from its middle, and
    distances to what bounds them.

    Lengths are in metres. A plot is `PLOT_M` wide; a plot that its block cuts off has row or
    column −1.
    """

    kind: Int[np.ndarray, "..."]
    house_row: Int[np.ndarray, "..."]
    house_column: Int[np.ndarray, "..."]
    house_v: Float[np.ndarray, "..."]
    house_u: Float[np.ndarray, "..."]
    parcel_row: Int[np.ndarray, "..."]
    parcel_column: Int[np.ndarray, "..."]
    road: Float[np.ndarray, "..."]
    street: Float[np.ndarray, "..."]
    edge: Float[np.ndarray, "..."]
    water: Float[np.ndarray, "..."]

    @property
    def is_water(self) -> Bool[np.ndarray, "..."]:
        """Open water, bridges left out."""
        return (self.water < 0) & (self.road > ROAD_HALF_WIDTH_M)

    @property
    def is_forest(self) -> Bool[np.ndarray, "..."]:
        """Forest floor, a few metres from anything else."""
        return (self.kind == FOREST) & (self.water > 4) & (self.road > ROAD_HALF_WIDTH_M + 4)


@dataclass(frozen=True)
class LandCover:
    """The map for `seed`."""

    seed: int

    def turn(self, y: Length, x: Length) -> tuple[Length, Length]:
        """`y`, `x` along the directions of the streets, not bent yet."""
        angle = 0.15 + 0.5 * keyed_number(self.seed, 99)
        return y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)

    def frame(self, y: Float[np.ndarray, "*s"], x: Float[np.ndarray, "*s"]) -> Frame:
        """Street coordinates and distance to water of points at `y`, `x` metres from the scene's
        corner.
        """
        v, u = self.turn(y, x)
        v = v + 22 * SmoothNoise(self.seed, 100, 420.0).at(y, x)
        u = u + 22 * SmoothNoise(self.seed, 101, 420.0).at(y, x)
        course = SmoothNoise(self.seed, 102, 800.0).at(y, x) + 0.09 * SmoothNoise(
            self.seed, 103, 120.0
        ).at(y, x)
        shore = 4 * SmoothNoise(self.seed, 104, 18.0).at(y, x)
        river = 330 * np.abs(course) - RIVER_HALF_WIDTH_M
        lake = 160 * (2.0 - SmoothNoise(self.seed, 105, 520.0).at(y, x))
        return Frame(v, u, np.minimum(river, lake) + shore)

    def ground(self, frame: Frame) -> Ground:
        """What lies at the points of `frame`."""
        row, from_north, height = self._between_lines(frame.v, 110)
        column, from_west, width = self._between_lines(frame.u, 111)
        draw = keyed_uniform(self.seed, 112, row, column)
        kind = np.searchsorted(np.cumsum(BLOCK_SHARES)[:-1], draw, side="right")
        road_v = np.minimum(from_north, height - from_north)
        road_u = np.minimum(from_west, width - from_west)
        is_farmland = kind == FARMLAND
        strips = np.where(is_farmland, 2 + (4 * keyed_uniform(self.seed, 113, row, column)), 1)
        halves = np.where(is_farmland, 1 + (2 * keyed_uniform(self.seed, 114, row, column)), 1)
        strip, edge_u = _cut(from_west, width, strips.astype(np.int64))
        half, edge_v = _cut(from_north, height, halves.astype(np.int64))
        street = np.minimum(_to_street(from_west), _to_street(from_north))
        house_row, house_v = _plot(from_north, height, row)
        house_column, house_u = _plot(from_west, width, column)
        return Ground(
            kind=kind,
            house_row=house_row,
            house_column=house_column,
            house_v=house_v,
            house_u=house_u,
            parcel_row=row * 8 + half,
            parcel_column=column * 8 + strip,
            road=np.minimum(road_v, road_u),
            street=np.where(kind == VILLAGE, street, np.inf),
            edge=np.minimum(edge_u, edge_v),
            water=frame.water,
        )

    def _between_lines(
        self, position: Float[np.ndarray, "*s"], stream: int
    ) -> tuple[Int[np.ndarray, "*s"], Float[np.ndarray, "*s"], Float[np.ndarray, "*s"]]:
        """Index of the block along one axis, distance to its first road, and its width."""
        cell = np.floor(position / BLOCK_M).astype(np.int64)
        first = int(cell.min(initial=0)) - 2
        index = np.arange(first, int(cell.max(initial=0)) + 4)
        jitter = keyed_uniform(self.seed, stream, index, np.zeros_like(index)) - 0.5
        lines = (index + 0.5 * jitter) * BLOCK_M
        block = cell - first
        block = block - (position < lines[block]) + (position >= lines[block + 1])
        start = lines[block]
        return block + first, position - start, lines[block + 1] - start


def _cut(
    offset: Float[np.ndarray, "*s"], length: Float[np.ndarray, "*s"], parts: Int[np.ndarray, "*s"]
) -> tuple[Int[np.ndarray, "*s"], Float[np.ndarray, "*s"]]:
    """Which of `parts` equal parts of `length` holds `offset`, and the distance to that part's
    border.
    """
    size = length / parts
    part = np.minimum((offset / size).astype(np.int64), parts - 1)
    inside = offset - part * size
    return part, np.minimum(inside, size - inside)


def _to_street(offset: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    phase = offset % STREET_PITCH_M
    return np.minimum(phase, STREET_PITCH_M - phase)


def _plot(
    offset: Float[np.ndarray, "*s"], length: Float[np.ndarray, "*s"], block: Int[np.ndarray, "*s"]
) -> tuple[Int[np.ndarray, "*s"], Float[np.ndarray, "*s"]]:
    """Index of the house plot along one axis (−1: cut off by the block's end) and the offset from
    its middle.
    """
    plot = np.floor(offset / PLOT_M).astype(np.int64)
    whole = (plot >= 0) & ((plot + 1) * PLOT_M <= length)
    return np.where(whole, (block + (1 << 20)) * 64 + plot, -1), offset - (plot + 0.5) * PLOT_M
