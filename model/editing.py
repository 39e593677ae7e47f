"""Editing: generation under what is known of the image, without a gradient.

What is known is a constraint, a set of images with the projection P onto it. Every estimate is
projected, x0_hat <- P x0_hat (the null-space way of Wang et al., DDNM, ICLR 2023), so that the
last one, which is the image, satisfies it to rounding:

    area means (super-resolution)    P x0 = x0 + up(low - mean x0),    up constant over a cell
    known pixels (inpainting)        P x0 = known where it is known, x0 elsewhere

A trajectory starts from sqrt(abar) P g + sqrt(1 - abar) xi, g what is guessed beforehand: 0, or
what finished parents predict (`Constraint.guess`). Its known part then stays at
sqrt(abar) P x0 + sqrt(1 - abar) n, whatever the solver: in a step

    u' = alpha' x0_hat + sqrt(sigma'^2 - s^2) (u - alpha x0_hat) / sigma + s n'

the estimate of the known part is what it was, so that n' = xi as it started for s = 0, and
sqrt(1 - s^2 / sigma'^2) n + (s / sigma') n' for a stochastic solver (2M extrapolates a constant).
So the denoiser reads the known part with the keyed noise of its time.

An image that is generated pass by pass, from coarse to fine, is held in each of them (`Edit`).
Area means that are as fine as a pass's cells stand for the pass: generation starts below them.
Known pixels are known at every level: a cell of which the part w is known has P x0 = w known +
(1 - w) x0, and where a pass is also held to the area means of its parents, the rest of a family
makes up for what its known members lack.

Projections are local, so that tilings change nothing and memory stays that of the painter. They
are approximate as a posterior: what is painted is drawn after the estimates, not after the known
part's exact likelihood. Area means of whole passes are not approximate: the finer blocks of a
cascade are drawn given them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.generate import ArrayField, Constraint, Estimator, Field
from model.lattice import Box, tiles


@runtime_checkable
class Source(Protocol):
    """Values that are read by boxes and not written; a `generate.Field` is one."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, box: Box) -> Float[Tensor, "c h w"]:
        """Values of a box that has a part inside, zero outside."""
        ...


@dataclass(frozen=True)
class AreaMeans:
    """Means over squares of 2^down x 2^down cells of the field, which are given by `low`.

    low: their values, the first over the field's first cells. Where it ends before the field does,
    nothing is known.
    """

    low: Source
    down: int

    def __post_init__(self) -> None:
        if self.down < 1:
            raise ValueError(
                f"area means are of cells 2^down times as large as the field's with down at least "
                f"1, but down is {self.down}; use Known for values of the field's own cells"
            )

    @property
    def cell(self) -> int:
        return 1 << self.down

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        if any(part % self.cell for part in (box.y, box.x, box.height, box.width)):
            raise ValueError(
                f"means over squares of {self.cell} cells are known, but {box} cuts through some; "
                f"paint in tiles and windows that are multiples of {self.cell}"
            )
        coarse = box.cover(box.level + self.down)
        _, height, width = self.low.shape
        if coarse.y >= height or coarse.x >= width:
            return x0
        error = self.low.read(coarse).to(x0) - F.avg_pool2d(x0, self.cell)
        error[:, max(height - coarse.y, 0) :] = 0.0
        error[:, :, max(width - coarse.x, 0) :] = 0.0
        return x0 + error.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)

    def guess(self, box: Box, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return self.project(box, torch.zeros_like(like))


@dataclass(frozen=True)
class Known:
    """Values of the field's own cells, where `mask` is not zero.

    mask: one channel. Where they end before the field does, nothing is known.
    """

    values: Source
    mask: Source

    def __post_init__(self) -> None:
        if self.mask.shape != (1, *self.values.shape[1:]):
            raise ValueError(
                f"a mask of one channel says where values are known, but one of {self.mask.shape} "
                f"does not fit values of {self.values.shape}"
            )

    @property
    def cell(self) -> int:
        return 1

    def known_part(self, box: Box, like: Tensor) -> Float[Tensor, "1 h w"]:
        """1 for every cell of a box that is known, else 0."""
        return (_read(self.mask, box, like) != 0).to(like)

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        known = self.known_part(box, x0) != 0
        return torch.where(known, _read(self.values, box, x0), x0)

    def guess(self, box: Box, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return self.project(box, torch.zeros_like(like))


def _read(source: Source, box: Box, like: Tensor) -> Float[Tensor, "c h w"]:
    """Values of any box, zero outside."""
    channels, height, width = source.shape
    if box.y >= height or box.x >= width:
        return like.new_zeros(channels, *box.shape)
    return source.read(box).to(like)


@dataclass(frozen=True)
class Partly:
    """Means of the known part of coarse cells, and how large it is: one constraint a level.

    values, parts: of all cells; values are anything where nothing is known.
    """

    values: Source
    parts: Source

    @property
    def cell(self) -> int:
        return 1

    def known_part(self, box: Box, like: Tensor) -> Float[Tensor, "1 h w"]:
        """w of every cell of a box."""
        return _read(self.parts, box, like)

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return torch.lerp(x0, _read(self.values, box, x0), self.known_part(box, x0))

    def guess(self, box: Box, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return self.project(box, torch.zeros_like(like))


@dataclass(frozen=True)
class Within:
    """Known values inside families whose area means are given as well.

    What is left of a family's mean goes to its cells as far as they are unknown.
    """

    known: Known | Partly
    parents: Constraint

    @property
    def cell(self) -> int:
        return self.parents.cell

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        wanted = self.parents.project(box, x0)
        x0, side = self.known.project(box, wanted), self.cell
        free = 1 - self.known.known_part(box, x0)
        left = F.avg_pool2d(wanted - x0, side) / F.avg_pool2d(free, side).clamp_min(_LEAST_FREE)
        return x0 + left.repeat_interleave(side, 1).repeat_interleave(side, 2) * free

    def guess(self, box: Box, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return self.project(box, self.parents.guess(box, like))


_LEAST_FREE = 1e-6


@runtime_checkable
class Edit(Protocol):
    """What an image is held to, pass by pass; leaves: `LowImage`, `KnownPixels`."""

    def constraint(self, level: int) -> Constraint:
        """On cells of a level that is generated."""
        ...

    def given(self, level: int, shape: tuple[int, int, int]) -> Field | None:
        """The whole field of a level, where that is known."""
        ...


@dataclass(frozen=True)
class LowImage:
    """An image's area means over cells of `level`, all of them.

    low: where it ends before the image does, nothing is known.
    """

    low: Source
    level: int

    def constraint(self, level: int) -> Constraint:
        return AreaMeans(self.low, self.level - level)

    def given(self, level: int, shape: tuple[int, int, int]) -> Field | None:
        """The low image reduced to this level, continued to the image's end by its last cells."""
        down = level - self.level
        if down < 0:
            return None
        _, height, width = shape
        _, rows, columns = self.low.shape
        field = ArrayField(np.empty(shape, np.float32))
        side = max(_READ_CELLS >> down, 1)
        for box in tiles(height, width, side, level=level):
            fine = box.refine(self.level)
            inside = _nearest(fine, rows, columns)
            values = self.low.read(inside)
            at_y = torch.arange(fine.y, fine.y + fine.height).clamp(max=rows - 1) - inside.y
            at_x = torch.arange(fine.x, fine.x + fine.width).clamp(max=columns - 1) - inside.x
            field.write(box, F.avg_pool2d(values[:, at_y][:, :, at_x], 1 << down))
        return field


def _nearest(box: Box, height: int, width: int) -> Box:
    """The part of a box inside an image, or the cells at its end that are nearest to it."""
    y, x = min(box.y, height - 1), min(box.x, width - 1)
    bottom, right = min(box.y + box.height, height), min(box.x + box.width, width)
    return Box(box.level, y, x, max(bottom - y, 1), max(right - x, 1))


_READ_CELLS = 1024


class KnownPixels:
    """Values of an image's own cells, of `level`, where a mask is not zero."""

    def __init__(self, known: Known, level: int) -> None:
        self.known, self.level = known, level

    def constraint(self, level: int) -> Constraint:
        """At the image's own level the values themselves; above it, means of their parts."""
        if level < self.level:
            raise ValueError(
                f"pixels are known at level {self.level} and say nothing of level {level}"
            )
        if level == self.level:
            return self.known
        channels, height, width = self.known.values.shape
        down = level - self.level
        rows, columns = -(-height >> down), -(-width >> down)
        values = ArrayField(np.zeros((channels, rows, columns), np.float32))
        parts = ArrayField(np.zeros((1, rows, columns), np.float32))
        for box in tiles(rows, columns, max(_READ_CELLS >> down, 1), level=level):
            fine = box.refine(self.level)
            mask = (self.known.mask.read(fine) != 0).float()
            means = F.avg_pool2d(self.known.values.read(fine) * mask, 1 << down)
            part = F.avg_pool2d(mask, 1 << down)
            values.write(box, means / part.clamp_min(torch.finfo(torch.float32).tiny))
            parts.write(box, part)
        return Partly(values, parts)

    def given(self, level: int, shape: tuple[int, int, int]) -> Field | None:
        return None


def hold(edit: Constraint, parents: Constraint | None) -> Constraint:
    """What an image is held to by what is known of it, and by the area means of its parents, with
    which known area means agree.
    """
    if parents is None:
        return edit
    return Within(edit, parents) if isinstance(edit, Known | Partly) else Both(edit, parents)


@dataclass(frozen=True)
class Both:
    """Two constraints, of which the first keeps what the second asks for."""

    first: Constraint
    second: Constraint

    @property
    def cell(self) -> int:
        return max(self.first.cell, self.second.cell)

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return self.first.project(box, self.second.project(box, x0))

    def guess(self, box: Box, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        return self.first.project(box, self.second.guess(box, like))


@dataclass(frozen=True)
class Edited:
    """Any painter, every estimate projected: a `generate.Estimator`."""

    painter: Estimator
    constraint: Constraint

    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, P x0_hat) of the painter's boxes; the field must not change meanwhile."""
        for box, u, x0 in self.painter.estimate(field, log_snr):
            yield box, u, self.constraint.project(box, x0)


def start_from(
    field: Field, constraint: Constraint, log_snr: float, *, level: int = 0, tile: int = 512
) -> None:
    """Add sqrt(abar) times what is guessed to a field that `generate.start` wrote."""
    alpha = (1.0 + np.exp(-log_snr)) ** -0.5
    for box in tiles(*field.shape[1:], max(tile, constraint.cell), level=level):
        u = field.read(box)
        field.write(box, u + constraint.guess(box, u) * alpha)
