"""How conditions reach the image: tokens with coordinates, looked up or attended to.

A condition is a set of tokens, each an SSL embedding of a square of the image with a centre and a
side (its footprint). One token per image would only be a bias: softmax over one key is one. With
many, the layout can be told. Two operators read them: softmax cross-attention at the coarse
lattice (inside the U-Net), and at finer levels a bilinear lookup of the finest token lattice at
each cell, which modulates features (FiLM) at a cost that does not grow with their number.

A dropped condition (for classifier-free guidance) is a learned null token at the same places.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.points import Points
from model.resample import bilinear


@dataclass(frozen=True)
class Condition:
    """Tokens of a batch of images; the first gy * gx are the finest lattice, row by row.

    values: standardised embeddings. centres_px: (y, x) relative to the image's corner.
    footprints_px: sides of the squares. grid: (gy, gx). keep: where False, the condition is
    replaced by the null token.
    """

    values: Float[Tensor, "b n d"]
    centres_px: Float[Tensor, "b n 2"]
    footprints_px: Float[Tensor, "b n"]
    grid: tuple[int, int]
    keep: Bool[Tensor, " b"]

    def dropped(self) -> "Condition":
        """The same places without their content."""
        none = torch.zeros_like(self.keep)
        return Condition(self.values, self.centres_px, self.footprints_px, self.grid, none)

    def to(self, device: torch.device) -> "Condition":
        return Condition(
            self.values.to(device),
            self.centres_px.to(device),
            self.footprints_px.to(device),
            self.grid,
            self.keep.to(device),
        )


def fourier(
    values: Float[Tensor, "*shape"], width: int, period: float
) -> Float[Tensor, "*shape w"]:
    """Sines and cosines of `values` at width / 2 octaves, the longest with the given period."""
    octaves = 2.0 ** torch.arange(width // 2, device=values.device, dtype=values.dtype)
    angles = values[..., None] * octaves * (2 * math.pi / period)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TokenEncoder(nn.Module):
    """Tokens -> features with position and footprint; the null token where the condition is
    dropped.
    """

    POSITION_WIDTH = 16
    POSITION_PERIOD_PX = 16_384.0

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width))
        self.content = nn.Linear(token_dim, width)
        self.place = nn.Linear(2 * self.POSITION_WIDTH + 1, width)

    def forward(
        self, condition: Condition
    ) -> tuple[Float[Tensor, "b n w"], Float[Tensor, "b w gy gx"]]:
        """Features of all tokens with their places, and of the finest lattice without (its place
        is its index).
        """
        keep = condition.keep[:, None, None]
        content = torch.where(keep, self.content(condition.values), self.null)
        places = fourier(condition.centres_px, self.POSITION_WIDTH, self.POSITION_PERIOD_PX)
        scale = torch.log2(condition.footprints_px / 256.0)[..., None]
        tokens = content + self.place(torch.cat([places.flatten(-2), scale], dim=-1))
        gy, gx = condition.grid
        lattice = content[:, : gy * gx].unflatten(1, (gy, gx)).permute(0, 3, 1, 2)
        return tokens, lattice


@dataclass(frozen=True)
class Tokens:
    """A condition once encoded: all tokens to attend to, the finest lattice to look up."""

    attended: Float[Tensor, "b n t"]
    lattice: Float[Tensor, "b t gy gx"]
    condition: Condition

    def at(
        self, index: Int64[Tensor, " n"], y_px: Float[Tensor, "n h"], x_px: Float[Tensor, "n w"]
    ) -> Float[Tensor, "n h w t"]:
        """Tokens of the images `index` at cells with these centres."""
        first = self.condition.centres_px[index, 0]
        pitch = self.condition.footprints_px[index, 0]
        return look_up(self.lattice[index], first, pitch, y_px, x_px)

    def at_points(self, points: Points) -> Float[Tensor, "n t"]:
        """Tokens at sparse points, each of its own image; constant beyond the lattice's rim."""
        first = self.condition.centres_px[:, 0].double()[points.image]
        pitch = self.condition.footprints_px[:, 0].double()[points.image]
        place = (points.centres_px() - first) / pitch[:, None]
        return bilinear(self.lattice.permute(0, 2, 3, 1), points.image, place)


def look_up(
    lattice: Float[Tensor, "b t gy gx"],
    first_px: Float[Tensor, "b 2"],
    pitch_px: Float[Tensor, " b"],
    centres_y_px: Float[Tensor, "b h"],
    centres_x_px: Float[Tensor, "b w"],
) -> Float[Tensor, "b h w t"]:
    """Bilinear interpolation of a token lattice at cells; constant beyond its rim.

    The lattice's first token is centred at `first_px` (y, x), its neighbours `pitch_px` apart.
    `grid_sample` with align_corners=True wants -1 at the first token's centre and +1 at the last
    one's, in (x, y) order.
    """
    gy, gx = lattice.shape[-2:]
    y = (centres_y_px - first_px[:, :1]) / pitch_px[:, None] * (2.0 / max(gy - 1, 1)) - 1.0
    x = (centres_x_px - first_px[:, 1:]) / pitch_px[:, None] * (2.0 / max(gx - 1, 1)) - 1.0
    shape = (-1, y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    sampled = F.grid_sample(
        lattice, grid.to(lattice.dtype), mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled.permute(0, 2, 3, 1)
