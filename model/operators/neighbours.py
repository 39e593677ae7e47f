"""Which points lie within reach of which: found once for a set of points, used by every block.

Points are neighbours if they belong to one image and one level and lie at most r = kernel // 2
cells of that level apart in y and in x. Every (image, level) is laid out as rows of a plane of its
own, and all planes one behind the other in one int64 key,

    key = first + (y + r) stride + x,    stride = width + r,    rows = height + 2 r,

so that keys r to the left or right, or r rows up or down, never belong to another row or plane.
The neighbours of a point in row y + dy are then one interval of the sorted keys, found by two
binary searches: O(n k log n) time and O(n k + pairs) memory, whatever the size of the image.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Int32, Int64
from torch import Tensor

from model.points import Points


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of each of n points, without the point itself, in compressed rows.

    Those of point i are neighbour[start[i] : start[i + 1]], and tap says where they lie:
    (dy + r) kernel + dx + r, increasing within a row, as `conv2d` counts the taps of its weight.
    j is i's neighbour at a tap exactly if i is j's at the opposite one, kernel^2 - 1 - tap.
    """

    kernel: int
    start: Int64[Tensor, " n1"]
    neighbour: Int64[Tensor, " p"]
    tap: Int32[Tensor, " p"]

    def __len__(self) -> int:
        """Number of points."""
        return len(self.start) - 1

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """Neighbours of every point."""
        return self.start.diff()

    @cached_property
    def ordered_by_tap(
        self,
    ) -> tuple[Int64[Tensor, " taps1"], Int64[Tensor, " p"], Int64[Tensor, " p"]]:
        """(first pair of every tap, points, their neighbours): the pairs tap by tap, and within
        one in the order of the points.
        """
        order = self.tap.argsort(stable=True)
        sizes = torch.bincount(self.tap, minlength=self.kernel**2)
        return (
            F.pad(sizes.cumsum(0), (1, 0)),
            torch.repeat_interleave(self.counts)[order],
            self.neighbour[order],
        )

    @cached_property
    def by_tap(self) -> list[tuple[int, Int64[Tensor, " q"], Int64[Tensor, " q"]]]:
        """(tap, points, their neighbours at it) for every tap that occurs; a point occurs at most
        once in each.
        """
        first, point, neighbour = self.ordered_by_tap
        sizes = first.diff().tolist()
        parts = zip(point.split(sizes), neighbour.split(sizes), strict=True)
        return [(tap, i, j) for tap, (i, j) in enumerate(parts) if len(i)]

    def to(self, device: torch.device) -> "Neighbours":
        return Neighbours(
            self.kernel,
            self.start.to(device),
            self.neighbour.to(device),
            self.tap.to(device),
        )


def find_neighbours(points: Points, kernel: int) -> Neighbours:
    """Neighbours of all points for a depthwise convolution with `kernel` x `kernel` taps.

    The order of the points is arbitrary and kept; none may occur twice.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"a kernel needs an odd number of taps to have a centre, not {kernel}")
    r, device = kernel // 2, points.y.device
    key, stride = _keys(points, r)
    key_sorted, order = key.sort()
    again = (key_sorted.diff() == 0).nonzero()
    if len(again):
        i = int(order[again[0]])
        raise ValueError(
            f"{len(again)} points occur more than once, first (image, level, y, x) = "
            f"({int(points.image[i])}, {int(points.level[i])}, {int(points.y[i])}, "
            f"{int(points.x[i])}); a cell has one value, so keep one point of each"
        )
    reach = torch.arange(-r, r + 1, device=device)
    row = key_sorted[:, None] + reach * stride[order][:, None]
    first = torch.empty_like(row)
    size = torch.empty_like(row)
    first[order] = torch.searchsorted(key_sorted, row - r)
    size[order] = torch.searchsorted(key_sorted, row + r, right=True)
    size -= first

    # Pairs in the order of (point, dy, dx): the segment of each, and its place in it.
    size = size.flatten()
    segment = torch.repeat_interleave(size)
    place = torch.arange(len(segment), device=device) - (size.cumsum(0) - size)[segment]
    found = first.flatten()[segment] + place
    point, dy = segment // kernel, segment % kernel - r
    dx = key_sorted[found] - key[point] - dy * stride[point]
    tap = (dy + r) * kernel + dx + r
    other = tap != kernel**2 // 2
    start = F.pad((size.view(-1, kernel).sum(dim=1) - 1).cumsum(0), (1, 0))
    return Neighbours(kernel, start, order[found[other]], tap[other].int())


def _keys(points: Points, r: int) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Each point's key and the stride of its rows."""
    levels, which = points.level.unique(return_inverse=True)
    first, strides, total = [], [], 0
    for height, width in points.sizes_px.tolist():
        for level in levels.tolist():
            rows, stride = ((height - 1) >> level) + 1 + 2 * r, ((width - 1) >> level) + 1 + r
            first.append(total)
            strides.append(stride)
            total += rows * stride
    if total > torch.iinfo(torch.int64).max:
        raise ValueError(
            f"the {points.batch} images of this batch have {total:.3g} cells with their margins, "
            f"more than the {2**63:.3g} that int64 can number; use smaller batches or images"
        )
    plane = points.image * len(levels) + which
    stride = torch.tensor(strides, dtype=torch.int64, device=points.y.device)[plane]
    origin = torch.tensor(first, dtype=torch.int64, device=points.y.device)[plane]
    return origin + (points.y + r) * stride + points.x, stride
