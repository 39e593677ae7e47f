"""What a network is asked for, and how much an error counts at each noise level.

With alpha = sqrt(abar) and sigma = sqrt(1 - abar), u = alpha u_0 + sigma xi (both mollified alike,
where they are mollified), a *target* is a linear combination of u_0 and xi, from which and from u
the estimate of u_0 follows:

    epsilon          xi                                     (Ho et al., 2020; the papers)
    v                alpha xi - sigma u_0                   (Salimans and Ho, 2022)
    x0               u_0
    preconditioned   (u_0 - c_skip u) / c_out               (Karras et al., 2022, Table 1)

The last has unit variance at every noise level, if u_0 has variance S and xi variance N: c_skip =
alpha S / (alpha^2 S + sigma^2 N), c_out^2 = sigma^2 S N / (alpha^2 S + sigma^2 N). Reparametrising
changes nothing but the target: an error e of x0_hat is an error of the target of e times a known
factor, `error_scale`.

A *weight* multiplies the squared error of the target:

    simple       1
    min-snr      min(SNR, 5) on the error of x0_hat (Hang et al., 2023)
    variational  lambda_t = beta_t^2 / (2 beta~_t (1 - beta_t)(1 - abar_t)) on the error of xi
                 (Theorem 1 of ∞-Brush), with 1000 steps of the schedule and beta at most 0.999.
                 It is infinite at t = 1, where beta~ is zero, and is cut there to its value at
                 t = 2.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from model.schedule import STEPS, Schedule

TargetName = Literal["epsilon", "v", "x0", "preconditioned"]
WeightName = Literal["simple", "min-snr", "variational"]
MIN_SNR_GAMMA = 5.0
MOST_BETA = 0.999  # Nichol and Dhariwal (2021)


@dataclass(frozen=True)
class Level:
    """The noise level of values: log-SNR, and the variances of u_0 and xi there.

    Shapes broadcast to the values', so that cells of several sizes each have their own.
    """

    log_snr: Tensor
    signal: Tensor | float = 1.0
    noise: Tensor | float = 1.0

    @property
    def alpha(self) -> Tensor:
        return torch.sigmoid(self.log_snr).sqrt()

    @property
    def sigma(self) -> Tensor:
        return torch.sigmoid(-self.log_snr).sqrt()


@runtime_checkable
class Target(Protocol):
    """One parametrisation of the estimate of u_0."""

    def of(
        self, u_0: Float[Tensor, "*shape"], xi: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        """What the network should give."""
        ...

    def estimate(
        self, out: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        """x0_hat, from what it gave and u."""
        ...

    def error_scale(self, at: Level) -> Tensor:
        """Error of the target over error of x0_hat, at the same u."""
        ...


class Epsilon:
    """xi; x0_hat = (u - sigma xi_hat) / alpha."""

    def of(
        self, u_0: Float[Tensor, "*shape"], xi: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        return xi

    def estimate(
        self, out: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        return (u - at.sigma * out) / at.alpha

    def error_scale(self, at: Level) -> Tensor:
        return at.alpha / at.sigma


class Velocity:
    """alpha xi - sigma u_0; x0_hat = alpha u - sigma v_hat."""

    def of(
        self, u_0: Float[Tensor, "*shape"], xi: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        return at.alpha * xi - at.sigma * u_0

    def estimate(
        self, out: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        return at.alpha * u - at.sigma * out

    def error_scale(self, at: Level) -> Tensor:
        return 1 / at.sigma


class Clean:
    """u_0 itself."""

    def of(
        self, u_0: Float[Tensor, "*shape"], xi: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        return u_0

    def estimate(
        self, out: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        return out

    def error_scale(self, at: Level) -> Tensor:
        return torch.ones_like(at.log_snr)


class Preconditioned:
    """(u_0 - c_skip u) / c_out; x0_hat = c_skip u + c_out F."""

    def of(
        self, u_0: Float[Tensor, "*shape"], xi: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        skip, out = self._factors(at)
        return (u_0 - skip * (at.alpha * u_0 + at.sigma * xi)) / out

    def estimate(
        self, out: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"], at: Level
    ) -> Float[Tensor, "*shape"]:
        skip, scale = self._factors(at)
        return skip * u + scale * out

    def error_scale(self, at: Level) -> Tensor:
        return 1 / self._factors(at)[1]

    def _factors(self, at: Level) -> tuple[Tensor, Tensor]:
        total = at.alpha**2 * at.signal + at.sigma**2 * at.noise
        skip = at.alpha * at.signal / total
        return skip, at.sigma * (at.signal * at.noise / total) ** 0.5


TARGETS: dict[str, Target] = {
    "epsilon": Epsilon(),
    "v": Velocity(),
    "x0": Clean(),
    "preconditioned": Preconditioned(),
}


def make_target(name: str) -> Target:
    """The target of a name."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} does not exist; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def loss_weight(
    name: str, target: Target, schedule: Schedule, at: Level
) -> Float[Tensor, "*shape"]:
    """What the squared error of the target is multiplied by."""
    if name == "simple":
        return torch.ones_like(at.log_snr)
    if name == "min-snr":
        snr = torch.exp(at.log_snr).clamp_max(MIN_SNR_GAMMA)
        return snr / target.error_scale(at) ** 2
    if name == "variational":
        of_epsilon = variational_weight(schedule, at.log_snr)
        return of_epsilon * (Epsilon().error_scale(at) / target.error_scale(at)) ** 2
    raise ValueError(f"weight {name!r} does not exist; choose simple, min-snr or variational")


def variational_weight(schedule: Schedule, log_snr: Tensor) -> Tensor:
    """lambda_t of Theorem 1 at the step of the schedule that ends nearest, 2 <= t <= 1000."""
    step = (schedule.time(log_snr.double()) * STEPS).round().clamp(2, STEPS)
    now, before = (schedule.log_snr(t / STEPS) for t in (step, step - 1))
    abar_before = torch.sigmoid(before)
    noise, noise_before = torch.sigmoid(-now), torch.sigmoid(-before)
    # 1 - abar / abar_before, without cancellation.
    beta = ((noise - noise_before) / abar_before).clamp_max(MOST_BETA)
    posterior = noise_before / noise * beta
    return (beta.square() / (2 * posterior * (1 - beta) * noise)).to(log_snr.dtype)
