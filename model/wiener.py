"""The linear estimate of the lattice: a Wiener filter over all of its octaves at once.

The lattice's values mix octaves of very different signal-to-noise ratio: an image's power falls
with frequency, so that its layout stands above the noise long before its finest cells do. With one
gain for all, the network itself would have to learn to blur. In the cosine basis (DCT-II: no jump
at the rim) the best linear estimate is one gain a mode,

    mode of x0_hat = sigmoid(lambda + ln(S / N)) x mode of y,

S and N the signal's and the noise's variance in the mode's octave. The octave of the mode (ky, kx)
of an image of h x w cells is that of its larger frequency, max(ky / h, kx / w). Between the
middles of octaves ln(S / N) is interpolated; beyond the first and the last it is constant.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from model.process import Octaves


def cosine_basis(size: int, like: Tensor) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II: row k is sqrt(2 / n) cos(pi k (i + 1/2) / n), halved in power at
    k = 0.
    """
    k = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2.0 / size)
    rows[0] *= math.sqrt(0.5)
    return rows.to(like)


def mode_offsets(octaves: Octaves, level: int, height: int, width: int) -> Float[Tensor, "h w"]:
    """ln(S / N) of every mode of a lattice of height x width cells of `level`."""
    levels = range(level, octaves.noise.top_level + 1)
    offsets = torch.tensor([octaves.offset(level) for level in levels], dtype=torch.float64)
    ky = torch.arange(height, dtype=torch.float64) / height
    kx = torch.arange(width, dtype=torch.float64) / width
    frequency = torch.maximum(ky[:, None], kx[None, :]).clamp(min=2.0 ** -len(offsets))
    # The octave of level + j holds the frequencies 2^-(j + 1) to 2^-j of Nyquist.
    place = (-torch.log2(frequency) - 0.5).clamp(0, len(offsets) - 1)
    below = place.floor().long().clamp(max=max(len(offsets) - 2, 0))
    above = (below + 1).clamp(max=len(offsets) - 1)
    return torch.lerp(offsets[below], offsets[above], place - below)


def wiener(
    octaves: Octaves, level: int, observed: Float[Tensor, "b h w c"], log_snr: Float[Tensor, " b"]
) -> Float[Tensor, "b h w c"]:
    """The linear estimate of u_0 on the lattice of `level` from y = u_t / sqrt(abar), zero where
    absent.
    """
    _, height, width, _ = observed.shape
    rows, columns = cosine_basis(height, observed), cosine_basis(width, observed)
    offsets = mode_offsets(octaves, level, height, width).to(observed)
    gains = torch.sigmoid(log_snr[:, None, None] + offsets)[..., None]
    modes = torch.einsum("ki,bijc,lj->bklc", rows, observed, columns)
    return torch.einsum("ki,bklc,lj->bijc", rows, gains * modes, columns)
