"""What one training sample knows of its image: exact area means at the cells of a draw.

A draw is either of windows (`WindowDraw`), for denoisers that convolve, or of scattered cells
(`PointDraw`), for sparse operators. With both comes the whole coarse lattice.
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
    """Standardised area means of a batch of images at scattered cells, zero where absent.

    cells: (level, y, x), y and x in cells of the level. size_px: (height, width) of the images.
    """

    lattice: Float[Tensor, "b hl wl c"]
    lattice_present: Bool[Tensor, "b hl wl 1"]
    values: Float[Tensor, "b n c"]
    present: Bool[Tensor, "b n 1"]
    cells: Int64[Tensor, "b n 3"]
    size_px: tuple[int, int]

    def points(self) -> tuple[Points, Float[Tensor, "m c"]]:
        """The cells that are present, image by image, and their values."""
        image, place = self.present[..., 0].nonzero().unbind(dim=1)
        level, y, x = self.cells[image, place].unbind(dim=1)
        sizes = torch.tensor([self.size_px], device=image.device).expand(len(self.cells), 2)
        return Points(image, level, y, x, sizes.contiguous()), self.values[image, place]

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
