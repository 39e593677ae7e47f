"""Stochastic painting: tiles and restarts change nothing, and the law of what is painted."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fields
import numpy as np
import pytest
import torch

from jobs.painting import Recipe, paint, work_of
from model.family import make_passes
from model.generate import (
    ArrayField,
    Estimator,
    Field,
    Trajectory,
    advance,
    finish,
    fresh_noise,
    start,
)
from model.lattice import Box, tiles
from model.mollify import MollifiedNoise
from model.noise import Noise, NoiseTree
from model.solver import DDIM, DPMSolverPP2M, Solver, uniform_steps
from model.spectrum import NoiseSpectrum

MEAN, RATIO = 0.7, 2.5
LOW, HIGH = -9.0, 9.0
MOLLIFIED = MollifiedNoise(NoiseTree(NoiseSpectrum(9), channels=2), sigma_px=1.0)


@dataclass(frozen=True)
class GaussianPainter:
    """The exact denoiser of u_0 = MEAN + a field of RATIO times the covariance of the noise: one
    gain for all modes, so that it is a function of the pixel.
    """

    tile: int

    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, torch.Tensor, torch.Tensor]]:
        alpha, variance = 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
        gain = alpha * RATIO / (alpha**2 * RATIO + variance)
        for box in tiles(*field.shape[1:], self.tile):
            u = field.read(box)
            yield box, u, MEAN + gain * (u - alpha * MEAN)


def painted(
    painter: Estimator,
    noise: Noise,
    solver: Solver,
    shape: tuple[int, int, int],
    bounds: tuple[float, float],
    steps: int,
) -> np.ndarray:
    pair = [ArrayField(np.zeros(shape)) for _ in range(2)]
    start(pair[0], noise, 7, bounds[0])
    for i, step in enumerate(solver.steps(*bounds, steps)):
        state = Trajectory(pair[i % 2], pair[(i + 1) % 2])
        advance(painter, solver, step, state, fresh=fresh_noise(noise, 7, i))
    finish(painter, bounds[1], Trajectory(pair[steps % 2], pair[(steps + 1) % 2]))
    return pair[(steps + 1) % 2].array


def scalar_variance(solver: Solver, steps: int) -> float:
    """Of what is painted, over the noise's: the same steps on one mode, noise by noise."""
    u = torch.zeros(2 + steps, dtype=torch.float64)
    u[1] = 1 / math.sqrt(1 + math.exp(LOW))
    for i, step in enumerate(solver.steps(LOW, HIGH, steps)):
        alpha, noise = 1 / math.sqrt(1 + math.exp(-step.now)), 1 / (1 + math.exp(step.now))
        gain = alpha * RATIO / (alpha**2 * RATIO + noise)
        fresh = torch.zeros_like(u)
        fresh[2 + i] = 1.0
        u = solver(u, gain * u, None, step, fresh)
    alpha, noise = 1 / math.sqrt(1 + math.exp(-HIGH)), 1 / (1 + math.exp(HIGH))
    return float((alpha * RATIO / (alpha**2 * RATIO + noise) * u).square().sum())


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_gaussian_field_is_painted_with_its_mean_and_covariance_whatever_the_tiles(
    eta: float,
) -> None:
    shape, steps = (1, 384, 384), 12
    noise = MollifiedNoise(NoiseTree(NoiseSpectrum(9), channels=1), sigma_px=1.0)
    whole = painted(GaussianPainter(384), noise, DDIM(eta), shape, (LOW, HIGH), steps)
    tiled = painted(GaussianPainter(150), noise, DDIM(eta), shape, (LOW, HIGH), steps)
    np.testing.assert_array_equal(whole, tiled)
    found = whole - MEAN
    covariance = noise.covariance(9).numpy()
    variance = scalar_variance(DDIM(eta), steps)
    assert 0.5 * RATIO < variance < RATIO  # what 12 steps leave
    spread = 4 * np.square(covariance).sum() / covariance[0, 0] ** 2 / found.size
    deviation = math.sqrt(variance * covariance[0, 0])
    effective = 4 * covariance.sum() / covariance[0, 0] / found.size
    assert abs(found.mean()) < 5 * deviation * math.sqrt(effective) + 0.02 * MEAN
    error = 5 * math.sqrt(2 * spread) * covariance[0, 0]
    for dy, dx in ((0, 0), (0, 1), (1, 1), (2, 0), (0, 4), (7, 7)):
        lagged = (found[:, dy:, dx:] * found[:, : 384 - dy, : 384 - dx]).mean()
        assert abs(lagged / variance - covariance[dy, dx]) < error, (dy, dx)


def test_white_noise_in_a_mollified_process_would_be_seen() -> None:
    """The ancestor's mistake: then the finest frequencies hold far more than the covariance."""

    @dataclass(frozen=True)
    class Mixed:
        channels: int = 2

        def on_stream(self, stream: int) -> Noise:
            return MOLLIFIED.tree.on_stream(stream)

        box, boxes, at = MOLLIFIED.box, MOLLIFIED.boxes, MOLLIFIED.at

    shape, bounds = (2, 128, 128), (LOW, HIGH)
    right = painted(GaussianPainter(128), MOLLIFIED, DDIM(1.0), shape, bounds, 16)
    wrong = painted(GaussianPainter(128), Mixed(), DDIM(1.0), shape, bounds, 16)
    nyquist = [np.diff(np.diff(field, axis=1), axis=2).var() for field in (right, wrong)]
    assert nyquist[1] > 20 * nyquist[0]


class KilledError(Exception):
    pass


def killed_at(work: int) -> Callable[[int, int], None]:
    """Amid the tiles of the step before which so much work has been done."""
    seen = []

    def report(start: int, amount: int) -> None:
        seen.append(start)
        if seen.count(work) == 2:
            raise KilledError

    return report


@pytest.mark.parametrize(
    ("name", "solver", "eta"),
    [("A", "dpm++2m", None), ("A", "ddim", 0.5), ("B", "ancestral", None)],
)
def test_a_painting_killed_amid_a_step_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path, name: str, solver: str, eta: float | None
) -> None:
    """In whatever pass: what the ones before have made stays, and is not made again."""
    recipe = Recipe(32, 64, 5, seed=3, guidance=1.0, solver=solver, eta=eta)
    passes = make_passes(
        fields.denoiser(), fields.condition(1), guidance=1.0, tile=8, level=0, steps=5
    )
    undisturbed = paint(passes, recipe, channels=2).array
    names = [each.name for each in passes]
    before = names.index(name)
    work = [work_of(each, recipe) for each in passes]
    third = sum(work[:before]) + work[before] * 2 // 5
    with pytest.raises(KilledError):
        paint(passes, recipe, channels=2, work=tmp_path, report=killed_at(third))
    done: list[tuple[int, int]] = []
    resumed = paint(
        passes, recipe, channels=2, work=tmp_path, report=lambda *work: done.append(work)
    )
    np.testing.assert_array_equal(resumed.array, undisturbed)
    assert done[0][0] == third and sum(amount for _, amount in done) == sum(work) - third
    again = paint(passes, recipe, channels=2, work=tmp_path, report=killed_at(0)).array
    np.testing.assert_array_equal(again, undisturbed)
    other = Recipe(32, 64, 5, seed=4, guidance=1.0, solver=solver, eta=eta)
    assert np.abs(paint(passes, other, channels=2).array - undisturbed).max() > 0.05


def test_deterministic_solvers_ask_for_no_noise() -> None:
    def forbidden(box: Box, device: torch.device) -> torch.Tensor:
        raise AssertionError("noise was asked for")

    (step,) = uniform_steps(-1.0, 1.0, 1)
    for solver in (DDIM(), DPMSolverPP2M()):
        state = Trajectory(*(ArrayField(np.zeros((1, 8, 8))) for _ in range(4)))
        advance(GaussianPainter(8), solver, step, state, fresh=forbidden)
    state = Trajectory(*(ArrayField(np.zeros((1, 8, 8))) for _ in range(2)))
    with pytest.raises(ValueError, match="needs fresh noise"):
        advance(GaussianPainter(8), DDIM(1.0), step, state)
