"""Triton's kernels against the reference: outputs and gradients at awkward sizes.

Run by `test_operators.py` in a process of its own: whether Triton interprets is decided when it is
first imported. Memory that is allocated and not yet written holds NaN throughout.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.operators.contract import sparse_depthwise
from model.operators.neighbours import find_neighbours
from model.operators.normalisation import Normalisation
from model.points import Points, full_lattice

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
EMPTY = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(64).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def scattered(sizes: list[tuple[int, int]], counts: list[int]) -> Points:
    """Distinct pixels of images of different sizes, some of them empty, in random order."""
    draw = torch.Generator().manual_seed(sum(counts))
    image, cells = [], []
    for i, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        image.append(torch.full((count,), i))
        cells.append(torch.randperm(height * width, generator=draw)[:count])
    widths = torch.tensor(sizes)[torch.cat(image), 1]
    order = torch.randperm(sum(counts), generator=draw)
    cell, owner = torch.cat(cells)[order], torch.cat(image)[order]
    widths = widths[order]
    return Points(
        owner, torch.zeros_like(owner), cell // widths, cell % widths, torch.tensor(sizes)
    )


def both(
    points: Points, c: int, kernel: int, normalisation: Normalisation, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Triton's and the reference's output, gradient of the values and gradient of the weight."""
    draw = torch.Generator().manual_seed(c + kernel)
    values = torch.randn(len(points), c, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
    weight = torch.randn(c, kernel, kernel, generator=draw, dtype=torch.float64)
    weight = weight.to(DEVICE, torch.promote_types(dtype, torch.float32))
    seen = torch.randn(len(points), c, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
    neighbours = find_neighbours(points.to(DEVICE), kernel)
    results: list[tuple[Tensor, ...]] = []
    for backend in ("triton", "reference"):
        v, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
        out = sparse_depthwise(v, w, neighbours, normalisation=normalisation, backend=backend)  # type: ignore[arg-type]
        results.append((out.detach(), *torch.autograd.grad(out, (v, w), seen)))
    yield from zip(*results, strict=True)


ONE = scattered([(3, 3)], [1])
SEVEN = scattered([(4, 4), (5, 5), (3, 7)], [4, 0, 3])
MANY = scattered([(9, 12), (6, 6), (16, 16)], [60, 0, 70])
FULL = full_lattice(9, 8)


@pytest.mark.parametrize("normalisation", ["ratio", "stable"])
@pytest.mark.parametrize(
    ("points", "c", "kernel"),
    [
        (ONE, 1, 3),
        (ONE, 33, 7),
        (SEVEN, 1, 5),
        (SEVEN, 3, 3),
        (SEVEN, 64, 7),
        (MANY, 1, 7),
        (MANY, 3, 5),
        (MANY, 33, 3),
        (MANY, 64, 5),
        (MANY, 65, 3),
        (FULL, 3, 7),
    ],
)
def test_outputs_and_gradients_are_the_references(
    points: Points, c: int, kernel: int, normalisation: Normalisation
) -> None:
    for triton, reference in both(points, c, kernel, normalisation, torch.float64):
        torch.testing.assert_close(triton, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("normalisation", ["ratio", "stable"])
def test_float32(normalisation: Normalisation) -> None:
    for triton, reference in both(MANY, 33, 3, normalisation, torch.float32):
        scale = float(reference.abs().max())
        torch.testing.assert_close(triton, reference, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("normalisation", ["ratio", "stable"])
def test_bfloat16_sums_in_float32(normalisation: Normalisation) -> None:
    """Both round the same sums once: results differ by one unit in the last place at most."""
    for triton, reference in both(MANY, 33, 3, normalisation, torch.bfloat16):
        assert triton.dtype == reference.dtype
        step = torch.finfo(reference.dtype).eps
        scale = float(reference.abs().max())
        torch.testing.assert_close(triton, reference, rtol=step, atol=1e-6 * scale)


def test_the_same_bits_every_time() -> None:
    first, again = (
        [triton for triton, _ in both(MANY, 3, 5, "stable", torch.float32)] for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_and_values_that_are_not_contiguous() -> None:
    neighbours = find_neighbours(MANY.to(DEVICE), 3)
    values = torch.randn(4, len(MANY), dtype=torch.float64, device=DEVICE).T.requires_grad_()
    weight = torch.ones(4, 3, 3, dtype=torch.float64, device=DEVICE)
    grads = []
    for backend in ("triton", "reference"):
        out = sparse_depthwise(
            values,
            weight,
            neighbours,
            normalisation="stable",
            backend=backend,  # type: ignore[arg-type]
        )
        grads += [out.detach(), *torch.autograd.grad(out.square().sum(), values)]
    torch.testing.assert_close(grads[:2], grads[2:], rtol=0, atol=1e-10)


def test_no_points_at_all() -> None:
    points = Points(EMPTY, EMPTY, EMPTY, EMPTY, torch.tensor([[4, 4]]))
    for triton, reference in both(points, 3, 5, "ratio", torch.float32):
        assert torch.equal(triton, reference)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.operators import triton_kernels as kernels

fixed = dict(SUM=tl.float32, BLOCK_N=32, BLOCK_C=64, PAIRS=32)
types = dict.fromkeys(("STABLE", *fixed), "constexpr") | {"numerator": "fp32", "offset": "fp32"}
types |= dict.fromkeys(("weight", "centre", "grad_centre", "grad_weight"), "*fp32")
types |= dict.fromkeys(("start", "neighbour", "point", "first_of_tap"), "*i64")
for dtype in ("*bf16", "*fp32"):
    types |= dict.fromkeys(("values", "grad", "out", "grad_values"), dtype)
    for stable in (True, False):
        for kernel in (kernels._forward, kernels._backward_values, kernels._backward_weight):
            names = [parameter.name for parameter in kernel.params]
            types["tap"] = "*i32" if "weight" in names else "i32"
            signature = {name: types.get(name, "i32") for name in names}
            constants = {n: v for n, v in (fixed | {"STABLE": stable}).items() if n in names}
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels.LAUNCH)
            print("compiled")
"""


def test_the_kernels_compile_for_a_gpu_without_one() -> None:
    """To machine code of an H100, by the compiler that comes with Triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["compiled"] * 12, done.stderr
