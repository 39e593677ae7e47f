"""The sparse depthwise convolution as Triton kernels: gather, multiply and normalise in one pass.

A program owns a block of points and of channels, and walks through the neighbours of its points
slot by slot. Nothing of the size of the pairs is written, and no atomics are used, so that results
are the same in every run:

    forward         reads values, writes outputs
    values          their gradient is a gather too, from the points that see this one, which are
                    its own neighbours at the mirrored tap; the same pass sums what the centre's
                    weight receives from the block
    weight          a program sums its share of one tap's pairs; the shares are added afterwards,
                    always in the same order

Sums are in float32 (float64 for float64). Offsets are int64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.operators.neighbours import Neighbours
from model.operators.normalisation import Normalisation, fraction

TILE = 2048  # values that a program holds
MAX_BLOCK_C = 64
MAX_SHARES = 64  # programs that share the pairs of one tap
PAIRS = 32  # pairs that a program adds at a time
LAUNCH = {"enable_fp_fusion": False}  # rounded as the reference is, whatever Triton's default


@triton.jit
def _forward(
    values,
    weight,  # (taps, c)
    centre,  # (c): the centre's weight, or the sum of all
    start,
    neighbour,
    tap,
    out,
    n,
    c,
    numerator,
    offset,
    STABLE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row, in_col = row < n, (col < c)[None, :]
    inside = in_row[:, None] & in_col
    place = row[:, None] * c + col[None, :]
    first = tl.load(start + row, mask=in_row, other=0)
    count = tl.load(start + row + 1, mask=in_row, other=0) - first
    own = tl.load(values + place, mask=inside, other=0).to(SUM)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=SUM)
    for slot in range(0, tl.max(count, axis=0)):
        here = slot < count
        other = tl.load(neighbour + first + slot, mask=here, other=0)
        which = tl.load(tap + first + slot, mask=here, other=0)
        seen = here[:, None] & in_col
        w = tl.load(weight + which[:, None] * c + col[None, :], mask=seen, other=0)
        v = tl.load(values + other[:, None] * c + col[None, :], mask=seen, other=0).to(SUM)
        if STABLE:
            v -= own
        total += w * v
    gain = (numerator / (count.to(SUM) + offset))[:, None]
    mine = tl.load(centre + col, mask=col < c, other=0)[None, :] * own
    result = mine + gain * total if STABLE else gain * (mine + total)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_values(
    grad,
    values,
    weight,
    centre,
    start,
    neighbour,
    tap,
    grad_values,
    grad_centre,  # (blocks of points, c)
    n,
    c,
    taps,
    numerator,
    offset,
    STABLE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row, in_col = row < n, (col < c)[None, :]
    inside = in_row[:, None] & in_col
    place = row[:, None] * c + col[None, :]
    first = tl.load(start + row, mask=in_row, other=0)
    count = tl.load(start + row + 1, mask=in_row, other=0) - first
    own = tl.load(grad + place, mask=inside, other=0).to(SUM)
    scaled = own * (numerator / (count.to(SUM) + offset))[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=SUM)
    for slot in range(0, tl.max(count, axis=0)):
        here = slot < count
        other = tl.load(neighbour + first + slot, mask=here, other=0)
        which = tl.load(tap + first + slot, mask=here, other=0)
        its = tl.load(start + other + 1, mask=here, other=0)
        its -= tl.load(start + other, mask=here, other=0)
        gain = (numerator / (its.to(SUM) + offset))[:, None]
        seen = here[:, None] & in_col
        mirrored = weight + (taps - 1 - which)[:, None] * c + col[None, :]
        w = tl.load(mirrored, mask=seen, other=0)
        g = tl.load(grad + other[:, None] * c + col[None, :], mask=seen, other=0).to(SUM)
        total += w * (gain * g)
        if STABLE:
            w = tl.load(weight + which[:, None] * c + col[None, :], mask=seen, other=0)
            total -= w * scaled
    if not STABLE:
        own = scaled
    total += tl.load(centre + col, mask=col < c, other=0)[None, :] * own
    tl.store(grad_values + place, total.to(grad_values.dtype.element_ty), mask=inside)
    v = tl.load(values + place, mask=inside, other=0).to(SUM)
    share = grad_centre + tl.program_id(0).to(tl.int64) * c + col
    tl.store(share, tl.sum(own * v, axis=0), mask=col < c)


@triton.jit
def _backward_weight(
    grad,
    values,
    start,
    first_of_tap,
    point,
    neighbour,
    grad_weight,  # (shares, taps, c)
    c,
    taps,
    shares,
    numerator,
    offset,
    STABLE: tl.constexpr,
    SUM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tap, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    col = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(first_of_tap + tap)
    size = tl.load(first_of_tap + tap + 1) - begin
    last = begin + size * (share + 1) // shares
    begin += size * share // shares
    total = tl.zeros([BLOCK_C], dtype=SUM)
    for step in range(0, tl.cdiv(last - begin, PAIRS)):
        pair = begin + step * PAIRS + tl.arange(0, PAIRS)
        here = pair < last
        seen = here[:, None] & (col < c)[None, :]
        i = tl.load(point + pair, mask=here, other=0)
        j = tl.load(neighbour + pair, mask=here, other=0)
        count = tl.load(start + i + 1, mask=here, other=0)
        count -= tl.load(start + i, mask=here, other=0)
        gain = (numerator / (count.to(SUM) + offset))[:, None]
        g = tl.load(grad + i[:, None] * c + col[None, :], mask=seen, other=0).to(SUM)
        v = tl.load(values + j[:, None] * c + col[None, :], mask=seen, other=0).to(SUM)
        if STABLE:
            v -= tl.load(values + i[:, None] * c + col[None, :], mask=seen, other=0).to(SUM)
        total += tl.sum(gain * g * v, axis=0)
    tl.store(grad_weight + (share * taps + tap) * c + col, total, mask=col < c)


INTERPRETED = not isinstance(_forward, triton.JITFunction)


def sparse_depthwise(
    values: Float[Tensor, "n c"],
    weight: Float[Tensor, "c k k"],
    neighbours: Neighbours,
    normalisation: Normalisation,
) -> Float[Tensor, "n c"]:
    """The operator of `model.operators.contract`; `weight` is of the precision of the sums."""
    if not (values.is_cuda or INTERPRETED):
        raise ValueError(
            f"backend 'triton' needs a GPU, but the values are on {values.device}; use "
            "backend='reference', or set TRITON_INTERPRET=1 before Python starts, for tests"
        )
    return _SparseDepthwise.apply(values, weight.flatten(1), neighbours, normalisation)


class _SparseDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        neighbours: Neighbours,
        normalisation: Normalisation,
    ) -> Tensor:
        values = values.contiguous()
        ctx.save_for_backward(values, weight)
        ctx.neighbours, ctx.normalisation = neighbours, normalisation
        n, c = values.shape
        out = torch.empty_like(values)
        if n == 0:
            return out
        block_n, block_c = _blocks(c)
        _forward[(triton.cdiv(n, block_n), triton.cdiv(c, block_c))](
            values,
            weight.T.contiguous(),
            _centre(weight, normalisation),
            neighbours.start,
            neighbours.neighbour,
            neighbours.tap,
            out,
            n,
            c,
            *fraction(neighbours.kernel, normalisation),
            STABLE=normalisation == "stable",
            SUM=_sum_type(weight),
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            **LAUNCH,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        values, weight = ctx.saved_tensors
        neighbours, normalisation = ctx.neighbours, ctx.normalisation
        (n, c), taps = values.shape, weight.shape[1]
        if n == 0:
            return torch.zeros_like(values), torch.zeros_like(weight), None, None
        grad = grad.contiguous()
        gain = fraction(neighbours.kernel, normalisation)
        block_n, block_c = _blocks(c)
        blocks = triton.cdiv(n, block_n), triton.cdiv(c, block_c)
        stable = normalisation == "stable"
        grad_values = torch.empty_like(values)
        grad_centre = weight.new_empty(blocks[0], c)
        _backward_values[blocks](
            grad,
            values,
            weight.T.contiguous(),
            _centre(weight, normalisation),
            neighbours.start,
            neighbours.neighbour,
            neighbours.tap,
            grad_values,
            grad_centre,
            n,
            c,
            taps,
            *gain,
            STABLE=stable,
            SUM=_sum_type(weight),
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            **LAUNCH,
        )
        if not ctx.needs_input_grad[1]:
            return grad_values, None, None, None
        pairs_of_tap = len(neighbours.neighbour) / taps
        num_shares = min(max(int(pairs_of_tap / PAIRS), 1), MAX_SHARES)
        shares = weight.new_empty(num_shares, taps, c)
        _backward_weight[(taps, num_shares, blocks[1])](
            grad,
            values,
            neighbours.start,
            *neighbours.ordered_by_tap,
            shares,
            c,
            taps,
            num_shares,
            *gain,
            STABLE=stable,
            SUM=_sum_type(weight),
            PAIRS=PAIRS,
            BLOCK_C=block_c,
            **LAUNCH,
        )
        grad_weight = shares.sum(dim=0).T
        received = slice(None) if stable else slice(taps // 2, taps // 2 + 1)
        grad_weight[:, received] += grad_centre.sum(dim=0)[:, None]
        return grad_values, grad_weight, None, None


def _blocks(channels: int) -> tuple[int, int]:
    """(points, channels) of a program."""
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_C)
    return max(min(TILE // block_c, 128), 16), block_c


def _centre(weight: Float[Tensor, "c t"], normalisation: Normalisation) -> Float[Tensor, " c"]:
    """What multiplies a point's own value."""
    if normalisation == "stable":
        return weight.sum(dim=1)
    return weight[:, weight.shape[1] // 2].contiguous()


def _sum_type(weight: Tensor) -> Any:
    return tl.float64 if weight.dtype == torch.float64 else tl.float32
