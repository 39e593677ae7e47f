"""What a draw brings into training: standardised values at the cells that a design named.

Values are standardised. Of patches and points they are zero at cells that are absent: outside the
image, or not wholly valid.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from model.points import Points


@dataclass(frozen=True)
class PatchDraw:
    """Standardised pixels of a batch of patches, zero where absent."""

    values: Float[Tensor, "b c h w"]
    present: Bool[Tensor, "b 1 h w"]

    def to(self, device: torch.device) -> "PatchDraw":
        return PatchDraw(self.values.to(device), self.present.to(device))


@dataclass(frozen=True)
class TopDraw:
    """Standardised area means of a batch of images on their top lattice or a window of it, zero
    where absent.

    weight: of each cell in the loss, zero where absent. origin: the first cell (y, x) of each.
    """

    values: Float[Tensor, "b c h w"]
    present: Float[Tensor, "b 1 h w"]
    weight: Float[Tensor, "b 1 h w"]
    origin: Int64[Tensor, "b 2"]

    def to(self, device: torch.device) -> "TopDraw":
        return TopDraw(
            self.values.to(device),
            self.present.to(device),
            self.weight.to(device),
            self.origin.to(device),
        )


@dataclass(frozen=True)
class BlockDraw:
    """A batch of windows of one block of octaves: standardised fine cells, and their parents with
    a margin on every side.

    parents_present: which lie inside the image; values outside are those of the nearest inside.
    weight: of the inner parents in the loss, zero where no pixel is valid. y_px, x_px: centres of
    the inner parents in pixels of their image.
    """

    values: Float[Tensor, "b c hk wk"]
    parents: Float[Tensor, "b c hp wp"]
    parents_present: Float[Tensor, "b 1 hp wp"]
    weight: Float[Tensor, "b 1 h w"]
    y_px: Float[Tensor, "b h"]
    x_px: Float[Tensor, "b w"]

    def to(self, device: torch.device) -> "BlockDraw":
        return BlockDraw(
            self.values.to(device),
            self.parents.to(device),
            self.parents_present.to(device),
            self.weight.to(device),
            self.y_px.to(device),
            self.x_px.to(device),
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


Draw = TopDraw | BlockDraw | PatchDraw | PointDraw
