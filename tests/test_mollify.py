"""Laws of the mollifier: of data, of noise, and that both are one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.lattice import Box
from model.mollifier import gaussian_taps, mollify
from model.mollify import MollifiedNoise
from model.noise import Noise, NoiseTree
from model.points import Points, full_lattice
from model.spectrum import NoiseSpectrum

WHITE = NoiseTree(NoiseSpectrum(top_level=8), channels=2)
NOISE = MollifiedNoise(WHITE, sigma_px=1.0)


def test_the_taps_are_the_gaussian_and_keep_the_mean() -> None:
    taps = gaussian_taps(1.5)
    assert len(taps) == 13 and taps.sum() == pytest.approx(1.0, abs=1e-15)
    frequency = np.linspace(-np.pi, np.pi, 101)
    spectrum = (taps * np.cos(frequency[:, None] * (np.arange(13) - 6))).sum(axis=1)
    np.testing.assert_allclose(spectrum, np.exp(-0.5 * (1.5 * frequency) ** 2), atol=2e-4)
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="a sigma above 0 px"):
            gaussian_taps(sigma)


def test_an_image_is_continued_by_its_mirror_image() -> None:
    random = np.random.default_rng(0)
    pixels, taps = random.normal(size=(5, 9, 2)), gaussian_taps(2.0)  # the kernel is wider
    radius = len(taps) // 2
    wide = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    expected = np.einsum(
        "yxcij,i,j->yxc",
        np.lib.stride_tricks.sliding_window_view(wide, (17, 17), (0, 1)),
        taps,
        taps,
    )
    found = mollify(pixels, 2.0)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(found.mean(axis=(0, 1)), pixels.mean(axis=(0, 1)), atol=1e-14)
    single = mollify(pixels.astype(np.float32), 2.0)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=1e-6)


def test_what_is_not_valid_has_no_weight() -> None:
    random = np.random.default_rng(1)
    pixels, valid = random.normal(size=(30, 20, 3)), random.random((30, 20)) < 0.6
    constant = mollify(np.where(valid[..., None], 4.0, np.nan), 1.0, valid)
    np.testing.assert_allclose(constant[valid], 4.0, atol=1e-14)
    assert (constant[~valid] == 0).all()
    weighted = mollify(pixels * valid[..., None], 1.0) / mollify(1.0 * valid[..., None], 1.0)
    np.testing.assert_allclose(mollify(pixels, 1.0, valid)[valid], weighted[valid], atol=1e-14)
    everywhere = np.ones((30, 20), dtype=bool)
    np.testing.assert_allclose(mollify(pixels, 1.0, everywhere), mollify(pixels, 1.0), atol=1e-14)
    with pytest.raises(ValueError, match="does not fit an image"):
        mollify(pixels, 1.0, everywhere.T)


def test_noise_and_data_are_mollified_by_one_kernel() -> None:
    noise = MollifiedNoise(WHITE, sigma_px=0.8)
    for level, sigma in ((0, 0.8), (-1, 1.6), (1, 0.4)):
        box, radius = Box(level, 3, -8, 40, 50), noise.radius(level)
        leaves = WHITE.means(torch.tensor([5]), box.grow(radius))[0].permute(1, 2, 0).numpy()
        data = mollify(leaves, sigma)[radius:-radius, radius:-radius]
        found = noise.box(5, box).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, data, atol=3e-7)


@settings(max_examples=15)
@given(
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.5, 1.0, 1.7]),
)
def test_a_window_is_the_crop_of_the_whole(
    y: int, x: int, height: int, width: int, sigma_px: float
) -> None:
    noise = MollifiedNoise(WHITE, sigma_px)
    window = Box(0, y, x, height, width)
    whole = window.grow(29)
    ys, xs = window.slices_in(whole)
    assert torch.equal(noise.box(7, window), noise.box(7, whole)[:, ys, xs])


def test_a_large_box_is_its_tiles() -> None:
    box = Box(0, -100, 40, 20, 1100)
    pieces = [NOISE.box(3, Box(0, -100, x, 20, 275)) for x in range(40, 1140, 275)]
    assert torch.equal(NOISE.box(3, box), torch.cat(pieces, dim=-1))


@pytest.mark.parametrize("sigma_px", [0.5, 1.0, 1.3])
def test_points_are_the_pixels_of_the_box(sigma_px: float) -> None:
    noise, seeds = MollifiedNoise(WHITE, 1.5 * sigma_px), torch.tensor([7, 2**40 + 3])
    generator = torch.Generator().manual_seed(0)
    points = full_lattice(60, 90, batch=2)
    points = points.take(torch.randperm(len(points), generator=generator)[:4000])
    whole = noise.boxes(seeds, Box(0, 0, 0, 60, 90))
    assert torch.equal(noise.at(seeds, points), whole[points.image, :, points.y, points.x])
    finer = replace(points, resolution=1)
    whole = noise.boxes(seeds, Box(-1, 0, 0, 60, 90))
    assert torch.equal(noise.at(seeds, finer), whole[points.image, :, points.y, points.x])
    few = points.take(torch.tensor([17]))
    assert torch.equal(noise.at(seeds, few), noise.at(seeds, points)[17:18])


def test_its_covariance_is_that_of_the_formula() -> None:
    values = NOISE.boxes(torch.arange(4), Box(0, 0, 0, 512, 512)).double()
    expected = NOISE.covariance(7)
    assert expected[0, 0].sqrt() == pytest.approx(1 / (2 * math.sqrt(math.pi)), rel=1e-3)
    # A lag's estimate has the variance sum_d C(d)^2 / pixels (Bartlett), within a factor of 2.
    error = 5 * math.sqrt(2 * float(4 * NOISE.covariance(9).square().sum()) / values.numel())
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 3), (2, 2), (6, 6)):
        found = (values[..., dy:, dx:] * values[..., : 512 - dy, : 512 - dx]).mean()
        assert abs(found - expected[dy, dx]) < error, (dy, dx)
    across = (values[:, 0] * values[:, 1]).mean()
    assert abs(across) < error


def test_it_is_normal() -> None:
    apart = NOISE.boxes(torch.arange(3), Box(0, 0, 0, 512, 512))[..., ::9, ::9].double()
    std = float(NOISE.covariance(1)[0, 0].sqrt())
    assert scipy.stats.kstest(apart.flatten().numpy(), "norm", args=(0, std)).pvalue > 0.01


@pytest.mark.parametrize("level", [-1, -2])
def test_its_covariance_on_the_ground_is_the_same_at_every_resolution(level: int) -> None:
    """d pixels of the training are scale * d pixels of the field."""
    noise, scale = MollifiedNoise(WHITE, 1.5), 1 << -level
    coarse, fine = noise.covariance(5), noise.covariance(1 + 4 * scale, level)
    torch.testing.assert_close(fine[::scale, ::scale], coarse, atol=2e-5, rtol=0)
    values = noise.boxes(torch.arange(4), Box(level, 0, 0, 512, 512)).double()
    for lag in (0, scale, 3 * scale):
        # A field of length sigma has about (512 / (4 sigma))^2 independent values.
        found = (values[..., lag:] * values[..., : 512 - lag]).mean()
        error = 5 * float(fine[0, 0]) * 4 * 1.5 * scale / 512 / math.sqrt(8)
        assert abs(found - fine[0, lag]) < error


def test_finer_fields_are_the_same_field_refined() -> None:
    """What is left between a field and the means of the next finer one is small, and shrinks."""
    noise, box, left = MollifiedNoise(WHITE, 2.0), Box(0, -7, 5, 64, 64), []
    for level in (0, -1, -2):
        coarse = noise.box(11, box.refine(level)).double()
        fine = noise.box(11, box.refine(level - 1)).double()
        means = torch.nn.functional.avg_pool2d(fine, 2)
        left.append(float((means - coarse).square().mean() / coarse.square().mean()))
    assert left[0] < 0.02
    assert left[2] < 0.5 * left[1] < 0.25 * left[0]


@pytest.mark.parametrize("sigma_px", [0.6, 1.0])
def test_its_octaves_are_those_of_its_spectrum(sigma_px: float) -> None:
    spectrum = NoiseSpectrum(8, sigma_px)
    values = MollifiedNoise(WHITE, sigma_px).boxes(torch.arange(8), Box(0, 0, 0, 256, 256))
    means = values.double()
    for level in range(5):
        count = means.numel()
        found, expected = float(means.square().mean()), spectrum.mean_variance(level)
        # Of normals that are correlated over some pixels.
        assert found == pytest.approx(expected, rel=5 * 3 * math.sqrt(2 / count))
        above = torch.nn.functional.avg_pool2d(means, 2)
        details = means - above.repeat_interleave(2, -1).repeat_interleave(2, -2)
        found, expected = float(details.square().mean()), spectrum.detail_variance(level)
        assert found == pytest.approx(expected, rel=5 * 3 * math.sqrt(2 / count))
        means = above
    white = NoiseSpectrum(8)
    assert spectrum.mean_variance(8) == pytest.approx(white.mean_variance(8), rel=0.02)


def test_streams_are_independent_fields_of_one_law() -> None:
    box = Box(0, 0, 0, 256, 256)
    first, second = NOISE.box(1, box), NOISE.on_stream(1).box(1, box)
    assert isinstance(NOISE, Noise) and isinstance(WHITE, Noise)
    assert torch.equal(NOISE.on_stream(0).box(1, box), first)
    correlation = (first * second).mean() / (first.std() * second.std())
    assert abs(correlation) < 5 * math.sqrt(13 / first.numel())


def test_mistakes_are_sentences() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    sizes = torch.tensor([[8, 8]])
    with pytest.raises(ValueError, match=r"known at pixels, but points of levels \[1\]"):
        NOISE.at(zero, Points(zero, zero + 1, zero, zero, sizes))
    with pytest.raises(ValueError, match="2 seeds do not fit"):
        NOISE.at(torch.tensor([0, 1]), Points(zero, zero, zero, zero, sizes))
    with pytest.raises(ValueError, match="use MollifiedNoise"):
        NoiseTree(NoiseSpectrum(8, 1.0), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_has_the_same_values() -> None:
    seeds, points = torch.tensor([1, 2]), full_lattice(50, 70, batch=2)
    box = Box(0, -3, 8, 100, 200)
    there = NOISE.boxes(seeds.cuda(), box).cpu()
    torch.testing.assert_close(NOISE.boxes(seeds, box), there, atol=1e-6, rtol=0)
    there = NOISE.at(seeds.cuda(), points.to(torch.device("cuda"))).cpu()
    torch.testing.assert_close(NOISE.at(seeds, points), there, atol=1e-6, rtol=0)
