"""Schedules: which log-SNR belongs to which time, and how much of an octave's life they cover.

    q(u_t | u_0) = N( sqrt(abar_t) u_0 , (1 - abar_t) C ),    lambda = ln( abar / (1 - abar) )

A schedule is lambda as a falling function of time t in [0, 1], t = 1 noise, cut to [low, high]: no
time has a log-SNR outside. Training draws times uniformly among those of a range (`draw_log_snr`),
and a solver can step through them uniformly (`levels`).

lambda is the process's own; an octave's is lambda + ln(S / N), S and N its signal's and noise's
variance (`process.Octaves`). Two things must hold of any schedule, and `coverage` and
`first_log_snrs` measure them: at t = 1 nothing of any octave is left (log-SNR <= -6), and each
octave is trained where it is decided (|log-SNR| < 3 with a probability of at least 0.2).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.process import Octaves

LOW, HIGH = -20.0, 20.0
_REFERENCE_PX = 64


@runtime_checkable
class Schedule(Protocol):
    """lambda(t) and its inverse, both cut to the log-SNRs `low` ... `high`."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """lambda at times in [0, 1]; 1 is noise."""
        ...

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """t at which lambda is `log_snr`."""
        ...


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule (Nichol and Dhariwal, 2021), shifted to a resolution.

        abar = cos^2(a) / cos^2(a_0),    a = (pi / 2) (t + s) / (1 + s),    a_0 = a at t = 0,
        lambda = ln( abar / (1 - abar) ) + 2 ln(64 / side_px)

    The shift is Hoogeboom et al.'s (2023): neighbouring pixels of a large image say the same, so
    that its noise has to be larger. offset: s, published as 0.008; with 0 lambda = -2 ln tan(a).
    side_px: of the image; 64 shifts nothing.
    """

    offset: float = 0.0
    side_px: int = _REFERENCE_PX
    low: float = LOW
    high: float = HIGH

    @property
    def shift(self) -> float:
        return 2 * math.log(_REFERENCE_PX / self.side_px)

    @property
    def _first(self) -> float:
        return math.pi / 2 * self.offset / (1 + self.offset)

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        first = self._first
        angle = first + (math.pi / 2 - first) * time.double()
        # cos^2(a_0) - cos^2(a), without cancellation.
        noise = torch.sin(angle - first) * torch.sin(angle + first)
        log_snr = 2 * torch.log(torch.cos(angle)) - torch.log(noise) + self.shift
        return log_snr.nan_to_num(self.low).clamp(self.low, self.high).to(time)

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        first = self._first
        level = log_snr.double().clamp(self.low, self.high) - self.shift
        cosine = torch.sigmoid(level).sqrt() * math.cos(first)
        sine = (math.sin(first) ** 2 + math.cos(first) ** 2 * torch.sigmoid(-level)).sqrt()
        angle = torch.atan2(sine, cosine)
        return ((angle - first) / (math.pi / 2 - first)).to(log_snr)


@dataclass(frozen=True)
class Linear:
    """The linear schedule (Ho et al., 2020): abar = prod (1 - beta_k), beta_k from first_beta to
    last_beta in `steps` steps, beta constant within each.
    """

    first_beta: float = 1e-4
    last_beta: float = 0.02
    steps: int = 1000
    high: float = HIGH

    @property
    def low(self) -> float:
        """Where the last step ends: ln(abar) = -10.1 as published."""
        lost = float(self._table[1][-1])
        return -lost - math.log(-math.expm1(-lost))

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        times, losses = self._table
        lost = torch.from_numpy(np.interp(time.detach().cpu().double().numpy(), times, losses))
        log_snr = -lost - torch.log(-torch.expm1(-lost))
        return log_snr.clamp(self.low, self.high).to(time)

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        times, losses = self._table
        level = log_snr.detach().cpu().double().clamp(self.low, self.high)
        lost = torch.nn.functional.softplus(-level).numpy()
        return torch.from_numpy(np.interp(lost, losses, times)).to(log_snr)

    @property
    def _table(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        return _losses(self.first_beta, self.last_beta, self.steps)


@lru_cache(maxsize=8)
def _losses(
    first_beta: float, last_beta: float, steps: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Times k / steps and -ln(abar) there."""
    betas = np.linspace(first_beta, last_beta, steps)
    losses = np.concatenate([[0.0], -np.log1p(-betas).cumsum()])
    return np.linspace(0.0, 1.0, steps + 1), losses


@dataclass(frozen=True)
class UniformLogSNR:
    """lambda falls linearly from `high` to `low` (Kingma et al., 2021); over the octaves' range
    every octave goes from drowned to clean.
    """

    low: float
    high: float

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.high + (self.low - self.high) * time.clamp(0.0, 1.0)

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return (self.high - log_snr.clamp(self.low, self.high)) / (self.high - self.low)


SCHEDULES = ("cosine", "shifted-cosine", "linear", "uniform")


def make_schedule(
    name: str, *, side_px: int | None = None, octaves: Octaves | None = None
) -> Schedule:
    """A schedule by its name: `cosine` and `linear` as published, `shifted-cosine` for images of
    side_px, `uniform` over the range of the octaves.

    A cosine goes on below its published end (-20) where octaves of very large images need that to
    drown.
    """
    low = LOW if octaves is None else min(LOW, octaves.log_snr_range()[0])
    if name == "cosine":
        return Cosine(offset=0.008, low=low)
    if name == "shifted-cosine":
        if side_px is None:
            raise ValueError("a shifted cosine schedule needs the side of the images in pixels")
        return Cosine(side_px=side_px, low=low)
    if name == "linear":
        return Linear()
    if name == "uniform":
        if octaves is None:
            raise ValueError("a uniform schedule needs the octaves whose range it covers")
        return UniformLogSNR(*octaves.log_snr_range())
    raise ValueError(f"schedule {name!r} does not exist; choose {', '.join(SCHEDULES)}")


def log_snr_range(schedule: Schedule, octaves: Octaves) -> tuple[float, float]:
    """From drowned to clean in every octave, as far as the schedule goes."""
    low, high = octaves.log_snr_range()
    return max(low, schedule.low), min(high, schedule.high)


def draw_log_snr(
    schedule: Schedule, uniform: Float[Tensor, "*b"], low: float, high: float
) -> Float[Tensor, "*b"]:
    """Log-SNRs at times uniform among those of [low, high]; `uniform` 0 is `low`, 1 is `high`."""
    last, first = _times(schedule, low, high)
    return schedule.log_snr(last + (first - last) * uniform.double()).to(uniform)


def levels(schedule: Schedule, low: float, high: float, steps: int) -> list[float]:
    """`steps` + 1 log-SNRs from `low` to `high`, uniform in time (see `solver.steps_through`)."""
    uniform = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    return [float(level) for level in draw_log_snr(schedule, uniform, low, high)]


def first_log_snrs(octaves: Octaves, low: float) -> list[float]:
    """The log-SNR of every octave where the process's is `low`, fine to coarse."""
    return [low + octaves.offset(level) for level in range(octaves.noise.top_level + 1)]


def coverage(
    schedule: Schedule, octaves: Octaves, low: float, high: float, within: float = 3.0
) -> list[float]:
    """The probability that a drawn time finds an octave at |log-SNR| < within, fine to coarse."""
    last, first = _times(schedule, low, high)
    found = []
    for offset in first_log_snrs(octaves, 0.0):
        bounds = (min(max(edge - offset, low), high) for edge in (-within, within))
        noisy, clean = _times(schedule, *bounds)
        found.append((noisy - clean) / (last - first))
    return found


def _times(schedule: Schedule, low: float, high: float) -> tuple[float, float]:
    times = schedule.time(torch.tensor([low, high], dtype=torch.float64))
    return float(times[0]), float(times[1])


@dataclass(frozen=True)
class DiscreteTimes:
    """The papers' times t = 1 ... T of a schedule; index k of every array is t = k + 1.

    alpha_bar: abar_t; beta: 1 - abar_t / abar_{t-1}, at most `max_beta`, with abar_0 = 1, and
    abar_t their product, as published; posterior_beta: beta~_t = beta_t (1 - abar_{t-1}) /
    (1 - abar_t), 0 at t = 1.
    """

    alpha_bar: Float[np.ndarray, " T"]
    beta: Float[np.ndarray, " T"]
    posterior_beta: Float[np.ndarray, " T"]


def discrete_times(
    schedule: Schedule, steps: int = 1000, max_beta: float = 0.999
) -> DiscreteTimes:
    """The schedule at T = `steps` times."""
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    wanted = np.concatenate([[1.0], torch.sigmoid(schedule.log_snr(time)).numpy()])
    beta = np.minimum(1 - wanted[1:] / wanted[:-1], max_beta)
    alpha_bar = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return DiscreteTimes(alpha_bar, beta, beta * (1 - before) / (1 - alpha_bar))
