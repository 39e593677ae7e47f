"""A cascade with a condition, evaluated over fields: one pass a block, from coarse to fine.

The top block is evaluated whole, on a few hundred cells. A block below it goes through its field
tile by tile, under the finished field of its parents: a tile is read with the halo that its
network declares, as far as the image goes, so that a tiling changes nothing. Its images are those
whose area means are the parents (`Under`), so that a preview, which stops after a block, is the
exact mean of what the later blocks make of it.

Autoguidance (Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024): a
block that had little time errs most where it was still worse early in its training, so that the
difference to that earlier self says where it errs, and in which direction,

    x0_hat = x0_early + w (x0_late - x0_early),    w >= 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import Condition, Tokens
from model.cascade.denoiser import (
    CascadeBlock,
    CascadeDenoiser,
    LookedUp,
    OctaveBlock,
    Parents,
)
from model.cascade.range import ValueRange
from model.cascade.top import TopDenoiser
from model.generate import Constraint, Estimator, Field, Pass
from model.haar import means, up
from model.lattice import Box, tiles
from model.noise import NoiseTree
from model.noise_band import BandNoise


def cascade_passes(
    denoiser: CascadeDenoiser,
    condition: Condition,
    *,
    guidance: float,
    tile: int,
    level: int,
    steps: int | None,
    values: ValueRange | None = None,
    early: CascadeDenoiser | None = None,
    autoguidance: float | None = None,
) -> list[Pass]:
    """The passes of an image of cells of `level`: all blocks as far as one that is as fine.

    guidance: classifier-free guidance, x0 = null + guidance (conditional - null), in blocks that
    read tokens; 1 evaluates the condition alone. tile: side of a tile in cells of each block.
    values: inside which area means are held; pixels are not, whose image is rounded in any case.
    early: the same denoiser early in its training; without it there is no autoguidance.
    autoguidance: of all blocks, None for each one's own.
    """
    tree = NoiseTree(denoiser.octaves.noise, denoiser.config.channels)
    found: list[Pass] = []
    for config in denoiser.config.sequence:
        block = denoiser.blocks[config.name]
        assert isinstance(block, CascadeBlock)
        given = sides(block, condition, guidance)
        weight = config.autoguidance if autoguidance is None else autoguidance
        early_block = None
        if early is not None and weight != 1.0:
            other = early.blocks[config.name]
            assert isinstance(other, CascadeBlock)
            early_block = EarlyBlock(other.body, sides(other, condition, 1.0)[0], weight)
        evaluations, bounds = steps or config.evaluations, block.log_snr_range()
        if isinstance(block.body, TopDenoiser):
            top = TopPainter(block.body, given, guidance, values, early_block)
            prepare = partial(_whole, top)
            found.append(Pass(config.name, block.body.level, evaluations, bounds, tree, prepare))
            fine = block.body.level
        else:
            assert isinstance(block.body, OctaveBlock)
            fine, parents = block.body.block.fine, block.body.block.parents
            cells = max(tile, 1 << block.body.block.octaves)
            held = values if fine > 0 else None
            below = partial(_below, block.body, given, guidance, cells, held, early_block)
            noise = BandNoise(tree, parents)
            found.append(Pass(config.name, fine, evaluations, bounds, noise, below))
        if fine <= level:
            break
    return found


Given = Tokens | LookedUp | None
"""A condition as a block reads it."""


def sides(block: CascadeBlock, condition: Condition, guidance: float) -> tuple[Given, ...]:
    """The encoded conditions under which a block is evaluated: with guidance the null and the
    condition, otherwise the condition alone.
    """
    guided = guidance != 1.0 and block.tokens is not None
    given = [condition.dropped(), condition] if guided else [condition]
    with torch.no_grad():
        return tuple(block.encode(side) for side in given)


@dataclass(frozen=True)
class EarlyBlock:
    """A block early in its training, under the condition alone, and the weight of autoguidance."""

    body: TopDenoiser | OctaveBlock
    given: Given
    weight: float

    def guide(
        self, x0: Float[Tensor, "*shape"], weaker: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Away from the early estimate."""
        return torch.lerp(weaker, x0, self.weight)


def guided(
    estimates: Sequence[Float[Tensor, "*shape"]], guidance: float
) -> Float[Tensor, "*shape"]:
    """From the null's estimate to the condition's, and beyond."""
    return torch.lerp(estimates[0], estimates[-1], guidance)


def _whole(painter: "TopPainter", above: Field | None) -> tuple[Estimator, Constraint | None]:
    return painter, None


def _below(
    body: OctaveBlock,
    given: tuple[Given, ...],
    guidance: float,
    tile: int,
    values: ValueRange | None,
    early: EarlyBlock | None,
    above: Field | None,
) -> tuple[Estimator, Constraint | None]:
    assert above is not None, "a block of octaves has parents"
    under = Under(body, above)
    return BlockPainter(under, given, guidance, tile, values, early), under


@dataclass(frozen=True)
class TopPainter:
    """The top block under one or two conditions."""

    body: TopDenoiser
    given: tuple[Given, ...]
    guidance: float
    values: ValueRange | None = None
    early: EarlyBlock | None = None

    @torch.no_grad()
    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of the whole field."""
        like = next(self.body.parameters())
        _, h, w = field.shape
        box = Box(self.body.level, 0, 0, h, w)
        u = field.read(box).to(like)[None]
        observed, level = u / _alpha(log_snr), like.new_full((1,), log_snr)
        present = torch.ones_like(u[:, :1])
        found = [
            self.body(observed, present, tokens, level)
            for tokens in self.given
            if isinstance(tokens, Tokens)
        ]
        x0 = guided(found, self.guidance)
        if self.early is not None:
            assert isinstance(self.early.body, TopDenoiser)
            assert isinstance(self.early.given, Tokens)
            weaker = self.early.body(observed, present, self.early.given, level)
            x0 = self.early.guide(x0, weaker)
        if self.values is not None:
            x0 = self.values.hold(x0, self.body.level, 0)
        yield box, u[0], x0[0]


@dataclass(frozen=True)
class Under:
    """The images of a block whose area means are a field of parents."""

    body: OctaveBlock
    parents: Field

    @property
    def cell(self) -> int:
        """Boxes are multiples of this many fine cells: a parent."""
        return 1 << self.body.block.octaves

    def project(self, box: Box, x0: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """The values with the means of the parents."""
        n = self.body.block.octaves
        wanted = self.parents.read(self._above(box)).to(x0)
        return x0 + up(wanted[None] - means(x0[None], n), n)[0]

    def guess(self, box: Box, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """What the parents tell: their means and the details that they predict."""
        return self.body.base(self.around(self._above(box), like))[0]

    def _above(self, box: Box) -> Box:
        above = box.cover(self.body.block.parents)
        if above.refine(box.level) != box:
            raise ValueError(
                f"{box} cuts through parents of {self.cell} cells a side, whose means are given"
            )
        return above

    def around(self, box: Box, like: Tensor) -> Parents:
        """Parents of a box inside the image, with the margin that the network sees."""
        margin, level = self.body.config.margin, box.level
        _, height, width = self.parents.shape
        outer = box.grow(margin)
        inside = outer.clip(height, width)
        values = self.parents.read(inside).to(like)
        rows = torch.arange(outer.y, outer.y + outer.height, device=like.device)
        columns = torch.arange(outer.x, outer.x + outer.width, device=like.device)
        values = values[:, rows.clamp(0, height - 1) - inside.y]
        values = values[:, :, columns.clamp(0, width - 1) - inside.x]
        there_y, there_x = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        present = (there_y[:, None] & there_x)[None, None].to(like.dtype)
        inner = slice(margin, -margin)
        y_px, x_px = (((n[inner] + 0.5) * 2.0**level).to(like)[None] for n in (rows, columns))
        return Parents(values[None], present, y_px, x_px)


@dataclass(frozen=True)
class BlockPainter:
    """A block of octaves under its parents and one or two conditions.

    tile: side of a tile in fine cells.
    """

    under: Under
    given: tuple[Given, ...]
    guidance: float
    tile: int
    values: ValueRange | None = None
    early: EarlyBlock | None = None

    def __post_init__(self) -> None:
        if self.tile % self.under.cell:
            raise ValueError(
                f"a tile of {self.tile} is not a multiple of a parent, {self.under.cell} cells"
            )

    @torch.no_grad()
    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of every tile, in order; the field must not change meanwhile."""
        body = self.under.body
        block, like = body.block, next(body.parameters())
        level = like.new_full((1,), log_snr)
        _, height, width = self.under.parents.shape
        for box in tiles(*field.shape[1:], self.tile, level=block.fine):
            wide = box.cover(block.parents).grow(block.halo).clip(height, width)
            cells = wide.refine(block.fine)
            u = field.read(cells).to(like)
            parents = self.under.around(wide, like)
            told = body.told(parents)
            base = told.means + told.smooth
            observed = u / _alpha(log_snr) - base
            found = [
                body(observed, parents, tokens, level, told)
                for tokens in self.given
                if not isinstance(tokens, Tokens)
            ]
            x0 = guided(found, self.guidance)
            if self.early is not None:
                assert isinstance(self.early.body, OctaveBlock)
                assert not isinstance(self.early.given, Tokens)
                weaker = self.early.body(observed, parents, self.early.given, level, told)
                x0 = self.early.guide(x0, weaker)
            ys, xs = box.slices_in(cells)
            x0 = (base + x0)[:, :, ys, xs]
            if self.values is not None:
                x0 = self.values.hold(x0, block.fine, block.octaves)
            yield box, u[:, ys, xs], x0[0]


def _alpha(log_snr: float) -> float:
    """sqrt(abar)."""
    return float(torch.sigmoid(torch.tensor(log_snr, dtype=torch.float64)).sqrt())
