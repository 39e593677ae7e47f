"""Schedules: how noisy u_t is at a time t in [0, 1], as log-SNR lambda = ln(abar / (1 - abar)).

Time 0 is the image, time 1 the noise. Training draws t uniformly and sampling steps through it, so
that a schedule decides how much of either each octave gets (see `process.Octaves`):

    Cosine     abar = cos^2(pi t / 2), lambda = -2 ln tan(pi t / 2) (Nichol and Dhariwal, 2021).
               `shifted` by 2 ln(64 / side) for an image of `side` pixels (Hoogeboom et al., 2023):
               means over cells of side / 64 pixels have that much less noise.
    Linear     beta from 1e-4 to 0.02 in 1000 steps (Ho et al., 2020), in continuous time (Song et
               al., 2021, VP-SDE): ln abar = -t^2 (b1 - b0) / 2 - t b0, b0 = 0.1, b1 = 20.
    Uniform    lambda falls linearly, over a range in which every octave goes from clean to
               drowned.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from model.process import Octaves

ScheduleName = Literal["cosine", "shifted", "linear", "uniform"]
STEPS = 1000
"""Discrete steps of the published schedules."""
REFERENCE_PX = 64


@runtime_checkable
class Schedule(Protocol):
    """The log-SNR as a falling function of time, cut to [low, high]."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The log-SNR at times in [0, 1]; low at 1, high at 0."""
        ...

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The inverse."""
        ...


@dataclass(frozen=True)
class Cosine:
    """lambda = shift - 2 ln tan(pi t / 2), t running through the part that gives [low, high]."""

    low: float = -13.0
    high: float = 13.0
    shift: float = 0.0

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        first, last = self._angle(self.high), self._angle(self.low)
        return self.shift - 2 * torch.log(torch.tan(first + (last - first) * time))

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        first, last = self._angle(self.high), self._angle(self.low)
        angle = torch.atan(torch.exp((self.shift - log_snr) / 2))
        return (angle - first) / (last - first)

    def _angle(self, log_snr: float) -> float:
        return math.atan(math.exp((self.shift - log_snr) / 2))


@dataclass(frozen=True)
class Linear:
    """abar = exp(-t^2 (b1 - b0) / 2 - t b0), t running through the part that gives [low, high]."""

    low: float = -10.0
    high: float = 13.0
    first_beta: float = 0.1
    last_beta: float = 20.0

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        first, last = self._place(self.high), self._place(self.low)
        t = first + (last - first) * time
        decay = t * self.first_beta + t.square() * (self.last_beta - self.first_beta) / 2
        return -torch.log(torch.expm1(decay))

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        first, last = self._place(self.high), self._place(self.low)
        return (self._inverse(torch.nn.functional.softplus(-log_snr)) - first) / (last - first)

    def _place(self, log_snr: float) -> float:
        return float(self._inverse(torch.tensor(math.log1p(math.exp(-log_snr))).double()))

    def _inverse(self, decay: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The time at which -ln abar is `decay`: the root of a quadratic."""
        b0, rise = self.first_beta, self.last_beta - self.first_beta
        return 2 * decay / (b0 + torch.sqrt(b0**2 + 2 * rise * decay))


@dataclass(frozen=True)
class Uniform:
    """lambda = high + (low - high) t."""

    low: float
    high: float

    def log_snr(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.high + (self.low - self.high) * time

    def time(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return (log_snr - self.high) / (self.low - self.high)


def make_schedule(name: str, octaves: Octaves) -> Schedule:
    """The schedule of a name for images of these octaves.

    All but `linear` cover the range in which every octave goes from drowned to clean, the
    unshifted cosine at least that of steps 1 to 999 of its discrete ancestor.
    """
    low, high = octaves.log_snr_range()
    if name == "uniform":
        return Uniform(low, high)
    if name == "cosine":
        return Cosine(min(low, -13.0), max(high, 13.0))
    if name == "shifted":
        return Cosine(low, high, 2 * math.log(REFERENCE_PX / 2**octaves.noise.top_level))
    if name == "linear":
        return Linear()
    raise ValueError(
        f"schedule {name!r} does not exist; choose cosine, shifted, linear or uniform"
    )


def coverage(schedule: Schedule, offset: float, width: float = 3.0) -> float:
    """The part of time in which an octave is neither drowned nor clean: |log-SNR| < width.

    offset: the octave's log-SNR above the process's (`Octaves.offset`).
    """
    edges = torch.tensor([width - offset, -width - offset], dtype=torch.float64)
    first, last = schedule.time(edges.clamp(schedule.low, schedule.high)).tolist()
    return float(last - first)
