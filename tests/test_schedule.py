"""Schedules against their publications, and what they leave of every octave."""

import math

import numpy as np
import pytest
import torch

from model.process import Octaves
from model.schedule import (
    SCHEDULES,
    Cosine,
    Linear,
    Schedule,
    UniformLogSNR,
    coverage,
    discrete_times,
    draw_log_snr,
    first_log_snrs,
    levels,
    log_snr_range,
    make_schedule,
)
from model.spectrum import NoiseSpectrum

# Detail variances of 4096^2 px of an H&E slide (0.5 um a pixel), colours whitened.
SLIDE = (
    *(0.0685, 0.1257, 0.1694, 0.1495, 0.0921, 0.0510),
    *(0.0356, 0.0310, 0.0416, 0.0562, 0.0574, 0.1221, 0.0100),
)


OCTAVES = Octaves(SLIDE, SLIDE[:5], NoiseSpectrum(12))


ALL = [
    Cosine(),
    Cosine(offset=0.008),
    Cosine(side_px=1024),
    Linear(),
    UniformLogSNR(-14.0, 17.0),
]


@pytest.mark.parametrize("schedule", ALL)
def test_time_and_log_snr_are_inverse_within_the_range(schedule: Schedule) -> None:
    time = torch.linspace(0, 1, 2001, dtype=torch.float64)
    found = schedule.log_snr(time)
    assert (found.diff() <= 0).all()
    assert found.min() >= schedule.low and found.max() <= schedule.high
    inside = (found > schedule.low) & (found < schedule.high)
    assert inside.sum() > 1900
    torch.testing.assert_close(schedule.time(found)[inside], time[inside], atol=1e-10, rtol=0)
    outside = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    edges = torch.tensor([schedule.low, schedule.high], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(outside), schedule.time(edges))
    single = schedule.log_snr(time[1:-1:50].float()).double()
    torch.testing.assert_close(single, found[1:-1:50], atol=2e-3, rtol=1e-4)


def test_the_cosine_schedule_is_the_published_one() -> None:
    """abar = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2)."""
    time = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    f0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(torch.sigmoid(make_schedule("cosine").log_snr(time)), f / f0)
    plain = -2 * torch.log(torch.tan(math.pi / 2 * time))
    torch.testing.assert_close(Cosine().log_snr(time), plain)
    shifted = make_schedule("shifted-cosine", side_px=512)
    torch.testing.assert_close(shifted.log_snr(time), plain + 2 * math.log(64 / 512))


def test_the_linear_schedule_is_the_published_one() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    times = discrete_times(Linear())
    np.testing.assert_allclose(times.alpha_bar, np.cumprod(1 - betas), rtol=1e-9)
    np.testing.assert_allclose(times.beta, betas, rtol=1e-6)
    assert times.alpha_bar[-1] == pytest.approx(4.036e-5, rel=1e-3)  # Ho et al.'s prior


def test_times_are_drawn_uniformly_within_a_range() -> None:
    low, high = -15.0, 8.0
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)
    found = draw_log_snr(Cosine(), uniform, low, high)
    assert found[0] == pytest.approx(low) and found[-1] == pytest.approx(high)
    # sqrt(abar) = cos(pi t / 2) and its angle runs at constant speed.
    angle = torch.acos(torch.sigmoid(found).sqrt())
    torch.testing.assert_close(angle.diff(), angle.diff().mean().expand(1000))
    assert (found.diff() > 0).all()
    assert levels(Cosine(), low, high, 1000) == found.tolist()
    straight = levels(UniformLogSNR(low, high), low, high, 4)
    assert straight == pytest.approx([-15.0, -9.25, -3.5, 2.25, 8.0])
    assert draw_log_snr(Cosine(), uniform.float(), low, high).dtype == torch.float32


def test_ours_drowns_every_octave_and_covers_it() -> None:
    measured = OCTAVES
    schedule = make_schedule("uniform", octaves=measured)
    assert max(first_log_snrs(measured, schedule.low)) <= -6.0 + 1e-9
    assert min(first_log_snrs(measured, schedule.high)) >= 6.0 - 1e-9
    assert min(coverage(schedule, measured, schedule.low, schedule.high)) >= 0.2


@pytest.mark.parametrize("name", ["cosine", "shifted-cosine"])
@pytest.mark.parametrize("top_level", [8, 12, 16])
def test_cosines_drown_every_octave_however_large_the_image(name: str, top_level: int) -> None:
    signal = (0.1,) * (top_level + 1)
    measured = Octaves(signal, signal[:5], NoiseSpectrum(top_level))
    schedule = make_schedule(name, side_px=1 << top_level, octaves=measured)
    low, _ = log_snr_range(schedule, measured)
    assert max(first_log_snrs(measured, low)) <= -6.0 + 1e-9
    time = torch.linspace(0.01, 0.9, 90, dtype=torch.float64)
    published = make_schedule(name, side_px=1 << top_level)
    torch.testing.assert_close(schedule.log_snr(time), published.log_snr(time))


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(side_px=4096)])
def test_schedules_of_one_log_snr_starve_octaves_under_white_noise(schedule: Schedule) -> None:
    """Unshifted the coarse ones, shifted the fine ones: why blocks have ranges of their own."""
    measured = OCTAVES
    found = coverage(schedule, measured, *measured.log_snr_range())
    assert min(found) < 0.02
    assert (found[0] > 0.5) if schedule == Cosine() else (found[8] > 0.5 and found[0] < 0.02)


def test_coverage_is_the_frequency_among_drawn_times() -> None:
    measured, schedule = OCTAVES, Cosine(side_px=256)
    low, high = measured.log_snr_range()
    drawn = draw_log_snr(schedule, torch.linspace(0, 1, 200_001, dtype=torch.float64), low, high)
    for level, expected in enumerate(coverage(schedule, measured, low, high)):
        inside = (drawn + measured.offset(level)).abs() < 3
        assert inside.double().mean() == pytest.approx(expected, abs=1e-4)


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="'quadratic' does not exist; choose cosine, shifted"):
        make_schedule("quadratic")
    with pytest.raises(ValueError, match="needs the side of the images"):
        make_schedule("shifted-cosine")
    with pytest.raises(ValueError, match="needs the octaves"):
        make_schedule("uniform")
    for name in SCHEDULES:
        found = make_schedule(name, side_px=64, octaves=OCTAVES)
        assert isinstance(found, Schedule)
