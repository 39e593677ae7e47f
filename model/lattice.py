"""Dyadic cells: the one coordinate type of the project.

An image is a function u observed through its area means over *cells*. A cell (level, y, x) is the
square of 2^level x 2^level pixels whose corner is pixel (y 2^level, x 2^level); level 0 is the
pixel itself, and levels below 0 are parts of it, -1 its quarters. The random pixels of a training
draw are cells of level 0, a thumbnail is all cells of one level, a window is a rectangle of cells.
A cell's four children tile it, so the mean over a cell is the mean of the means over its children.

Nothing here needs torch, so that ingest and packing use it on machines without it.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle of cells of one level; (y, x) is its first cell and may lie outside the image.

    y, x, height and width are counted in cells of side 2^level pixels.
    """

    level: int
    y: int
    x: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a box needs at least one cell, but got {self}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def grow(self, cells: int) -> "Box":
        """The box with `cells` more cells on every side."""
        return Box(
            self.level,
            self.y - cells,
            self.x - cells,
            self.height + 2 * cells,
            self.width + 2 * cells,
        )

    def cover(self, level: int) -> "Box":
        """The smallest box of a level at least as coarse that covers this one."""
        up = level - self.level
        if up < 0:
            raise ValueError(f"level {level} is finer than the box's level {self.level}")
        y, x = self.y >> up, self.x >> up
        bottom, right = -(-(self.y + self.height) >> up), -(-(self.x + self.width) >> up)
        return Box(level, y, x, bottom - y, right - x)

    def refine(self, level: int) -> "Box":
        """The same area in cells of a level at least as fine."""
        down = self.level - level
        if down < 0:
            raise ValueError(f"level {level} is coarser than the box's level {self.level}")
        return Box(level, self.y << down, self.x << down, self.height << down, self.width << down)

    def slices_in(self, outer: "Box") -> tuple[slice, slice]:
        """Where this box lies in an array that holds `outer`; both have the same level."""
        if self.level != outer.level:
            raise ValueError(f"boxes of levels {self.level} and {outer.level} do not nest")
        y, x = self.y - outer.y, self.x - outer.x
        if y < 0 or x < 0 or y + self.height > outer.height or x + self.width > outer.width:
            raise ValueError(f"{self} does not lie inside {outer}")
        return slice(y, y + self.height), slice(x, x + self.width)

    def clip(self, height: int, width: int) -> "Box":
        """The part inside an image that has height x width cells at this level."""
        y, x = max(self.y, 0), max(self.x, 0)
        bottom, right = min(self.y + self.height, height), min(self.x + self.width, width)
        return Box(self.level, y, x, bottom - y, right - x)


def at_level(length_px: int, level: int) -> int:
    """How many cells of a level, 0 or above or below, a row of pixels has."""
    return -(-length_px >> level) if level >= 0 else length_px << -level


def tiles(height: int, width: int, tile: int, *, level: int = 0) -> Iterator[Box]:
    """Boxes of at most tile x tile cells that partition height x width cells, row by row.

    Ragged edges are kept: the last tile of a row or column is as small as what is left.
    """
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            yield Box(level, y, x, min(tile, height - y), min(tile, width - x))
