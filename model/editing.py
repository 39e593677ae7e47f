"""Editing: painting under what is known of the image, without a gradient.

What is known is a constraint, a set of images with the projection P onto it. Every estimate is
projected, x0_hat <- P x0_hat (the null-space way of Wang et al., DDNM, ICLR 2023), so that the
last one, which is the image, satisfies it to rounding:

    area means (super-resolution)    P x0 = x0 + up(low - mean x0),    up constant over a cell
    known pixels (inpainting)        P x0 = known where it is known, x0 elsewhere

A trajectory starts from sqrt(abar) P 0 + sqrt(1 - abar) xi. Its known part then stays at
sqrt(abar) P x0 + sqrt(1 - abar) n, whatever the solver: in a step

    u' = alpha' x0_hat + sqrt(sigma'^2 - s^2) (u - alpha x0_hat) / sigma + s n'

the estimate of the known part is what it was, so that n' = xi as it started for s = 0, and
sqrt(1 - s^2 / sigma'^2) n + (s / sigma') n' for a stochastic solver (2M extrapolates a constant).
So the denoiser reads the known part with the keyed noise of its time, and this noise is the one
field that also drives what is unknown beside it: where noise is correlated (floored), fresh noise
in the known part alone would tear at its border.

Projections are local, so that tilings change nothing and memory stays that of the painter. They
are approximate as a posterior: what is painted is drawn after the estimates, not after the known
part's exact likelihood.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.generate import Estimator, Field
from model.lattice import Box, tiles


@runtime_checkable
class Source(Protocol):
    """Values that are read by boxes and not written; a `generate.Field` is one."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, box: Box) -> Float[Tensor, "c h w"]:
        """Values of a box that has a part inside, zero outside."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """What an image is held to; leaves: `AreaMeans`, `Known`."""

    @property
    def cell(self) -> int:
        """Boxes that are projected are multiples of this many cells of the field."""
        ...

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """The nearest values on a box of the field that satisfy it."""
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

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        _, height, width = self.mask.shape
        if box.y >= height or box.x >= width:
            return x0
        known = self.mask.read(box).to(x0.device) != 0
        return torch.where(known, self.values.read(box).to(x0), x0)


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
    """Add sqrt(abar) P 0 to a field that `generate.start` wrote at the first log-SNR."""
    alpha = (1.0 + np.exp(-log_snr)) ** -0.5
    for box in tiles(*field.shape[1:], max(tile, constraint.cell), level=level):
        u = field.read(box)
        field.write(box, u + constraint.project(box, torch.zeros_like(u)) * alpha)
