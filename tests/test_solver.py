"""Solvers against the exact denoiser of a Gaussian field: mean, covariance and order."""

import itertools
import math

import pytest
import torch

from model.schedule import Uniform
from model.solver import DDIM, DPMSolverPP2M, Solver, steps_through

MEAN, SIGNAL, NOISE = 0.7, 0.3, 0.02
LOW, HIGH = -9.0, 9.0


def exact_estimate(u: torch.Tensor, log_snr: float) -> torch.Tensor:
    """E[u_0 | u_t] for u_0 ~ N(MEAN, SIGNAL) and noise of variance NOISE."""
    alpha = math.sqrt(1 / (1 + math.exp(-log_snr)))
    noise = NOISE / (1 + math.exp(log_snr))
    gain = alpha * SIGNAL / (alpha**2 * SIGNAL + noise)
    return MEAN + gain * (u - alpha * MEAN)


def exact_flow(u: torch.Tensor) -> torch.Tensor:
    """The probability-flow ODE is linear: it carries N(alpha m, alpha^2 s + sigma^2 n) along."""

    def moments(log_snr: float) -> tuple[float, float]:
        alpha = math.sqrt(1 / (1 + math.exp(-log_snr)))
        return alpha * MEAN, math.sqrt(alpha**2 * SIGNAL + NOISE / (1 + math.exp(log_snr)))

    (mean, std), (mean_after, std_after) = moments(LOW), moments(HIGH)
    return mean_after + (u - mean) * (std_after / std)


def solve(solver: Solver, u: torch.Tensor, steps: int) -> torch.Tensor:
    before = None
    for step in steps_through(Uniform(LOW, HIGH), steps):
        estimate = exact_estimate(u, step.now)
        u = solver(u, estimate, before, step)
        before = estimate if solver.remembers else None
    return u


@pytest.mark.parametrize(("solver", "order"), [(DDIM(), 1), (DPMSolverPP2M(), 2)])
def test_solvers_converge_at_their_order(solver: Solver, order: int) -> None:
    u = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64)
    errors = [float((solve(solver, u, n) - exact_flow(u)).abs().max()) for n in (160, 320, 640)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(m - order) < 0.15 for m in measured), measured


@pytest.mark.parametrize(("solver", "steps"), [(DDIM(), 200), (DPMSolverPP2M(), 24)])
def test_the_field_has_the_right_mean_and_covariance(solver: Solver, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200_000, dtype=torch.float64, generator=generator)
    alpha, sigma = 1 / math.sqrt(1 + math.exp(-LOW)), 1 / math.sqrt(1 + math.exp(LOW))
    u = alpha * MEAN + start * math.sqrt(alpha**2 * SIGNAL + sigma**2 * NOISE)
    painted = exact_estimate(solve(solver, u, steps), HIGH)
    assert abs(painted.mean() - MEAN) < 0.01
    assert abs(10 * math.log10(painted.var() / SIGNAL)) < 0.5  # dB


def test_steps_join_and_the_first_has_no_memory() -> None:
    steps = steps_through(Uniform(-3.0, 5.0), 4)
    assert [s.now for s in steps] == [-3.0, -1.0, 1.0, 3.0]
    assert [s.after for s in steps] == [-1.0, 1.0, 3.0, 5.0]
    assert [s.before for s in steps] == [None, -3.0, -1.0, 1.0]
    with pytest.raises(ValueError, match="at least one step"):
        steps_through(Uniform(0.0, 1.0), 0)
