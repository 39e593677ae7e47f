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

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(
    counter: tuple[Int64[Tensor, "..."], ...], key: tuple[Int64[Tensor, "..."], ...]
) -> tuple[Int64[Tensor, "..."], ...]:
    """Philox-4x32-10: four 32-bit words (held in int64) from a counter of four and a key of two
    words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The low 64 bits of a product are right although int64 wraps; sign bits are masked.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _normals(words: tuple[Int64[Tensor, "..."], ...]) -> Float[Tensor, "*shape 4"]:
    """Four standard normals (float64) from four 32-bit words, by Box and Muller."""
    u = [(word.double() + 0.5) * 2.0**-32 for word in words]
    out = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r, phi = torch.sqrt(-2.0 * torch.log(radius)), 2.0 * math.pi * angle
        out += [r * torch.cos(phi), r * torch.sin(phi)]
    return torch.stack(out, dim=-1)


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
        seeds: Int64[Tensor, " b"],
        level: int,
        y: Int64[Tensor, "b h"],
        x: Int64[Tensor, "b w"],
    ) -> tuple[Int64[Tensor, "b c h w"], ...]:
        device = seeds.device
        shape = (len(seeds), self.channels, y.shape[1], x.shape[1])
        channel = torch.arange(self.channels, device=device)[None, :, None, None]
        counter = (
            (y & _MASK)[:, None, :, None].expand(shape),
            (x & _MASK)[:, None, None, :].expand(shape),
            (channel * 256 + level).expand(shape),
            torch.full((1, 1, 1, 1), self.stream, device=device).expand(shape),
        )
        key = tuple(word[:, None, None, None] for word in (seeds & _MASK, (seeds >> 32) & _MASK))
        return philox_4x32(counter, key)

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
        normals = _normals(self._words(seeds, level, y, x))
        normals = normals - normals.mean(dim=-1, keepdim=True)
        std = math.sqrt(self.spectrum.detail_variance(level) * 4.0 / 3.0)
        four = parents[..., None] + std * normals
        return four.reshape(b, c, h, w, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(b, c, 2 * h, 2 * w)

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """Means over all cells of a box, float32; O(cells) work, O(levels) for a single cell."""
        return self.boxes(torch.tensor([seed], dtype=torch.int64, device=device), box)[0]

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed; float32."""
        return self._boxes(seeds, box).float()

    def _boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
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
        b = len(seeds)
        words = self._words(seeds, box.level, rows.expand(b, -1), columns.expand(b, -1))
        std = math.sqrt(self.spectrum.innovation(box.level)) * self.spectrum.scale
        return _normals(words)[..., 0] * std


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
