"""The mollifier A of the papers: a truncated Gaussian over pixels (numpy and scipy only).

Its taps are the one definition of A: data is mollified with them before it is packed, noise where
it is evaluated (`mollify`). They sum to one, so that A keeps means.
"""

import math

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

TRUNCATE = 4.0


def gaussian_taps(sigma_px: float) -> Float[np.ndarray, " k"]:
    """exp(-i^2 / (2 sigma^2)) at whole pixels |i| <= 4 sigma, rounded, over its sum; float64."""
    if not (math.isfinite(sigma_px) and sigma_px > 0):
        raise ValueError(f"a mollifier needs a sigma above 0 px, but got {sigma_px:g}")
    radius = int(TRUNCATE * sigma_px + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_px) ** 2)
    return np.asarray(taps / taps.sum())


def mollify(
    pixels: Float[np.ndarray, "h w c"],
    sigma_px: float,
    valid: Bool[np.ndarray, "rows columns"] | None = None,
) -> Float[np.ndarray, "h w c"]:
    """A u_0: the image and what lies beyond its borders, their mirror image (the border's pixel
    twice, so that constants and the mean are kept).

    Where pixels are not valid the weights of those that are sum to one again, A(u valid) /
    A(valid); what is not valid becomes 0.
    """
    taps = gaussian_taps(sigma_px)
    if valid is None:
        return _correlate(pixels, taps)
    if valid.shape != pixels.shape[:2]:
        raise ValueError(
            f"a mask of {valid.shape} does not fit an image of {pixels.shape[:2]} pixels"
        )
    mask = valid[..., None]
    # A product would let what is not finite through.
    weighted = _correlate(np.where(mask, pixels, 0).astype(pixels.dtype), taps)
    weight = _correlate(mask.astype(pixels.dtype), taps)
    out = np.zeros_like(weighted)
    return np.divide(weighted, weight, out=out, where=mask)


def _correlate(
    values: Float[np.ndarray, "h w c"], taps: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "h w c"]:
    for axis in (0, 1):
        values = scipy.ndimage.correlate1d(values, taps, axis=axis, mode="reflect")
    return values
