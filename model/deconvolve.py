"""The approximate inverse of the mollifier, tile by tile (∞-Diff, Eq. 16).

What is painted by a mollified process is A u_0. Its Wiener inverse has at every frequency the gain

    g = k / (k^2 + eps^2),    k = the spectrum of the mollifier's taps,

so that of u_0 k g = k^2 / (k^2 + eps^2) is left: a half where k = eps. With sigma = 1 px and eps =
0.05 that is at 0.78 of Nyquist, where the gain is largest, 1 / (2 eps) = 10. eps = 0.001 passes
nearly all even at Nyquist, with gains up to 500 for whatever is not of u_0.

The papers divide spectra of the whole image. Here g is a finite filter, so that a tile needs only
a halo. Its impulse response falls exponentially; it is cut where no frequency's gain is wrong by
more than `tolerance`, and written as a short sum of products of one-dimensional filters. Sums are
taken in one order, so that tiles agree bit for bit. An image is continued by its mirror image, as
the mollifier did.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.generate import Field
from model.lattice import Box, tiles
from model.mollifier import gaussian_taps
from model.mollify import weigh

_LARGEST_GRID = 1024


@dataclass(frozen=True)
class WienerInverse:
    """g as a finite filter.

    sigma_px: of the mollifier, in pixels of the image (at scale r, r times the training's). eps:
    see above. tolerance: the largest error of a gain.
    """

    sigma_px: float
    eps: float = 0.05
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not self.eps > 0 or not self.tolerance > 0:
            raise ValueError(
                f"a Wiener inverse needs eps and tolerance above 0, but got {self.eps:g} and "
                f"{self.tolerance:g}"
            )
        _separable(self.sigma_px, self.eps, self.tolerance)

    @property
    def terms(self) -> tuple[tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]], ...]:
        """Pairs of filters (down, across) whose products sum to the impulse response."""
        return _separable(self.sigma_px, self.eps, self.tolerance)

    @property
    def halo(self) -> int:
        """Pixels beyond a place that its value depends on."""
        return len(self.terms[0][0]) // 2

    def __call__(self, values: Float[Tensor, "c h w"]) -> Float[Tensor, "c h2 w2"]:
        """The inverse at the pixels that have a halo around them."""
        length = 2 * self.halo + 1
        if min(values.shape[-2:]) < length:
            raise ValueError(
                f"{values.shape[-2]}x{values.shape[-1]} pixels are too few for a halo of "
                f"{self.halo} around each"
            )
        total = torch.zeros_like(values[:, length - 1 :, length - 1 :])
        for down, across in self.terms:
            rows = weigh(down.tolist(), values.unfold(1, length, 1).movedim(-1, 0))
            total = total + weigh(across.tolist(), rows.unfold(2, length, 1).movedim(-1, 0))
        return total


def wiener_gain(sigma_px: float, eps: float, size: int) -> Float[np.ndarray, "n n"]:
    """g at the frequencies of a discrete Fourier transform of size x size pixels."""
    taps = gaussian_taps(sigma_px)
    places = np.arange(len(taps)) - len(taps) // 2
    spectrum = np.cos(2 * np.pi * np.fft.fftfreq(size)[:, None] * places) @ taps
    both = spectrum[:, None] * spectrum
    return np.asarray(both / (both**2 + eps**2))


@lru_cache(maxsize=32)
def _separable(
    sigma_px: float, eps: float, tolerance: float
) -> tuple[tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]], ...]:
    size = 128
    while size <= _LARGEST_GRID:
        gain = wiener_gain(sigma_px, eps, size)
        response = np.fft.fftshift(np.fft.ifft2(gain).real)
        middle = size // 2
        distance = np.abs(np.arange(size) - middle)
        rings = np.bincount(np.maximum.outer(distance, distance).ravel(), np.abs(response).ravel())
        cut = rings[::-1].cumsum()[::-1]  # what is lost from this distance on
        halo = int(np.argmax(cut <= tolerance / 2)) - 1
        # Beyond a quarter of the grid the response would fold back upon itself.
        if 0 <= halo < size // 4:
            inside = slice(middle - halo, middle + halo + 1)
            return _factored(response[inside, inside], gain, tolerance)
        size *= 2
    raise ValueError(
        f"the Wiener inverse of sigma {sigma_px:g} px with eps {eps:g} reaches further than "
        f"{_LARGEST_GRID // 4} px at a tolerance of {tolerance:g}; a larger eps or tolerance "
        "reaches less far"
    )


def _factored(
    response: Float[np.ndarray, "k k"], gain: Float[np.ndarray, "n n"], tolerance: float
) -> tuple[tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]], ...]:
    """The fewest singular vectors that keep the tolerance."""
    left, values, right = np.linalg.svd(response)
    for rank in range(1, len(values) + 1):
        found = (left[:, :rank] * values[:rank]) @ right[:rank]
        if _error(found, gain) <= tolerance:
            break
    return tuple((left[:, i] * values[i], right[i]) for i in range(rank))


def _error(response: Float[np.ndarray, "k k"], gain: Float[np.ndarray, "n n"]) -> float:
    """Largest error of the gain over all frequencies."""
    size, halo = len(gain), len(response) // 2
    padded = np.zeros_like(gain)
    places = np.arange(-halo, halo + 1) % size
    padded[np.ix_(places, places)] = response
    return float(np.abs(np.fft.fft2(padded) - gain).max())


def deconvolve(
    source: Field, target: Field, inverse: WienerInverse, *, level: int = 0, tile: int = 512
) -> None:
    """Write the inverse of all of `source`, continued by its mirror image, to `target`."""
    _, height, width = source.shape
    for box in tiles(height, width, tile, level=level):
        values = _mirrored(source, box.grow(inverse.halo))
        target.write(box, inverse(values.double()).to(values.dtype))


def _mirrored(field: Field, box: Box) -> Float[Tensor, "c h w"]:
    """Values of a box that may stick out of the field."""
    _, height, width = field.shape
    ys, xs = _mirror(box.y, box.height, height), _mirror(box.x, box.width, width)
    first_y, first_x = int(ys.min()), int(xs.min())
    there = Box(
        box.level, first_y, first_x, int(ys.max()) + 1 - first_y, int(xs.max()) + 1 - first_x
    )
    return field.read(there)[:, ys - first_y][:, :, xs - first_x]


def _mirror(first: int, count: int, extent: int) -> Int64[Tensor, " n"]:
    """Where the values of a mirrored axis are: d c b a | a b c d | d c b a."""
    place = torch.arange(first, first + count) % (2 * extent)
    return torch.minimum(place, 2 * extent - 1 - place)
