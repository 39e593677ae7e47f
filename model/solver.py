"""Solvers: one step along the probability-flow ODE, from one log-SNR to the next, given the
estimate of u_0.

A solver is a pure function of a few values at one place, so that it runs tile by tile. In y-free
form, with alpha = sqrt(abar), sigma = sqrt(1 - abar) and h = (lambda_next - lambda) / 2:

    DDIM (Song et al., 2021), first order:
        u' = sigma'/sigma u + alpha' (1 - e^-h) x0_hat
    DPM-Solver++(2M) (Lu et al., 2022), second order:
        the same with x0_hat + (x0_hat - x0_hat_before) h / (2 h_before)
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from model.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One step: the log-SNR before it, at it and after it; `before` is None at the first step."""

    before: float | None
    now: float
    after: float


@runtime_checkable
class Solver(Protocol):
    """u at log-SNR `step.now` -> u at `step.after`.

    `remembers` says whether the estimate of the step before is wanted; it is None at the first
    step in any case.
    """

    remembers: bool

    def __call__(
        self,
        u: Float[Tensor, "*shape"],
        estimate: Float[Tensor, "*shape"],
        estimate_before: Float[Tensor, "*shape"] | None,
        step: Step,
    ) -> Float[Tensor, "*shape"]: ...


def _alpha_sigma(log_snr: float) -> tuple[float, float]:
    return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))


def _exponential_step(
    u: Float[Tensor, "*shape"], estimate: Float[Tensor, "*shape"], step: Step
) -> Float[Tensor, "*shape"]:
    """Exact integration of the ODE while the estimate is constant."""
    _, sigma = _alpha_sigma(step.now)
    alpha_after, sigma_after = _alpha_sigma(step.after)
    shrink = -math.expm1(-(step.after - step.now) / 2)
    return (sigma_after / sigma) * u + (alpha_after * shrink) * estimate


class DDIM:
    """Denoising diffusion implicit model, eta = 0; first order, deterministic."""

    remembers = False

    def __call__(
        self,
        u: Float[Tensor, "*shape"],
        estimate: Float[Tensor, "*shape"],
        estimate_before: Float[Tensor, "*shape"] | None,
        step: Step,
    ) -> Float[Tensor, "*shape"]:
        return _exponential_step(u, estimate, step)


class DPMSolverPP2M:
    """DPM-Solver++(2M): the estimate extrapolated to the middle of the step; second order,
    deterministic.
    """

    remembers = True

    def __call__(
        self,
        u: Float[Tensor, "*shape"],
        estimate: Float[Tensor, "*shape"],
        estimate_before: Float[Tensor, "*shape"] | None,
        step: Step,
    ) -> Float[Tensor, "*shape"]:
        if estimate_before is not None and step.before is not None:
            ratio = (step.after - step.now) / (step.now - step.before)
            estimate = estimate + (ratio / 2) * (estimate - estimate_before)
        return _exponential_step(u, estimate, step)


def steps_through(schedule: Schedule, steps: int) -> list[Step]:
    """`steps` steps, uniform in the schedule's time, from noise to image; u at the last log-SNR is
    still to be denoised once more.
    """
    if steps < 1:
        raise ValueError(f"a trajectory needs at least one step, but {steps} were asked for")
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    grid: list[float] = schedule.log_snr(times).tolist()
    before: list[float | None] = [None, *grid[:-2]]
    return [Step(b, now, after) for b, now, after in zip(before, grid[:-1], grid[1:], strict=True)]
