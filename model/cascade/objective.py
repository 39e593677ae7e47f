"""The training objective of one block: the error of F in each of its octaves.

Given the data, blocks are independent: each is trained by its own objective, with the true means
as parents. They carry a little noise, U(0, parents_noise) of deviation, so that generated ones are
no shock. The log-SNR is normal around the middle of the block's range, where its octaves are
decided, and held inside the range.

Noise is keyed by the sample's seed. It need not be known by place here, so that it is not taken
from the keyed field but has its law: white details of the block's octaves alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import Condition, Tokens
from model.cascade.denoiser import CascadeBlock, CascadeDenoiser, OctaveBlock, Parents
from model.cascade.top import TopDenoiser
from model.draw import BlockDraw, TopDraw
from model.haar import zero_mean

NOISE_STREAM, PARENTS_STREAM = 0xB10C, 0x9A9E
HELD_OUT_LOG_SNRS = (-4.0, -2.0, 0.0, 2.0, 4.0)
"""Around a block's middle, where the held-out error is measured."""
_LEAST_UNIFORM = 1e-3


class BlockObjective(nn.Module):
    """Losses of a batch in every octave of a block, fine to coarse, as a module that DeepSpeed can
    wrap. It holds the parameters of its block only.
    """

    def __init__(self, denoiser: CascadeDenoiser, name: str) -> None:
        super().__init__()
        block = denoiser.blocks[name]
        assert isinstance(block, CascadeBlock)
        self.config, self.name, self.block = denoiser.config, name, block

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the losses; the top block has one loss, at its own level."""
        body = self.block.body
        if isinstance(body, TopDenoiser):
            return (body.level,)
        return tuple(range(body.block.fine, body.block.parents))

    def forward(
        self,
        draw: TopDraw | BlockDraw,
        condition: Condition,
        seeds: Int64[Tensor, " b"],
        uniform: Float[Tensor, " b"],
    ) -> Float[Tensor, " levels"]:
        """`seeds` name the noise; `uniform` in [0, 1) is the noise level's place in its law."""
        normal = torch.special.ndtri(uniform.clamp(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM))
        log_snr = self.block.middle() + self.config.log_snr_deviation * normal
        log_snr = log_snr.clamp(*self.block.log_snr_range())
        if isinstance(draw, BlockDraw) and self.config.parents_noise:
            draw = with_noisy_parents(draw, seeds, self.config.parents_noise)
        return self.losses(draw, condition, seeds, log_snr)

    def losses(
        self,
        draw: TopDraw | BlockDraw,
        condition: Condition,
        seeds: Int64[Tensor, " b"],
        log_snr: Float[Tensor, " b"],
    ) -> Float[Tensor, " levels"]:
        """At given log-SNRs."""
        body, tokens = self.block.body, self.block.encode(condition)
        sigma = torch.exp(-log_snr / 2)[:, None, None, None]
        noise = keyed_normals(seeds, NOISE_STREAM, draw.values.shape[1:]).to(draw.values)
        if isinstance(body, TopDenoiser):
            assert isinstance(draw, TopDraw) and isinstance(tokens, Tokens)
            observed = draw.values + sigma * noise * 2.0**-body.level
            cells = draw.values, observed, draw.present, draw.weight
            return body.loss(*cells, tokens, log_snr, draw.origin)
        assert isinstance(body, OctaveBlock) and isinstance(draw, BlockDraw)
        assert not isinstance(tokens, Tokens)
        n = body.block.octaves
        parents = Parents(draw.parents, draw.parents_present, draw.y_px, draw.x_px)
        told = body.told(parents)
        truth = zero_mean(draw.values, n) - told.smooth
        observed = truth + sigma * zero_mean(noise, n) * 2.0**-body.block.fine
        losses = body.losses(truth, observed, parents, tokens, log_snr, draw.weight, told)
        return losses.flip(0)

    @torch.no_grad()
    def held_out(
        self, draw: TopDraw | BlockDraw, condition: Condition, seeds: Int64[Tensor, " b"]
    ) -> Float[Tensor, "snrs levels"]:
        """The errors at fixed log-SNRs around the middle, under keyed noise and clean parents."""
        middle, count = self.block.middle(), len(draw.values)
        rows = [
            self.losses(draw, condition, seeds, draw.values.new_full((count,), middle + away))
            for away in HELD_OUT_LOG_SNRS
        ]
        return torch.stack(rows)


def with_noisy_parents(draw: BlockDraw, seeds: Int64[Tensor, " b"], largest: float) -> BlockDraw:
    """The draw with noise of a deviation between 0 and `largest` on its parents, keyed."""
    noise = keyed_normals(seeds, PARENTS_STREAM, draw.parents.shape[1:])
    streams = (_philox(seed, PARENTS_STREAM + 1) for seed in seeds.tolist())
    part = [np.random.Generator(stream).random() for stream in streams]
    deviation = largest * torch.tensor(part, dtype=torch.float32)[:, None, None, None]
    parents = draw.parents + (deviation * noise).to(draw.parents)
    return BlockDraw(draw.values, parents, draw.parents_present, draw.weight, draw.y_px, draw.x_px)


def keyed_normals(
    seeds: Int64[Tensor, " b"], stream: int, shape: Sequence[int]
) -> Float[Tensor, "b *shape"]:
    """Independent standard normals of each seed and stream, float32, made on the host."""
    rows = [
        np.random.Generator(_philox(seed, stream)).standard_normal(tuple(shape), np.float32)
        for seed in seeds.tolist()
    ]
    return torch.from_numpy(np.stack(rows))


def _philox(seed: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream], np.uint64))
