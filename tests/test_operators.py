"""Laws of the sparse operators: their neighbours, their dense counterpart, their gradients."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.operators.contract import sparse_depthwise
from model.operators.neighbours import Neighbours, find_neighbours
from model.operators.normalisation import Normalisation
from model.operators.reference import dense_depthwise
from model.operators.resize import resize_kernel
from model.points import Points, full_lattice

BOTH = pytest.mark.parametrize("normalisation", ["ratio", "stable"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def scattered(
    sizes: list[tuple[int, int]], counts: list[int], levels: int = 1, seed: int = 0
) -> Points:
    """Distinct cells at random places of images of the given sizes, in random order."""
    parts = []
    for image, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        cells = [
            (image, level, y, x)
            for level in range(levels)
            for y in range(((height - 1) >> level) + 1)
            for x in range(((width - 1) >> level) + 1)
        ]
        chosen = torch.randperm(len(cells), generator=generator(seed + image))[:count]
        parts += [cells[i] for i in chosen.tolist()]
    cells = torch.tensor(parts, dtype=torch.int64).view(-1, 4)
    cells = cells[torch.randperm(len(cells), generator=generator(seed))]
    return Points(*cells.unbind(dim=1), torch.tensor(sizes))


def pairs(neighbours: Neighbours) -> set[tuple[int, int, int]]:
    point = torch.repeat_interleave(neighbours.counts)
    found = zip(
        point.tolist(), neighbours.neighbour.tolist(), neighbours.tap.tolist(), strict=True
    )
    return set(found)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([1, 3, 5, 7, 9]),
    st.integers(0, 60),
    st.integers(0, 2**16),
)
def test_neighbours_are_those_of_every_pair_compared(
    sizes: list[tuple[int, int]], levels: int, kernel: int, count: int, seed: int
) -> None:
    points = scattered(sizes, [count] * len(sizes), levels, seed)
    r = kernel // 2
    cells = torch.stack([points.image, points.level, points.y, points.x], dim=1)
    difference = cells - cells[:, None]
    near = (difference[..., :2] == 0).all(-1) & (difference[..., 2:].abs() <= r).all(-1)
    near.fill_diagonal_(False)
    taps = (difference[..., 2] + r) * kernel + difference[..., 3] + r
    expected = {(i, j, int(taps[i, j])) for i, j in near.nonzero().tolist()}
    neighbours = find_neighbours(points, kernel)
    assert pairs(neighbours) == expected
    assert len(neighbours.neighbour) == len(expected)
    assert neighbours.counts.tolist() == near.sum(dim=1).tolist()
    rows = zip(neighbours.start[:-1].tolist(), neighbours.start[1:].tolist(), strict=True)
    for first, last in rows:
        assert bool((neighbours.tap[first:last].diff() > 0).all())


def test_images_beyond_two_to_the_31_pixels() -> None:
    """100,000 x 100,000 px: what lies near the far corner is what lies near the origin."""
    near = scattered([(90, 70), (90, 70)], [900, 800])
    far = Points(
        near.image,
        near.level,
        near.y + 99_910,
        near.x + 99_930,
        torch.full((2, 2), 100_000),
    )
    a, b = find_neighbours(near, 7), find_neighbours(far, 7)
    assert torch.equal(a.start, b.start)
    assert torch.equal(a.neighbour, b.neighbour)
    assert torch.equal(a.tap, b.tap)


def as_list(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


@BOTH
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(13, 17), (2, 9), (1, 1)])
def test_a_full_lattice_is_the_dense_convolution(
    size: tuple[int, int], kernel: int, normalisation: Normalisation
) -> None:
    """Outputs and gradients, in any order of the points; away from the border it is conv2d."""
    (height, width), c, r = size, 3, kernel // 2
    points = full_lattice(height, width, batch=2)
    order = torch.randperm(len(points), generator=generator())
    values = normal(2, c, height, width).requires_grad_()
    weight = normal(c, kernel, kernel, seed=1).requires_grad_()
    seen = normal(2, c, height, width, seed=2)

    dense = dense_depthwise(values, weight, None, normalisation)
    sparse = sparse_depthwise(
        as_list(values)[order],
        weight,
        find_neighbours(points.take(order), kernel),
        normalisation=normalisation,
        backend="reference",
    )
    torch.testing.assert_close(as_list(dense)[order], sparse, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(dense, (values, weight), seen),
        torch.autograd.grad(sparse, (values, weight), as_list(seen)[order]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    plain = F.conv2d(values, weight[:, None], padding=r, groups=c)
    inner = (..., slice(r, height - r), slice(r, width - r))
    assert torch.equal(dense[inner], plain[inner])
    everything = torch.ones(2, 1, height, width, dtype=torch.bool)
    masked = dense_depthwise(values, weight, everything, normalisation)
    torch.testing.assert_close(masked, dense, rtol=0, atol=1e-10)


@BOTH
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_scattered_points_are_a_masked_dense_convolution(
    density: float, normalisation: Normalisation
) -> None:
    height, width, c = 19, 23, 4
    present = torch.rand((2, 1, height, width), generator=generator(3)) < density
    image, _, y, x = present.nonzero(as_tuple=True)
    points = Points(image, torch.zeros_like(image), y, x, torch.tensor([[height, width]] * 2))
    values = normal(2, c, height, width).masked_fill(~present, float("nan")).requires_grad_()
    weight = normal(c, 7, 7, seed=1).requires_grad_()
    dense = dense_depthwise(values, weight, present, normalisation)
    assert bool((dense[~present.expand_as(dense)] == 0).all())
    at = present[:, 0]
    sparse = sparse_depthwise(
        values.permute(0, 2, 3, 1)[at],
        weight,
        find_neighbours(points, 7),
        normalisation=normalisation,
        backend="reference",
    )
    torch.testing.assert_close(dense.permute(0, 2, 3, 1)[at], sparse, rtol=0, atol=1e-10)
    seen = normal(len(points), c, seed=2)
    a = torch.autograd.grad(dense.permute(0, 2, 3, 1)[at], (values, weight), seen)
    b = torch.autograd.grad(sparse, (values, weight), seen)
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-9)


def formula(
    values: Tensor, weight: Tensor, points: Points, normalisation: Normalisation
) -> Tensor:
    """The definition, one point and one tap after the other."""
    kernel, r = weight.shape[-1], weight.shape[-1] // 2
    cells = zip(
        *(t.tolist() for t in (points.image, points.level, points.y, points.x)), strict=True
    )
    index = {cell: i for i, cell in enumerate(cells)}
    out = torch.zeros_like(values)
    for (image, level, y, x), i in index.items():
        total, count = torch.zeros_like(values[i]), -1
        for a in range(kernel):
            for b in range(kernel):
                j = index.get((image, level, y + a - r, x + b - r))
                if j is None:
                    continue
                count += 1
                own = 0 if normalisation == "ratio" else values[i]
                total = total + weight[:, a, b] * (values[j] - own)
        if normalisation == "ratio":
            out[i] = kernel**2 / (count + 1) * total
        else:
            whole = weight.sum(dim=(1, 2))
            out[i] = whole * values[i] + (kernel**2 - 1 + 8) / (count + 8) * total
    return out


@BOTH
@pytest.mark.parametrize("kernel", [3, 7])
def test_the_operator_is_its_formula(kernel: int, normalisation: Normalisation) -> None:
    """Ragged batches of several levels; the images of a batch are those images alone."""
    points = scattered([(12, 9), (5, 5), (20, 11)], [70, 0, 90], levels=2)
    values, weight = normal(len(points), 3), normal(3, kernel, kernel, seed=1)
    neighbours = find_neighbours(points, kernel)
    out = sparse_depthwise(
        values, weight, neighbours, normalisation=normalisation, backend="reference"
    )
    expected = formula(values, weight, points, normalisation)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for image in range(points.batch):
        mine = points.image == image
        alone = sparse_depthwise(
            values[mine],
            weight,
            find_neighbours(points.take(mine), kernel),
            normalisation=normalisation,
            backend="reference",
        )
        assert torch.equal(out[mine], alone)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    """Two images of which one's last row is, in the flat order, next to the other's first."""
    points = full_lattice(6, 6, batch=2)
    values, weight = normal(72, 2).requires_grad_(), normal(2, 7, 7, seed=1)
    out = sparse_depthwise(
        values, weight, find_neighbours(points, 7), normalisation="ratio", backend="reference"
    )
    (grad,) = torch.autograd.grad(out[:36].sum(), values)
    assert bool((grad[:36] != 0).all())
    assert bool((grad[36:] == 0).all())


@BOTH
def test_any_order_of_the_points_gives_the_same_answer(normalisation: Normalisation) -> None:
    points = scattered([(30, 30)], [250])
    order = torch.randperm(250, generator=generator(9))
    values, weight = normal(250, 2), normal(2, 7, 7, seed=1)
    out = sparse_depthwise(
        values,
        weight,
        find_neighbours(points, 7),
        normalisation=normalisation,
        backend="reference",
    )
    again = sparse_depthwise(
        values[order],
        weight,
        find_neighbours(points.take(order), 7),
        normalisation=normalisation,
        backend="reference",
    )
    assert torch.equal(out[order], again)


def test_constants_and_lone_points() -> None:
    """`stable` answers a constant with the sum of the weights, bit for bit, wherever points are;
    `ratio` multiplies a lone point by k^2 times the centre's weight.
    """
    points, weight = scattered([(40, 40)], [300]), normal(3, 7, 7)
    constant = torch.full((300, 3), 1.7, dtype=torch.float64)
    out = sparse_depthwise(
        constant, weight, find_neighbours(points, 7), normalisation="stable", backend="reference"
    )
    assert torch.equal(out, (constant * weight.sum(dim=(1, 2))))
    flat = weight.mean(dim=(1, 2), keepdim=True).expand_as(weight).contiguous()
    out = sparse_depthwise(
        constant, flat, find_neighbours(points, 7), normalisation="ratio", backend="reference"
    )
    torch.testing.assert_close(out, constant * weight.sum(dim=(1, 2)), rtol=0, atol=1e-10)

    lone = find_neighbours(scattered([(40, 40)], [1]), 7)
    value = normal(1, 3)
    ratio = sparse_depthwise(value, weight, lone, normalisation="ratio", backend="reference")
    torch.testing.assert_close(ratio, 49 * weight[:, 3, 3] * value)
    stable = sparse_depthwise(value, weight, lone, normalisation="stable", backend="reference")
    torch.testing.assert_close(stable, weight.sum(dim=(1, 2)) * value)


@BOTH
def test_gradients_are_derivatives(normalisation: Normalisation) -> None:
    neighbours = find_neighbours(scattered([(8, 8), (4, 4)], [20, 5], levels=2), 3)
    inputs = (normal(25, 2).requires_grad_(), normal(2, 3, 3, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda v, w: sparse_depthwise(
            v, w, neighbours, normalisation=normalisation, backend="reference"
        ),
        inputs,
    )


@BOTH
def test_no_points_at_all(normalisation: Normalisation) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    points = Points(empty, empty, empty, empty, torch.tensor([[4, 4]]))
    values = torch.zeros(0, 2, requires_grad=True)
    weight = torch.ones(2, 7, 7, requires_grad=True)
    out = sparse_depthwise(
        values,
        weight,
        find_neighbours(points, 7),
        normalisation=normalisation,
        backend="reference",
    )
    grads = torch.autograd.grad(out.sum(), (values, weight))
    assert out.shape == grads[0].shape == (0, 2)
    assert torch.equal(grads[1], torch.zeros_like(weight))


@BOTH
def test_bfloat16_is_accumulated_in_float32(normalisation: Normalisation) -> None:
    """The error is one rounding of the result, however many taps were added."""
    points, weight = full_lattice(24, 24), normal(3, 7, 7).float()
    values = normal(576, 3, seed=1).bfloat16()
    neighbours = find_neighbours(points, 7)
    out = sparse_depthwise(
        values, weight, neighbours, normalisation=normalisation, backend="reference"
    )
    exact = sparse_depthwise(
        values.double(),
        weight.double(),
        neighbours,
        normalisation=normalisation,
        backend="reference",
    )
    assert out.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps / 2
    error = (out.double() - exact).abs()
    assert bool((error <= 1.01 * rounding * exact.abs() + 1e-4).all())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0])
def test_resized_kernels_answer_constants_alike(ratio: float) -> None:
    """Of odd size; the sum is kept, and the first moments where `resize_kernel` says so."""
    weight = normal(4, 7, 7)
    resized = resize_kernel(weight, ratio)
    side = resized.shape[-1]
    assert side % 2 == 1
    torch.testing.assert_close(resized.sum(dim=(1, 2)), weight.sum(dim=(1, 2)))
    if ratio == 1:
        assert torch.equal(resized, weight)
    if ratio <= 1 or ratio == int(ratio):
        offset = torch.arange(side) - side // 2 + 0.0
        moment = torch.einsum("cab,b->c", resized, offset.double()) / ratio
        expected = torch.einsum("cab,b->c", weight, torch.arange(-3.0, 4.0).double())
        torch.testing.assert_close(moment, expected)
    if ratio == int(ratio):  # the samples of the piecewise bilinear function at the old taps
        r, step = side // 2, int(ratio)
        first = r - 3 * step
        at_taps = resized[:, first::step, first::step][:, :7, :7]
        torch.testing.assert_close(at_taps * ratio**2, weight)


def test_a_resized_kernel_is_the_same_operator_on_a_smooth_function() -> None:
    """A wave at 2, 4 and 8 times the resolution: the answers converge."""
    weight, answers = normal(1, 7, 7), []
    for ratio in (2, 4, 8):
        side = 24 * ratio
        y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / ratio] * 2, indexing="ij")
        wave = torch.sin(0.1 * y + 0.2 * x).double()[None, None]
        out = dense_depthwise(wave, resize_kernel(weight, float(ratio)), None, "stable")
        middle = slice(8 * ratio, 16 * ratio)
        answers.append(F.avg_pool2d(out[..., middle, middle], ratio))
    scale = answers[-1].abs().max()
    coarse = (answers[0] - answers[2]).abs().max() / scale
    fine = (answers[1] - answers[2]).abs().max() / scale
    assert fine < coarse / 2
    assert coarse < 0.01


def test_mistakes_are_sentences() -> None:
    points = full_lattice(4, 4)
    for kernel in (0, 2, 8):
        with pytest.raises(ValueError, match="an odd number of taps"):
            find_neighbours(points, kernel)
    twice = points.take(torch.tensor([0, 5, 3, 5]))
    with pytest.raises(ValueError, match=r"more than once, first .* = \(0, 0, 1, 1\)"):
        find_neighbours(twice, 3)
    side = 2**32
    far = torch.tensor([side - 1])
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"more than the .* that int64 can number"):
        find_neighbours(Points(zero, zero, far, far, torch.tensor([[side, side]])), 7)
    neighbours, weight = find_neighbours(points, 3), normal(2, 3, 3)
    with pytest.raises(ValueError, match="15 values for 16 points"):
        sparse_depthwise(
            normal(15, 2), weight, neighbours, normalisation="ratio", backend="reference"
        )
    with pytest.raises(ValueError, match="7 x 7 taps, but neighbours were found for 3"):
        sparse_depthwise(
            normal(16, 2), normal(2, 7, 7), neighbours, normalisation="ratio", backend="reference"
        )
    with pytest.raises(ValueError, match="for 2 channels, but the values have 3"):
        sparse_depthwise(
            normal(16, 3), weight, neighbours, normalisation="ratio", backend="reference"
        )
    with pytest.raises(ValueError, match="move them to one device"):
        sparse_depthwise(
            normal(16, 2).to("meta"),
            weight,
            neighbours,
            normalisation="ratio",
            backend="reference",
        )
    with pytest.raises(ValueError, match="positive ratio"):
        resize_kernel(weight, 0.0)


def run_parity(interpret: bool) -> subprocess.CompletedProcess[str]:
    """triton_parity.py in a process of its own: Triton decides at its import what it compiles."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", here / "triton_parity.py"],
        cwd=here.parent,
        env={**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tritons_kernels_are_the_reference_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_parity(interpret=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_tritons_kernels_are_the_reference_on_a_gpu() -> None:
    done = run_parity(interpret=False)
    assert done.returncode == 0, done.stdout


class FakeConvolution:
    """torchsparse's gather-scatter convolution by its documented semantics; checks its caller."""

    @staticmethod
    def apply(
        features: Tensor, weight: Tensor, kmap: dict[str, Any], config: object, transposed: bool
    ) -> Tensor:
        maps, sizes, (n_in, n_out) = kmap["nbmaps"], kmap["nbsizes"], kmap["sizes"]
        assert not transposed and n_in == n_out == len(features)
        assert maps.dtype == sizes.dtype == torch.int32
        assert len(maps) == int(sizes.sum()) and len(sizes) == len(weight)
        assert features.dtype == weight.dtype == torch.float32
        out = features @ weight[len(weight) // 2]
        for tap, rows in enumerate(maps.long().split(sizes.tolist())):
            source, target = rows.unbind(dim=1)
            assert len(target.unique()) == len(target)
            if tap == len(weight) // 2:
                assert torch.equal(source, torch.arange(n_in))
                assert torch.equal(target, torch.arange(n_in))
            else:
                out = out.index_add(0, target, features[source] @ weight[tap])
        return out


@pytest.fixture
def fake_torchsparse(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torchsparse"
    for part in ("", ".backend", ".nn", ".nn.functional", ".nn.functional.conv"):
        monkeypatch.setitem(sys.modules, name + part, ModuleType(name + part))
    func = ModuleType(name + ".nn.functional.conv.func")
    func.GatherScatterConvolutionFuntion = FakeConvolution  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, func.__name__, func)
    monkeypatch.delitem(sys.modules, "model.operators.torchsparse_adapter", raising=False)


@BOTH
@pytest.mark.usefixtures("fake_torchsparse")
def test_torchsparse_is_told_the_same_convolution(normalisation: Normalisation) -> None:
    points = scattered([(12, 9), (5, 5), (9, 9)], [70, 0, 40])
    neighbours, results = find_neighbours(points, 5), []
    for backend in ("torchsparse", "reference"):
        values = normal(110, 3).float().requires_grad_()
        weight = normal(3, 5, 5, seed=1).float().requires_grad_()
        out = sparse_depthwise(
            values, weight, neighbours, normalisation=normalisation, backend=backend
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), (values, weight))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-3)


def test_a_backend_that_cannot_run_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours, weight = find_neighbours(full_lattice(2, 2), 3), normal(2, 3, 3).float()

    def call(backend: Any) -> None:
        values = normal(4, 2).float()
        sparse_depthwise(values, weight, neighbours, normalisation="ratio", backend=backend)

    with pytest.raises(ValueError, match=r"needs a GPU, .* TRITON_INTERPRET=1"):
        call("triton")
    for module, remedy in (("triton", "pip install triton"), ("torchsparse", "build it from")):
        monkeypatch.setitem(sys.modules, module, None)
        for name in ("triton_kernels", "torchsparse_adapter"):
            monkeypatch.delitem(sys.modules, f"model.operators.{name}", raising=False)
        with pytest.raises(ValueError, match=f"backend '{module}' is not here .* {remedy}"):
            call(module)
