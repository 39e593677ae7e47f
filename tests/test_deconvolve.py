"""The Wiener inverse: a finite filter against the exact spectrum, and tiles against the whole."""

import numpy as np
import pytest
import torch

from model.deconvolve import WienerInverse, deconvolve, wiener_gain
from model.generate import ArrayField
from model.mollifier import gaussian_taps, mollify


@pytest.mark.parametrize(
    ("sigma_px", "eps", "tolerance"),
    [
        (1.0, 0.05, 1e-3),
        (1.0, 0.05, 1e-5),
        (1.0, 0.001, 1e-3),
        (2.5, 0.05, 1e-3),
        (0.5, 0.2, 1e-3),
    ],
)
def test_no_gain_is_wrong_by_more_than_the_tolerance(
    sigma_px: float, eps: float, tolerance: float
) -> None:
    inverse = WienerInverse(sigma_px, eps, tolerance)
    size = 600  # frequencies that the filter was not made from
    places = np.arange(-inverse.halo, inverse.halo + 1)
    waves = np.exp(-2j * np.pi * np.fft.fftfreq(size)[:, None] * places)
    found = sum((waves @ down)[:, None] * (waves @ across) for down, across in inverse.terms)
    assert np.abs(found - wiener_gain(sigma_px, eps, size)).max() <= tolerance * 1.05


@pytest.mark.parametrize(
    ("eps", "place", "passed"), [(0.05, 0.78, 0.5), (0.05, 1.0, 0.076), (0.001, 1.0, 0.995)]
)
def test_the_published_frequencies_pass(eps: float, place: float, passed: float) -> None:
    """At Nyquist a sampled Gaussian's spectrum is twice the Gaussian's (published: 2 and 98 %)."""
    size = 800
    gain = wiener_gain(1.0, eps, size)[:, 0]
    taps = gaussian_taps(1.0)
    spectrum = np.cos(2 * np.pi * np.fft.fftfreq(size)[:, None] * np.arange(-4, 5)) @ taps
    assert (gain * spectrum)[round(place * size / 2)] == pytest.approx(passed, abs=0.01)


def test_it_inverts_the_mollifier_as_the_exact_spectrum_does() -> None:
    """A mirrored image is periodic with twice its size: there the filter is a product."""
    image = np.random.default_rng(0).normal(size=(60, 45, 2))
    blurred, inverse = mollify(image, 1.0), WienerInverse(1.0)
    period = np.concatenate([blurred, blurred[::-1]], axis=0)
    period = np.concatenate([period, period[:, ::-1]], axis=1)
    taps, size = gaussian_taps(1.0), period.shape[:2]
    k = [np.cos(2 * np.pi * np.fft.fftfreq(n)[:, None] * np.arange(-4, 5)) @ taps for n in size]
    both = k[0][:, None] * k[1]
    gain = (both / (both**2 + 0.05**2))[..., None]
    exact = np.fft.ifft2(np.fft.fft2(period, axes=(0, 1)) * gain, axes=(0, 1)).real[:60, :45]
    source = ArrayField(blurred.transpose(2, 0, 1).copy())
    target = ArrayField(np.zeros_like(source.array))
    deconvolve(source, target, inverse)
    error = np.abs(target.array.transpose(1, 2, 0) - exact).max()
    assert error < 10 * inverse.tolerance
    smooth = mollify(image, 3.0)
    restored = ArrayField(np.zeros((2, 60, 45)))
    deconvolve(ArrayField(mollify(smooth, 1.0).transpose(2, 0, 1).copy()), restored, inverse)
    assert np.abs(restored.array.transpose(1, 2, 0) - smooth).max() < 0.01 * np.abs(smooth).max()


@pytest.mark.parametrize("shape", [(100, 70), (9, 130)])  # one smaller than the halo
def test_tiles_agree_bit_for_bit(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    inverse, painted = WienerInverse(1.0), []
    for tile in (512, 32, 7):
        field = ArrayField(np.zeros_like(image))
        deconvolve(ArrayField(image), field, inverse, tile=tile)
        painted.append(field.array)
    assert np.array_equal(painted[0], painted[1]) and np.array_equal(painted[0], painted[2])


def test_mistakes_are_sentences() -> None:
    with pytest.raises(ValueError, match="eps and tolerance above 0"):
        WienerInverse(1.0, 0.0)
    with pytest.raises(ValueError, match="reaches further than 256 px"):
        WienerInverse(30.0, 0.001, 1e-6)
    with pytest.raises(ValueError, match="too few for a halo"):
        WienerInverse(1.0)(torch.zeros(1, 8, 8))
