"""A sparse-operator denoiser with a condition, evaluated over fields tile by tile.

What points contribute to the whole image (see `denoiser`) is added up first: a pass over the tiles
for each sum, in which a tile goes as far as the sums that are known carry it and gives its part of
the next. The last pass goes to the end. A tile has the halo that its blocks need, so that a tiling
changes nothing; memory is O(tile) and the lattice.

With `sums` = "subset" a keyed subset of the pixels, as dense as the draws that were trained on and
the same at every step, stands for the image: its sums are what training met, and cost one look at
the subset. "all" takes every pixel, as the papers do, in one pass for each sum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import Condition
from model.design import Extent, UniformDesign
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
    condition alone. tile: side of a tile in pixels, a multiple of the coarse cell. density: points
    a pixel of the draws that were trained on, for configurations that sum over a subset.
    """

    denoiser: SparseOperatorDenoiser
    condition: Condition
    guidance: float = 1.0
    tile: int = 256
    density: float = 1.0

    def __post_init__(self) -> None:
        cell = self.denoiser.config.cell_px
        if self.tile % cell:
            raise ValueError(
                f"tiles of {self.tile} px must be a multiple of the coarse cell, {cell} px"
            )

    @torch.no_grad()
    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of every tile, in order; the field must not change meanwhile."""
        _, height, width = field.shape
        if height % self.denoiser.config.cell_px or width % self.denoiser.config.cell_px:
            raise ValueError(
                f"a field of {height}x{width} px is not whole coarse cells of "
                f"{self.denoiser.config.cell_px} px"
            )
        sides = [self.condition]
        if self.guidance != 1.0:
            sides.insert(0, self.condition.dropped())
        means = self._means(field, log_snr) if self.denoiser.config.means else None
        like = next(self.denoiser.parameters())
        at = torch.full((1,), log_snr, device=like.device, dtype=like.dtype)
        evaluations = [self.denoiser.prepare(side, at, means) for side in sides]
        known = [self._sums(field, evaluation) for evaluation in evaluations]
        for box in tiles(height, width, self.tile):
            support = self._support(field, box)
            u = field.read(support.box).to(like)
            estimates = [
                self._end(u, support, evaluation, sums)
                for evaluation, sums in zip(evaluations, known, strict=True)
            ]
            ys, xs = box.slices_in(support.box)
            x0 = torch.lerp(estimates[0], estimates[-1], self.guidance)
            yield box, u[:, ys, xs], x0[:, ys, xs]

    def _support(self, field: Field, box: Box) -> TileSupport:
        _, height, width = field.shape
        config = self.denoiser.config
        outer = box.grow(config.halo).clip(height, width)
        device = next(self.denoiser.parameters()).device
        return TileSupport(outer, box, height, width, config, device)

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
        scale = (1 + torch.exp(-evaluation.log_snr)).sqrt()
        return u.permute(1, 2, 0).flatten(0, 1) * scale

    def _go(
        self,
        observed: Float[Tensor, "n c"],
        support: Support,
        evaluation: Evaluation,
        sums: Sequence[Any],
    ) -> Part | Tensor:
        """As far as the known sums carry: the part of the next sum, or the output."""
        run = self.denoiser.run(observed, support, evaluation)
        part = next(run)
        try:
            for total in sums:
                part = run.send(total)
        except StopIteration as end:
            return end.value
        return part

    def _sums(self, field: Field, evaluation: Evaluation) -> list[Any]:
        """Everything that `run` is sent, in order."""
        sums: list[Any] = []
        subset = self._subset(field, evaluation)
        while len(sums) < self.denoiser.num_sums:
            if subset is not None:
                total = self._go(*subset, evaluation, sums)
            else:
                total = self._sum_of_tiles(field, evaluation, sums)
            assert not isinstance(total, Tensor)
            sums.append(self.denoiser.complete(total, evaluation))
        return sums

    def _sum_of_tiles(self, field: Field, evaluation: Evaluation, sums: Sequence[Any]) -> Part:
        total: Any = None
        level = self.denoiser.config.coarse_level
        _, height, width = field.shape
        like = next(self.denoiser.parameters())
        for box in tiles(height, width, self.tile):
            support = self._support(field, box)
            observed = self._observed(field.read(support.box).to(like), evaluation)
            part = self._go(observed, support, evaluation, sums)
            if isinstance(part, Splat):
                if total is None:
                    total = _nothing(part, height >> level, width >> level)
                lattice = Box(level, 0, 0, height >> level, width >> level)
                ys, xs = box.cover(level).slices_in(lattice)
                total.total[:, ys, xs], total.count[:, ys, xs] = part.total, part.count
            else:
                total = part if total is None else total + part
        return total

    @cached_property
    def _subsets(self) -> dict[tuple[int, int], Points]:
        return {}

    def _subset(
        self, field: Field, evaluation: Evaluation
    ) -> tuple[Float[Tensor, "n c"], Support] | None:
        """y at the keyed subset of the field's pixels; None where all are summed."""
        if self.denoiser.config.sums == "all":
            return None
        _, height, width = field.shape
        like = next(self.denoiser.parameters())
        if (height, width) not in self._subsets:
            self._subsets[height, width] = keyed_subset(height, width, self.density)
        points = self._subsets[height, width]
        values = torch.empty(len(points), field.shape[0], dtype=like.dtype)
        for box in tiles(height, width, READ_PX):
            inside = (points.y >= box.y) & (points.y < box.y + box.height)
            inside &= (points.x >= box.x) & (points.x < box.x + box.width)
            read = field.read(box)[:, points.y[inside] - box.y, points.x[inside] - box.x]
            values[inside] = read.T.to(values)
        observed = values.to(like) * (1 + torch.exp(-evaluation.log_snr)).sqrt()
        return observed, self.denoiser.support(points.to(like.device))

    def _means(self, field: Field, log_snr: float) -> Means:
        like = next(self.denoiser.parameters())
        scale = (1.0 + np.exp(-log_snr)) ** 0.5
        level = self.denoiser.config.coarse_level
        observed = area_means(field, level, scale, like, max(self.tile, READ_PX))
        return Means(observed, torch.ones_like(observed[..., :1]))


def keyed_subset(height: int, width: int, density: float) -> Points:
    """`density` times the pixels of an image, uniformly, always the same."""
    size = torch.tensor([[height, width]])
    number = max(round(density * height * width), 1)
    drawn = UniformDesign(points=number).cells(Extent(height, width), SUBSET_KEY)
    cells = torch.from_numpy(drawn)
    zero = torch.zeros(number, dtype=torch.int64)
    return Points(zero, zero, cells[:, 1], cells[:, 2], size)


def _nothing(like: Splat, height: int, width: int) -> Splat:
    """The lattice of the whole image, to be filled by tiles."""
    total, count = (
        part.new_zeros(1, height, width, part.shape[-1]) for part in (like.total, like.count)
    )
    return Splat(total, count)
