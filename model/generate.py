"""Generation over a `Field`: one tile or a million, the same code, and the same image up to
rounding.

A field is a u_t that can be read and written by rectangles. One evaluation of the denoiser takes
the exact area means of u_t at 8 px cells and coarser (held whole: image / 64), evaluates the
lattice and the levels above the tiles once, and then tile by tile the finer levels, each tile with
the halo that its blocks declare. Every coupling is local, or on the lattice, so that the tiling
changes nothing. Memory is O(tile + image / 64); fields may live on disk.

Noise is a keyed field, a function of place: enlarging the image or changing the tiles keeps its
values. So is the noise that a stochastic solver adds, one field a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.attention import Condition
from model.denoiser import Layer, PyramidDenoiser, Tokens
from model.lattice import Box, tiles
from model.noise import Noise
from model.solver import Solver, Step


@runtime_checkable
class Field(Protocol):
    """u_t on the cells of one level: (channels, height, width) values that are read and written by
    boxes.
    """

    shape: tuple[int, int, int]

    def read(self, box: Box) -> Float[Tensor, "c h w"]:
        """Values of a box, zero outside the field; float32."""
        ...

    def write(self, box: Box, values: Float[Tensor, "c h w"]) -> None:
        """Replace the values of a box inside the field."""
        ...


class ArrayField:
    """A field in a float32 array: numpy's in memory, or a memory map on disk."""

    def __init__(self, array: Float[np.ndarray, "c h w"]) -> None:
        self.array = array
        c, h, w = array.shape
        self.shape = (c, h, w)

    def read(self, box: Box) -> Float[Tensor, "c h w"]:
        _, h, w = self.shape
        inside = box.clip(h, w)
        values = self.array[
            :, inside.y : inside.y + inside.height, inside.x : inside.x + inside.width
        ]
        return padded(torch.from_numpy(np.array(values)), inside, box)

    def write(self, box: Box, values: Float[Tensor, "c h w"]) -> None:
        self.array[:, box.y : box.y + box.height, box.x : box.x + box.width] = values.cpu().numpy()


def padded(
    values: Float[Tensor, "c h w"], inside: Box, box: Box
) -> Float[Tensor, "c height width"]:
    """Values of `inside`, a part of `box`, as those of all of it: zero elsewhere."""
    top, left = inside.y - box.y, inside.x - box.x
    bottom = box.height - top - inside.height
    right = box.width - left - inside.width
    return F.pad(values, (left, right, top, bottom))


@runtime_checkable
class Estimator(Protocol):
    """A denoiser and a condition, evaluated over fields; leaves: `Painter`,
    `sparse.painter.SparsePainter`, `baselines.PatchPainter`, and around any `editing.Edited`.
    """

    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of boxes that partition the field, which must not change
        meanwhile.
        """
        ...


@dataclass(frozen=True)
class Painter:
    """A denoiser with a condition, ready to be evaluated over fields.

    base_level: level of the field's cells; 0 paints pixels, 1 the same image at half its
    resolution. guidance: classifier-free guidance, x0 = null + guidance (conditional - null); 1
    evaluates the condition alone. tile: side of a tile in cells of the field, a multiple of the
    coarse cell.
    """

    denoiser: PyramidDenoiser
    condition: Condition
    guidance: float = 1.0
    tile: int = 256
    base_level: int = 0
    held_level: int = 3

    def __post_init__(self) -> None:
        coarse = self.denoiser.config.coarse_level
        if not 0 <= self.base_level <= self.held_level <= coarse:
            raise ValueError(
                f"levels must be ordered base <= held <= coarse, but got "
                f"{self.base_level}, {self.held_level}, {coarse}"
            )
        cell = 1 << (coarse - self.base_level)
        if self.tile % cell:
            raise ValueError(f"a tile of {self.tile} is not a multiple of the coarse cell, {cell}")

    @torch.no_grad()
    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of every tile, in order; the field must not change meanwhile."""
        like = next(self.denoiser.parameters())
        sides = (
            [self.condition]
            if self.guidance == 1.0
            else [self.condition.dropped(), self.condition]
        )
        scale = (1.0 + np.exp(-log_snr)) ** 0.5
        down = self.held_level - self.base_level
        means = area_means(field, down, scale, like, max(self.tile, 1024))
        evaluations = [
            _Evaluation(
                self,
                tokens,
                means,
                torch.full((1,), log_snr, device=like.device, dtype=like.dtype),
                field.shape,
            )
            for tokens in (self.denoiser.encode(side) for side in sides)
        ]
        for box in tiles(*field.shape[1:], self.tile, level=self.base_level):
            needed = self.needed(box)
            wide = self.widest(box, needed)
            u = field.read(wide).to(like)
            estimates = [evaluation.tile(box, needed, u * scale) for evaluation in evaluations]
            x0 = torch.lerp(estimates[0], estimates[-1], self.guidance)
            ys, xs = box.slices_in(wide)
            yield box, u[:, ys, xs], x0

    def needed(self, box: Box) -> list[Box]:
        """The cells of every level below the held one, whole families, that an estimate on `box`
        depends on.
        """
        boxes = []
        for level in range(self.base_level, self.held_level):
            box = box.grow(self.denoiser.config.halo).cover(level + 1)
            boxes.append(box.refine(level))
            box = box.grow(1)
        return boxes

    def widest(self, box: Box, needed: Sequence[Box]) -> Box:
        """The field's cells that cover all of `needed`."""
        return needed[-1].refine(self.base_level) if needed else box


def area_means(
    field: Field, down: int, scale: float, like: Tensor, tile: int
) -> Float[Tensor, "1 h w c"]:
    """Means of `scale` times a field over squares of 2^down cells, read in tiles."""
    c, h, w = field.shape
    means = torch.empty(c, h >> down, w >> down, device=like.device, dtype=like.dtype)
    for box in tiles(h, w, tile):
        coarse = box.cover(down)
        values = field.read(box).to(like)
        ys = slice(coarse.y, coarse.y + coarse.height)
        xs = slice(coarse.x, coarse.x + coarse.width)
        means[:, ys, xs] = F.avg_pool2d(values, 1 << down) * scale
    return means.permute(1, 2, 0)[None]


class _Evaluation:
    """One evaluation under one condition: the held levels at once, and tiles below them."""

    def __init__(
        self,
        painter: Painter,
        tokens: Tokens,
        means: Float[Tensor, "1 h w c"],
        log_snr: Float[Tensor, "1"],
        shape: Sequence[int],
    ) -> None:
        self.painter, self.tokens, self.log_snr = painter, tokens, log_snr
        self.height, self.width = shape[1:]
        self.index = torch.zeros(1, dtype=torch.int64, device=means.device)
        denoiser = painter.denoiser
        coarse = denoiser.config.coarse_level
        levels = {painter.held_level: means}
        for level in range(painter.held_level, coarse):
            levels[level + 1] = _pool(levels[level])
        observed = levels[coarse]
        layer = denoiser.lattice(
            observed, torch.ones_like(observed[..., :1]), log_snr, tokens
        ).layer
        box = Box(coarse, 0, 0, *observed.shape[1:3])
        for level in range(coarse - 1, painter.held_level - 1, -1):
            layer, box = self._descend(layer, box, box.refine(level), levels[level])
        self.held, self.held_box = layer, box

    def tile(
        self, box: Box, needed: Sequence[Box], observed: Float[Tensor, "c h w"]
    ) -> Float[Tensor, "c h2 w2"]:
        """x0_hat on `box` from y on the widest of the boxes it needs (see `Painter.needed`)."""
        pyramid, wide = [observed.permute(1, 2, 0)[None]], [self.painter.widest(box, needed)]
        for _ in needed[1:]:
            pyramid.append(_pool(pyramid[-1]))
            wide.append(wide[-1].cover(wide[-1].level + 1))
        layer, outer = self.held, self.held_box
        for inner, values, around in reversed(list(zip(needed, pyramid, wide, strict=False))):
            ys, xs = inner.slices_in(around)
            layer, outer = self._descend(layer, outer, inner, values[:, ys, xs])
        ys, xs = box.slices_in(outer)
        return layer.estimate[0, ys, xs].permute(2, 0, 1)

    def _descend(
        self, parents: Layer, outer: Box, inner: Box, observed: Float[Tensor, "1 h w c"]
    ) -> tuple[Layer, Box]:
        level = inner.level
        family = inner.cover(level + 1).grow(1)
        origin = torch.tensor([[family.y - outer.y, family.x - outer.x]], device=observed.device)
        around = parents.crop(self.index, origin, family.shape)
        origins = torch.tensor([[inner.y, inner.x]], device=observed.device)
        descent = self.painter.denoiser.descend(
            level,
            around,
            observed,
            self._present(inner, observed),
            origins,
            self.log_snr,
            self.tokens,
            self.index,
        )
        return descent.layer, inner

    def _present(self, box: Box, like: Float[Tensor, "1 h w c"]) -> Float[Tensor, "1 h w 1"]:
        up = box.level - self.painter.base_level
        rows = torch.arange(box.y, box.y + box.height, device=like.device)
        columns = torch.arange(box.x, box.x + box.width, device=like.device)
        inside_y = (rows >= 0) & (rows < self.height >> up)
        inside_x = (columns >= 0) & (columns < self.width >> up)
        return (inside_y[:, None] & inside_x)[None, :, :, None].to(like.dtype)


def _pool(values: Float[Tensor, "1 h w c"]) -> Float[Tensor, "1 h2 w2 c"]:
    return F.avg_pool2d(values.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def start(
    field: Field, noise: Noise, seed: int, log_snr: float, *, level: int = 0, tile: int = 512
) -> None:
    """Write u at the first log-SNR, where nothing of u_0 is left: sqrt(1 - abar) times the keyed
    noise.
    """
    sigma = (1.0 + np.exp(log_snr)) ** -0.5
    for box in tiles(*field.shape[1:], tile, level=level):
        field.write(box, noise.box(seed, box) * sigma)


@dataclass(frozen=True)
class Trajectory:
    """The fields of one step, all of one shape: what it reads, and what it writes.

    It reads u_t and, with solvers that remember, the estimate of the step before; it writes u at
    the next step and this step's estimate. Nothing that is read is written, so a step can be
    repeated.
    """

    current: Field
    following: Field
    estimate_before: Field | None = None
    estimate: Field | None = None


FreshNoise = Callable[[Box, torch.device], Float[Tensor, "c h w"]]


def fresh_noise(noise: Noise, seed: int, number: int) -> FreshNoise:
    """What step `number` adds: the field of `seed` on a stream of its own (0 is the start's), so
    that a step repeated adds the same.
    """
    return partial(noise.on_stream(1 + number).box, seed)


def advance(
    painter: Estimator,
    solver: Solver,
    step: Step,
    state: Trajectory,
    report: Callable[[int], None] = lambda cells: None,
    fresh: FreshNoise | None = None,
) -> None:
    """One step of the solver: reads `state.current`, writes `state.following` (and the estimate),
    tile by tile.

    `report` is told the cells done; `fresh` is asked only by solvers that add noise.
    """
    adds_noise = solver.noise_scale(step) > 0.0
    for box, u, x0 in painter.estimate(state.current, step.now):
        before = None
        if solver.remembers:
            assert state.estimate is not None and state.estimate_before is not None
            state.estimate.write(box, x0)
            if step.before is not None:
                before = state.estimate_before.read(box).to(x0)
        added = fresh(box, x0.device).to(x0) if fresh is not None and adds_noise else None
        state.following.write(box, solver(u, x0, before, step, added))
        report(box.height * box.width)


def finish(
    painter: Estimator,
    log_snr: float,
    state: Trajectory,
    report: Callable[[int], None] = lambda cells: None,
) -> None:
    """The last evaluation: writes x0_hat itself."""
    for box, _, x0 in painter.estimate(state.current, log_snr):
        state.following.write(box, x0)
        report(box.height * box.width)
