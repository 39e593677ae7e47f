"""The top block: area means over large cells, all of them at once, from the condition alone.

A few hundred values hold the layout of an image. What is diffused is the field itself, in white
noise; every mode of the cosine basis is preconditioned at its own log-SNR (see `wiener`):

    x0_hat = D^-1 [ c_skip D y + c_out D F(D^-1 c_in D y, ...) ],    D the cosine transform.

The network is global; it is trained on windows of a few hundred cells, and knows their places in
the image. Each cell looks up the tokens at its place, and attends to all tokens,
wherever they are, by the papers' cross-attention operator (GNOT; `point_attention`), so that
distant places, coarser tokens, a label or a global vector can speak too. Without tokens the layout
is drawn from what was seen in training.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import Tokens
from model.blocks import LevelEmbedding
from model.cascade.config import CascadeConfig
from model.cascade.network import EMBEDDED, Conv, ResidualBlock
from model.point_attention import make_point_attention
from model.points import window_lattice
from model.process import Octaves, preconditioning_factors
from model.wiener import cosine_basis, mode_offsets


class TopNet(nn.Module):
    """F on a field of h x w cells, any h and w."""

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        top = config.top
        self.level = top.level
        self.stem = Conv(2 * config.channels + 1, top.width, centred=True)
        self.token = Conv(config.token_width, top.width, 1) if top.lookup else None
        self.embedding = LevelEmbedding(config.embedding_width, EMBEDDED)
        self.blocks = nn.ModuleList(
            ResidualBlock(top.width, config.embedding_width, centred=True)
            for _ in range(top.depth)
        )
        self.attention = nn.ModuleList(
            make_point_attention(
                top.attention,
                width=top.width,
                token_width=config.token_width,
                embedding_width=config.embedding_width,
                heads=top.heads,
            )
            for _ in range(top.depth)
            if top.attention != "none"
        )
        self.head = Conv(top.width, config.channels, zero=True)

    def forward(
        self,
        seen: Float[Tensor, "b i h w"],
        present: Float[Tensor, "b 1 h w"],
        tokens: Tokens,
        log_snr: Float[Tensor, " b"],
        origin: Int64[Tensor, "b 2"] | None,
    ) -> Float[Tensor, "b c h w"]:
        b, _, h, w = seen.shape
        first = torch.zeros(b, 2, dtype=torch.int64) if origin is None else origin.cpu()
        embedding = self.embedding(log_snr)
        x = self.stem(torch.cat([seen * present, present], dim=1))
        if self.token is not None:
            y_px, x_px = (
                cell_centres(n, self.level, seen) + (start.to(seen) * 2.0**self.level)[:, None]
                for n, start in zip((h, w), first.unbind(1), strict=True)
            )
            found = tokens.at(torch.arange(b, device=seen.device), y_px, x_px)
            x = x + self.token(found.permute(0, 3, 1, 2))
        points = window_lattice((h, w), first, self.level).to(seen.device)
        for i, block in enumerate(self.blocks):
            x = block(x, embedding)
            if len(self.attention):
                features = x.permute(0, 2, 3, 1).reshape(b * h * w, -1)
                features = self.attention[i](features, points, tokens, embedding)
                x = features.view(b, h, w, -1).permute(0, 3, 1, 2)
        return self.head(F.silu(x))


def cell_centres(cells: int, level: int, like: Tensor) -> Float[Tensor, " n"]:
    """Centres in pixels of the cells along one side of an image."""
    return (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) * 2.0**level


class TopDenoiser(nn.Module):
    """x0_hat of the top block's field from y = u_t / sqrt(abar), tokens and the log-SNR."""

    def __init__(self, config: CascadeConfig, octaves: Octaves) -> None:
        super().__init__()
        self.config, self.octaves, self.level = config, octaves, config.top.level
        levels = range(self.level, octaves.noise.top_level + 1)
        self.offsets = [octaves.offset(level) for level in levels]
        self.net = TopNet(config)

    def forward(
        self,
        observed: Float[Tensor, "b c h w"],
        present: Float[Tensor, "b 1 h w"],
        tokens: Tokens,
        log_snr: Float[Tensor, " b"],
        origin: Int64[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """x0_hat; origin: the first cell of each field, where it is a window of an image."""
        field = _Modes(self.octaves, self.level, observed, log_snr)
        return field.estimate(self.correction(field, present, tokens, log_snr, origin))

    def loss(
        self,
        truth: Float[Tensor, "b c h w"],
        observed: Float[Tensor, "b c h w"],
        present: Float[Tensor, "b 1 h w"],
        weight: Float[Tensor, "b 1 h w"],
        tokens: Tokens,
        log_snr: Float[Tensor, " b"],
        origin: Int64[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, "1"]:
        """Mean squared error of F over the cells of a batch, each with its weight."""
        field = _Modes(self.octaves, self.level, observed, log_snr)
        error = self.correction(field, present, tokens, log_snr, origin) - field.target(truth)
        return (error.square() * weight).mean()[None]

    def correction(
        self,
        field: "_Modes",
        present: Float[Tensor, "b 1 h w"],
        tokens: Tokens,
        log_snr: Float[Tensor, " b"],
        origin: Int64[Tensor, "b 2"] | None,
    ) -> Float[Tensor, "b c h w"]:
        seen = torch.cat([field.scaled, field.known], dim=1)
        middle = sum(self.offsets) / len(self.offsets)
        return self.net(seen, present, tokens, log_snr + middle, origin).to(field.scaled)


class _Modes:
    """A field's cosine modes and their preconditioning at one noise level an image."""

    def __init__(
        self,
        octaves: Octaves,
        level: int,
        observed: Float[Tensor, "b c h w"],
        log_snr: Float[Tensor, " b"],
    ) -> None:
        h, w = observed.shape[2:]
        self.rows, self.columns = cosine_basis(h, observed), cosine_basis(w, observed)
        noise = 4.0**-level
        signal = noise * torch.exp(mode_offsets(octaves, level, h, w)).to(observed)
        factors = preconditioning_factors(signal, noise, log_snr[:, None, None].to(observed))
        c_in, self.c_skip, self.c_out, _ = (factor[:, None] for factor in factors)
        modes = self._transform(observed)
        self.scaled, self.known = self._back(c_in * modes), self._back(self.c_skip * modes)

    def _transform(self, values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        with torch.autocast(values.device.type, enabled=False):
            return self.rows @ values @ self.columns.T

    def _back(self, modes: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        with torch.autocast(modes.device.type, enabled=False):
            return self.rows.T @ modes @ self.columns

    def estimate(self, correction: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x0_hat from F."""
        return self.known + self._back(self.c_out * self._transform(correction))

    def target(self, truth: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What F should have been."""
        return self._back(self._transform(truth - self.known) / self.c_out)
