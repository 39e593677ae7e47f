"""Sparse cells of one level of the infinite lattice: points without an image around them."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """Cells of one level of several fields, anywhere on the infinite lattice."""

    image: Int64[Tensor, " n"]
    y: Int64[Tensor, " n"]
    x: Int64[Tensor, " n"]

    def parents(self) -> "Cells":
        return Cells(self.image, self.y >> 1, self.x >> 1)

    def distinct(self) -> tuple["Cells", Int64[Tensor, " n"]]:
        """Each cell once, and where among those every one of these is."""
        if len(self.y) == 0:
            return self, self.image
        (y, first_y), (x, first_x) = ((v - v.min(), v.min()) for v in (self.y, self.x))
        rows = (self.image * (y.max() + 1) + y).unique(return_inverse=True)
        width = x.max() + 1
        keys, place = (rows[1] * width + x).unique(return_inverse=True)
        row = rows[0][keys // width]
        height = y.max() + 1
        return Cells(row // height, row % height + first_y, keys % width + first_x), place
