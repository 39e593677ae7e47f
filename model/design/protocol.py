"""What a design is: one protocol for all that packing and training ask of it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64


@dataclass(frozen=True)
class Extent:
    """An image as a design sees it.

    present: which cells of the coarse lattice are wholly valid; None where all are. tiles_px:
    corner (y, x) of the first embedded tile that lies wholly inside.
    """

    height_px: int
    width_px: int
    present: Bool[np.ndarray, "hl wl"] | None = None
    tiles_px: tuple[int, int] = (0, 0)

    @property
    def pixels(self) -> int:
        return self.height_px * self.width_px

    def lattice_cells(self, level: int) -> int:
        """Cells of the coarse lattice, whose level is given."""
        return (self.height_px >> level) * (self.width_px >> level)


@runtime_checkable
class Design(Protocol):
    """Which cells are drawn.

    footprint_px: the one size of token that conditions a draw, None where all do. lattice: whether
    the coarse lattice is part of a draw; it counts against the budget then.
    """

    @property
    def coarse_level(self) -> int: ...

    @property
    def footprint_px(self) -> int | None: ...

    @property
    def lattice(self) -> bool: ...

    def num_cells(self, image: Extent) -> int:
        """Cells that one draw holds beside the lattice; a `ValueError` where the image or the
        budget is too small for one.
        """
        ...

    def num_values(self, image: Extent) -> int:
        """Cells that one draw holds, never more than the budget."""
        ...

    def fits(self, image: Extent) -> bool:
        """Whether this image holds anything to draw; one that does not is left out."""
        ...

    def draws_to_cover(self, image: Extent) -> int:
        """Draws that score as many pixels as the image has."""
        ...

    def describe(self, image: Extent) -> str:
        """The cells of a draw in a few words."""
        ...


@runtime_checkable
class PointDesign(Design, Protocol):
    """A design of single cells, no two alike."""

    def of(self, cells: int) -> "PointDesign":
        """The same design for so many cells and no lattice; pixels alone where they are too few
        for more.
        """
        ...

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        """(level, y, x), y and x in cells of that level.

        key: non-negative integers (seed, region, pack) that name this draw.
        """
        ...
