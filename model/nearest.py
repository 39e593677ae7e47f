"""The nearest points of lattice cells, exactly, without looking at all pairs.

Points are sorted by the bits of their coordinates, interleaved (Morton order), so that the points
of any square of a quadtree are one range of the list, found by bisection. For every query a few
squares are kept and split until they hold few points; a square is dropped once it is farther than
k points are known to be. The search begins with the nine squares around a query, of the lattice's
own cells, and only queries whose neighbours may lie beyond these begin again with larger ones. So
the work is proportional to the queries and hardly grows with the points: 3 of 65,536 or of 10^7.

Distances are integers in half pixels, so that they have no rounding, and equal ones are decided
by the order of the points' own coordinates: an answer does not depend on the order of the list.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor

from model.points import Points

LEAF = 8
MOST_BITS = 60
_FAR = 2**62


def nearest(
    points: Points,
    image: Int64[Tensor, " m"],
    cells: Int64[Tensor, "m 2"],
    level: int,
    neighbours: int,
) -> tuple[Int64[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """The `neighbours` points nearest to the centres of cells (y, x) of `level` of the images
    `image`, the nearest first, and their squared distances in half pixels.

    Index -1 where an image has fewer points.
    """
    assert neighbours <= LEAF
    tree = _Tree(points, level)
    centres = (2 * cells + 1) << level
    found = image.new_full((len(image), neighbours), -1)
    squared = image.new_full((len(image), neighbours), _FAR)
    left = torch.arange(len(image), device=image.device)
    while len(left):
        safe = tree.covered(centres[left], level)
        last = safe >= tree.side
        tried = left[last | tree.has(image[left], centres[left], level, neighbours)]
        if len(tried):
            found[tried], squared[tried] = tree.search(
                image[tried], centres[tried], level, neighbours
            )
        left = left[~last & (squared[left, -1] >= safe**2)]
        level += 1
    return found, squared


class _Tree:
    """Points in Morton order; a square of level s, 2^(s + 1) half pixels wide, is a range."""

    def __init__(self, points: Points, level: int) -> None:
        self.centres = torch.stack([points.y, points.x], dim=-1) * 2 + 1 << points.level[:, None]
        longest = 2 * int(points.sizes_px.max())
        farthest = max(longest, int(self.centres.max()) if len(points) else 0)
        self.bits = max(farthest.bit_length(), level + 1)
        self.side = 1 << self.bits
        if 2 * self.bits + points.batch.bit_length() > MOST_BITS:
            raise ValueError(
                f"{points.batch} images of up to {longest // 2} px a side have too many places to "
                "number; search fewer images at once"
            )
        keys = (points.image << 2 * self.bits) + interleave(self.centres)
        self.keys, self.order = keys.sort(stable=True)
        self.centres = self.centres[self.order]

    def covered(self, centres: Int64[Tensor, "m 2"], level: int) -> Int64[Tensor, " m"]:
        """How far, in half pixels, the nine squares around a place reach on every side."""
        side = 2 << level
        inside = centres % side
        return torch.minimum(inside, side - inside).amin(dim=-1) + side

    def has(
        self, image: Int64[Tensor, " m"], centres: Int64[Tensor, "m 2"], level: int, k: int
    ) -> Bool[Tensor, " m"]:
        """Whether the nine squares of `level` around each place hold k points."""
        start, stop = self._ranges(image, self._around(centres, level), level)
        return (stop - start).sum(dim=-1) >= k

    def _around(self, centres: Int64[Tensor, "m 2"], level: int) -> Int64[Tensor, "m 9 2"]:
        around = torch.cartesian_prod(*[torch.arange(-1, 2, device=centres.device)] * 2)
        return (centres >> (level + 1))[:, None] + around

    def search(
        self,
        image: Int64[Tensor, " m"],
        centres: Int64[Tensor, "m 2"],
        level: int,
        k: int,
    ) -> tuple[Int64[Tensor, "m k"], Int64[Tensor, "m k"]]:
        """The k nearest points within the nine squares of `level` around each place."""
        squares = self._around(centres, level)
        quarters = torch.cartesian_prod(*[torch.arange(2, device=image.device)] * 2)
        start, stop = self._ranges(image, squares, level)
        while True:
            squares, start, stop = self._prune(centres, squares, start, stop, level, k)
            if level < 0 or int((stop - start).max()) <= LEAF:
                break
            squares = (2 * squares[:, :, None] + quarters).flatten(1, 2)
            level -= 1
            start, stop = self._ranges(image, squares, level)
        return self._nearest_in(centres, start, stop, k)

    def _ranges(
        self, image: Int64[Tensor, " m"], squares: Int64[Tensor, "m f 2"], level: int
    ) -> tuple[Int64[Tensor, "m f"], Int64[Tensor, "m f"]]:
        """Which part of the list lies in each square; empty where there is no such square."""
        shift = level + 1
        outside = ((squares < 0) | (squares >> max(self.bits - shift, 0) > 0)).any(dim=-1)
        number = interleave(squares.clamp(0, (self.side - 1) >> shift))
        first = (image[:, None] << 2 * self.bits) + (number << 2 * shift)
        start = torch.searchsorted(self.keys, first)
        stop = torch.searchsorted(self.keys, first + (1 << 2 * shift))
        return start, torch.where(outside, start, stop)

    def _prune(
        self,
        centres: Int64[Tensor, "m 2"],
        squares: Int64[Tensor, "m f 2"],
        start: Int64[Tensor, "m f"],
        stop: Int64[Tensor, "m f"],
        level: int,
        k: int,
    ) -> tuple[Int64[Tensor, "m g 2"], Int64[Tensor, "m g"], Int64[Tensor, "m g"]]:
        """Squares that may hold one of the k nearest: no farther than k points surely are."""
        side = 1 << (level + 1)
        low = squares * side - centres[:, None]
        high = low + side - 1
        closest = torch.maximum(low, -high).clamp_min(0).square().sum(dim=-1)
        farthest = torch.maximum(-low, high).square().sum(dim=-1)
        count = stop - start
        copies = torch.arange(k, device=count.device) < count[..., None]
        bounds = torch.where(copies, farthest[..., None], _FAR).flatten(1)
        bound = bounds.topk(k, dim=-1, largest=False).values[:, -1:]
        kept = (count > 0) & (closest <= bound)
        width = max(int(kept.sum(dim=-1).max()), 1)
        order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :width]
        start, stop = start.gather(1, order), stop.gather(1, order)
        stop = torch.where(kept.gather(1, order), stop, start)
        return squares.gather(1, order[..., None].expand(-1, -1, 2)), start, stop

    def _nearest_in(
        self,
        centres: Int64[Tensor, "m 2"],
        start: Int64[Tensor, "m f"],
        stop: Int64[Tensor, "m f"],
        k: int,
    ) -> tuple[Int64[Tensor, "m k"], Int64[Tensor, "m k"]]:
        """The k nearest of the points in these ranges, by distance and then by their own order."""
        places = start[..., None] + torch.arange(LEAF, device=start.device)
        exists: Bool[Tensor, "m f"] = (places < stop[..., None]).flatten(1)
        places = places.flatten(1).clamp_max(max(len(self.order) - 1, 0))
        if len(self.order) == 0:
            empty = places[:, :1].expand(-1, k)
            return torch.full_like(empty, -1), torch.full_like(empty, _FAR)
        squared = (self.centres[places] - centres[:, None]).square().sum(dim=-1)
        squared = torch.where(exists, squared, _FAR)
        places = torch.where(exists, places, len(self.order))
        by_place = places.argsort(dim=-1, stable=True)
        squared, places = squared.gather(1, by_place), places.gather(1, by_place)
        nearest = squared.argsort(dim=-1, stable=True)[:, :k]
        squared, places = squared.gather(1, nearest), places.gather(1, nearest)
        found = torch.where(squared < _FAR, self.order[places.clamp_max(len(self.order) - 1)], -1)
        lacking = k - found.shape[1]
        if lacking > 0:
            found = F.pad(found, (0, lacking), value=-1)
            squared = F.pad(squared, (0, lacking), value=_FAR)
        return found, squared


def interleave(places: Int64[Tensor, "*n 2"]) -> Int64[Tensor, "*n"]:
    """The bits of y and x, alternating, x lowest; both below 2^31."""
    spread = places
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        spread = (spread | (spread << shift)) & mask
    return (spread[..., 0] << 1) | spread[..., 1]
