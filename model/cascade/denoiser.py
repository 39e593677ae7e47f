"""The cascade: p(u | e) = p(u_top | e) prod_b p(u_f | u_g, e), one block of octaves after another.

Block b is given the area means u_g over its parents' cells and generates those over finer cells,
u_f (the last block reads no e). What is diffused is the part of u_f that the parents do not tell,

    x = u_f - up(u_g) - I(u_g),    y = x + sigma xi,    lambda = -2 ln sigma,

I the details that bicubic interpolation predicts (`haar.predicted`), xi the keyed noise of these
octaves alone (`noise_band.BandNoise`). x has zero mean in every parent cell, so that no block
contradicts a coarser one. In octave l of the block the signal has variance S_l, the noise sigma^2
N_l, and each octave is preconditioned at its own log-SNR (EDM; Karras et al., 2022):

    x0_hat = sum_l [ c_skip,l y_l + c_out,l F_l ],    F = net( sum_l c_in,l y_l, ...).

The loss is the mean over octaves of the squared error of F: every octave counts alike, in units of
its own noise (docs/method.md compares that with ∞-Brush's Theorem 1). Blocks share no weights;
given the data each is trained on its own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.attention import Condition, TokenEncoder, TokenLookup, Tokens
from model.cascade.config import BlockConfig, CascadeConfig
from model.cascade.network import BlockNet
from model.cascade.top import TopDenoiser
from model.haar import details, predicted, up, zero_mean
from model.process import Octaves, preconditioning_factors

MARGIN_NATS = 6.0
"""A block's noise levels go from this far below its easiest octave to as far above its hardest."""


@dataclass(frozen=True)
class Parents:
    """Values of parent cells on a rectangle of an image with a margin on every side, those outside
    continued from the nearest; which of them exist; and the centres in pixels of the inner ones.
    """

    values: Float[Tensor, "b c hp wp"]
    present: Float[Tensor, "b 1 hp wp"]
    y_px: Float[Tensor, "b h"]
    x_px: Float[Tensor, "b w"]


@dataclass(frozen=True)
class Told:
    """What parents tell of the fine cells: up(u_g), and I(u_g)."""

    means: Float[Tensor, "b c hk wk"]
    smooth: Float[Tensor, "b c hk wk"]


@dataclass(frozen=True)
class LookedUp:
    """A condition whose tokens are encoded where they are looked up."""

    encoder: TokenLookup
    condition: Condition

    def at(
        self, y_px: Float[Tensor, "b h"], x_px: Float[Tensor, "b w"]
    ) -> Float[Tensor, "b t h w"]:
        """Features at cells with these centres."""
        return self.encoder(self.condition, y_px, x_px)


class OctaveBlock(nn.Module):
    """x0_hat of a block's details from y, its parents, tokens and the log-SNR."""

    def __init__(self, config: CascadeConfig, block: BlockConfig, octaves: Octaves) -> None:
        super().__init__()
        self.config, self.block = config, block
        levels = range(block.parents - 1, block.fine - 1, -1)
        self.variances = [octaves.variances(level) for level in levels]
        self.offsets = [octaves.offset(level) for level in levels]
        self.scale = sum(signal for signal, _ in self.variances) ** -0.5
        self.net = BlockNet(config, block)

    def told(self, parents: Parents) -> Told:
        """What these parents tell, for all evaluations under them."""
        means = up(self.inner(parents.values), self.block.octaves)
        return Told(means, self.predicted(parents))

    def base(self, parents: Parents) -> Float[Tensor, "b c hk wk"]:
        """up(u_g) + I(u_g)."""
        told = self.told(parents)
        return told.means + told.smooth

    def inner(self, values: Float[Tensor, "b c hp wp"]) -> Float[Tensor, "b c h w"]:
        """Without the margin."""
        m = self.config.margin
        return values[..., m : values.shape[2] - m, m : values.shape[3] - m]

    def predicted(self, parents: Parents) -> Float[Tensor, "b c hk wk"]:
        """I(u_g)."""
        return predicted(parents.values, self.block.octaves, self.config.margin)

    def forward(
        self,
        observed: Float[Tensor, "b c hk wk"],
        parents: Parents,
        tokens: LookedUp | None,
        log_snr: Float[Tensor, " b"],
        told: Told | None = None,
    ) -> Float[Tensor, "b c hk wk"]:
        """x0_hat: zero mean in every parent cell. told: by the parents, where the caller knows."""
        seen, told = _Seen(self, observed, log_snr), told or self.told(parents)
        out = self.correction(seen, parents, told, tokens, log_snr)
        return seen.known + seen.corrected(out)

    def losses(
        self,
        truth: Float[Tensor, "b c hk wk"],
        observed: Float[Tensor, "b c hk wk"],
        parents: Parents,
        tokens: LookedUp | None,
        log_snr: Float[Tensor, " b"],
        weight: Float[Tensor, "b 1 h w"],
        told: Told | None = None,
    ) -> Float[Tensor, " octaves"]:
        """Mean squared error of F in every octave, coarse to fine, over the fine cells of parents,
        each with its weight.
        """
        seen = _Seen(self, observed, log_snr)
        out = self.correction(seen, parents, told or self.told(parents), tokens, log_snr)
        n, losses = self.block.octaves, []
        pairs = zip(details(out, n), seen.targets(truth), strict=True)
        cells = up(weight, n)
        for found, wanted in pairs:
            losses.append(((found - wanted).square().mean(dim=1, keepdim=True) * cells).mean())
        return torch.stack(losses)

    def looked_up(self, tokens: LookedUp, parents: Parents) -> Float[Tensor, "b t h w"]:
        """Features of tokens at n x n places of every inner parent, of a feature all places
        together.
        """
        n, centres_px = self.block.lookups, (parents.y_px, parents.x_px)
        steps = torch.arange(n, device=parents.y_px.device, dtype=parents.y_px.dtype)
        away = (steps + 0.5) / n - 0.5
        y_px, x_px = (
            (centre[..., None] + away * 2.0**self.block.parents).flatten(1)
            for centre in centres_px
        )
        return F.pixel_unshuffle(tokens.at(y_px, x_px), n)

    def correction(
        self,
        seen: "_Seen",
        parents: Parents,
        told: Told,
        tokens: LookedUp | None,
        log_snr: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c hk wk"]:
        """F of all octaves together."""
        guess = told.means + told.smooth + seen.known
        out, gains = self.net(
            torch.cat([seen.scaled, guess, told.smooth * self.scale], dim=1),
            parents.values,
            parents.present,
            None if tokens is None else self.looked_up(tokens, parents),
            log_snr + sum(self.offsets) / len(self.offsets),
        )
        return zero_mean(seen.weighted(gains.to(guess)) + out.to(guess), self.block.octaves)


class _Seen:
    """Observed details, octave by octave, and their preconditioning."""

    def __init__(
        self,
        block: OctaveBlock,
        observed: Float[Tensor, "b c hk wk"],
        log_snr: Float[Tensor, " b"],
    ) -> None:
        self.n = block.block.octaves
        level = log_snr[:, None, None, None]
        self.octaves = details(observed, self.n)
        self.factors = [preconditioning_factors(s, n, level)[:3] for s, n in block.variances]
        self.parts = [c_in * y for (c_in, _, _), y in zip(self.factors, self.octaves, strict=True)]
        self.scaled = torch.stack(self.parts).sum(dim=0)
        self.known = self._sum([c_skip for _, c_skip, _ in self.factors], self.octaves)

    @staticmethod
    def _sum(factors: list[Tensor], parts: list[Tensor]) -> Tensor:
        total = factors[0] * parts[0]
        for factor, part in zip(factors[1:], parts[1:], strict=True):
            total = torch.addcmul(total, factor, part)
        return total

    def weighted(self, gains: Float[Tensor, "b g hk wk"]) -> Float[Tensor, "b c hk wk"]:
        """sum_l gain_l c_in,l y_l."""
        return self._sum(list(gains.chunk(self.n, dim=1)), self.parts)

    def corrected(self, out: Float[Tensor, "b c hk wk"]) -> Float[Tensor, "b c hk wk"]:
        """sum_l c_out,l F_l."""
        return self._sum([c_out for _, _, c_out in self.factors], details(out, self.n))

    def targets(self, truth: Float[Tensor, "b c hk wk"]) -> list[Float[Tensor, "b c hk wk"]]:
        """What F should have been, octave by octave."""
        parts = zip(details(truth, self.n), self.octaves, self.factors, strict=True)
        return [(wanted - c_skip * y) / c_out for wanted, y, (_, c_skip, c_out) in parts]


class CascadeBlock(nn.Module):
    """A block with the encoder of the tokens that it reads."""

    def __init__(
        self, config: CascadeConfig, body: TopDenoiser | OctaveBlock, *, reads_tokens: bool
    ) -> None:
        super().__init__()
        self.body = body
        self.tokens: TokenEncoder | TokenLookup | None = None
        if reads_tokens:
            kind = TokenEncoder if isinstance(body, TopDenoiser) else TokenLookup
            self.tokens = kind(
                config.token_dim, config.token_width, config.classes, config.vector_dim
            )

    def encode(self, condition: Condition) -> Tokens | LookedUp | None:
        """What the block reads of a condition; None where it reads nothing."""
        if isinstance(self.tokens, TokenEncoder):
            attended, lattice = self.tokens(condition)
            return Tokens(attended, lattice, condition)
        return None if self.tokens is None else LookedUp(self.tokens, condition)

    def log_snr_range(self) -> tuple[float, float]:
        """From drowned in the easiest octave to clean in the hardest."""
        offsets = self.body.offsets
        return -MARGIN_NATS - max(offsets), MARGIN_NATS - min(offsets)

    def middle(self) -> float:
        """The log-SNR at which the octaves are decided, on average."""
        return -sum(self.body.offsets) / len(self.body.offsets)


class CascadeDenoiser(nn.Module):
    """All blocks of a cascade, by name, coarse to fine.

    octaves: of the regions that it is trained on; lengths are pixels of their resolution.
    """

    def __init__(self, config: CascadeConfig, octaves: Octaves) -> None:
        super().__init__()
        if octaves.coarse_level != config.top.level:
            raise ValueError(
                f"the octaves were measured below level {octaves.coarse_level}, the cascade's top "
                f"block is of level {config.top.level}; pack again"
            )
        self.config, self.octaves = config, octaves
        blocks = {
            config.top.name: CascadeBlock(config, TopDenoiser(config, octaves), reads_tokens=True)
        }
        for block in config.blocks:
            body = OctaveBlock(config, block, octaves)
            blocks[block.name] = CascadeBlock(config, body, reads_tokens=block.tokens)
        self.blocks = nn.ModuleDict(blocks)
