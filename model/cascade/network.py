"""The network of a block: a small U-Net of dense 3x3 convolutions on coarse places.

All normalisation is per place and all couplings are convolutions, so that what a place computes
depends on a bounded neighbourhood (`config.BlockConfig.halo`). Beyond a rectangle's border is the
padding of every convolution, zero: an image's border and a training window's look alike, but for
the parents around them. Dense convolutions of a few hundred channels in channels-last run at a
CPU's full rate, which depthwise ones at every pixel do not (docs/benchmarks.md).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import LevelEmbedding
from model.cascade.config import BlockConfig, CascadeConfig

EMBEDDED = 8
"""Sines and cosines of a log-SNR: slow ones, since a network changes slowly with the noise."""
_NORM_EPS = 1e-3


class Conv(nn.Module):
    """A convolution whose kernel is stored as the matrix (out, side * side * in), as Muon takes
    it; `zero` starts it at zero.

    centred: it starts as a convolution of side 1. Taps that never meet a neighbour in training,
    as those of large cells in small regions, then stay zero, and larger images are not disturbed.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int = 3,
        *,
        stride: int = 1,
        zero: bool = False,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.side, self.stride = side, stride
        met = inputs * (1 if centred else side**2)
        bound = 0.0 if zero else 1.0 / math.sqrt(met)
        kernel = torch.zeros(outputs, side, side, inputs)
        part = kernel[:, side // 2, side // 2] if centred else kernel
        part.uniform_(-bound, bound)
        self.weight = nn.Parameter(kernel.flatten(1))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        kernel = self.weight.unflatten(1, (self.side, self.side, -1)).permute(0, 3, 1, 2)
        padding = self.side // 2 if self.stride == 1 else 0
        return F.conv2d(x, kernel, self.bias, self.stride, padding)


def normalised(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """With mean 0 and variance 1 over the channels of each place.

    Dividing by the root mean square alone would do, but torch computes its gradient on a CPU in
    pieces, which takes three times as long.
    """
    last = x.permute(0, 2, 3, 1)
    return F.layer_norm(last, last.shape[-1:], eps=_NORM_EPS).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(FiLM(norm(conv(silu(norm(x))))))), zero until it has learned something. Halo:
    2 places.
    """

    def __init__(self, width: int, embedding_width: int, *, centred: bool = False) -> None:
        super().__init__()
        self.first = Conv(width, width, centred=centred)
        self.second = Conv(width, width, zero=True)
        self.film = nn.Linear(embedding_width, 2 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h w"]:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        y = normalised(self.first(F.silu(normalised(x))))
        return x + self.second(F.silu(y * (1 + scale) + shift))


class ContextNet(nn.Module):
    """What the parents of a rectangle and of `margin` cells around it say of each of them."""

    def __init__(self, channels: int, hidden: int, width: int, margin: int) -> None:
        super().__init__()
        self.first = Conv(channels + 1, hidden, centred=True)
        self.middle = nn.ModuleList(Conv(hidden, hidden, centred=True) for _ in range(margin - 2))
        self.last = Conv(hidden, width, centred=True)
        self.margin = margin

    def forward(
        self, parents: Float[Tensor, "b c hp wp"], present: Float[Tensor, "b 1 hp wp"]
    ) -> Float[Tensor, "b f h w"]:
        x = self.first(torch.cat([parents * present, present], dim=1))
        for conv in self.middle:
            x = conv(F.silu(x))
        x = self.last(F.silu(x))
        m = self.margin
        return x[..., m : x.shape[2] - m, m : x.shape[3] - m]


class BlockNet(nn.Module):
    """From what is seen of a block's cells, its parents, looked-up tokens and the noise level
    (relative to the middle of the block's range): what is added to F, and with which gain the
    observed details of each octave are.

    Where an image is flat all of its observed details are noise. Features are normalised place by
    place and have lost their size, so that a gain says what convolutions alone learn slowly: how
    far a place's own details are to be believed.
    """

    def __init__(self, config: CascadeConfig, block: BlockConfig) -> None:
        super().__init__()
        widths, channels, inside = block.widths, config.channels, block.place**2
        self.place = block.place
        self.stem = Conv(3 * channels * inside, widths[0], block.stem_side)
        self.context = ContextNet(channels, block.context, widths[-1], config.margin)
        tokens = config.token_width * block.lookups**2
        self.token = Conv(tokens, widths[-1], 1) if block.tokens else None
        self.embedding = LevelEmbedding(config.embedding_width, EMBEDDED)
        stages = [
            nn.ModuleList(
                ResidualBlock(width, config.embedding_width, centred=i == len(widths) - 1)
                for _ in range(depth)
            )
            for i, (width, depth) in enumerate(zip(widths, block.depths, strict=True))
        ]
        self.encoder, self.coarsest = nn.ModuleList(stages[:-1]), stages[-1]
        self.decoder = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width, config.embedding_width) for _ in range(depth))
            for width, depth in zip(widths[:-1], block.depths[:-1], strict=True)
        )
        pairs = list(itertools.pairwise(widths))
        self.downs = nn.ModuleList(Conv(a, b, 2, stride=2) for a, b in pairs)
        self.ups = nn.ModuleList(Conv(b, 4 * a, 1) for a, b in pairs)
        self.head = Conv(widths[0], channels * inside, zero=True)
        self.gain = Conv(widths[0], channels * block.octaves, 1, zero=True)

    def forward(
        self,
        seen: Float[Tensor, "b i hk wk"],
        parents: Float[Tensor, "b c hp wp"],
        parents_present: Float[Tensor, "b 1 hp wp"],
        tokens: Float[Tensor, "b t h w"] | None,
        log_snr: Float[Tensor, " b"],
    ) -> tuple[Float[Tensor, "b c hk wk"], Float[Tensor, "b g hk wk"]]:
        """parents, parents_present: with a margin, which may lie outside the image. Gains are
        those of the coarsest octave first.
        """
        embedding, skips = self.embedding(log_snr), []
        x = F.pixel_unshuffle(seen, self.place).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for stage, down in zip(self.encoder, self.downs, strict=True):
            x = _through(stage, x, embedding)
            skips.append(x)
            x = down(x)
        x = x + self.context(parents, parents_present)
        if self.token is not None and tokens is not None:
            x = x + self.token(tokens)
        x = _through(self.coarsest, x, embedding)
        for i in reversed(range(len(skips))):
            x = F.pixel_shuffle(self.ups[i](x), 2) + skips[i]
            x = _through(self.decoder[i], x, embedding)
        x = F.silu(x)
        gains = F.interpolate(self.gain(x), scale_factor=float(self.place))
        return F.pixel_shuffle(self.head(x), self.place), gains


def _through(stage: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    """The residual blocks of one resolution."""
    for block in stage.children():
        x = block(x, embedding)
    return x
