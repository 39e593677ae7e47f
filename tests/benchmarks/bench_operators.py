"""What the sparse operator costs against the masked dense convolution, and against memory.

The opponent is what ∞-Diff's portable backend does at N random pixels of an image: scatter them
into a dense grid of zeros, convolve it and its mask, divide, and gather at the pixels. Its 64
channels of 4096² are 4.3 GB in float32 and more for gradients, so that the dense side runs in
groups of channels, one after the other, and its memory is that of one group; at once it would be
in proportion. Parity is checked before anything is timed. Nothing is asserted about time.
"""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from benchmarks.bench_costs import extra_gb, report, seconds
from torch import Tensor, nn

from model.operators.contract import sparse_depthwise
from model.operators.neighbours import Neighbours, find_neighbours
from model.points import Points

SIDE, POINTS, CHANNELS, KERNEL = 4096, 65_536, 64, 7
GROUP = 8  # channels of the dense side at a time


def uniform(side: int, count: int) -> Points:
    draw = torch.Generator().manual_seed(0)
    cells = torch.randperm(side**2, generator=draw)[:count]
    zero = torch.zeros_like(cells)
    return Points(zero, zero, cells // side, cells % side, torch.tensor([[side, side]]))


class MaskedDense:
    """`ratio` at the points by a dense convolution of values and, once, of their mask."""

    def __init__(self, points: Points) -> None:
        self.height, self.width = points.sizes_px[0].tolist()
        self.cell = points.y * self.width + points.x
        mask = torch.zeros(self.height * self.width).index_fill(0, self.cell, 1)
        mean = torch.full((1, 1, KERNEL, KERNEL), 1 / KERNEL**2)
        fraction = F.conv2d(mask.view(1, 1, self.height, -1), mean, padding=KERNEL // 2)
        self.fraction = fraction.flatten()[self.cell]

    def __call__(self, values: Tensor, weight: Tensor) -> Tensor:
        grid = values.new_zeros(len(weight), self.height * self.width)
        grid = grid.index_copy(1, self.cell, values.T).view(1, -1, self.height, self.width)
        taps = F.conv2d(grid, weight[:, None], padding=KERNEL // 2, groups=len(weight))
        return (taps.flatten(2)[0, :, self.cell] / self.fraction).T


def gradients(operator: Callable[[Tensor, Tensor], Tensor], values: Tensor, weight: Tensor):  # type: ignore[no-untyped-def]
    values, weight = values.detach().requires_grad_(), weight.detach().requires_grad_()
    out = operator(values, weight)
    return out.detach(), *torch.autograd.grad(out, (values, weight), out.detach())


def in_groups(operator: Callable[[Tensor, Tensor], Tensor], values: Tensor, weight: Tensor):  # type: ignore[no-untyped-def]
    """Output and gradients of a depthwise operator, some channels at a time."""
    parts = [
        gradients(operator, v, w)
        for v, w in zip(values.split(GROUP, dim=1), weight.split(GROUP), strict=True)
    ]
    out, grad_values, grad_weight = zip(*parts, strict=True)
    return torch.cat(out, dim=1), torch.cat(grad_values, dim=1), torch.cat(grad_weight)


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(POINTS, CHANNELS, generator=draw)
    weight = torch.randn(CHANNELS, KERNEL, KERNEL, generator=draw) / KERNEL
    return values.to(device), weight.to(device)


class Block(nn.Module):
    """A sparse block of ∞-Diff: depthwise operator, norm, and an MLP of twice the width."""

    def __init__(self, neighbours: Neighbours) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.norm = nn.LayerNorm(CHANNELS)
        self.mlp = nn.Sequential(
            nn.Linear(CHANNELS, 2 * CHANNELS), nn.SiLU(), nn.Linear(2 * CHANNELS, CHANNELS)
        )

    def forward(self, values: Tensor, weight: Tensor) -> Tensor:
        mixed = sparse_depthwise(
            values, weight, self.neighbours, normalisation="ratio", backend="reference"
        )
        return values + self.mlp(self.norm(mixed))


@pytest.mark.timeout(3600)
def test_the_sparse_operator_against_the_masked_dense_convolution_on_a_cpu() -> None:
    values, weight = inputs()
    small, some = uniform(256, 256), slice(0, 256)
    ours = gradients(
        lambda v, w: sparse_depthwise(
            v, w, find_neighbours(small, KERNEL), normalisation="ratio", backend="reference"
        ),
        values[some],
        weight,
    )
    theirs = in_groups(MaskedDense(small), values[some], weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

    points = uniform(SIDE, POINTS)
    searching = seconds(lambda: find_neighbours(points, KERNEL))
    neighbours = find_neighbours(points, KERNEL)

    def stable(v: Tensor, w: Tensor) -> Tensor:
        return sparse_depthwise(v, w, neighbours, normalisation="stable", backend="reference")

    def ratio(v: Tensor, w: Tensor) -> Tensor:
        return sparse_depthwise(v, w, neighbours, normalisation="ratio", backend="reference")

    sparse_gb = extra_gb(lambda: gradients(ratio, values, weight))  # before anything is reused
    sparse = {
        "ratio": seconds(lambda: gradients(ratio, values, weight)),
        "stable": seconds(lambda: gradients(stable, values, weight)),
        "whole block (ratio, norm, MLP)": seconds(
            lambda: gradients(Block(neighbours), values, weight)
        ),
    }
    started, found = time.perf_counter(), []
    dense_gb = extra_gb(lambda: found.extend(in_groups(MaskedDense(points), values, weight)))
    dense, theirs = time.perf_counter() - started, tuple(found)
    torch.testing.assert_close(gradients(ratio, values, weight), theirs, rtol=1e-3, atol=1e-2)
    rows = [
        (f"masked dense, {GROUP} channels at a time", f"{dense:.1f} s, {dense_gb:.2f} GB more"),
        ("finding neighbours, once", f"{searching * 1e3:.0f} ms"),
        *(
            (name, f"{cost * 1e3:.0f} ms, {dense / cost:.0f} × faster")
            for name, cost in sparse.items()
        ),
        (
            "with the search in every block",
            f"{dense / (sparse['ratio'] + searching):.0f} × faster",
        ),
        (
            "memory",
            f"{sparse_gb:.3f} GB more; all channels of the dense side at once would take about "
            f"{dense_gb * CHANNELS / GROUP:.1f} GB",
        ),
    ]
    report(f"sparse depthwise, {POINTS} points of {SIDE}², {CHANNELS} channels, fwd + bwd", rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_against_the_bytes_they_must_move_on_a_gpu(dtype: torch.dtype) -> None:
    """Floor: values read and outputs written forward; gradient and values read and the values'
    gradient written backward; at the speed of a copy on this card.
    """
    from triton.testing import do_bench_cudagraph

    values, weight = inputs("cuda")
    values = values.to(dtype)
    points = uniform(SIDE, POINTS).to(torch.device("cuda"))
    neighbours = find_neighbours(points, KERNEL)
    results = {
        backend: gradients(
            lambda v, w, b=backend: sparse_depthwise(  # type: ignore[misc]
                v, w, neighbours, normalisation="stable", backend=b
            ),
            values,
            weight,
        )
        for backend in ("triton", "reference")
    }
    loose = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(*results.values(), strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=loose, atol=loose * scale)

    def cost(work: Callable[[], object]) -> float:
        """Milliseconds on the device, without what Python takes to launch."""
        return do_bench_cudagraph(work, rep=50, return_mode="median")

    big = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    bytes_per_ms = 2 * big.numel() / cost(big.clone)
    floor = 5 * values.numel() * values.element_size() / bytes_per_ms
    order = torch.randperm(POINTS, device="cuda")
    rows = [("floor: 5 passes over the values", f"{floor * 1e3:.0f} µs")]
    gather = cost(lambda: values[order])
    rows.append(("a gather in plain torch", f"{gather * 1e3:.0f} µs"))
    for backend in ("triton", "reference"):

        def operator(v: Tensor, w: Tensor, backend: str = backend) -> Tensor:
            return sparse_depthwise(
                v,
                w,
                neighbours,
                normalisation="stable",
                backend=backend,  # type: ignore[arg-type]
            )

        torch.cuda.reset_peak_memory_stats()
        both = cost(lambda operator=operator: gradients(operator, values, weight))  # type: ignore[misc]
        forward = cost(lambda operator=operator: operator(values, weight))  # type: ignore[misc]
        gb = torch.cuda.max_memory_allocated() / 1e9
        rows.append(
            (
                f"{backend}, forward and backward",
                f"{both * 1e3:.0f} µs ({both / floor:.1f} × the floor), forward "
                f"{forward * 1e3:.0f} µs ({forward / gather:.1f} × a gather), {gb:.2f} GB",
            )
        )
    report(f"sparse depthwise on {torch.cuda.get_device_name()}, {dtype}", rows)
