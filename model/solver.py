"""Solvers: one step from one log-SNR to the next, given the estimate of u_0.

A solver is a pure function of a few values at one place, so that it runs tile by tile. With
alpha = sqrt(abar), sigma = sqrt(1 - abar) and h = (lambda_next - lambda) / 2:

    DDIM (Song et al., 2021), first order, with n' fresh noise of the process's own law:
        u' = alpha' x0_hat + sqrt(sigma'^2 - s^2) (u - alpha x0_hat) / sigma + s n',
        s  = eta sigma' sqrt(1 - e^-2h)
    ancestral (Ho et al., 2020): s^2 is then the posterior's variance beta~, which is eta = 1
    DPM-Solver++(2M) (Lu et al., 2022), second order:
        DDIM at eta = 0 with x0_hat + (x0_hat - x0_hat_before) h / (2 h_before)

Noise that is not of the process's law (white, where the process is mollified) would stay in the
image. It is keyed by step and place (`generate.fresh_noise`), so that tiles and restarts change
nothing.

Log-SNRs. First-order solvers take them uniformly. 2M takes smaller steps towards the clean end,

    lambda(s) = low + (high - low) ((1 + g) s - g s^2),    s uniform in 0 ... 1,    g = 0.4,

so that of many steps the last is (1 - g) / (1 + g) of the first. On the exact denoiser of a
Gaussian field with the octaves of H&E, a block of the cascade at a time, 10 evaluations then leave
every octave's variance right within 0.06 dB; uniform ones need 16 to 20 for 0.1 dB. All ancestral
steps together leave the part e^(-h) of it and DDIM's e^(-h/2), whatever the octave: 1.4 to 1.8 dB
and 0.8 to 1.0 dB too little at 20 steps; for 0.5 dB they need 75 and 40. The larger variance
beta_t that Ho et al. also tried leaves -1.8 dB in coarse octaves at 20 steps and +1.5 dB in the
finest, measured with all octaves of a region together: not offered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step: the log-SNR before it, at it and after it; `before` is None at the first step."""

    before: float | None
    now: float
    after: float


@runtime_checkable
class Solver(Protocol):
    """u at log-SNR `step.now` -> u at `step.after`."""

    @property
    def remembers(self) -> bool:
        """Whether the estimate of the step before is wanted; it is None at the first step in any
        case.
        """
        ...

    def steps(self, low: float, high: float, count: int) -> list[Step]:
        """So many steps from one log-SNR to another, where this solver does best."""
        ...

    def noise_scale(self, step: Step) -> float:
        """Of the fresh noise that the step adds; at 0 none is wanted."""
        ...

    def __call__(
        self,
        u: Float[Tensor, "*shape"],
        estimate: Float[Tensor, "*shape"],
        estimate_before: Float[Tensor, "*shape"] | None,
        step: Step,
        noise: Float[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "*shape"]: ...


def _alpha_sigma(log_snr: float) -> tuple[float, float]:
    return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit model; eta = 0 is deterministic, eta = 1 ancestral.

    The step is the exact solution while the estimate is constant, of the probability-flow ODE at
    eta = 0 and of the reverse SDE at eta = 1.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(
                f"eta lies between 0 (deterministic) and 1 (ancestral), but is {self.eta:g}"
            )

    @property
    def remembers(self) -> bool:
        return False

    def steps(self, low: float, high: float, count: int) -> list[Step]:
        return uniform_steps(low, high, count)

    def noise_scale(self, step: Step) -> float:
        _, sigma_after = _alpha_sigma(step.after)
        return self.eta * sigma_after * math.sqrt(-math.expm1(step.now - step.after))

    def __call__(
        self,
        u: Float[Tensor, "*shape"],
        estimate: Float[Tensor, "*shape"],
        estimate_before: Float[Tensor, "*shape"] | None,
        step: Step,
        noise: Float[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        _, sigma = _alpha_sigma(step.now)
        alpha_after, sigma_after = _alpha_sigma(step.after)
        # sqrt(sigma'^2 - s^2) = sigma' e^kept
        kept = 0.5 * math.log1p(self.eta**2 * math.expm1(step.now - step.after))
        shrink = -math.expm1(kept - (step.after - step.now) / 2)
        moved = (sigma_after * math.exp(kept) / sigma) * u + (alpha_after * shrink) * estimate
        scale = self.noise_scale(step)
        if scale == 0.0:
            return moved
        if noise is None:
            raise ValueError(
                f"a step with eta = {self.eta:g} needs fresh noise, but none is given"
            )
        return moved + scale * noise


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M): the estimate extrapolated to the middle of the step; second order,
    deterministic.
    """

    @property
    def remembers(self) -> bool:
        return True

    def steps(self, low: float, high: float, count: int) -> list[Step]:
        return graded_steps(low, high, count)

    def noise_scale(self, step: Step) -> float:
        return 0.0

    def __call__(
        self,
        u: Float[Tensor, "*shape"],
        estimate: Float[Tensor, "*shape"],
        estimate_before: Float[Tensor, "*shape"] | None,
        step: Step,
        noise: Float[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        if estimate_before is not None and step.before is not None:
            ratio = (step.after - step.now) / (step.now - step.before)
            estimate = estimate + (ratio / 2) * (estimate - estimate_before)
        return DDIM()(u, estimate, None, step)


SOLVERS = ("dpm++2m", "ddim", "ancestral")


def make_solver(name: str, eta: float | None = None) -> Solver:
    """A solver by its name; `eta` is DDIM's, by default 0."""
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} does not exist; choose {', '.join(SOLVERS)}")
    if name == "ddim":
        return DDIM(0.0 if eta is None else eta)
    if eta is not None:
        raise ValueError(f"eta = {eta:g} belongs to the solver ddim, but the solver is {name}")
    return DDIM(eta=1.0) if name == "ancestral" else DPMSolverPP2M()


def steps_through(log_snrs: Sequence[float]) -> list[Step]:
    """The steps from each log-SNR to the next; u at the last is still to be denoised once more."""
    if len(log_snrs) < 2:
        raise ValueError(
            f"a trajectory needs at least one step, but {len(log_snrs) - 1} were asked for"
        )
    before: list[float | None] = [None, *log_snrs[:-2]]
    ends = zip(before, log_snrs[:-1], log_snrs[1:], strict=True)
    return [Step(b, now, after) for b, now, after in ends]


GRADING = 0.4
"""Of the steps of DPM-Solver++(2M); see the head of this module."""


def uniform_steps(low: float, high: float, steps: int) -> list[Step]:
    """`steps` steps, uniform in log-SNR, from `low` to `high`."""
    return graded_steps(low, high, steps, grading=0.0)


def graded_steps(low: float, high: float, steps: int, *, grading: float = GRADING) -> list[Step]:
    """`steps` steps from `low` to `high`, each smaller than the one before by the same amount."""
    parts = [i / max(steps, 1) for i in range(steps + 1)]
    grown = [(1 + grading) * part - grading * part**2 for part in parts]
    return steps_through([*(low + (high - low) * part for part in grown[:-1]), high])
