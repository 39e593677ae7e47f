"""The variance of the noise in every octave of the Haar basis: white, or with a floor.

See `noise` for the field that has it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class NoiseSpectrum:
    """Variance of the noise in every octave of the Haar basis.

    top_level: level whose cells start the recursion; at least the level of the training region.
    coarse_level: the noise inside cells of this level is white.
    floor: f, the least variance that an octave from coarse_level up adds; 0 is white noise.
    """

    top_level: int = 12
    coarse_level: int = 5
    floor: float = 0.005

    def innovation(self, level: int) -> float:
        """e_j, not normalised; at the top level the variance of the means there."""
        share = 1.0 if level == self.top_level else 0.75
        return max(share * 4.0**-level, self.floor)

    @property
    def scale(self) -> float:
        """The factor that gives the pixel unit variance."""
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

    An innovation at level j reaches the coarse lattice as the product of two copies of the kernel
    k = S^(j - coarse) delta. Its mean over blocks of m cells has, in one dimension and averaged
    over the period p of places, the variance (min(m, p) / p) sum_n (mean of k over block n)^2.
    """
    coarse = spectrum.coarse_level
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
