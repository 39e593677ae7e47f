"""What a draw brings into training: standardised values at the cells that a design named.

Designs draw in two ways (see `design`), and so there are two kinds of draw of a batch: windows,
whole squares of cells whose neighbours are at known places, and points, cells in a list. Both hold
the coarse lattice of exact area means beside them. Values are standardised, and zero at cells that
are absent: outside the image, or not wholly valid.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from model.points import Points


@dataclass(frozen=True)
class WindowDraw:
    """Standardised area means of a batch of images in windows, zero where absent.

    windows[:, :, l] and origins[:, :, l] belong to level l, 0 <= l < coarse level; origins are (y,
    x) in cells of it.
    """

    lattice: Float[Tensor, "b hl wl c"]
    lattice_present: Bool[Tensor, "b hl wl 1"]
    windows: Float[Tensor, "b chains levels w w c"]
    windows_present: Bool[Tensor, "b chains levels w w 1"]
    origins: Int64[Tensor, "b chains levels 2"]

    def to(self, device: torch.device) -> "WindowDraw":
        return WindowDraw(
            self.lattice.to(device),
            self.lattice_present.to(device),
            self.windows.to(device),
            self.windows_present.to(device),
            self.origins.to(device),
        )


@dataclass(frozen=True)
class PointDraw:
    """Standardised area means of a batch of images at listed cells, zero where absent.

    cells: (level, y, x), y and x in cells of that level, inside the image or not; no cell of an
    image comes twice. size_px: (height, width) of every image of the batch.
    """

    lattice: Float[Tensor, "b hl wl c"]
    lattice_present: Bool[Tensor, "b hl wl 1"]
    values: Float[Tensor, "b n c"]
    present: Bool[Tensor, "b n 1"]
    cells: Int64[Tensor, "b n 3"]
    size_px: tuple[int, int]

    def points(self) -> tuple[Points, Float[Tensor, "m c"]]:
        """The cells that are present in one list, image after image, and their values."""
        image, place = self.present[..., 0].nonzero(as_tuple=True)
        level, y, x = self.cells[image, place].unbind(dim=-1)
        sizes = torch.tensor([self.size_px], device=image.device).repeat(len(self.cells), 1)
        return Points(image, level, y, x, sizes), self.values[image, place]

    def to(self, device: torch.device) -> "PointDraw":
        return PointDraw(
            self.lattice.to(device),
            self.lattice_present.to(device),
            self.values.to(device),
            self.present.to(device),
            self.cells.to(device),
            self.size_px,
        )


Draw = WindowDraw | PointDraw
