"""What the sparse and the grid level are made of: a block of points, and the U-Net's part."""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import Tokens
from model.blocks import ModulatedMlp, zero_linear
from model.coarse import make_unet, unet_time
from model.dropout import KeyedDropout, dropping
from model.operator_attention import AttentionSums, SelfAttentionOperator
from model.point_attention import PointAttention, make_point_attention
from model.sparse.config import SparseConfig
from model.sparse.support import Support

Sum = TypeVar("Sum")
Ask = Callable[[], Sum]
"""How to find what some points contribute to a sum over the image, for who does not know it."""


class SparseConv(nn.Module):
    """x + MLP( norm(operator(x)) (1 + scale) + shift ) over the points present (∞-Diff, appendix
    A); the operator has no bias, scale and shift follow from the noise level.
    """

    def __init__(self, width: int, kernel: int, embedding_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel, kernel).uniform_(-1, 1) / kernel)
        self.film = zero_linear(embedding_width, 2 * width)
        self.mlp = ModulatedMlp(width)

    def forward(
        self, x: Float[Tensor, "n w"], embedding: Float[Tensor, "b e"], support: Support
    ) -> Float[Tensor, "n w"]:
        film = self.film(embedding)
        if len(film) > 1:
            film = film[support.points.image]
        return x + self.mlp(support.depthwise(x, self.weight), film)


class PointBlock(nn.Module):
    """The operators of one layer at the sparse level, each added to the features of points.

    Its forward is a coroutine, as the denoiser's (see `denoiser`): it yields how to find the sums
    of its own points for self-attention and is sent those of the image.
    """

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.local = SparseConv(config.width, config.kernel, config.embedding_width)
        self.condition: PointAttention | None = None
        self.each_other: SelfAttentionOperator | None = None
        if config.cross_attention != "none":
            self.condition = make_point_attention(
                config.cross_attention,
                width=config.width,
                token_width=config.token_width,
                embedding_width=config.embedding_width,
                heads=config.heads,
            )
        if config.self_attention:
            self.each_other = SelfAttentionOperator(config.width, config.heads)

    def forward(
        self,
        x: Float[Tensor, "n w"],
        support: Support,
        embedding: Float[Tensor, "b e"],
        tokens: Tokens | None = None,
    ) -> Generator[Ask[AttentionSums], AttentionSums, Float[Tensor, "n w"]]:
        points = support.points
        x = self.local(x, embedding, support)
        if self.condition is not None and tokens is not None:
            x = self.condition(x, points, tokens, embedding)
        if self.each_other is not None:
            sums = yield partial(_own_sums, self.each_other, x, support)
            x = self.each_other.attend(x, points, sums)
        return x


def _own_sums(
    attention: SelfAttentionOperator, x: Float[Tensor, "n w"], support: Support
) -> AttentionSums:
    """What the points that a support stands for contribute."""
    points, inner, weights = support.points, support.interior, support.weights
    if inner is None:
        return attention.accumulate(x, points, weights)
    return attention.accumulate(x[inner], points.take(inner), weights[inner])


class LatticeNet(nn.Module):
    """The grid level: a U-Net on the coarse lattice; any height and width, padded inside.

    inputs: channels that come to it beside the looked-up tokens. With a latent, the embedding that
    holds it modulates every residual block, as the noise level does.
    """

    def __init__(self, config: SparseConfig, inputs: int) -> None:
        super().__init__()
        self.multiple = 1 << (len(config.unet_widths) - 1)
        modulated = config.embedding_width if config.latent_dim else None
        self.unet: Any = make_unet(config, inputs, config.width, modulated)
        if config.unet_dropout:
            _drop(self.unet, config)

    def forward(
        self,
        values: Float[Tensor, "b hl wl i"],
        log_snr: Float[Tensor, " b"],
        tokens: Float[Tensor, "b n t"],
        modulation: Float[Tensor, "b e"] | None = None,
        seeds: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b hl wl w"]:
        """Features at the cells; `seeds` of the images decide what is dropped, None drops
        nothing.
        """
        h, w = values.shape[1:3]
        x = F.pad(values.permute(0, 3, 1, 2), (0, -w % self.multiple, 0, -h % self.multiple))
        with dropping(self.unet, seeds):
            out = self.unet(
                x, unet_time(log_snr), encoder_hidden_states=tokens, timestep_cond=modulation
            ).sample
        return out[:, :, :h, :w].permute(0, 2, 3, 1)


def _drop(unet: Any, config: SparseConfig) -> None:
    """Dropout in the residual blocks of the resolutions that attend, and of the middle."""
    attending = config.unet_attention
    down = unet.down_blocks[len(unet.down_blocks) - attending :]
    resnets = [
        resnet
        for block in (*down, unet.mid_block, *unet.up_blocks[:attending])
        for resnet in block.resnets
    ]
    for number, resnet in enumerate(resnets):
        resnet.dropout = KeyedDropout(config.unet_dropout, number)
