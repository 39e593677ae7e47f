"""A depthwise kernel at another resolution.

The k x k weights are taken for a function on the plane, bilinear between the taps and falling to
zero one tap beyond them, and the operator for an integral against it. On cells `ratio` times finer
the function is sampled at the cells' spacing and divided by ratio^2, the cells' area; on coarser
cells (ratio < 1) each tap is shared among the cells nearest to it, which is the transpose. (∞-Diff
resizes kernels bilinearly to an odd size too, but as an image, whose sum changes with the size.)

What is preserved: the sum of the weights of every original tap, exactly, hence the operator's
answer to constants, at any ratio; and the first moments, hence its answer to linear functions,
where ratio is an integer or less than 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def resized_side(side: int, ratio: float) -> int:
    """Taps a side of a kernel of `side` taps on cells that are `ratio` times finer."""
    r = side // 2
    # The outermost cells with a weight: |offset| / ratio < r + 1, or next to r * ratio.
    reach = math.ceil((r + 1) * ratio) - 1 if ratio >= 1 else math.ceil(r * ratio)
    return 2 * reach + 1


def resize_kernel(weight: Float[Tensor, "c k k"], ratio: float) -> Float[Tensor, "c m m"]:
    """The same operator for cells that are `ratio` times finer (below 1: coarser), of odd size."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"a kernel is resized by a positive ratio of resolutions, not {ratio}")
    r, reach = weight.shape[-1] // 2, resized_side(weight.shape[-1], ratio) // 2
    tap = torch.arange(-r, r + 1, dtype=torch.float64, device=weight.device)
    cell = torch.arange(-reach, reach + 1, dtype=torch.float64, device=weight.device)
    share = (1 - (cell[:, None] - tap * ratio).abs() / max(ratio, 1.0)).clamp(min=0)
    share = (share / share.sum(dim=0)).to(weight.dtype)
    return torch.einsum("ai,cij,bj->cab", share, weight, share)
