"""The forward process, its bookkeeping per octave, and what the network is asked to estimate.

    q(u_t | u_0) = N( sqrt(abar_t) u_0 , (1 - abar_t) C ),    lambda = log( abar / (1 - abar) )

Time is the log-SNR lambda itself: abar = sigmoid(lambda). In the Haar basis u splits into octaves,
and each has a log-SNR of its own, lambda + ln(signal variance / noise variance): a coarse octave
drowns in white noise long after a fine one has. So training and sampling go through a range of
lambda in which every octave that is diffused goes from drowned to clean, and each octave is
preconditioned at its own noise level (Karras et al., 2022, Table 1): with y = u_t /
sqrt(abar) = u_0 + sigma xi, signal variance S and noise variance N = sigma^2 n,

    x0_hat = mu + c_skip (y - mu) + c_out F,    c_skip = S / (S + N),    c_out^2 = S N / (S + N),

where mu is what is known before; F has unit variance as input, as output and in the loss.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from model.spectrum import NoiseSpectrum

_LEAST_VARIANCE = 1e-4


@dataclass(frozen=True)
class Octaves:
    """Signal and noise variance of every octave, in standardised units (mean over bands).

    signal[l]: variance of the detail at level l (cell minus parent), mean over bands and images;
        signal[-1] is the variance of the mean over the whole region.
    residual[l], l < coarse_level: variance of the detail without what the parents of its block of
        octaves predict of it (`haar.predicted`); () where nothing is predicted.
    noise: the noise's spectrum; its top level is len(signal) - 1.
    """

    signal: tuple[float, ...]
    residual: tuple[float, ...]
    noise: NoiseSpectrum

    def __post_init__(self) -> None:
        if len(self.signal) != self.noise.top_level + 1:
            raise ValueError(
                f"{len(self.signal)} signal variances do not fit a noise tree of top level "
                f"{self.noise.top_level}"
            )

    @property
    def coarse_level(self) -> int:
        return len(self.residual)

    def variances(self, level: int) -> tuple[float, float]:
        """(signal, noise) variance of what the network estimates at `level`.

        Below the coarse level that is the detail without what is predicted of it; at the coarse
        level the lattice's values.
        """
        if level < self.coarse_level:
            return max(self.residual[level], _LEAST_VARIANCE), self.noise.detail_variance(level)
        return sum(self.signal[level:]), self.noise.mean_variance(level)

    def offset(self, level: int) -> float:
        """ln(signal variance / noise variance) of one octave; the octave's log-SNR is lambda plus
        this.
        """
        top = self.noise.top_level
        noise = (
            self.noise.mean_variance(top) if level == top else self.noise.detail_variance(level)
        )
        signal = self.signal[level] if level >= self.coarse_level else self.residual[level]
        return math.log(max(signal, _LEAST_VARIANCE) / noise)

    def log_snr_range(self, margin: float = 6.0) -> tuple[float, float]:
        """From -margin in the easiest octave to +margin in the hardest."""
        offsets = [self.offset(level) for level in range(self.noise.top_level + 1)]
        return -margin - max(offsets), margin - min(offsets)


@dataclass(frozen=True)
class Preconditioning:
    """The three factors of one level at one noise level, each of shape (b, 1, 1, 1)."""

    c_in: Float[Tensor, "b 1 1 1"]
    c_skip: Float[Tensor, "b 1 1 1"]
    c_out: Float[Tensor, "b 1 1 1"]
    log_snr: Float[Tensor, " b"]
    """The level's own log-SNR."""


def precondition(octaves: Octaves, level: int, log_snr: Float[Tensor, " b"]) -> Preconditioning:
    """Factors of `level` for y = u_t / sqrt(abar) at the process's log-SNR."""
    c_in, c_skip, c_out, own = preconditioning_factors(*octaves.variances(level), log_snr)
    shape = (-1, 1, 1, 1)
    return Preconditioning(c_in.view(shape), c_skip.view(shape), c_out.view(shape), own)


def preconditioning_factors(
    signal: float | Float[Tensor, "*#b"],
    noise: float | Float[Tensor, "*#b"],
    log_snr: Float[Tensor, "*#b"],
) -> tuple[Float[Tensor, "*#b"], Float[Tensor, "*#b"], Float[Tensor, "*#b"], Float[Tensor, "*#b"]]:
    """c_in, c_skip and c_out for variances S of the signal and n of the noise, and their log-SNR,
    lambda + ln(S / n).
    """
    total_noise = noise * torch.exp(-log_snr)
    total = signal + total_noise
    c_out = (signal * total_noise / total).sqrt()
    return total.rsqrt(), signal / total, c_out, torch.log(signal / total_noise)
