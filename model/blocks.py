"""Parts that denoisers of all kinds share."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.attention import fourier


class LevelEmbedding(nn.Module):
    """A log-SNR as a vector; `features`: how many sines and cosines it is told by, slow ones
    first.
    """

    FEATURES = 16
    PERIOD = 64.0
    LIMIT = 16.0

    def __init__(self, width: int, features: int = FEATURES) -> None:
        super().__init__()
        self.features = features
        self.net = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, "b w"]:
        limited = log_snr.clamp(-self.LIMIT, self.LIMIT)
        return self.net(fourier(limited, self.features, self.PERIOD))


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


def zero_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that starts at zero: its branch is absent until it has learned something."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
