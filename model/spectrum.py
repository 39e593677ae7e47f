"""The variance of the noise in every octave of the Haar basis: white or mollified.

See `noise` and `mollify` for the fields that have it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from model.mollifier import gaussian_taps


@dataclass(frozen=True)
class NoiseSpectrum:
    """Variance of the noise in every octave of the Haar basis.

    top_level: level whose cells start the recursion; at least the level of the training region.
    mollifier_sigma_px: deviation of the Gaussian that smooths white noise, which is not
        renormalised; 0 for none.
    """

    top_level: int = 12
    mollifier_sigma_px: float = 0.0

    def mean_variance(self, level: int) -> float:
        """Variance of the mean over a cell of `level`, averaged over places: 4^-level of white
        noise.
        """
        if self.mollifier_sigma_px:
            return _mollified_mean_variance(self.mollifier_sigma_px, level)
        return 4.0**-level

    def detail_variance(self, level: int) -> float:
        """Variance of (cell of `level` - its parent), averaged over places: 3/4 4^-level of white
        noise.
        """
        return self.mean_variance(level) - self.mean_variance(level + 1)


@lru_cache(maxsize=1024)
def _mollified_mean_variance(sigma_px: float, level: int) -> float:
    """In one dimension the mean over m pixels has the variance sum_d c(d) (1 - |d| / m)+ / m, c
    the autocorrelation of the taps.
    """
    taps, pixels = gaussian_taps(sigma_px), 1 << level
    lags = np.abs(np.arange(-len(taps) + 1, len(taps)))
    overlap = np.maximum(1 - lags / pixels, 0) / pixels
    return float((np.convolve(taps, taps) * overlap).sum() ** 2)
