"""How a convolution is normalised where taps are absent.

With w_t the weight of tap t, k x k taps, v_i the value of a point and n_i the number of its
neighbours that are present (without itself):

    ratio     out_i = g_i sum_{present t} w_t v_t,                                 (the papers)
              g_i = k^2 / (n_i + 1)
    stable    out_i = (sum_t w_t) v_i + g_i sum_{present t != centre} w_t (v_t - v_i),   (ours)
              g_i = (k^2 - 1 + kappa) / (n_i + kappa),   kappa = 8

Both equal the convolution where no tap is absent. `ratio` estimates the convolution by the mean
over the taps present: a lone point is multiplied by k^2 times its centre weight, 49 for k = 7.
`stable` starts from what a constant would give, which is exact on constants whatever is present,
and corrects it by the differences seen; kappa shrinks the correction where they are few.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Normalisation = Literal["ratio", "stable"]

KAPPA = 8.0


def fraction(kernel: int, normalisation: Normalisation) -> tuple[float, float]:
    """(numerator, offset) of the gain, numerator / (n_i + offset)."""
    if normalisation == "ratio":
        return float(kernel**2), 1.0
    return kernel**2 - 1 + KAPPA, KAPPA


def gain(
    counts: Int64[Tensor, "*n"], kernel: int, normalisation: Normalisation, dtype: torch.dtype
) -> Float[Tensor, "*n"]:
    """What the sum over present taps is multiplied by, from the number of neighbours without the
    centre.
    """
    numerator, offset = fraction(kernel, normalisation)
    return numerator / (counts.to(dtype) + offset)
