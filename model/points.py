"""Sparse points: cells of a batch of images, in one flat list.

A point is a dyadic cell (level, y, x) of one image of the batch; level 0 is the pixel. The lists
of the images may differ in length (ragged batches), and so may the images in size. Coordinates are
int64, so that images beyond 2^31 pixels have them too. Features of points are (n, c) tensors in
the same order; nothing that a model computes may depend on that order.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Points:
    """Cells of a batch of images, checked once.

    image: which image of the batch. level, y, x: the cell; y and x are counted in cells of its own
    level. sizes_px: (height, width) of every image. resolution: where an image is painted finer or
    coarser than what was trained on, its pixel is 2^-resolution of the training's; levels, sizes
    and coordinates are the image's own.
    """

    image: Int64[Tensor, " n"]
    level: Int64[Tensor, " n"]
    y: Int64[Tensor, " n"]
    x: Int64[Tensor, " n"]
    sizes_px: Int64[Tensor, "b 2"]
    resolution: int = 0

    def __post_init__(self) -> None:
        if len(self.sizes_px) == 0 or bool((self.sizes_px < 1).any()):
            raise ValueError(
                f"images need at least one pixel each, but their sizes are "
                f"{self.sizes_px.tolist()}"
            )
        lengths = {len(part) for part in (self.image, self.level, self.y, self.x)}
        if len(lengths) != 1:
            raise ValueError(
                f"points need as many images, levels, y and x, but got {sorted(lengths)}"
            )
        if len(self) == 0:
            return
        if int(self.image.min()) < 0 or int(self.image.max()) >= len(self.sizes_px):
            raise ValueError(
                f"points name images {int(self.image.min())} to {int(self.image.max())} of a "
                f"batch of {len(self.sizes_px)}; count images from 0"
            )
        if int(self.level.min()) < 0:
            raise ValueError(f"levels count from 0, but one is {int(self.level.min())}")
        outside = ~self.inside()
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            height, width = self.sizes_px[self.image[first]].tolist()
            raise ValueError(
                f"{int(outside.sum())} points lie outside their image, the first at (level, y, x) "
                f"= ({int(self.level[first])}, {int(self.y[first])}, {int(self.x[first])}) of "
                f"{height}x{width} px; coordinates are cells of the point's own level"
            )

    def __len__(self) -> int:
        return len(self.image)

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.sizes_px)

    def inside(self) -> Bool[Tensor, " n"]:
        """Which cells hold at least one pixel of their image."""
        last = (self.sizes_px[self.image] - 1) >> self.level[:, None]
        return (self.y >= 0) & (self.x >= 0) & (self.y <= last[:, 0]) & (self.x <= last[:, 1])

    def centres_px(self) -> Float[Tensor, "n 2"]:
        """(y, x) of the cells' centres in pixels of the training, float64."""
        side = torch.pow(2.0, self.level.double() - self.resolution)
        return (torch.stack([self.y, self.x], dim=-1).double() + 0.5) * side[:, None]

    def counts(self) -> Int64[Tensor, " b"]:
        """Points of every image."""
        return torch.bincount(self.image, minlength=self.batch)

    def take(self, index: Int64[Tensor, " m"] | Bool[Tensor, " n"]) -> "Points":
        """Some of the points, or all in another order."""
        parts = {name: getattr(self, name)[index] for name in ("image", "level", "y", "x")}
        return replace(self, **parts)

    def to(self, device: torch.device) -> "Points":
        names = ("image", "level", "y", "x", "sizes_px")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def full_lattice(height_px: int, width_px: int, batch: int = 1, level: int = 0) -> Points:
    """Every cell of one level of `batch` images of one size, row by row."""
    h, w = -(-height_px >> level), -(-width_px >> level)
    image = torch.arange(batch).repeat_interleave(h * w)
    y = torch.arange(h).repeat_interleave(w).repeat(batch)
    x = torch.arange(w).repeat(batch * h)
    sizes = torch.tensor([[height_px, width_px]]).expand(batch, 2).contiguous()
    return Points(image, torch.full_like(image, level), y, x, sizes)


def window_lattice(shape: tuple[int, int], origin: Int64[Tensor, "b 2"], level: int) -> Points:
    """Every cell of windows of `shape` cells of one level, each in an image that ends with it."""
    (h, w), batch = shape, len(origin)
    points = full_lattice(h << level, w << level, batch, level)
    sizes = points.sizes_px + (origin << level)
    y, x = points.y + origin[points.image, 0], points.x + origin[points.image, 1]
    return replace(points, y=y, x=x, sizes_px=sizes)
