"""The pyramid denoiser: a U-Net on the exact coarse means, then level by level down to the pixel.

Observed is y = u_t / sqrt(abar) as area means over cells. At the coarse lattice (cells of 32 px) a
U-Net with cross-attention to the tokens corrects their linear estimate (`wiener`). Each finer
level predicts its values from its parents by their slopes, corrects that with its own observed
details (a Wiener step), and then with a small local network that sees its parents' features: three
terms, of which only the last is learned. Siblings' details sum to zero, so that a cell's estimate
*is* the mean of the estimates below it; the layout is decided at the lattice and never
contradicted by the pixels.

In training levels are windows (`design.ZoomDesign`), in generation they are dense; the same
`descend` computes both, and both meet the same statistics.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import Condition, TokenEncoder, Tokens
from model.blocks import LevelNet
from model.coarse import CoarseNet
from model.config import PyramidConfig
from model.haar import detail, repeat, slope_detail
from model.process import Octaves, precondition
from model.schedule import make_schedule
from model.wiener import precondition_lattice, wiener


@dataclass(frozen=True)
class Layer:
    """What one level knows on a rectangle of its cells, channels-last; the parents of the next
    level.

    estimate: x0_hat, standardised. features: handed down. present: 1 where a cell exists, else 0.
    """

    estimate: Float[Tensor, "b h w c"]
    features: Float[Tensor, "b h w f"]
    present: Float[Tensor, "b h w 1"]

    def crop(
        self, index: Int64[Tensor, " n"], origins: Int64[Tensor, "n 2"], side: tuple[int, int]
    ) -> "Layer":
        """Rectangles of `side` cells at `origins` of the images `index`; absent where they stick
        out.
        """
        parts = (self.estimate, self.features, self.present)
        cropped = crop(torch.cat(parts, dim=-1), index, origins, side)
        return Layer(*cropped.split([part.shape[-1] for part in parts], dim=-1))

    def detached(self) -> "Layer":
        """The same layer, whose estimate no longer passes gradients (its features do)."""
        return Layer(self.estimate.detach(), self.features, self.present)


@dataclass(frozen=True)
class Descent:
    """One level's result: the layer, the network's F, and the details known without it."""

    layer: Layer
    correction: Float[Tensor, "b h w c"]
    known: Float[Tensor, "b h w c"]


def crop(
    values: Float[Tensor, "b h w c"],
    index: Int64[Tensor, " n"],
    origins: Int64[Tensor, "n 2"],
    side: tuple[int, int],
) -> Float[Tensor, "n sy sx c"]:
    """values[index[i], origin_i : origin_i + side], zero outside."""
    b, h, w, c = values.shape
    rows = origins[:, :1] + torch.arange(side[0], device=values.device)
    columns = origins[:, 1:] + torch.arange(side[1], device=values.device)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    flat = (index[:, None] * h + rows.clamp(0, h - 1))[:, :, None] * w
    flat = flat + columns.clamp(0, w - 1)[:, None, :]
    taken = values.reshape(b * h * w, c).index_select(0, flat.flatten())
    return taken.view(*flat.shape, c) * inside[..., None]


class PyramidDenoiser(nn.Module):
    """x0_hat at every cell of every level from y = u_t / sqrt(abar), tokens and the log-SNR.

    Levels run from config.coarse_level (`lattice`) to 0 (`descend`); lengths are pixels of the
    training resolution.
    """

    def __init__(self, config: PyramidConfig, octaves: Octaves) -> None:
        super().__init__()
        if octaves.coarse_level != config.coarse_level:
            raise ValueError(
                f"the octaves were measured for a coarse level of {octaves.coarse_level}, "
                f"the denoiser has {config.coarse_level}; pack again with the same --coarse-level"
            )
        self.config = config
        self.octaves = octaves
        side_px = 1 << octaves.noise.top_level
        self.schedule = make_schedule(config.schedule, side_px=side_px, octaves=octaves)
        self.tokens = TokenEncoder(config.token_dim, config.token_width, config.classes)
        self.coarse = CoarseNet(config)
        parents = (config.lattice_width, *config.widths)
        self.levels = nn.ModuleList(
            LevelNet(
                channels=config.channels,
                width=config.widths[place],
                parent_width=parents[place],
                embedding_width=config.embedding_width,
                token_width=config.token_width if level >= config.lookup_level else 0,
                blocks=config.blocks[place],
                kernel=config.kernel,
            )
            for place, level in enumerate(reversed(range(config.coarse_level)))
        )

    def encode(self, condition: Condition) -> Tokens:
        """Tokens once for a whole evaluation."""
        attended, lattice = self.tokens(condition)
        return Tokens(attended, lattice, condition)

    def lattice(
        self,
        observed: Float[Tensor, "b h w c"],
        present: Float[Tensor, "b h w 1"],
        log_snr: Float[Tensor, " b"],
        tokens: Tokens,
    ) -> Descent:
        """The coarse level, all of it."""
        level = self.config.coarse_level
        factors = precondition_lattice(self.octaves, log_snr)
        b, h, w, _ = observed.shape
        device = observed.device
        looked_up = tokens.at(
            torch.arange(b, device=device),
            self.coarse.patch_centres(h, self.config.cell_px, device).expand(b, -1),
            self.coarse.patch_centres(w, self.config.cell_px, device).expand(b, -1),
        )
        observed = observed * present
        known = wiener(self.octaves, level, observed, log_snr) * present
        scale = self.octaves.variances(level)[0] ** -0.5
        out, features = self.coarse(
            torch.cat([observed * factors.c_in, known * scale], dim=-1).permute(0, 3, 1, 2),
            present.permute(0, 3, 1, 2),
            factors.log_snr,
            tokens.attended,
            looked_up.permute(0, 3, 1, 2),
        )
        correction = out.permute(0, 2, 3, 1)
        estimate = (known + factors.c_out * correction) * present
        layer = Layer(estimate, features.permute(0, 2, 3, 1) * present, present)
        return Descent(layer, correction, known)

    def descend(
        self,
        level: int,
        parents: Layer,
        observed: Float[Tensor, "n h w c"],
        present: Float[Tensor, "n h w 1"],
        origins: Int64[Tensor, "n 2"],
        log_snr: Float[Tensor, " n"],
        tokens: Tokens,
        index: Int64[Tensor, " n"],
    ) -> Descent:
        """One level finer, on rectangles whose first cells are `origins` (even) of the images
        `index`.

        `parents` cover the same rectangles with a margin of one parent cell on every side.
        """
        factors = precondition(self.octaves, level, log_snr)
        inner = (slice(None), slice(1, -1), slice(1, -1))
        slopes = slope_detail(parents.estimate, parents.present)
        innovation = (detail(observed) - slopes) * present
        known = slopes + factors.c_skip * innovation
        baseline = (repeat(parents.estimate[inner]) + known) * present
        correction, features = self.levels[self.config.coarse_level - 1 - level](
            torch.cat([factors.c_in * innovation, baseline], dim=-1),
            parents.features[inner],
            factors.log_snr,
            self._looked_up(level, observed, origins, tokens, index),
            present,
        )
        estimate = (baseline + factors.c_out * correction) * present
        return Descent(Layer(estimate, features, present), correction, known)

    def _looked_up(
        self,
        level: int,
        observed: Float[Tensor, "n h w c"],
        origins: Int64[Tensor, "n 2"],
        tokens: Tokens,
        index: Int64[Tensor, " n"],
    ) -> Float[Tensor, "n h w t"] | None:
        if level < self.config.lookup_level:
            return None
        h, w = observed.shape[1:3]
        rows = origins[:, :1] + torch.arange(h, device=observed.device)
        columns = origins[:, 1:] + torch.arange(w, device=observed.device)
        return tokens.at(index, (rows + 0.5) * 2.0**level, (columns + 0.5) * 2.0**level)

    def correction_target(
        self,
        level: int,
        truth: Float[Tensor, "n h w c"],
        known: Float[Tensor, "n h w c"],
        log_snr: Float[Tensor, " n"],
    ) -> Float[Tensor, "n h w c"]:
        """What F should have been at `level`."""
        if level == self.config.coarse_level:
            return (truth - known) / precondition_lattice(self.octaves, log_snr).c_out
        return (detail(truth) - known) / precondition(self.octaves, level, log_snr).c_out
