"""The papers' smoothing operator A: a truncated Gaussian over pixels, and what undoes it.

A u = k * u with k the Gaussian of deviation sigma, cut off beyond 3 sigma and summing to one. Data
are smoothed when they are packed, since a pixel's neighbours are needed; noise is smoothed where
it is evaluated (`mollified`), by the same taps, so that both have the same spectrum and the
signal-to-noise ratio of no frequency changes.

Deconvolution is Wiener's filter k^ / (k^^2 + eps^2), as a finite filter: at sigma = 1 px and eps =
0.05 it passes half of the amplitude at 0.78 of Nyquist. Its taps fall off geometrically; cut off
after `INVERSE_REACH` deviations they are within 1e-3 of the filter at every frequency, and a tile
needs that halo and no more.

Nothing here needs torch, so that packing uses it on machines without it.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.ndimage import correlate1d

REACH = 3.0
INVERSE_REACH = 20.0
WIENER_EPSILON = 0.05


def gaussian_taps(sigma_px: float) -> Float64[np.ndarray, " k"]:
    """k in one dimension, an odd number of taps; a single one where sigma is 0."""
    if sigma_px < 0 or not math.isfinite(sigma_px):
        raise ValueError(f"a mollifier's sigma is a number of pixels from 0 on, not {sigma_px}")
    radius = math.ceil(REACH * sigma_px)
    if radius == 0:
        return np.ones(1)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_px) ** 2)
    return taps / taps.sum()


def mollify(
    pixels: Float[np.ndarray, "h w c"],
    sigma_px: float,
    valid: Bool[np.ndarray, "h w"] | None = None,
) -> Float[np.ndarray, "h w c"]:
    """A u of an image that is reflected at its borders.

    valid: which pixels count; the mean is over those within reach, and what is not valid stays as
    it is.
    """
    taps = gaussian_taps(sigma_px)
    if valid is None or valid.all():
        return _smooth(pixels, taps)
    mask = valid[..., None].astype(pixels.dtype)
    weight = _smooth(mask, taps)
    smooth = _smooth(pixels * mask, taps) / np.where(mask > 0, weight, 1)
    return np.where(mask > 0, smooth, pixels)


def inverse_taps(sigma_px: float, epsilon: float = WIENER_EPSILON) -> Float64[np.ndarray, "k k"]:
    """The finite Wiener filter of the mollifier; its rim is the halo that a tile needs.

    The filter is not a product of two of one dimension. Its taps are those of a torus so large
    that what wraps around is rounding, cut off, and normalised to keep constants as they are kept
    by the filter, 1 / (1 + eps^2).
    """
    if sigma_px == 0:
        return np.full((1, 1), 1 / (1 + epsilon**2))
    radius = math.ceil(INVERSE_REACH * sigma_px)
    size = 8 * radius
    taps = gaussian_taps(sigma_px)
    line = np.zeros(size)
    line[np.arange(len(taps)) - len(taps) // 2] = taps
    response = np.fft.fft(line).real
    response = response[:, None] * response[None, :]
    filter_ = np.fft.ifft2(response / (response**2 + epsilon**2)).real
    near = np.arange(-radius, radius + 1)
    kept = filter_[np.ix_(near, near)]
    return kept / kept.sum() / (1 + epsilon**2)


def _smooth(values: Float[np.ndarray, "h w c"], taps: Float64[np.ndarray, " k"]) -> np.ndarray:
    for axis in (0, 1):
        values = correlate1d(values, taps, axis=axis, mode="reflect")
    return values
