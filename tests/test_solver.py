"""Solvers against the exact denoiser of a Gaussian field: mean, covariance and order.

Every step is linear, so that a mode is followed exactly: as the coefficients of its mean, of the
noise it starts from and of the noise of every step. Columns are these, rows are modes.
"""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from model.cascade.config import BlockConfig, CascadeConfig, TopConfig
from model.cascade.denoiser import MARGIN_NATS
from model.process import Octaves
from model.solver import (
    DDIM,
    SOLVERS,
    DPMSolverPP2M,
    Solver,
    make_solver,
    steps_through,
    uniform_steps,
)
from model.spectrum import NoiseSpectrum
from model.wiener import mode_offsets

MEAN, SIGNAL, NOISE = 0.7, 0.3, 0.02
LOW, HIGH = -9.0, 9.0
# Detail variances of 4096^2 px of an H&E slide (0.5 um a pixel), colours whitened.
SLIDE = (
    *(0.0685, 0.1257, 0.1694, 0.1495, 0.0921, 0.0510),
    *(0.0356, 0.0310, 0.0416, 0.0562, 0.0574, 0.1221, 0.0100),
)


def alpha_sigma(log_snr: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))


def exact_estimate(u: torch.Tensor, ratio: torch.Tensor, log_snr: float) -> torch.Tensor:
    """E[u_0 | u_t] for modes of variance `ratio` times the noise's: coefficients of it."""
    alpha, sigma = alpha_sigma(log_snr)
    gain = (alpha * ratio / (alpha**2 * ratio + sigma**2))[:, None]
    mean = torch.zeros_like(u)
    mean[:, 0] = 1.0
    return mean + gain * (u - alpha * mean)


def follow(
    solver: Solver, ratio: torch.Tensor, low: float, high: float, steps: int, mean: float
) -> torch.Tensor:
    """Coefficients at `high`; at `low` u is `mean` times the mean's and the process's noise."""
    u = torch.zeros(len(ratio), steps + 2, dtype=torch.float64)
    alpha, sigma = alpha_sigma(low)
    u[:, 0] = mean * alpha
    u[:, 1] = (mean * alpha**2 * ratio + sigma**2).sqrt()
    before = None
    for number, step in enumerate(solver.steps(low, high, steps)):
        estimate = exact_estimate(u, ratio, step.now)
        fresh = torch.zeros_like(u)
        fresh[:, 2 + number] = 1.0
        wanted = solver.noise_scale(step) > 0
        u = solver(u, estimate, before, step, fresh if wanted else None)
        before = estimate if solver.remembers else None
    return u


def moments(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u[:, 0], u[:, 1:].square().sum(dim=1)


@pytest.mark.parametrize(("solver", "order"), [(DDIM(), 1), (DPMSolverPP2M(), 2)])
def test_deterministic_solvers_follow_the_flow_at_their_order(solver: Solver, order: int) -> None:
    """The probability-flow ODE carries N(alpha m, alpha^2 S + sigma^2 N) along, value by value."""
    ratio = torch.tensor([SIGNAL / NOISE, 0.3, 40.0], dtype=torch.float64)
    alpha, sigma = alpha_sigma(HIGH)
    exact = torch.stack([torch.full_like(ratio, alpha), (alpha**2 * ratio + sigma**2).sqrt()])
    errors = []
    for steps in (160, 320, 640):
        u = follow(solver, ratio, LOW, HIGH, steps, mean=1.0)
        errors.append(float((u[:, :2].T - exact).abs().max()))
        assert u[:, 2:].abs().max() == 0
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(m - order) < 0.15 for m in measured), measured


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_stochastic_solvers_converge_in_mean_and_variance(eta: float) -> None:
    ratio = torch.tensor([SIGNAL / NOISE, 0.3, 40.0], dtype=torch.float64)
    alpha, sigma = alpha_sigma(HIGH)
    exact = alpha**2 * ratio + sigma**2
    errors = []
    for steps in (160, 320, 640):
        mean, variance = moments(follow(DDIM(eta), ratio, LOW, HIGH, steps, mean=1.0))
        errors.append(
            (float((mean - alpha).abs().max()), float((variance / exact - 1).abs().max()))
        )
    for a, b in itertools.pairwise(errors):
        assert math.log2(a[1] / b[1]) > 0.9, errors
        assert b[0] < 1e-9 or math.log2(a[0] / b[0]) > 0.9, errors


def test_a_step_at_eta_one_is_the_ddpm_posterior() -> None:
    """q(u' | u, u_0) of Ho et al. (2020), Eq. 6 and 7."""
    (step,) = uniform_steps(-1.0, 0.5, 1)
    alpha, sigma = alpha_sigma(step.now)
    alpha_after, sigma_after = alpha_sigma(step.after)
    kept = (alpha / alpha_after) ** 2  # 1 - beta
    u, estimate, fresh = torch.randn(
        3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    mean = (alpha_after * (1 - kept) * estimate + math.sqrt(kept) * sigma_after**2 * u) / sigma**2
    deviation = math.sqrt(sigma_after**2 / sigma**2 * (1 - kept))
    ancestral = make_solver("ancestral")
    assert ancestral == DDIM(eta=1.0)
    assert ancestral.noise_scale(step) == pytest.approx(deviation)
    found = ancestral(u, estimate, None, step, fresh)
    torch.testing.assert_close(found, mean + deviation * fresh)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_from_the_truth_keeps_the_marginal(eta: float) -> None:
    """Whatever eta, u' given u_0 is N(alpha' u_0, sigma'^2): coefficients of (u_0, n, n')."""
    (step,) = uniform_steps(-2.0, 1.0, 1)
    alpha, sigma = alpha_sigma(step.now)
    u = torch.tensor([alpha, sigma, 0.0], dtype=torch.float64)
    clean, _, fresh = torch.eye(3, dtype=torch.float64)
    after = DDIM(eta)(u, clean, None, step, fresh)
    alpha_after, sigma_after = alpha_sigma(step.after)
    assert float(after[0]) == pytest.approx(alpha_after)
    assert float(after[1:].norm()) == pytest.approx(sigma_after)


def decibels(name: str, offsets: Sequence[float], evaluations: int) -> torch.Tensor:
    """Generated over real variance of octaves of these ln(S / N), which are generated together,
    with as many evaluations as `jobs.painting` spends them: from noise alone, where the solver
    takes its steps, the last for x0_hat. An untrained block of a cascade is this exact denoiser.
    """
    low, high = -MARGIN_NATS - max(offsets), MARGIN_NATS - min(offsets)
    ratio = torch.tensor(offsets, dtype=torch.float64).exp()
    u = follow(make_solver(name), ratio, low, high, evaluations - 1, mean=0.0)
    mean, variance = moments(exact_estimate(u, ratio, high))
    assert (mean > 0.94).all() and (mean < 1.01).all()
    return 10 * torch.log10(variance / ratio)


def offsets_of(block: TopConfig | BlockConfig, signal: Sequence[float]) -> list[float]:
    """ln(S / N) of a block's octaves; of the top block's modes, which lie between its octaves'."""
    octaves = Octaves(tuple(signal), (), NoiseSpectrum(len(signal) - 1))
    if isinstance(block, TopConfig):
        return mode_offsets(octaves, block.level, 16, 1).flatten().tolist()
    return [octaves.offset(level) for level in range(block.fine, block.parents)]


# ln(S / N) between successive octaves of a block, coarse to fine, of the slide above and of the
# demo's phantom; the widest gaps, and those in a row.
GAPS = {
    1: [()],
    2: [(2.05,), (1.07,), (-0.56,), (0,)],
    4: [(2.05, 1.28, 1.07), (1.03, 1.28, 1.07), (1.28, 1.07, -0.56), (0, 0, 0)],
}


@pytest.mark.parametrize(
    "block", CascadeConfig(channels=3, token_dim=8).sequence, ids=lambda b: b.name
)
def test_each_block_reproduces_every_octave_within_a_tenth_of_a_decibel(
    block: TopConfig | BlockConfig,
) -> None:
    """At its default number of evaluations, with the default solver."""
    found = [offsets_of(block, SLIDE)]
    if isinstance(block, BlockConfig):
        gaps = GAPS[block.octaves]
        found += [list(itertools.accumulate(each, initial=0.0)) for each in gaps]
    errors = [decibels("dpm++2m", offsets, block.evaluations) for offsets in found]
    worst = max(float(each.abs().max()) for each in errors)
    assert worst < 0.1, worst
    # Two evaluations fewer would not do.
    fewer = [decibels("dpm++2m", offsets, block.evaluations - 2) for offsets in found]
    assert max(float(each.abs().max()) for each in fewer) > 0.1


@pytest.mark.parametrize(
    "block", CascadeConfig(channels=3, token_dim=8).sequence, ids=lambda b: b.name
)
def test_first_order_solvers_shrink_all_octaves_alike(block: TopConfig | BlockConfig) -> None:
    """All steps of h together leave the part e^(-h) of the variance, e^(-h / 2) at eta = 0, of
    what infinitely many leave between the ends of the range.
    """
    offsets = offsets_of(block, SLIDE)
    assert decibels("ddim", offsets, 40).abs().max() < 0.5
    assert decibels("ancestral", offsets, 75).abs().max() < 0.5
    for name, lost in (("ddim", 0.5), ("ancestral", 1.0)):
        ends = decibels(name, offsets, 4001) * 2 - decibels(name, offsets, 2001)
        for evaluations in (20, 40, 80):
            low, high = -MARGIN_NATS - max(offsets), MARGIN_NATS - min(offsets)
            h = (high - low) / (evaluations - 1) / 2
            left = (ends - decibels(name, offsets, evaluations)) / 10 * math.log(10) / (lost * h)
            assert left.min() > 0.92 and left.max() < 1.08, (name, evaluations, left)
            assert left.max() - left.min() < 0.04


def test_deterministic_steps_want_no_noise_and_stochastic_ones_say_so() -> None:
    (step,) = uniform_steps(-1.0, 1.0, 1)
    zero = torch.zeros(3)
    assert DDIM().noise_scale(step) == DPMSolverPP2M().noise_scale(step) == 0.0
    with pytest.raises(ValueError, match=r"eta = 0\.5 needs fresh noise"):
        DDIM(0.5)(zero, zero, None, step)
    with pytest.raises(ValueError, match=r"and 1 \(ancestral\), but is"):
        DDIM(1.5)
    with pytest.raises(ValueError, match="choose dpm\\+\\+2m, ddim, ancestral"):
        make_solver("euler")
    with pytest.raises(ValueError, match="belongs to the solver ddim"):
        make_solver("ancestral", 0.5)
    assert all(isinstance(make_solver(name), Solver) for name in SOLVERS)
    assert make_solver("ddim", 0.3) == DDIM(0.3)


def test_steps_join_and_the_first_has_no_memory() -> None:
    steps = uniform_steps(-3.0, 5.0, 4)
    assert [s.now for s in steps] == [-3.0, -1.0, 1.0, 3.0]
    assert [s.after for s in steps] == [-1.0, 1.0, 3.0, 5.0]
    assert [s.before for s in steps] == [None, -3.0, -1.0, 1.0]
    assert steps_through([-3.0, -1.0, 1.0, 3.0, 5.0]) == steps
    with pytest.raises(ValueError, match="at least one step"):
        uniform_steps(0.0, 1.0, 0)


def test_the_second_order_solver_takes_steps_that_shrink_by_the_same_amount() -> None:
    steps = DPMSolverPP2M().steps(-3.0, 5.0, 9)
    lengths = torch.tensor([s.after - s.now for s in steps], dtype=torch.float64)
    assert (steps[0].now, steps[-1].after) == (-3.0, 5.0)
    assert (lengths > 0).all() and (lengths.diff() < 0).all()
    torch.testing.assert_close(lengths.diff(), lengths.diff()[:1].expand(8))
    assert DDIM().steps(-3.0, 5.0, 9) == uniform_steps(-3.0, 5.0, 9)
