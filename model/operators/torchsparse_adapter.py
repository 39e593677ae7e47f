"""The sparse depthwise convolution by torchsparse's gather-scatter convolution.

torchsparse (2.1, github.com/mit-han-lab/torchsparse) has no depthwise mode; ∞-Diff used a fork
that had. Here each tap's weight is a diagonal c x c matrix, which is c times the arithmetic that a
depthwise convolution needs: this backend is for those who want that library's numbers, not speed.
Its own search is not used, because it hashes int32 coordinates: our pairs become its kernel map,
(input, output) rows tap by tap, with the centre's among them, since its convolution multiplies
all points by the middle tap and skips that tap's rows.
"""

import torch
import torchsparse
import torchsparse.backend
from jaxtyping import Float
from torch import Tensor
from torchsparse.nn.functional.conv.func import (
    GatherScatterConvolutionFuntion as GatherScatterConvolution,  # spelled so there
)

from model.operators.neighbours import Neighbours
from model.operators.normalisation import Normalisation, gain

CONFIG = {"epsilon": 0.0, "mm_thresh": 0}


def sparse_depthwise(
    values: Float[Tensor, "n c"],
    weight: Float[Tensor, "c k k"],
    neighbours: Neighbours,
    normalisation: Normalisation,
) -> Float[Tensor, "n c"]:
    """The operator of `model.operators.contract`, in float32."""
    if weight.dtype != torch.float32:
        raise ValueError(
            f"backend 'torchsparse' computes in float32, not {weight.dtype}; use "
            "backend='triton' or 'reference'"
        )
    exact, total = values.to(weight.dtype), weight.sum(dim=(1, 2))
    if len(values) == 0:
        return values * total.to(values.dtype)
    taps, kernel_map = weight.flatten(1).T, _kernel_map(neighbours)

    def convolve(features: Tensor, matrices: Tensor) -> Tensor:
        return GatherScatterConvolution.apply(features, matrices, kernel_map, CONFIG, False)

    scale = gain(neighbours.counts, neighbours.kernel, normalisation, weight.dtype)[:, None]
    out = scale * convolve(exact, torch.diag_embed(taps))
    if normalisation == "stable":
        present = convolve(exact.new_ones(len(exact), 1), taps[:, None])
        out = out + exact * (total - scale * present)
    return out.to(values.dtype)


def _kernel_map(neighbours: Neighbours) -> dict[str, object]:
    first, point, neighbour = neighbours.ordered_by_tap
    n, middle = len(neighbours), neighbours.kernel**2 // 2
    every = torch.arange(n, device=point.device)
    before = int(first[middle])
    inputs = torch.cat([neighbour[:before], every, neighbour[before:]])
    outputs = torch.cat([point[:before], every, point[before:]])
    sizes = first.diff()
    sizes[middle] = n
    maps, sizes = torch.stack([inputs, outputs], dim=1).int(), sizes.int()
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    if point.is_cuda:
        masks = torchsparse.backend.build_mask_from_kmap(n, n, maps, sizes)
    return {
        "nbmaps": maps,
        "nbsizes": sizes,
        "sizes": (n, n),
        "input_mask": masks[0],
        "output_mask": masks[1],
    }
