"""Where features live: at sparse points, or at all cells of a tile.

The denoiser is written once, over flat (n, c) features. What differs between a draw of points and
a tile of an image is how neighbours are found and how many pixels a point stands for; a support
knows that.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.lattice import Box
from model.operators.contract import Backend, sparse_depthwise
from model.operators.neighbours import Neighbours, find_neighbours
from model.operators.reference import dense_depthwise
from model.operators.resize import resize_kernel
from model.points import Points
from model.resample import NearestPoints, Splat, nearest_points, quadrature_weights
from model.sparse.config import SparseConfig


@runtime_checkable
class Support(Protocol):
    """What the denoiser asks of where its features live."""

    @property
    def points(self) -> Points:
        """The cells, in the order of the features."""
        ...

    @property
    def interior(self) -> Bool[Tensor, " n"] | None:
        """Which points count in sums over the image; None where all do."""
        ...

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """The part of the image that each point stands for; sums to one over an image."""
        ...

    def depthwise(
        self, values: Float[Tensor, "n c"], weight: Float[Tensor, "c k k"]
    ) -> Float[Tensor, "n c"]:
        """The depthwise operator over the points present."""
        ...

    def to_lattice(self, features: Float[Tensor, "n c"]) -> Splat:
        """Features on the coarse lattice: of the whole images, or of what a tile stands for."""
        ...


@dataclass(frozen=True)
class PointSupport:
    """Sparse points of a batch of images; neighbours are found once for all blocks.

    The images' lattices have one size: the U-Net normalises over all of its lattice, so that rows
    and columns that only another image has would change what it gives.
    """

    points: Points
    config: SparseConfig
    backend: Backend = "reference"
    interior: None = None

    def __post_init__(self) -> None:
        points = self.points
        level = self.config.coarse_level + points.resolution
        lattices = (points.sizes_px - 1 >> level).unique(dim=0)
        if len(lattices) > 1:
            raise ValueError(
                f"images of {points.sizes_px.unique(dim=0).tolist()} px need lattices of "
                f"{len(lattices)} sizes, but those of one batch share one; put images of one size "
                "in a batch"
            )
        if len(points) and int(points.level.max()) > level:
            raise ValueError(
                f"a point of level {int(points.level.max())} is coarser than the lattice of level "
                f"{level}, in whose cells points lie; draw finer cells"
            )

    @cached_property
    def neighbours(self) -> Neighbours:
        return find_neighbours(self.points, self.config.kernel_side(self.points.resolution))

    @cached_property
    def weights(self) -> Float[Tensor, " n"]:
        return quadrature_weights(self.points, self.config.coarse_level)

    def depthwise(
        self, values: Float[Tensor, "n c"], weight: Float[Tensor, "c k k"]
    ) -> Float[Tensor, "n c"]:
        return sparse_depthwise(
            values,
            resized(weight, self.points.resolution),
            self.neighbours,
            normalisation=self.config.normalisation,
            backend=self.backend,
        )

    @cached_property
    def nearest(self) -> NearestPoints:
        return nearest_points(self.points, self.config.coarse_level)

    def to_lattice(self, features: Float[Tensor, "n c"]) -> Splat:
        if self.config.resampling == "splat":
            return Splat.accumulate(self.points, features, self.config.coarse_level)
        return _as_one(self.nearest.gather(features))


@dataclass(frozen=True)
class TileSupport:
    """All pixels of a rectangle of one image; `inner`, inside it, is what it stands for.

    Pixels are the image's own (see `points.Points.resolution`), the boxes of level 0. height_px,
    width_px: of the whole image. Pixels beyond the rectangle count as absent, which is
    true where it ends with the image and false within the operators' reach of any other rim.
    """

    box: Box
    inner: Box
    height_px: int
    width_px: int
    config: SparseConfig
    device: torch.device
    resolution: int = 0

    @cached_property
    def points(self) -> Points:
        box = self.box
        y = torch.arange(box.y, box.y + box.height, device=self.device)
        x = torch.arange(box.x, box.x + box.width, device=self.device)
        y, x = (part.flatten() for part in torch.meshgrid(y, x, indexing="ij"))
        zero = torch.zeros_like(y)
        sizes = torch.tensor([[self.height_px, self.width_px]], device=self.device)
        return Points(zero, zero, y, x, sizes, self.resolution)

    @cached_property
    def interior(self) -> Bool[Tensor, " n"]:
        inside = torch.zeros(self.box.shape, dtype=torch.bool, device=self.device)
        inside[self.inner.slices_in(self.box)] = True
        return inside.flatten()

    @cached_property
    def weights(self) -> Float[Tensor, " n"]:
        share = 1.0 / (self.height_px * self.width_px)
        return torch.full((len(self.points),), share, dtype=torch.float64, device=self.device)

    def depthwise(
        self, values: Float[Tensor, "n c"], weight: Float[Tensor, "c k k"]
    ) -> Float[Tensor, "n c"]:
        grid = values.view(1, *self.box.shape, -1).permute(0, 3, 1, 2)
        kernel = resized(weight, self.resolution)
        out = dense_depthwise(grid, kernel, None, self.config.normalisation)
        return out.permute(0, 2, 3, 1).reshape(values.shape)

    @cached_property
    def own(self) -> PointSupport:
        """The pixels that the tile stands for, as an image of their own."""
        here = self.points.take(self.interior)
        corner = self.inner
        size = torch.tensor([corner.shape], device=self.device)
        own = replace(here, y=here.y - corner.y, x=here.x - corner.x, sizes_px=size)
        return PointSupport(own, self.config)

    def to_lattice(self, features: Float[Tensor, "n c"]) -> Splat:
        return self.own.to_lattice(features[self.interior])


def resized(weight: Float[Tensor, "c k k"], resolution: int) -> Float[Tensor, "c m m"]:
    """The kernels of an operator for images of 2^resolution times the training's."""
    return resize_kernel(weight, 2.0**resolution) if resolution else weight


def _as_one(features: Float[Tensor, "b hl wl c"]) -> Splat:
    """Features of a lattice as if one point had come to every cell."""
    return Splat(features, torch.ones_like(features[..., :1]))
