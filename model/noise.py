"""Noise as a random field on the dyadic tree, known at any cell without touching its pixels.

The field is a pure function of (seed, stream, y, x, channel) on the infinite lattice. From a
cell's mean, one call of Philox-4x32-10 (Salmon et al., SC 2011) gives four normals n_i and its
children

    child_i = parent + 2^-j (n_i - mean(n)),    j = level of the children,

so that the mean of the children *is* the parent. Started with independent means of variance 4^-top
at the top level, the leaves are exactly iid N(0, 1): `white` noise. A cell's mean costs O(levels)
calls; sparse points, a window, a tile and the whole image hold the same values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.cells import Cells
from model.lattice import Box
from model.philox import MASK, normals, philox_4x32
from model.points import Points
from model.spectrum import NoiseSpectrum

_CELLS_AT_ONCE = 1 << 18


@runtime_checkable
class Noise(Protocol):
    """A random field that is known at any place; leaves: `NoiseTree`, `noise_band.BandNoise`,
    `mollify.MollifiedNoise`.

    A batch of seeds names as many independent fields, and so does another stream of one seed.
    Values are float32, the same bit for bit however they are asked for.
    """

    @property
    def channels(self) -> int: ...

    def on_stream(self, stream: int) -> "Noise":
        """The independent field of the same law that `stream` names."""
        ...

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """All cells of a box."""
        ...

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed."""
        ...

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Sparse cells; image i of the points is the field of seeds[i]."""
        ...


@dataclass(frozen=True)
class NoiseTree:
    """White noise: means over cells, by recursion from the top of the tree.

    Counters are (y, x, 256 channel + level, stream): the means at the top are keyed by their own
    level and place, the children of a cell by the cell's place and their level, which is finer.
    The tree goes on below the pixel, where the level counts modulo 256: white noise has means of
    variance 4^-level at any.

    Every method takes a batch of seeds, one field each. Values are float64 inside and float32
    outside.
    """

    spectrum: NoiseSpectrum
    channels: int
    stream: int = 0

    def __post_init__(self) -> None:
        if self.spectrum.mollifier_sigma_px:
            raise ValueError(
                "a noise tree's leaves are not mollified, but its spectrum is that of noise "
                f"mollified by {self.spectrum.mollifier_sigma_px:g} px; use MollifiedNoise"
            )

    def on_stream(self, stream: int) -> "NoiseTree":
        return replace(self, stream=stream)

    def _normals(
        self,
        seeds: Int64[Tensor, "..."],
        level: int,
        y: Int64[Tensor, "..."],
        x: Int64[Tensor, "..."],
    ) -> Float[Tensor, "n c *cells 4"]:
        """Four normals of every channel at cells (y, x) of the fields of `seeds`, which broadcast
        against each other.
        """
        shape = torch.broadcast_shapes(seeds.shape, y.shape, x.shape)
        shape = torch.Size((shape[0], self.channels, *shape[1:]))
        channel = torch.arange(self.channels, device=seeds.device)
        place = channel.view(-1, *(1 for _ in shape[2:])) * 256 + level % 256
        counter = (
            (y & MASK).unsqueeze(1).expand(shape),
            (x & MASK).unsqueeze(1).expand(shape),
            place.expand(shape),
            torch.full_like(place, self.stream).expand(shape),
        )
        low, high = (word.unsqueeze(1) for word in (seeds & MASK, (seeds >> 32) & MASK))
        return normals(philox_4x32(counter, (low, high)))

    def _details(
        self,
        seeds: Int64[Tensor, "..."],
        level: int,
        y: Int64[Tensor, "..."],
        x: Int64[Tensor, "..."],
    ) -> Float[Tensor, "n c *cells 4"]:
        """What the four children, of `level`, of the cells (y, x) add to them."""
        drawn = self._normals(seeds, level, y, x)
        # Written out, since the order of a library's sum may depend on the shape.
        mean = (drawn[..., 0] + drawn[..., 1] + drawn[..., 2] + drawn[..., 3]) * 0.25
        std = math.sqrt(self.spectrum.detail_variance(level) * 4.0 / 3.0)
        return std * (drawn - mean[..., None])

    def children(
        self,
        parents: Float[Tensor, "b c h w"],
        seeds: Int64[Tensor, " b"],
        level: int,
        origins: Int64[Tensor, "b 2"],
    ) -> Float[Tensor, "b c h2 w2"]:
        """The 2h x 2w cells of `level` inside h x w parents whose first cell (of level + 1) is
        `origins`.
        """
        b, c, h, w = parents.shape
        y = origins[:, :1] + torch.arange(h, device=parents.device)
        x = origins[:, 1:] + torch.arange(w, device=parents.device)
        details = self._details(seeds[:, None, None], level, y[:, :, None], x[:, None, :])
        four = parents[..., None] + details
        return four.reshape(b, c, h, w, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(b, c, 2 * h, 2 * w)

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """Means over all cells of a box, float32; O(cells) work, O(levels) for a single cell."""
        return self.boxes(torch.tensor([seed], dtype=torch.int64, device=device), box)[0]

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed; float32."""
        return self.means(seeds, box).float()

    def _check(self, level: int) -> None:
        if level > self.spectrum.top_level:
            raise ValueError(
                f"cells of level {level} lie above the tree's top level {self.spectrum.top_level}"
            )

    def means(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """`boxes` before it is rounded: float64."""
        self._check(box.level)
        outer = box.cover(self.spectrum.top_level)
        rows = torch.arange(outer.y, outer.y + outer.height, device=seeds.device)
        columns = torch.arange(outer.x, outer.x + outer.width, device=seeds.device)
        top = self._top(seeds[:, None, None], rows[None, :, None], columns[None, None])
        return self.descend(top, seeds, outer.level, box)

    def descend(
        self, values: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"], start: int, box: Box
    ) -> Float[Tensor, "b c h2 w2"]:
        """The cells of a box: values at the cells of level `start` that cover it, and the details
        of the levels below.
        """
        outer = box.cover(start)
        for level in range(start - 1, box.level - 1, -1):
            origin = torch.tensor([[outer.y, outer.x]], device=seeds.device)
            values = self.children(values, seeds, level, origin.expand(len(seeds), 2))
            inner, outer = box.cover(level), outer.refine(level)
            ys, xs = inner.slices_in(outer)
            values, outer = values[:, :, ys, xs], inner
        return values

    def _top(
        self, seeds: Int64[Tensor, "..."], y: Int64[Tensor, "..."], x: Int64[Tensor, "..."]
    ) -> Float[Tensor, "n c *cells"]:
        """The independent means over cells of the top level."""
        level = self.spectrum.top_level
        std = math.sqrt(self.spectrum.mean_variance(level))
        return self._normals(seeds, level, y, x)[..., 0] * std

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Means over sparse cells of any levels, float32; image i of the points is the field of
        seeds[i]. Equal to `boxes` bit for bit; O(levels) calls a cell, fewer where cells share
        ancestors.
        """
        return at_points(self.cells, self.channels, seeds, points)

    def cells(self, seeds: Int64[Tensor, " b"], level: int, cells: Cells) -> Float[Tensor, "n c"]:
        """Means over cells of one level, anywhere on the lattice, float64 and at once: of `at`
        each chunk.
        """
        self._check(level)
        if level == self.spectrum.top_level:
            return self._top(seeds[cells.image], cells.y, cells.x)
        parents, place = cells.parents().distinct()
        return self.families(seeds, level, parents)[place, :, 2 * (cells.y & 1) + (cells.x & 1)]

    def families(
        self, seeds: Int64[Tensor, " b"], level: int, parents: Cells
    ) -> Float[Tensor, "n c 4"]:
        """The four children, of `level`, of sparse cells."""
        return self.split(self.cells(seeds, level + 1, parents), seeds, level, parents)

    def split(
        self,
        values: Float[Tensor, "n c"],
        seeds: Int64[Tensor, " b"],
        level: int,
        parents: Cells,
    ) -> Float[Tensor, "n c 4"]:
        """`children` of sparse cells whose values are given."""
        details = self._details(seeds[parents.image], level, parents.y, parents.x)
        return values[..., None] + details


def at_points(
    cells: Callable[[Tensor, int, Cells], Tensor],
    channels: int,
    seeds: Int64[Tensor, " b"],
    points: Points,
) -> Float[Tensor, "n c"]:
    """`Noise.at` of a field that knows the cells of one level: level by level, so many at once."""
    if len(seeds) != points.batch:
        raise ValueError(
            f"{len(seeds)} seeds do not fit points of {points.batch} images; give one a field"
        )
    values = torch.empty(len(points), channels, device=seeds.device)
    levels = points.level - points.resolution
    for level in levels.unique().tolist():
        for part in torch.nonzero(levels == level)[:, 0].split(_CELLS_AT_ONCE):
            there = Cells(points.image[part], points.y[part], points.x[part])
            values[part] = cells(seeds, level, there).float()
    return values
