"""What values an image can have: estimates are held inside.

Nearly all pixels of a scan lie between two values, its thousandth quantiles, and so do their area
means, in a range that is narrower the larger the cell. An estimate far outside is wrong, whatever
the noise level. Beside the brightest value, glass, that leaves little room for any texture.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from model.haar import means, up

_ROUNDS = 3


@dataclass(frozen=True)
class ValueRange:
    """Per band and level of cells, lowest and highest values in pixel values.

    colour, mean: pixel = mean + colour u. low, high: of the levels from 0 on.
    """

    colour: Float[Tensor, "c c"]
    mean: Float[Tensor, " c"]
    low: Float[Tensor, "levels c"]
    high: Float[Tensor, "levels c"]

    def hold(
        self, x0: Float[Tensor, "b c h w"], level: int, octaves: int
    ) -> Float[Tensor, "b c h w"]:
        """x0 with its values inside the range of `level`, nearly so where its means over squares
        of 2^octaves cells a side stay what they are (0 octaves: no means are kept).
        """
        low, high = (edge[level].to(x0)[:, None, None] for edge in (self.low, self.high))
        pixels = self._to_pixels(x0)
        if not octaves:
            return self._from_pixels(pixels.clamp(low, high))
        wanted, held = means(pixels, octaves), pixels
        for _ in range(_ROUNDS):
            held = held.clamp(low, high)
            held = held + up(wanted - means(held, octaves), octaves)
        return self._from_pixels(held)

    def _to_pixels(self, u: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return _mixed(self.colour, u) + self.mean.to(u)[:, None, None]

    def _from_pixels(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return _mixed(torch.linalg.inv(self.colour), pixels - self.mean.to(pixels)[:, None, None])


def _mixed(matrix: Float[Tensor, "c c"], values: Float[Tensor, "b c h w"]) -> Tensor:
    """A matrix applied to the bands of every cell, in the values' own precision."""
    with torch.autocast(values.device.type, enabled=False):
        return torch.einsum("ij,bjhw->bihw", matrix.to(values), values)
