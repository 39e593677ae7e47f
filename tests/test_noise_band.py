"""Laws of the noise of a block of octaves: it is the tree's without the means above."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.lattice import Box
from model.noise import Noise, NoiseTree
from model.noise_band import BandNoise
from model.points import Points, full_lattice
from model.spectrum import NoiseSpectrum

WHITE = NoiseTree(NoiseSpectrum(top_level=8), channels=2)
PARENTS = (1, 2, 5, 8)


def repeated(values: Tensor, levels: int) -> Tensor:
    return values.repeat_interleave(1 << levels, -2).repeat_interleave(1 << levels, -1)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[int, int]:
    """(parents, a level below it)."""
    parents = draw(st.integers(-1, 8))
    return parents, draw(st.integers(max(parents - 6, -3), parents - 1))


@settings(max_examples=40)
@given(
    blocks(),
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(1, 70),
    st.integers(1, 70),
)
def test_a_window_is_the_crop_of_the_whole(
    block: tuple[int, int], y: int, x: int, height: int, width: int
) -> None:
    parents, level = block
    noise, window = BandNoise(WHITE, parents), Box(level, y, x, height, width)
    whole = window.grow(37)
    ys, xs = window.slices_in(whole)
    assert torch.equal(noise.box(7, window), noise.box(7, whole)[:, ys, xs])


@settings(max_examples=40)
@given(
    blocks(),
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(1, 70),
    st.integers(1, 70),
)
def test_it_is_the_tree_without_its_means_over_the_parents(
    block: tuple[int, int], y: int, x: int, height: int, width: int
) -> None:
    parents, level = block
    box, seeds = Box(level, y, x, height, width), torch.tensor([7, 2**40 + 3])
    above = box.cover(parents)
    ys, xs = box.slices_in(above.refine(level))
    means = repeated(WHITE.boxes(seeds, above), parents - level)[:, :, ys, xs]
    expected, found = WHITE.boxes(seeds, box) - means, BandNoise(WHITE, parents).boxes(seeds, box)
    torch.testing.assert_close(found, expected, atol=1e-6 * max(2.0**-level, 1.0), rtol=0)


@pytest.mark.parametrize("parents", PARENTS)
def test_every_parent_has_mean_zero(parents: int) -> None:
    noise, box = BandNoise(WHITE, parents), Box(parents, -3, 5, 4, 7)
    for level in range(parents):
        cells = noise.box(1, box.refine(level)).double()
        means = torch.nn.functional.avg_pool2d(cells, 1 << (parents - level))
        torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-6, rtol=0)


def test_its_details_have_the_variance_of_white_noise() -> None:
    parents = 4
    noise, seeds = BandNoise(WHITE, parents), torch.arange(16)
    above = torch.zeros(16, 2, 32, 32)
    for level in reversed(range(parents)):
        side = 32 << (parents - level)
        cells = noise.boxes(seeds, Box(level, 0, 0, side, side))
        details = (cells - repeated(above, 1)).double()
        error = 5 * (2 / (0.75 * details.numel())) ** 0.5
        assert abs(details.square().mean() / (0.75 * 4.0**-level) - 1) < error
        above = cells


def test_a_cell_is_independent_of_its_parent_and_of_what_lies_in_others() -> None:
    seeds, parents = torch.arange(4), Box(2, 0, 0, 64, 64)
    means = WHITE.boxes(seeds, parents).double()
    cells = BandNoise(WHITE, 2).boxes(seeds, parents.refine(0)).double()
    inside = cells.unflatten(-1, (64, 4)).unflatten(-3, (64, 4))  # b, c, parent y, y, parent x, x
    first, last, other = inside[..., 0, :, 0], inside[..., 3, :, 3], inside[..., 1, :, 2]
    error = 5 / means.numel() ** 0.5
    for cell in (first, last, other):
        assert abs(cell.square().mean() - 15 / 16) < 2**0.5 * error
        assert abs((cell * means).mean()) < error / 4
    # White cells whose mean was taken away: -1/16 between any two of a parent.
    assert abs((first * last).mean() + 1 / 16) < error
    assert abs((first * other).mean() + 1 / 16) < error
    assert abs((first[..., 1:] * last[..., :-1]).mean()) < error
    assert abs((first[..., 1:, :] * other[..., :-1, :]).mean()) < error


def test_streams_are_independent_fields_of_one_law() -> None:
    noise, box = BandNoise(WHITE, 3), Box(0, -8, 16, 256, 256)
    first, second = noise.box(1, box), noise.on_stream(1).box(1, box)
    assert isinstance(noise, Noise) and noise.channels == 2
    assert torch.equal(noise.on_stream(0).box(1, box), first)
    for other in (second, noise.box(2, box), noise.box(1 + 2**32, box)):
        correlation = (first * other).mean() / (first.std() * other.std())
        assert abs(correlation) < 5 / first.numel() ** 0.5
    assert float(second.std()) == pytest.approx(float(first.std()), rel=0.02)


@pytest.mark.parametrize("parents", PARENTS)
def test_points_of_mixed_levels_are_the_cells_of_the_boxes(parents: int) -> None:
    noise, seeds = BandNoise(WHITE, parents), torch.tensor([7, 2**40 + 3])
    depths = sorted({0, parents // 2, parents - 1})
    parts = [full_lattice(100, 230, batch=2, level=depth) for depth in depths]
    image, level, y, x = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("image", "level", "y", "x")
    )
    points = Points(image, level, y, x, parts[0].sizes_px)
    generator = torch.Generator().manual_seed(0)
    points = points.take(torch.randperm(len(points), generator=generator)[:3000])
    found = noise.at(seeds, points)
    for depth in depths:
        whole = noise.boxes(seeds, Box(depth, 0, 0, -(-100 >> depth), -(-230 >> depth)))
        mine = points.level == depth
        there = whole[points.image[mine], :, points.y[mine], points.x[mine]]
        assert torch.equal(found[mine], there)
    assert torch.equal(noise.at(seeds, points.take(torch.tensor([17]))), found[17:18])


def test_it_is_defined_beyond_2_to_the_31_pixels_and_below_the_pixel() -> None:
    noise, far = BandNoise(WHITE, 2), Box(0, 2**33 + 1, -(2**33) - 1, 4, 4)
    assert torch.equal(noise.box(0, far), noise.box(0, far.grow(2))[:, 2:-2, 2:-2])
    finer = noise.box(0, far.refine(-1)).double()
    means = torch.nn.functional.avg_pool2d(finer, 2)
    torch.testing.assert_close(means, noise.box(0, far).double(), atol=1e-6, rtol=0)


def test_mistakes_are_sentences() -> None:
    noise, zero = BandNoise(WHITE, 2), torch.zeros(1, dtype=torch.int64)
    sizes = torch.tensor([[8, 8]])
    for level in (2, 3):
        with pytest.raises(ValueError, match=f"of level {level} do not lie below level 2"):
            noise.box(0, Box(level, 0, 0, 1, 1))
        with pytest.raises(ValueError, match=f"of level {level} do not lie below level 2"):
            noise.at(zero, Points(zero, zero + level, zero, zero, sizes))
    with pytest.raises(ValueError, match="2 seeds do not fit points of 1 images"):
        noise.at(torch.tensor([0, 1]), Points(zero, zero, zero, zero, sizes))
    with pytest.raises(ValueError, match="below level 9 does not fit a tree of top level 8"):
        BandNoise(WHITE, 9)
    nothing = torch.tensor([], dtype=torch.int64)
    assert noise.at(zero, Points(zero, zero, zero, zero, sizes).take(nothing)).shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_has_the_same_values() -> None:
    noise, seeds = BandNoise(WHITE, 3), torch.tensor([5, 6])
    points, box = full_lattice(50, 70, batch=2), Box(0, -7, 90, 300, 200)
    there = noise.boxes(seeds.cuda(), box).cpu()
    torch.testing.assert_close(noise.boxes(seeds, box), there, atol=1e-6, rtol=0)
    there = noise.at(seeds.cuda(), points.to(torch.device("cuda"))).cpu()
    torch.testing.assert_close(noise.at(seeds, points), there, atol=1e-6, rtol=0)
