"""What a design is: a pure function from an image's extent and a key to the cells of one draw."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from model.lattice import Box


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

    def lattice_cells(self, level: int) -> int:
        """Cells of a level."""
        return (self.height_px >> level) * (self.width_px >> level)


class AnyDesign(Protocol):
    """What all designs know.

    window: side of a window in cells, 1 where cells are scattered. halo: cells at its rim that are
    not scored. footprint_px: the one size of token that conditions a draw, None where all do.
    """

    @property
    def window(self) -> int: ...

    @property
    def halo(self) -> int: ...

    @property
    def coarse_level(self) -> int: ...

    @property
    def footprint_px(self) -> int | None: ...

    def describe(self, image: Extent) -> str:
        """What a draw is, in a few words."""
        ...

    def num_drawn(self, image: Extent) -> int:
        """Cells of one draw, without the lattice, which all draws of an image share; a
        `ValueError` where the image or the budget is too small for one.
        """
        ...

    def num_values(self, image: Extent) -> int:
        """Cells that one training sample holds, never more than the budget."""
        ...

    def fits(self, image: Extent) -> bool:
        """Whether this image holds anything to draw; one that does not is left out."""
        ...

    def draws_to_cover(self, image: Extent) -> int:
        """Draws that score as many pixels as the image has."""
        ...


@runtime_checkable
class WindowDesign(AnyDesign, Protocol):
    """A design whose draws are chains of windows."""

    def shape(self, image: Extent) -> tuple[int, int]:
        """(chains, levels) of a draw; a `ValueError` as of `num_drawn`."""
        ...

    def draw(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "chains levels 2"]:
        """First cells (y, x) of the windows, in cells of their level; [:, l] is level l.

        key: non-negative integers (seed, region, pack) that name this draw.
        """
        ...

    def view(self, origins: Int64[np.ndarray, "chains levels 2"]) -> Box | None:
        """The pixels whose tokens condition a draw; None for all of the image."""
        ...


@runtime_checkable
class PointDesign(AnyDesign, Protocol):
    """A design whose draws are scattered cells."""

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        """Cells (level, y, x), y and x in cells of the level, as many in every draw.

        Some may lie outside the image, and some may come again: such are absent from the draw.
        """
        ...


Design = WindowDesign | PointDesign
