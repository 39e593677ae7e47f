"""The definition of the sparse depthwise convolution, in plain torch, and its dense counterpart.

Over the pairs of one tap a point occurs once, so that a tap is a gather, a product and an
`index_add_` without collisions, and its memory is what it gathers. Both normalisations are one
linear form over pairs (i, j, t): j is i's neighbour at tap t,

    pairs(v; a, b)_i = sum_{(j, t)} a_t v_j - b_t v_i,

with a = w and b = 0 (`ratio`) or b = w (`stable`). Since i is j's neighbour at the opposite tap,
the gradient is the same form with a mirrored: again a gather.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.operators.neighbours import Neighbours
from model.operators.normalisation import Normalisation, gain


def sparse_depthwise(
    values: Float[Tensor, "n c"],
    weight: Float[Tensor, "c k k"],
    neighbours: Neighbours,
    normalisation: Normalisation,
) -> Float[Tensor, "n c"]:
    """The operator of `model.operators.contract`; `weight` is of the precision of the sums."""
    exact = values.to(weight.dtype)
    out = _SparseDepthwise.apply(exact, weight.flatten(1), neighbours, normalisation)
    return out.to(values.dtype)


class _SparseDepthwise(torch.autograd.Function):
    """Saves its inputs and nothing of the size of the pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        neighbours: Neighbours,
        normalisation: Normalisation,
    ) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.neighbours, ctx.normalisation = neighbours, normalisation
        scale = gain(neighbours.counts, neighbours.kernel, normalisation, values.dtype)[:, None]
        if normalisation == "ratio":
            out = values * weight[:, weight.shape[1] // 2]
            return _add_pairs(out, values, weight, None, neighbours).mul_(scale)
        out = _add_pairs(torch.zeros_like(values), values, weight, weight, neighbours)
        return out.mul_(scale).addcmul_(values, weight.sum(dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, weight = ctx.saved_tensors
        neighbours, stable = ctx.neighbours, ctx.normalisation == "stable"
        scale = gain(neighbours.counts, neighbours.kernel, ctx.normalisation, values.dtype)[
            :, None
        ]
        scaled, centre = grad * scale, weight.shape[1] // 2
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = grad * weight.sum(dim=1) if stable else scaled * weight[:, centre]
            own = weight if stable else None
            _add_pairs(grad_values, scaled, weight.flip(1), own, neighbours)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            if stable:
                grad_weight += (grad * values).sum(dim=0)[:, None]
            else:
                grad_weight[:, centre] = (scaled * values).sum(dim=0)
            for tap, i, j in neighbours.by_tap:
                seen = values[j] - values[i] if stable else values[j]
                grad_weight[:, tap] += (scaled[i] * seen).sum(dim=0)
        return grad_values, grad_weight, None, None


def _add_pairs(
    out: Float[Tensor, "n c"],
    values: Float[Tensor, "n c"],
    at_neighbour: Float[Tensor, "c t"],
    at_point: Float[Tensor, "c t"] | None,
    neighbours: Neighbours,
) -> Float[Tensor, "n c"]:
    """out_i += sum over (j, t) of at_neighbour_t v_j - at_point_t v_i, in place."""
    for tap, i, j in neighbours.by_tap:
        term = values[j] * at_neighbour[:, tap]
        if at_point is not None:
            term -= values[i] * at_point[:, tap]
        out.index_add_(0, i, term)
    return out


def dense_depthwise(
    values: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "c k k"],
    present: Bool[Tensor, "b 1 h w"] | None,
    normalisation: Normalisation,
) -> Float[Tensor, "b c h w"]:
    """The same operator on a lattice, by `conv2d`; zero where a cell is absent.

    present: which cells exist, or None for all. Taps beyond the rim are absent, so a rim that is
    not the image's needs a halo of kernel // 2 cells. Half-precision values are convolved as they
    are (`conv2d` accumulates in float32) and normalised in float32.
    """
    c, k, _ = weight.shape
    precise = torch.promote_types(values.dtype, torch.float32)
    kernel, weight = weight[:, None].to(values.dtype), weight.to(precise)
    if present is None:
        out = F.conv2d(values, kernel, padding=k // 2, groups=c)
        for y, x in _rim(values.shape[-2], values.shape[-1], k // 2):
            counts, sums, total = _within(weight, y, x, values.shape[-2:])
            part = out[..., y, x], values[..., y, x]
            out[..., y, x] = _normalise(*part, counts, sums, total, k, normalisation)
        return out
    values, mask = torch.where(present, values, 0), present.to(precise)
    counts = F.conv2d(mask, torch.ones_like(weight[:1, None]), padding=k // 2).round().long()
    sums, total = F.conv2d(mask, weight[:, None], padding=k // 2), weight.sum(dim=(1, 2))
    out = F.conv2d(values, kernel, padding=k // 2, groups=c)
    out = _normalise(out, values, counts, sums, total, k, normalisation)
    return torch.where(present, out, 0).to(values.dtype)


def _normalise(
    taps: Float[Tensor, "b c h w"],
    values: Float[Tensor, "b c h w"],
    counts: Int64[Tensor, "*#b h w"],
    sums: Float[Tensor, "*#b c h w"],
    total: Float[Tensor, " c"],
    kernel: int,
    normalisation: Normalisation,
) -> Float[Tensor, "b c h w"]:
    """From the sums over present taps (centre included) of weights times values and of weights."""
    scale = gain((counts - 1).clamp(min=0), kernel, normalisation, sums.dtype)
    out = taps * scale
    if normalisation == "ratio":
        return out
    return torch.addcmul(out, values, total[:, None, None] - scale * sums)


def _rim(height: int, width: int, r: int) -> list[tuple[slice, slice]]:
    """The cells of a lattice that lie within r cells of its border, as disjoint rectangles."""
    top, left = min(r, height), min(r, width)
    bottom, right = max(height - r, top), max(width - r, left)
    middle = slice(top, bottom)
    rim = [(slice(0, top), slice(0, width)), (slice(bottom, height), slice(0, width))]
    return [*rim, (middle, slice(0, left)), (middle, slice(right, width))]


def _within(
    weight: Float[Tensor, "c k k"], y: slice, x: slice, size: tuple[int, ...]
) -> tuple[Int64[Tensor, "h w"], Float[Tensor, "c h w"], Float[Tensor, " c"]]:
    """At some cells of a full lattice: taps inside it, the sums of their weights, and of all.

    The taps inside are a rectangle, so their sum is four corners of the weight's integral.
    """
    k = weight.shape[-1]
    integral = F.pad(weight.cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0))
    ys = torch.arange(y.start, y.stop, device=weight.device)
    xs = torch.arange(x.start, x.stop, device=weight.device)
    y0, y1 = (k // 2 - ys).clamp(min=0), (size[0] + k // 2 - ys).clamp(max=k)
    x0, x1 = (k // 2 - xs).clamp(min=0), (size[1] + k // 2 - xs).clamp(max=k)
    rows = integral[:, y1] - integral[:, y0]
    sums = rows[..., x1] - rows[..., x0]
    return (y1 - y0)[:, None] * (x1 - x0), sums, integral[:, -1, -1]
