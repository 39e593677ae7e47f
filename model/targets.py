"""Targets: what the network is asked for, and weights: how much an error of it counts.

With alpha^2 = abar = sigmoid(lambda), sigma^2 = 1 - abar and n the noise (A xi where it is
mollified), u_t = alpha u_0 + sigma n. As everywhere here, what is observed is y = u_t / alpha.

| target         | network's output       | x0_hat                  | output error^2 / x0 error^2 |
| -------------- | ---------------------- | ----------------------- | --------------------------- |
| epsilon        | n                      | y - (sigma / alpha) out | alpha^2 / sigma^2 = SNR     |
| v              | alpha n - sigma u_0    | alpha^2 y - sigma out   | 1 / sigma^2 = SNR + 1       |
| x0             | u_0                    | out                     | 1                           |
| preconditioned | (u_0 - c_skip y)/c_out | c_skip y + c_out out    | 1 / c_out^2                 |

So the same x0_hat has an output under every target, and losses differ by the last column only,
`loss_gain`. A weight multiplies the squared error of the output; it is defined by what it does to
the error of x0_hat or epsilon, whatever the target.

Everything is a pure function of tensors. log_snr has one value an image (or a point); images and
points have further dimensions behind.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.process import preconditioning_factors
from model.schedule import Schedule, discrete_times


def _along(factor: Float[Tensor, "*b"], values: Float[Tensor, "*shape"]) -> Float[Tensor, "*more"]:
    """The factor with the trailing dimensions of the values."""
    return factor.view(*factor.shape, *(1 for _ in range(values.ndim - factor.ndim)))


@runtime_checkable
class Target(Protocol):
    """What the network estimates; leaves: `Epsilon`, `Velocity`, `Clean`, `Preconditioned`."""

    def input_scale(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The factor of y with which the network sees it: alpha, which makes it u_t, or c_in."""
        ...

    def of(
        self,
        clean: Float[Tensor, "*shape"],
        noise: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        """What the network should give for u_0 and n."""
        ...

    def to_estimate(
        self,
        output: Float[Tensor, "*shape"],
        observed: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        """x0_hat from the network's output and y."""
        ...

    def loss_gain(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Squared error of the output over that of x0_hat."""
        ...


@dataclass(frozen=True)
class Epsilon:
    """The noise itself (Ho et al., 2020); mollified where the process is (∞-Diff)."""

    def input_scale(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(log_snr).sqrt()

    def of(
        self,
        clean: Float[Tensor, "*shape"],
        noise: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        return noise

    def to_estimate(
        self,
        output: Float[Tensor, "*shape"],
        observed: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        return observed - _along(torch.exp(-log_snr / 2), output) * output

    def loss_gain(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.exp(log_snr)


@dataclass(frozen=True)
class Velocity:
    """v (Salimans and Ho, 2022): the noise where there is little of it, else -u_0."""

    def input_scale(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(log_snr).sqrt()

    def of(
        self,
        clean: Float[Tensor, "*shape"],
        noise: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        alpha, sigma = (torch.sigmoid(sign * log_snr).sqrt() for sign in (1, -1))
        return _along(alpha, noise) * noise - _along(sigma, clean) * clean

    def to_estimate(
        self,
        output: Float[Tensor, "*shape"],
        observed: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        kept = _along(torch.sigmoid(log_snr), observed) * observed
        return kept - _along(torch.sigmoid(-log_snr).sqrt(), output) * output

    def loss_gain(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.exp(log_snr) + 1


@dataclass(frozen=True)
class Clean:
    """u_0 itself."""

    def input_scale(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(log_snr).sqrt()

    def of(
        self,
        clean: Float[Tensor, "*shape"],
        noise: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        return clean

    def to_estimate(
        self,
        output: Float[Tensor, "*shape"],
        observed: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        return output

    def loss_gain(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class Preconditioned:
    """F of `process` (Karras et al., 2022): unit variance as input, as output and in the loss.

    signal, noise: their variances S and n, one number, or one for each value of log_snr (points of
    several levels).
    """

    signal: float | Float[Tensor, "*b"]
    noise: float | Float[Tensor, "*b"] = 1.0

    def input_scale(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return preconditioning_factors(self.signal, self.noise, log_snr)[0]

    def of(
        self,
        clean: Float[Tensor, "*shape"],
        noise: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        _, skip, out, _ = preconditioning_factors(self.signal, self.noise, log_snr)
        observed = clean + _along(torch.exp(-log_snr / 2), noise) * noise
        return (clean - _along(skip, observed) * observed) / _along(out, clean)

    def to_estimate(
        self,
        output: Float[Tensor, "*shape"],
        observed: Float[Tensor, "*shape"],
        log_snr: Float[Tensor, "*b"],
    ) -> Float[Tensor, "*shape"]:
        _, skip, out, _ = preconditioning_factors(self.signal, self.noise, log_snr)
        return _along(skip, observed) * observed + _along(out, output) * output

    def loss_gain(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return preconditioning_factors(self.signal, self.noise, log_snr)[2].square().reciprocal()


TARGETS = ("epsilon", "v", "x0", "preconditioned")


def make_target(
    name: str,
    signal: float | Float[Tensor, "*b"] | None = None,
    noise: float | Float[Tensor, "*b"] = 1.0,
) -> Target:
    """A target by its name; `preconditioned` needs the variances of signal and noise."""
    plain: dict[str, Target] = {"epsilon": Epsilon(), "v": Velocity(), "x0": Clean()}
    if name in plain:
        return plain[name]
    if name == "preconditioned":
        if signal is None:
            raise ValueError("a preconditioned target needs the signal's variance")
        return Preconditioned(signal, noise)
    raise ValueError(f"target {name!r} does not exist; choose {', '.join(TARGETS)}")


@runtime_checkable
class Weight(Protocol):
    """What the squared error of the network's output is multiplied by."""

    def __call__(self, target: Target, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]: ...


@dataclass(frozen=True)
class Simple:
    """1, whatever the target (Ho et al., 2020)."""

    def __call__(self, target: Target, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the error of x0_hat (Hang et al., 2023): divided by SNR for epsilon, by
    SNR + 1 for v.
    """

    gamma: float = 5.0

    def __call__(self, target: Target, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.exp(log_snr).clamp(max=self.gamma) / target.loss_gain(log_snr)


@dataclass(frozen=True)
class Variational:
    """The papers' lambda_t on the error of epsilon: of the variational bound, at times 1 ... T,

        lambda_t = beta_t^2 / ( 2 beta~_t (1 - beta_t) (1 - abar_t) )

    at most `limit`. Of the published cosine schedule it is 0.003 at t = 500, infinite at t = 1 and
    499 at t = 1000; the default limit cuts t = 1, 999 and 1000.
    """

    schedule: Schedule
    steps: int = 1000
    limit: float = 1.0

    def table(self) -> Float[np.ndarray, " T"]:
        """lambda_t before it is cut; index k is t = k + 1."""
        times = discrete_times(self.schedule, self.steps)
        below = 2 * times.posterior_beta * (1 - times.beta) * (1 - times.alpha_bar)
        with np.errstate(divide="ignore"):
            return times.beta**2 / below

    def __call__(self, target: Target, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        time = torch.ceil(self.schedule.time(log_snr.double()) * self.steps - 1e-6)
        index = time.long().clamp(1, self.steps) - 1
        table = torch.from_numpy(self.table()).clamp(max=self.limit).to(log_snr)
        return table[index] * torch.exp(log_snr) / target.loss_gain(log_snr)


WEIGHTS = ("simple", "min-snr", "variational")


def make_weight(name: str, schedule: Schedule | None = None) -> Weight:
    """A weight by its name; `variational` needs the schedule whose times it weighs."""
    if name == "simple":
        return Simple()
    if name == "min-snr":
        return MinSNR()
    if name == "variational":
        if schedule is None:
            raise ValueError("the variational weight needs the schedule whose times it weighs")
        return Variational(schedule)
    raise ValueError(f"weight {name!r} does not exist; choose {', '.join(WEIGHTS)}")
