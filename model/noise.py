"""Noise as a random field on the dyadic tree, known at any cell without touching its pixels.

The field is a pure function of (seed, stream, y, x, channel) on the infinite lattice. From a
cell's mean, one call of Philox-4x32-10 (Salmon et al., SC 2011) gives four normals n_i and its
children

    child_i = parent + 2^-j (n_i - mean(n)),    j = level of the children,

so that the mean of the children *is* the parent. Started with independent means of variance 4^-top
at the top level, the leaves are exactly iid N(0, 1): `white` noise. A cell's mean costs O(levels)
calls; a window, a tile and the whole image hold the same values.

White noise is so small in the coarse octaves that the layout of an image would be decided in the
last steps of a trajectory. `floored` noise (floor f > 0) is white inside the coarse cells, and its
means over them are a sum over octaves of smooth fields,

    v_j = S v_{j+1} + sqrt(e_j) n_j,    e_j = max(3 4^-(j+1), f),    j = top - 1 ... coarse,

where S doubles the resolution by bilinear interpolation, the subdivision mask (1, 3, 3, 1) / 4 of
quadratic B-splines: each octave adds C^1 blobs. (With S a mere repetition the blobs are squares on
a dyadic grid, and a network that has not learned to remove them all paints squares.) The whole is
normalised once, to unit variance at the pixel.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from model.lattice import Box
from model.philox import MASK, normals, philox_4x32
from model.points import Points


@dataclass(frozen=True)
class NoiseSpectrum:
    """Variance of the noise in every octave of the Haar basis.

    top_level: level whose cells start the recursion; at least the level of the training region.
    coarse_level: the noise inside cells of this level is white.
    floor: f, the least variance that an octave from coarse_level up adds; 0 is white noise.
    """

    top_level: int = 12
    coarse_level: int = 5
    floor: float = 0.005

    def innovation(self, level: int) -> float:
        """e_j, not normalised; at the top level the variance of the means there."""
        share = 1.0 if level == self.top_level else 0.75
        return max(share * 4.0**-level, self.floor)

    @property
    def scale(self) -> float:
        """The factor that gives the pixel unit variance."""
        return 1.0 / math.sqrt(_raw_mean_variance(self, 0))

    def mean_variance(self, level: int) -> float:
        """Variance of the mean over a cell of `level`, averaged over places."""
        return _raw_mean_variance(self, level) * self.scale**2

    def detail_variance(self, level: int) -> float:
        """Variance of (cell of `level` - its parent), averaged over places."""
        return self.mean_variance(level) - self.mean_variance(level + 1)


@lru_cache(maxsize=1024)
def _raw_mean_variance(spectrum: NoiseSpectrum, level: int) -> float:
    """The mean's variance before normalisation.

    An innovation at level j reaches the coarse lattice as the product of two copies of the kernel
    k = S^(j - coarse) delta. Its mean over blocks of m cells has, in one dimension and averaged
    over the period p of places, the variance (min(m, p) / p) sum_n (mean of k over block n)^2.
    """
    coarse = spectrum.coarse_level
    if spectrum.floor == 0.0:
        return 4.0**-level
    if level < coarse:
        return 4.0**-level - 4.0**-coarse + _raw_mean_variance(spectrum, coarse)
    total, kernel = 0.0, np.ones(1)
    block = 1 << (level - coarse)
    for j in range(coarse, spectrum.top_level + 1):
        period = 1 << (j - coarse)
        step = min(block, period)
        means = np.convolve(kernel, np.full(block, 1.0 / block))
        first = (block + period - 2) % step  # the kernel begins period - 1 cells before its origin
        one = float(np.square(means[first::step]).sum()) * step / period
        total += spectrum.innovation(j) * one**2
        doubled = np.zeros(2 * len(kernel) - 1)
        doubled[::2] = kernel
        kernel = np.convolve(doubled, [0.25, 0.75, 0.75, 0.25])
    return total


@dataclass(frozen=True)
class NoiseTree:
    """The field: means over cells, by recursion from the top of the tree.

    Counters are (y, x, 256 channel + level, stream): innovations are keyed by their own level and
    place, the children of a cell by the cell's place and their level, which is finer.

    Every method takes a batch of seeds, one field each. Values are float64 inside and float32
    outside.
    """

    spectrum: NoiseSpectrum
    channels: int
    stream: int = 0

    def _words(
        self,
        seeds: Int64[Tensor, "..."],
        level: int,
        y: Int64[Tensor, "..."],
        x: Int64[Tensor, "..."],
    ) -> tuple[Int64[Tensor, "..."], ...]:
        """Four words at every channel of cells; arguments broadcast, their axis 1 is the
        channels'.
        """
        device = seeds.device
        channel = torch.arange(self.channels, device=device)
        channel = channel.view(1, -1, *[1] * (seeds.dim() - 2))
        shape = torch.broadcast_shapes(seeds.shape, y.shape, x.shape, channel.shape)
        counter = (
            (y & MASK).expand(shape),
            (x & MASK).expand(shape),
            (channel * 256 + level).expand(shape),
            torch.full_like(seeds, self.stream).expand(shape),
        )
        return philox_4x32(counter, (seeds & MASK, (seeds >> 32) & MASK))

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
        where = seeds[:, None, None, None], level, y[:, None, :, None], x[:, None, None, :]
        four = parents[..., None] + self._apart(*where)
        return four.reshape(b, c, h, w, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(b, c, 2 * h, 2 * w)

    def _apart(
        self,
        seeds: Int64[Tensor, "..."],
        level: int,
        y: Int64[Tensor, "..."],
        x: Int64[Tensor, "..."],
    ) -> Float[Tensor, "*shape 4"]:
        """What the four children, at `level`, of cells (y, x) are apart from them."""
        found = normals(self._words(seeds, level, y, x))
        std = math.sqrt(self.spectrum.detail_variance(level) * 4.0 / 3.0)
        return std * (found - found.mean(dim=-1, keepdim=True))

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """Means over all cells of a box, float32; O(cells) work, O(levels) for a single cell."""
        return self.boxes(torch.tensor([seed], dtype=torch.int64, device=device), box)[0]

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed; float32."""
        return self.exact(seeds, box).float()

    def exact(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """`boxes` in float64."""
        spectrum = self.spectrum
        if box.level > spectrum.top_level:
            raise ValueError(
                f"a box of level {box.level} lies above the tree's top level {spectrum.top_level}"
            )
        if spectrum.floor == 0.0:
            outer = box.cover(spectrum.top_level)
            values = self._innovations(seeds, outer)
        elif box.level > spectrum.coarse_level:
            values = self._smooth(seeds, box.refine(spectrum.coarse_level))
            return F.avg_pool2d(values, 1 << (box.level - spectrum.coarse_level))
        else:
            outer = box.cover(spectrum.coarse_level)
            values = self._smooth(seeds, outer)
        for level in range(outer.level - 1, box.level - 1, -1):
            origin = torch.tensor([[outer.y, outer.x]], device=seeds.device)
            values = self.children(values, seeds, level, origin.expand(len(seeds), 2))
            inner, outer = box.cover(level), outer.refine(level)
            ys, xs = inner.slices_in(outer)
            values, outer = values[:, :, ys, xs], inner
        return values

    def windows(
        self,
        seeds: Int64[Tensor, " n"],
        level: int,
        corners: Int64[Tensor, "n 2"],
        side: int,
    ) -> Float[Tensor, "n c s s"]:
        """Squares of side x side cells of white noise at scattered corners (y, x), each of a field
        of its own; float64.
        """
        if self.spectrum.floor:
            raise ValueError("scattered windows are of white noise; set the floor to 0")
        # The side of what covers the window at each level, wherever it begins.
        sides = [side]
        for _ in range(level, self.spectrum.top_level):
            sides.append(sides[-1] // 2 + 1)
        inside = torch.arange(sides[-1], device=corners.device)
        first = corners >> (len(sides) - 1)
        rows, columns = (first[:, axis, None] + inside for axis in (0, 1))
        where = rows[:, None, :, None], columns[:, None, None, :]
        values = self._innovation(seeds[:, None, None, None], self.spectrum.top_level, *where)
        for up in reversed(range(len(sides) - 1)):
            values = self.children(values, seeds, level + up, first)
            finer = corners >> up
            skip, inside = finer - 2 * first, torch.arange(sides[up], device=corners.device)
            rows, columns = (skip[:, axis, None] + inside for axis in (0, 1))
            index = rows[:, :, None] * values.shape[-1] + columns[:, None, :]
            index = index.flatten(1)[:, None].expand(-1, self.channels, -1)
            values = values.flatten(2).gather(2, index).unflatten(2, (sides[up], sides[up]))
            first = finer
        return values

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Means over sparse cells of any levels, as `boxes` has them; float32, O(levels) a cell.

        `seeds` name the field of each image of the batch.
        """
        out = torch.empty(len(points), self.channels, device=seeds.device)
        for level in points.level.unique().tolist():
            here = (points.level == level).nonzero()[:, 0]
            found = self._at(seeds[points.image[here]], level, points.y[here], points.x[here])
            out[here] = found.float()
        return out

    def _at(
        self,
        seeds: Int64[Tensor, " n"],
        level: int,
        y: Int64[Tensor, " n"],
        x: Int64[Tensor, " n"],
    ) -> Float[Tensor, "n c"]:
        spectrum, coarse = self.spectrum, self.spectrum.coarse_level
        if level > spectrum.top_level:
            raise ValueError(
                f"a point of level {level} lies above the tree's top level {spectrum.top_level}"
            )
        if spectrum.floor and level > coarse:
            side = 1 << (level - coarse)
            inside = torch.arange(side, device=y.device)
            below = (
                (y[:, None, None] * side + inside[:, None]).expand(-1, side, side).flatten(),
                (x[:, None, None] * side + inside).expand(-1, side, side).flatten(),
            )
            values = self._smooth_at(seeds.repeat_interleave(side**2), coarse, *below)
            return values.view(len(y), side**2, -1).mean(dim=1)
        start = coarse if spectrum.floor else spectrum.top_level
        up = start - level
        if spectrum.floor:
            values = self._smooth_at(seeds, start, y >> up, x >> up)
        else:
            values = self._innovation(*_columns(seeds, start, y >> up, x >> up))
        for down in range(start - 1, level - 1, -1):
            up = down - level
            child = ((y >> up) & 1) * 2 + ((x >> up) & 1)
            apart = self._apart(*_columns(seeds, down, y >> (up + 1), x >> (up + 1)))
            values = (
                values + apart.gather(-1, child[:, None, None].expand_as(apart[..., :1]))[..., 0]
            )
        return values

    def _smooth_at(
        self,
        seeds: Int64[Tensor, " n"],
        level: int,
        y: Int64[Tensor, " n"],
        x: Int64[Tensor, " n"],
    ) -> Float[Tensor, "n c"]:
        """`_smooth` at single cells: each cell once, and so each of those that it is made of."""
        cells, back = torch.stack([seeds, y, x]).unique(dim=1, return_inverse=True)
        seeds, y, x = cells
        values = self._innovation(*_columns(seeds, level, y, x))
        if level == self.spectrum.top_level:
            return values[back]
        # Bilinear, as `_doubled`: three quarters of the parent, a quarter of the nearer neighbour.
        ys, xs = (torch.stack([p >> 1, (p >> 1) + 2 * (p & 1) - 1]) for p in (y, x))
        four = self._smooth_at(
            seeds.repeat(4),
            level + 1,
            ys.repeat_interleave(2, dim=0).flatten(),
            xs.repeat(2, 1).flatten(),
        ).view(2, 2, len(y), -1)
        rows = 0.75 * four[0] + 0.25 * four[1]
        return (0.75 * rows[0] + 0.25 * rows[1] + values)[back]

    def _smooth(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """Means over cells of the coarse level: innovations of every octave, interpolated down."""
        outer = box
        needed = [outer]
        for level in range(box.level + 1, self.spectrum.top_level + 1):
            outer = outer.cover(level).grow(1)
            needed.append(outer)
        values = self._innovations(seeds, outer)
        for inner in reversed(needed[:-1]):
            ys, xs = inner.slices_in(outer.grow(-1).refine(inner.level))
            values = _doubled(values)[:, :, ys, xs] + self._innovations(seeds, inner)
            outer = inner
        return values

    def _innovations(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """Independent normals of the innovation's variance on the cells of a box."""
        rows = torch.arange(box.y, box.y + box.height, device=seeds.device)
        columns = torch.arange(box.x, box.x + box.width, device=seeds.device)
        seeds = seeds[:, None, None, None]
        return self._innovation(
            seeds, box.level, rows[None, None, :, None], columns[None, None, None]
        )

    def _innovation(
        self,
        seeds: Int64[Tensor, "..."],
        level: int,
        y: Int64[Tensor, "..."],
        x: Int64[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        std = math.sqrt(self.spectrum.innovation(level)) * self.spectrum.scale
        return normals(self._words(seeds, level, y, x))[..., 0] * std


def _columns(
    seeds: Int64[Tensor, " n"], level: int, y: Int64[Tensor, " n"], x: Int64[Tensor, " n"]
) -> tuple[Int64[Tensor, "n 1"], int, Int64[Tensor, "n 1"], Int64[Tensor, "n 1"]]:
    return seeds[:, None], level, y[:, None], x[:, None]


def _doubled(values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Bilinear interpolation at the children of the inner cells: 2 (h - 2) x 2 (w - 2) values.

    Written out, since its values must not depend on the size of the box.
    """
    for axis in (2, 3):
        n = values.shape[axis]
        before, here, after = (values.narrow(axis, start, n - 2) for start in range(3))
        pair = (0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after)
        values = torch.stack(pair, dim=axis + 1).flatten(axis, axis + 1)
    return values
