"""The local parts of a denoiser: blocks whose every coupling is a declared number of cells.

All normalisation is per cell, so that a window computes what the whole image would, except within
the blocks' halo of the window's rim. Absent cells hold zero before every convolution, exactly as
if they were padding.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.attention import fourier
from model.haar import detail, repeat


class LevelEmbedding(nn.Module):
    """A level's log-SNR as a vector."""

    WIDTH = 16
    PERIOD = 64.0
    LIMIT = 16.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(self.WIDTH, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, "b w"]:
        limited = log_snr.clamp(-self.LIMIT, self.LIMIT)
        return self.net(fourier(limited, self.WIDTH, self.PERIOD))


class ModulatedMlp(nn.Module):
    """W_2 silu(W_1 [ norm(y) (1 + scale) + shift ]): zero until it has learned something."""

    EXPANSION = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.widen = nn.Linear(width, self.EXPANSION * width)
        self.narrow = zero_linear(self.EXPANSION * width, width)

    def forward(
        self, y: Float[Tensor, "*shape c"], film: Float[Tensor, "*film c2"]
    ) -> Float[Tensor, "*shape c"]:
        scale, shift = film.chunk(2, dim=-1)
        return self.narrow(F.silu(self.widen(self.norm(y) * (1 + scale) + shift)))


class LocalBlock(nn.Module):
    """Depthwise convolution, per-cell norm with FiLM, and an MLP, added to the input (ConvNeXt,
    Liu et al., 2022); zero where cells are absent. Halo: kernel // 2 cells.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.mlp = ModulatedMlp(width)

    def forward(
        self,
        x: Float[Tensor, "b h w c"],
        film: Float[Tensor, "b #h #w c2"],
        present: Float[Tensor, "b h w 1"],
    ) -> Float[Tensor, "b h w c"]:
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (x + self.mlp(y, film)) * present


class LevelNet(nn.Module):
    """The learned part of one level: local blocks that see its own details and its parents'
    features.

    channels: of the image; width: of this level's features; parent_width: of its parents';
    token_width: of the tokens looked up here, or 0 where none are.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        parent_width: int,
        embedding_width: int,
        token_width: int,
        blocks: int,
        kernel: int,
    ) -> None:
        super().__init__()
        self.inherit = nn.Linear(parent_width, width)
        self.observe = nn.Linear(2 * channels, width)
        self.embedding = LevelEmbedding(embedding_width)
        self.film = zero_linear(embedding_width, 2 * width)
        self.token_film = zero_linear(token_width, 2 * width) if token_width else None
        self.blocks = nn.ModuleList(LocalBlock(width, kernel) for _ in range(blocks))
        # Without a bias, which details do not have.
        self.head = zero_linear(width, channels, bias=False)
        self.gain = zero_linear(width, channels)

    def forward(
        self,
        inputs: Float[Tensor, "b h2 w2 i"],
        parents: Float[Tensor, "b h w p"],
        log_snr: Float[Tensor, " b"],
        tokens: Float[Tensor, "b h2 w2 t"] | None,
        present: Float[Tensor, "b h2 w2 1"],
    ) -> tuple[Float[Tensor, "b h2 w2 c"], Float[Tensor, "b h2 w2 f"]]:
        """F, whose siblings sum to zero, and the level's features.

        The gain lets features say how far a cell's own details are to be believed: where an image
        is flat they are all noise.
        """
        x = (self.observe(inputs) + repeat(self.inherit(parents))) * present
        film = self.film(self.embedding(log_snr))[:, None, None, :]
        if self.token_film is not None and tokens is not None:
            film = film + self.token_film(tokens)
        for block in self.blocks:
            x = block(x, film, present)
        own = inputs[..., : self.head.out_features]
        return detail(self.head(x) + self.gain(x) * own), x


def zero_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that starts at zero: its branch is absent until it has learned something."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
