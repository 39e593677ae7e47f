"""Points -> coarse lattice -> points.

The lattice of level L has one cell of 2^L px a side for every 2^L px of an image, the last ones
sticking out where it does not divide. A batch shares one lattice, as large as its largest image
needs; cells outside an image are absent and hold zero. Tensors over a lattice are channels-last.
Levels of lattices are the training's: an image of another resolution has the same lattice.

Down: `nearest_points` takes the papers' three nearest points of every cell's centre, by inverse
squared distance. `Splat` takes the mean over the points inside each cell, beside their number: a
sum, so that any partition of the points gives the same. Up: `interpolate` reads the lattice
bilinearly at the points' centres.

Places on a lattice are (y, x) in units of its cells, 0 at the first cell's centre: neither
transposed nor stretched to [-1, 1], which is how the papers' ancestor came to read one transposed
quadrant.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from model.nearest import nearest
from model.points import Points


def lattice_shape(points: Points, level: int) -> tuple[int, int]:
    """(hl, wl) of the lattice of a level that holds every image of the batch."""
    height, width = (_last_cells(points, level).amax(dim=0) + 1).tolist()
    return height, width


def lattice_present(points: Points, level: int) -> Bool[Tensor, "b hl wl"]:
    """Which cells of the lattice hold a pixel of their image."""
    hl, wl = lattice_shape(points, level)
    device = points.image.device
    extent = _last_cells(points, level) + 1
    rows = torch.arange(hl, device=device) < extent[:, :1]
    columns = torch.arange(wl, device=device) < extent[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def _last_cells(points: Points, level: int) -> Int64[Tensor, "b 2"]:
    """The last row and column of the lattice that hold a pixel of each image."""
    own_level = level + points.resolution
    if own_level < 0:
        raise ValueError(
            f"a lattice of level {level} is finer than the pixels of images of resolution "
            f"2^{points.resolution}; paint them finer"
        )
    return points.sizes_px - 1 >> own_level


def cells_of(points: Points, level: int) -> Int64[Tensor, " n"]:
    """The cell of the lattice, counted through the batch row by row, that each point lies in."""
    if len(points) and int(points.level.max()) > level + points.resolution:
        raise ValueError(
            f"a point of level {int(points.level.max())} is coarser than the lattice of level "
            f"{level} and lies in many of its cells; choose a coarser lattice"
        )
    hl, wl = lattice_shape(points, level)
    up = level + points.resolution - points.level
    return (points.image * hl + (points.y >> up)) * wl + (points.x >> up)


@dataclass(frozen=True)
class NearestPoints:
    """The nearest points of every cell's centre and their weights, which sum to one.

    An image with fewer points uses those that it has, one without any is zero, and a point at the
    centre itself takes all (the limit of inverse squared distance). Where a weight is zero its
    index means nothing.
    """

    index: Int64[Tensor, "b hl wl k"]
    weight: Float[Tensor, "b hl wl k"]

    def gather(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "b hl wl c"]:
        """Features of points on the lattice."""
        if len(features) == 0:
            return features.new_zeros(*self.index.shape[:-1], features.shape[1])
        neighbours = self.index.shape[-1]
        found = F.embedding_bag(
            self.index.view(-1, neighbours),
            features,
            per_sample_weights=self.weight.view(-1, neighbours).to(features.dtype),
            mode="sum",
        )
        return found.view(*self.index.shape[:-1], -1)


def nearest_points(points: Points, level: int, neighbours: int = 3) -> NearestPoints:
    """The `neighbours` nearest points of the cells of a level; once for one set of points."""
    present = lattice_present(points, level)
    image, y, x = present.nonzero().unbind(dim=-1)
    cells, own_level = torch.stack([y, x], dim=-1), level + points.resolution
    found, squared = nearest(points, image, cells, own_level, neighbours)
    exists = found >= 0
    closeness = torch.where(exists, 1.0 / squared.clamp_min(1).double(), 0.0)
    at_centre = exists & (squared == 0)
    closeness = torch.where(at_centre.any(dim=-1, keepdim=True), at_centre.double(), closeness)
    weight = closeness / closeness.sum(dim=-1, keepdim=True).clamp_min(torch.finfo().tiny)
    shape = (*present.shape, neighbours)
    index = torch.zeros(shape, dtype=torch.int64, device=present.device)
    index[image, y, x] = found.clamp_min(0)
    weights = torch.zeros(shape, dtype=torch.float64, device=present.device)
    weights[image, y, x] = weight
    return NearestPoints(index, weights)


@dataclass(frozen=True)
class Splat:
    """Sums over the points in each cell of a lattice, and their number; those of disjoint sets of
    points add up.
    """

    total: Float[Tensor, "b hl wl c"]
    count: Float[Tensor, "b hl wl 1"]

    @classmethod
    def accumulate(cls, points: Points, features: Float[Tensor, "n c"], level: int) -> "Splat":
        cells = cells_of(points, level)
        shape = (points.batch, *lattice_shape(points, level))
        precise = features if features.dtype == torch.float64 else features.float()
        ones = torch.cat([precise, precise.new_ones(len(precise), 1)], dim=-1)
        sums = precise.new_zeros(shape[0] * shape[1] * shape[2], ones.shape[1])
        sums = sums.index_add(0, cells, ones).view(*shape, -1)
        return cls(sums[..., :-1], sums[..., -1:])

    def __add__(self, other: "Splat") -> "Splat":
        return Splat(self.total + other.total, self.count + other.count)

    def apply(self) -> Float[Tensor, "b hl wl c1"]:
        """Means, zero where there is no point, and as last channel log2(1 + number of points)."""
        return torch.cat([self.total / self.count.clamp_min(1), torch.log2(1 + self.count)], -1)


def quadrature_weights(points: Points, level: int) -> Float[Tensor, " n"]:
    """w = 1 / (occupied cells x points in the cell), which sum to one in every image, float64.

    A sum over points with these weights stands for the mean over the image, however unevenly the
    points were drawn.
    """
    cells = cells_of(points, level)
    hl, wl = lattice_shape(points, level)
    count = torch.bincount(cells, minlength=points.batch * hl * wl)
    occupied = (count > 0).view(points.batch, -1).sum(dim=-1)
    return 1.0 / (occupied[points.image] * count[cells]).double()


def interpolate(
    lattice: Float[Tensor, "b hl wl c"], points: Points, level: int
) -> Float[Tensor, "n c"]:
    """A lattice of a level, read bilinearly at the points' centres; constant beyond the centres
    of an image's outermost cells.
    """
    if lattice.shape[:3] != (points.batch, *lattice_shape(points, level)):
        raise ValueError(
            f"the points need a lattice of {points.batch} x {lattice_shape(points, level)} cells "
            f"at level {level}, but got {tuple(lattice.shape[:3])}"
        )
    last = _last_cells(points, level)[points.image]
    place = points.centres_px() * 2.0**-level - 0.5
    return bilinear(lattice, points.image, torch.minimum(place, last.to(place)))


def bilinear(
    lattice: Float[Tensor, "b h w c"],
    image: Int64[Tensor, " n"],
    place: Float[Tensor, "n 2"],
) -> Float[Tensor, "n c"]:
    """Values at (y, x) in units of the lattice, of the image that each place belongs to; constant
    beyond its rim.
    """
    b, h, w, c = lattice.shape
    flat = lattice.reshape(b * h * w, c)
    last = torch.tensor([h - 1, w - 1], device=place.device)
    place = torch.minimum(place.clamp_min(0), last.to(place))
    first = torch.minimum(place.floor().long(), (last - 1).clamp_min(0))
    after = torch.minimum(first + 1, last)
    ty, tx = (place - first).to(lattice.dtype).unsqueeze(-1).unbind(dim=1)

    def read(y: Int64[Tensor, " n"], x: Int64[Tensor, " n"]) -> Float[Tensor, "n c"]:
        return flat.index_select(0, (image * h + y) * w + x)

    upper = torch.lerp(read(first[:, 0], first[:, 1]), read(first[:, 0], after[:, 1]), tx)
    lower = torch.lerp(read(after[:, 0], first[:, 1]), read(after[:, 0], after[:, 1]), tx)
    return torch.lerp(upper, lower, ty)
