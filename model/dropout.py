"""Dropout that is a function of the sample, not of the state of a generator.

What is dropped of an image's features follows from the image's seed, the layer and the place
alone, by Philox-4x32-10. So a step repeated drops the same, and so does a batch that is divided
over ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.philox import MASK, philox_4x32

STREAM = 0xD207


class KeyedDropout(nn.Module):
    """x times a mask of 0 and 1 / (1 - rate) while seeds are given (see `dropping`), else x.

    rate: the part that is dropped, in [0, 1). number: of the layer, so that no two drop alike.
    """

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate, self.number = rate, number
        self.seeds: Int64[Tensor, " b"] | None = None

    def forward(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *shape"]:
        if self.seeds is None:
            return x
        kept = keyed_words(self.seeds, x[0].numel(), self.number) >= int(self.rate * 2**32)
        return x * (kept.view_as(x).to(x.dtype) / (1 - self.rate))


def keyed_words(seeds: Int64[Tensor, " b"], count: int, number: int) -> Int64[Tensor, "b n"]:
    """`count` uniform 32-bit words of every seed; counters are (place, 0, layer, stream)."""
    place = torch.arange(-(-count // 4), device=seeds.device).expand(len(seeds), -1)
    zero = torch.zeros_like(place)
    counter = (place, zero, torch.full_like(place, number), torch.full_like(place, STREAM))
    low, high = (word[:, None].expand_as(place) for word in (seeds & MASK, (seeds >> 32) & MASK))
    return torch.stack(philox_4x32(counter, (low, high)), dim=-1).flatten(1)[:, :count]


@contextmanager
def dropping(network: nn.Module, seeds: Int64[Tensor, " b"] | None) -> Iterator[None]:
    """Within, every `KeyedDropout` of the network drops by these seeds, one an image; by none,
    nothing.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, KeyedDropout)]
    for layer in layers:
        layer.seeds = seeds
    try:
        yield
    finally:
        for layer in layers:
            layer.seeds = None
