"""The variance of the noise in every octave of the Haar basis: white, with a floor, or mollified.

See `noise` and `mollify` for the fields that have it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from model.mollifier import gaussian_taps


@dataclass(frozen=True)
class NoiseSpectrum:
    """Variance of the noise in every octave of the Haar basis.

    top_level: level whose cells start the recursion; at least the level of the training region.
    coarse_level: the noise inside cells of this level is white.
    floor: f, the least variance that an octave from coarse_level up adds; 0 is white noise.
    mollifier_sigma_px: deviation of the Gaussian that smooths white noise, which is not
        renormalised; 0 for none.
    """

    top_level: int = 12
    coarse_level: int = 5
    floor: float = 0.005
    mollifier_sigma_px: float = 0.0

    def __post_init__(self) -> None:
        if self.floor and self.mollifier_sigma_px:
            raise ValueError(
                f"mollified noise is made of white noise, but a floor of {self.floor:g} was asked "
                "for; set one of the two to 0"
            )

    def innovation(self, level: int) -> float:
        """e_j, not normalised; at the top level the variance of the means there."""
        share = 1.0 if level == self.top_level else 0.75
        return max(share * 4.0**-level, self.floor)

    @property
    def scale(self) -> float:
        """The factor that gives the pixel unit variance; 1 where it is not asked to have that."""
        if self.mollifier_sigma_px:
            return 1.0
        return 1.0 / math.sqrt(_raw_mean_variance(self, 0))

    def mean_variance(self, level: int) -> float:
        """Variance of the mean over a cell of `level`, averaged over places."""
        return _raw_mean_variance(self, level) * self.scale**2

    def detail_variance(self, level: int) -> float:
        """Variance of (cell of `level` - its parent), averaged over places."""
        return self.mean_variance(level) - self.mean_variance(level + 1)


@lru_cache(maxsize=1024)
def _raw_mean_variance(spectrum: NoiseSpectrum, level: int) -> float:
    """The mean's variance before normalisation.

    Mollified, the mean over m pixels has in one dimension the variance sum_d c(d) (1 - |d| / m)+
    / m, c the autocorrelation of the taps.

    An innovation at level j reaches the coarse lattice as the product of two copies of the kernel
    k = S^(j - coarse) delta. Its mean over blocks of m cells has, in one dimension and averaged
    over the period p of places, the variance (min(m, p) / p) sum_n (mean of k over block n)^2.
    """
    coarse = spectrum.coarse_level
    if spectrum.mollifier_sigma_px:
        taps, pixels = gaussian_taps(spectrum.mollifier_sigma_px), 1 << level
        lags = np.abs(np.arange(-len(taps) + 1, len(taps)))
        overlap = np.maximum(1 - lags / pixels, 0) / pixels
        return float((np.convolve(taps, taps) * overlap).sum() ** 2)
    if spectrum.floor == 0.0:
        return 4.0**-level
    if level < coarse:
        return 4.0**-level - 4.0**-coarse + _raw_mean_variance(spectrum, coarse)
    total, kernel = 0.0, np.ones(1)
    block = 1 << (level - coarse)
    for j in range(coarse, spectrum.top_level + 1):
        period = 1 << (j - coarse)
        step = min(block, period)
        means = np.convolve(kernel, np.full(block, 1.0 / block))
        first = (block + period - 2) % step  # the kernel begins period - 1 cells before its origin
        one = float(np.square(means[first::step]).sum()) * step / period
        total += spectrum.innovation(j) * one**2
        doubled = np.zeros(2 * len(kernel) - 1)
        doubled[::2] = kernel
        kernel = np.convolve(doubled, [0.25, 0.75, 0.75, 0.25])
    return total
