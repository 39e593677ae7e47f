"""Noise as a random field on the dyadic tree, known at any cell without touching its pixels.

The field is a pure function of (seed, stream, y, x, channel) on the infinite lattice. From a
cell's mean, one call of Philox-4x32-10 (Salmon et al., SC 2011) gives four normals n_i and its
children

    child_i = parent + 2^-j (n_i - mean(n)),    j = level of the children,

so that the mean of the children *is* the parent. Started with independent means of variance 4^-top
at the top level, the leaves are exactly iid N(0, 1): `white` noise. A cell's mean costs O(levels)
calls; sparse points, a window, a tile and the whole image hold the same values.

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
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
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
    """A random field that is known at any place; leaves: `NoiseTree`, `mollify.MollifiedNoise`.

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
    """The field: means over cells, by recursion from the top of the tree.

    Counters are (y, x, 256 channel + level, stream): innovations are keyed by their own level and
    place, the children of a cell by the cell's place and their level, which is finer. The tree
    goes on below the pixel, where the level counts modulo 256: white noise has means of variance
    4^-level at any.

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
        spectrum = self.spectrum
        self._check(box.level)
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
        return self._innovation(
            seeds[:, None, None], box.level, rows[None, :, None], columns[None, None]
        )

    def _innovation(
        self,
        seeds: Int64[Tensor, "..."],
        level: int,
        y: Int64[Tensor, "..."],
        x: Int64[Tensor, "..."],
    ) -> Float[Tensor, "n c *cells"]:
        std = math.sqrt(self.spectrum.innovation(level)) * self.spectrum.scale
        return self._normals(seeds, level, y, x)[..., 0] * std

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Means over sparse cells of any levels, float32; image i of the points is the field of
        seeds[i]. Equal to `boxes` bit for bit; O(levels) calls a cell, fewer where cells share
        ancestors.
        """
        if len(seeds) != points.batch:
            raise ValueError(
                f"{len(seeds)} seeds do not fit points of {points.batch} images; give one a field"
            )
        values = torch.empty(len(points), self.channels, device=seeds.device)
        for level in points.level.unique().tolist():
            chosen = torch.nonzero(points.level == level)[:, 0]
            up = max(level - self.spectrum.coarse_level, 0) if self.spectrum.floor else 0
            for part in chosen.split(max(_CELLS_AT_ONCE >> (2 * up), 1)):
                cells = Cells(points.image[part], points.y[part], points.x[part])
                values[part] = self.cells(seeds, level, cells).float()
        return values

    def cells(self, seeds: Int64[Tensor, " b"], level: int, cells: Cells) -> Float[Tensor, "n c"]:
        """Means over cells of one level, anywhere on the lattice, float64 and at once: of `at`
        each chunk.
        """
        spectrum = self.spectrum
        self._check(level)
        if spectrum.floor and level > spectrum.coarse_level:
            side = 1 << (level - spectrum.coarse_level)
            inside = torch.arange(side, device=seeds.device)
            within = Cells(
                cells.image[:, None, None].expand(-1, side, side).flatten(),
                (cells.y[:, None, None] * side + inside[:, None]).expand(-1, -1, side).flatten(),
                (cells.x[:, None, None] * side + inside).expand(-1, side, -1).flatten(),
            )
            values = self._smooth_cells(seeds, spectrum.coarse_level, within)
            blocks = values.view(len(cells.y), side, side, -1).permute(0, 3, 1, 2).contiguous()
            return F.avg_pool2d(blocks, side)[:, :, 0, 0]
        if level == (spectrum.coarse_level if spectrum.floor else spectrum.top_level):
            return self._smooth_cells(seeds, level, cells)
        parents, place = cells.parents().distinct()
        return self.families(seeds, level, parents)[place, :, 2 * (cells.y & 1) + (cells.x & 1)]

    def families(
        self, seeds: Int64[Tensor, " b"], level: int, parents: Cells
    ) -> Float[Tensor, "n c 4"]:
        """The four children, of `level`, of sparse cells inside which the noise is white."""
        above = self.cells(seeds, level + 1, parents)
        details = self._details(seeds[parents.image], level, parents.y, parents.x)
        return above[..., None] + details

    def _smooth_cells(
        self, seeds: Int64[Tensor, " b"], level: int, cells: Cells
    ) -> Float[Tensor, "n c"]:
        """`_smooth` at sparse cells of any level from the coarse one up."""
        own = self._innovation(seeds[cells.image], level, cells.y, cells.x)
        if level == self.spectrum.top_level:
            return own
        here = cells.parents()
        beside_y, beside_x = here.y + 2 * (cells.y & 1) - 1, here.x + 2 * (cells.x & 1) - 1
        near = [(y, x) for x in (here.x, beside_x) for y in (here.y, beside_y)]
        ys, xs = (torch.cat(part) for part in zip(*near, strict=True))
        parents, place = Cells(here.image.repeat(4), ys, xs).distinct()
        four = self._smooth_cells(seeds, level + 1, parents)[place].chunk(4)
        column, column_beside = (0.75 * four[k] + 0.25 * four[k + 1] for k in (0, 2))
        return 0.75 * column + 0.25 * column_beside + own


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
