"""A sparse-operator denoiser with a condition, evaluated over fields tile by tile.

What points contribute to the whole image (see `denoiser`) is added up first: a pass over the tiles
for each sum, in which a tile goes as far as the sums that are known carry it and gives its part of
the next. The last pass goes to the end. A tile has the halo that its blocks need, so that a tiling
changes nothing; memory is O(tile) and the lattice.

With `sums` = "subset" a keyed draw, by the design and as dense as what was trained on and the same
at every step, stands for the image: its sums are what training met, and cost one look at its
cells. "all" takes every pixel, as the papers do, in one pass for each sum.

A field may be finer or coarser than what was trained on: the lattice and the condition stay as
they are on the ground, operators' kernels are resized, and mollified noise has the same covariance
on the ground.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from model.attention import Condition
from model.design import EVERY_PIXEL, Extent, Sampling
from model.generate import Field, area_means
from model.lattice import Box, tiles
from model.points import Points
from model.resample import Splat
from model.sparse.denoiser import Evaluation, Means, Part, SparseOperatorDenoiser
from model.sparse.support import Support, TileSupport

READ_PX = 1024
SUBSET_KEY = (0, 0, 0)


@dataclass(frozen=True)
class SparsePainter:
    """A denoiser and a condition, ready to be evaluated over fields of pixels.

    guidance: classifier-free guidance, x0 = null + guidance (conditional - null); 1 evaluates the
    condition alone. tile: side of a tile in pixels of the field, a multiple of the coarse cell.
    sampling: how the images that were trained on were drawn, for configurations that sum over a
    subset. level: of the field's pixels: -1 paints the same image
    at twice the resolution.
    """

    denoiser: SparseOperatorDenoiser
    condition: Condition
    guidance: float = 1.0
    tile: int = 256
    sampling: Sampling = EVERY_PIXEL
    level: int = 0

    def __post_init__(self) -> None:
        if self.tile % self.cell:
            raise ValueError(
                f"tiles of {self.tile} px must be a multiple of the coarse cell, {self.cell} px"
            )

    @property
    def cell(self) -> int:
        """Side of a coarse cell in pixels of the field."""
        return 1 << (self.denoiser.config.coarse_level - self.level)

    @property
    def _like(self) -> Tensor:
        return next(self.denoiser.parameters())

    @torch.no_grad()
    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of every tile, in order; the field must not change meanwhile."""
        _, height, width = field.shape
        if height % self.cell or width % self.cell:
            raise ValueError(
                f"a field of {height}x{width} px is not whole coarse cells of {self.cell} px"
            )
        sides = [self.condition]
        if self.guidance != 1.0:
            sides.insert(0, self.condition.dropped())
        means = self._means(field, log_snr) if self.denoiser.config.means else None
        at = torch.full((1,), log_snr, device=self._like.device, dtype=self._like.dtype)
        evaluations = [self.denoiser.prepare(side, at, means) for side in sides]
        known = self._sums(field, evaluations)
        for box in tiles(height, width, self.tile):
            support = self._support(field, box)
            u = field.read(support.box).to(self._like)
            estimates = [
                self._end(u, support, evaluation, sums)
                for evaluation, sums in zip(evaluations, known, strict=True)
            ]
            ys, xs = box.slices_in(support.box)
            x0 = torch.lerp(estimates[0], estimates[-1], self.guidance)
            yield Box(self.level, box.y, box.x, *box.shape), u[:, ys, xs], x0[:, ys, xs]

    def _support(self, field: Field, box: Box) -> TileSupport:
        _, height, width = field.shape
        config = self.denoiser.config
        outer = box.grow(config.halo(-self.level)).clip(height, width)
        return TileSupport(outer, box, height, width, config, self._like.device, -self.level)

    def _end(
        self,
        u: Float[Tensor, "c h w"],
        support: TileSupport,
        evaluation: Evaluation,
        sums: Sequence[Any],
    ) -> Float[Tensor, "c h w"]:
        """x0_hat on all of a tile once every sum is known."""
        observed = self._observed(u, evaluation)
        out = self._go(observed, support, evaluation, sums)
        assert isinstance(out, Tensor)
        x0 = self.denoiser.estimate(out, observed, support.points, evaluation.log_snr)
        return x0.view(*u.shape[1:], -1).permute(2, 0, 1)

    def _observed(self, u: Float[Tensor, "c h w"], evaluation: Evaluation) -> Float[Tensor, "n c"]:
        """y = u_t / sqrt(abar), pixel by pixel."""
        return u.permute(1, 2, 0).flatten(0, 1) * _from_u(evaluation)

    def _go(
        self,
        observed: Float[Tensor, "n c"],
        support: Support,
        evaluation: Evaluation,
        sums: Sequence[Any],
    ) -> Part | Tensor:
        """As far as the known sums carry: the part of the next sum, or the output."""
        run = self.denoiser.run(observed, support, evaluation)
        ask = next(run)
        try:
            for total in sums:
                ask = run.send(total)
        except StopIteration as end:
            return end.value
        return ask()

    def _sums(self, field: Field, evaluations: Sequence[Evaluation]) -> list[list[Any]]:
        """Everything that `run` is sent, in order, for each evaluation."""
        if self.denoiser.config.sums == "subset":
            subset = self._subset(*field.shape[1:])
            u = subset.read(field).to(self._like)
            return [
                self.denoiser.over_all(u * _from_u(each), subset.support, each)[1]
                for each in evaluations
            ]
        found: list[list[Any]] = []
        for evaluation in evaluations:
            sums: list[Any] = []
            while len(sums) < self.denoiser.num_sums:
                total = self._sum_of_tiles(field, evaluation, sums)
                sums.append(self.denoiser.complete(total, evaluation))
            found.append(sums)
        return found

    def _sum_of_tiles(self, field: Field, evaluation: Evaluation, sums: Sequence[Any]) -> Part:
        total: Any = None
        down = self.denoiser.config.coarse_level - self.level
        _, height, width = field.shape
        for box in tiles(height, width, self.tile):
            support = self._support(field, box)
            observed = self._observed(field.read(support.box).to(self._like), evaluation)
            part = self._go(observed, support, evaluation, sums)
            if isinstance(part, Splat):
                if total is None:
                    total = _nothing(part, height >> down, width >> down)
                lattice = Box(down, 0, 0, height >> down, width >> down)
                ys, xs = box.cover(down).slices_in(lattice)
                total.total[:, ys, xs], total.count[:, ys, xs] = part.total, part.count
            else:
                total = part if total is None else total + part
        return total

    @cached_property
    def _subsets(self) -> dict[tuple[int, int], "Subset"]:
        return {}

    def _subset(self, height: int, width: int) -> "Subset":
        """The keyed subset of the cells of fields of this size; found once."""
        if (height, width) not in self._subsets:
            points = keyed_subset(height, width, self.sampling, self.level)
            support = self.denoiser.support(points.to(self._like.device))
            self._subsets[height, width] = Subset(points, support)
        return self._subsets[height, width]

    def _means(self, field: Field, log_snr: float) -> Means:
        scale = (1.0 + np.exp(-log_snr)) ** 0.5
        down = self.denoiser.config.coarse_level - self.level
        observed = area_means(field, down, scale, self._like, max(self.tile, READ_PX))
        return Means(observed, torch.ones_like(observed[..., :1]))


@dataclass(frozen=True)
class Subset:
    """Cells of a field that stand for all its pixels, and what finds their neighbours."""

    points: Points
    support: Support

    @cached_property
    def by_box(self) -> list[tuple[Box, Int64[Tensor, " m"]]]:
        """Boxes that are read at once, and which of the points lie in each."""
        height, width = self.points.sizes_px[0].tolist()
        across = -(-width // READ_PX)
        y, x = self.points.y << self.points.level, self.points.x << self.points.level
        number = y // READ_PX * across + x // READ_PX
        boxes = list(tiles(height, width, READ_PX))
        counts = torch.bincount(number, minlength=len(boxes)).tolist()
        return list(zip(boxes, number.argsort(stable=True).split(counts), strict=True))

    def read(self, field: Field) -> Float[Tensor, "n c"]:
        """The means of the field over the cells."""
        parts = [_means_at(field.read(box), box, self.points.take(i)) for box, i in self.by_box]
        order = torch.cat([inside for _, inside in self.by_box])
        return torch.cat(parts)[order.argsort()]


def keyed_subset(height: int, width: int, sampling: Sampling, level: int = 0) -> Points:
    """Cells of an image whose pixels are cells of `level`, drawn as `sampling` says, always the
    same; as many as it has pixels at most.
    """
    size = torch.tensor([[height, width]])
    number = round(sampling.density * 4.0**level * height * width)
    number = min(max(number, 1), height * width)
    drawn = sampling.design.of(number).cells(Extent(height, width), SUBSET_KEY)
    cell_level, y, x = torch.from_numpy(drawn).unbind(dim=-1)
    return Points(torch.zeros_like(cell_level), cell_level, y, x, size, -level)


def _means_at(values: Float[Tensor, "c h w"], box: Box, points: Points) -> Float[Tensor, "n c"]:
    """Means over cells inside a box of pixels of which these are the values."""
    found = values.new_empty(len(points), len(values))
    for level in points.level.unique().tolist():
        # Where the image ends within a cell, the mean is of what there is of it.
        pooled = F.avg_pool2d(values, 1 << level, ceil_mode=True)
        here = points.level == level
        y, x = points.y[here] - (box.y >> level), points.x[here] - (box.x >> level)
        found[here] = pooled[:, y, x].T
    return found


def _from_u(evaluation: Evaluation) -> Float[Tensor, "1"]:
    """1 / sqrt(abar), which makes u_t what is observed."""
    return (1 + torch.exp(-evaluation.log_snr)).sqrt()


def _nothing(like: Splat, height: int, width: int) -> Splat:
    """The lattice of the whole image, to be filled by tiles."""
    total, count = (
        part.new_zeros(1, height, width, part.shape[-1]) for part in (like.total, like.count)
    )
    return Splat(total, count)
