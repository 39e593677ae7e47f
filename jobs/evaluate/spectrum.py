"""What the pixels of crops say without a network: power per octave, and seams.

Both are sums over crops, which add up in any partition.

Octaves. In the Haar basis a crop is its mean plus details: octave k is what the area means over
cells of 2^k px have beyond the means over 2^(k+1) px. Their mean square is the power of that
octave; the sum over all octaves is the variance of the crop, exactly. White noise of variance v
has 3/4 v 4^-k. Blur takes power from the finest octaves.

Seams. A painting made in tiles or on a lattice of cells may step at their borders. The mean
absolute difference of neighbouring pixels is kept by the place of the border between them,
modulo 256 px; the mean at the multiples of a period over the mean elsewhere is 1 where nothing
happens. Real images have borders too: the 8 px blocks of a JPEG put 1.1 on all periods here, so
a painted number is to be read beside the real one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, UInt

CROP_PX = 256
OCTAVES = CROP_PX.bit_length() - 1
SEAM_PX = 32
PERIODS_PX = (8, SEAM_PX, 256)


@dataclass(frozen=True)
class Spectrum:
    """Sum over crops of the mean square of each octave's details, averaged over bands.

    Octave 0 is the finest.
    """

    crops: int
    power: Float64[np.ndarray, " octaves"]

    @classmethod
    def zero(cls) -> "Spectrum":
        return cls(0, np.zeros(OCTAVES))

    @classmethod
    def of(
        cls, crop: UInt[np.ndarray, "c 256 256"] | Float[np.ndarray, "c 256 256"]
    ) -> "Spectrum":
        means, power = crop.astype(np.float64), np.empty(OCTAVES)
        for octave in range(OCTAVES):
            c, side, _ = means.shape
            parents = means.reshape(c, side // 2, 2, side // 2, 2).mean(axis=(2, 4))
            # The details are orthogonal to their parents' means.
            power[octave] = np.square(means).mean() - np.square(parents).mean()
            means = parents
        return cls(1, power)

    def __add__(self, other: "Spectrum") -> "Spectrum":
        return Spectrum(self.crops + other.crops, self.power + other.power)

    def variances(self) -> Float64[np.ndarray, " octaves"]:
        """Mean square of the details of each octave."""
        return self.power / max(self.crops, 1)


@dataclass(frozen=True)
class Seams:
    """Sums and counts of |difference| of neighbouring pixels, by the border's place modulo 256."""

    total: Float64[np.ndarray, " 256"]
    count: Float64[np.ndarray, " 256"]

    @classmethod
    def zero(cls) -> "Seams":
        return cls(np.zeros(CROP_PX), np.zeros(CROP_PX))

    @classmethod
    def of(cls, pixels: UInt[np.ndarray, "c h w"]) -> "Seams":
        """Of a crop whose corner is at a multiple of 256 px; one row and column more than 256
        show the border to the next crop.
        """
        values = pixels.astype(np.float64)
        seams = cls.zero()
        for axis in (1, 2):
            steps = np.abs(np.diff(values, axis=axis)).mean(axis=0)
            along = steps.mean(axis=2 - axis)
            border = (np.arange(len(along)) + 1) % CROP_PX
            seams.total[border] += along
            seams.count[border] += 1
        return seams

    def __add__(self, other: "Seams") -> "Seams":
        return Seams(self.total + other.total, self.count + other.count)

    def contrast(self, period_px: int) -> float | None:
        """Mean step at multiples of the period over the mean step elsewhere; None where no border
        was seen, or nothing steps elsewhere.
        """
        at = np.arange(CROP_PX) % period_px == 0
        seen, elsewhere = self.count[at].sum(), self.total[~at].sum()
        if not seen or not elsewhere:
            return None
        return float(self.total[at].sum() / seen / (elsewhere / self.count[~at].sum()))
