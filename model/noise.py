"""White noise as a random field on the dyadic tree, known at any cell of any level without
touching its pixels.

The field is a pure function of (seed, stream, y, x, channel) on the infinite lattice. The mean
over a cell of the top level is a keyed normal; below it, one call of Philox-4x32-10 (Salmon et
al., SC 2011) at a cell gives four normals n_i, and its children are

    child_i = parent + 2^-j (n_i - mean(n)) ,       j = level of the children,

so that the mean of the children *is* the parent and the leaves are exactly iid N(0, 1) when the
top's variance is 4^-top. A cell's mean therefore costs O(levels) calls, and a window, a tile and
the whole image hold the same values.

`floored` noise keeps white noise below the coarse cell and raises each octave above it to a
variance of at least f: white noise is so small in the coarse octaves that the layout of an image
would be decided in the last steps of a trajectory. The whole is normalised once, to unit variance
at the pixel.
"""

import math
from dataclasses import dataclass

import torch
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
    """Variance of the noise in every octave of the tree.

    top_level: level whose cells have independent means; at least the level of the training region.
    coarse_level: cells of this level and finer octaves are white; coarser octaves are floored.
    floor: f, the least variance of an octave's detail (and of the top mean) from coarse_level up;
    0 is white noise.
    """

    top_level: int = 12
    coarse_level: int = 5
    floor: float = 0.005

    def _raw_detail(self, level: int) -> float:
        white = 3.0 * 4.0 ** -(level + 1)
        return max(white, self.floor) if level >= self.coarse_level else white

    def _raw_top(self) -> float:
        return max(4.0**-self.top_level, self.floor)

    @property
    def scale(self) -> float:
        """The factor that gives the pixel unit variance."""
        total = self._raw_top() + sum(self._raw_detail(level) for level in range(self.top_level))
        return 1.0 / math.sqrt(total)

    def detail_variance(self, level: int) -> float:
        """Variance of (cell of `level` - its parent)."""
        return self._raw_detail(level) * self.scale**2

    def mean_variance(self, level: int) -> float:
        """Variance of the mean over a cell of `level`."""
        finer = sum(self._raw_detail(j) for j in range(level, self.top_level))
        return (self._raw_top() + finer) * self.scale**2


@dataclass(frozen=True)
class NoiseTree:
    """The field: means over cells, by recursion from the top of the tree.

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

    def top(
        self, seeds: Int64[Tensor, " b"], y: Int64[Tensor, "b h"], x: Int64[Tensor, "b w"]
    ) -> Float[Tensor, "b c h w"]:
        """Means over top cells at rows y and columns x."""
        std = math.sqrt(self.spectrum.mean_variance(self.spectrum.top_level))
        words = self._words(seeds, self.spectrum.top_level, y, x)
        # Children are keyed by their own level, below top_level: no counter is used twice.
        return _normals(words)[..., 0] * std

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
        b, device = len(seeds), seeds.device
        top = self.spectrum.top_level
        if box.level > top:
            raise ValueError(f"a box of level {box.level} lies above the tree's top level {top}")
        outer = box.cover(top)
        rows = torch.arange(outer.y, outer.y + outer.height, device=device).expand(b, -1)
        columns = torch.arange(outer.x, outer.x + outer.width, device=device).expand(b, -1)
        values = self.top(seeds, rows, columns)
        for level in range(top - 1, box.level - 1, -1):
            origin = torch.tensor([[outer.y, outer.x]], device=device).expand(b, 2)
            values = self.children(values, seeds, level, origin)
            inner, outer = box.cover(level), outer.refine(level)
            ys, xs = inner.slices_in(outer)
            values, outer = values[:, :, ys, xs], inner
        return values
