"""Octaves of the Haar basis: area means, details, and what parents predict of their children.

The values of a level are their parents' means plus *details* whose mean over the four siblings is
zero. n levels below some parents, a field has n octaves of details, which are orthogonal. Tensors
are (b, c, h, w); a cell's 2^n x 2^n descendants lie in one square, and sides are multiples of it.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def up(parents: Float[Tensor, "b c h w"], n: int) -> Float[Tensor, "b c h2 w2"]:
    """Each parent's value at its 4^n descendants, n levels below."""
    return parents.repeat_interleave(1 << n, dim=2).repeat_interleave(1 << n, dim=3)


def means(values: Float[Tensor, "b c h2 w2"], n: int) -> Float[Tensor, "b c h w"]:
    """Area means over squares of 2^n cells a side."""
    for _ in range(n):
        # Four times as fast on a CPU as pooling.
        rows = values[..., ::2, :] + values[..., 1::2, :]
        values = (rows[..., ::2] + rows[..., 1::2]) * 0.25
    return values


def zero_mean(values: Float[Tensor, "b c h w"], n: int) -> Float[Tensor, "b c h w"]:
    """What is left without the means over squares of 2^n cells a side: n octaves of details."""
    return values - up(means(values, n), n)


def pyramid(values: Float[Tensor, "b c h w"], n: int) -> list[Float[Tensor, "b c _ _"]]:
    """The n octaves below squares of 2^n cells a side, fine to coarse, octave l on cells of 2^l a
    side; then the means over the squares.
    """
    found = []
    for _ in range(n):
        coarser = means(values, 1)
        found.append(values - up(coarser, 1))
        values = coarser
    return [*found, values]


def composed(octaves: Sequence[Float[Tensor, "b c _ _"]]) -> Float[Tensor, "b c h w"]:
    """The values whose pyramid this is."""
    *finer, values = octaves
    for octave in reversed(finer):
        values = octave + up(values, 1)
    return values


def details(values: Float[Tensor, "b c h w"], n: int) -> list[Float[Tensor, "b c h w"]]:
    """The n octaves below squares of 2^n cells a side, each on the values' own cells, coarse to
    fine; their sum is `zero_mean`.
    """
    return [up(octave, level) for level, octave in enumerate(pyramid(values, n)[:-1])][::-1]


INTERPOLATION_MARGIN = 2
"""Parents that `predicted` needs on every side."""


def predicted(
    parents: Float[Tensor, "b c hp wp"], n: int, margin: int
) -> Float[Tensor, "b c h2 w2"]:
    """The details that a smooth image would have n levels below these parents: their bicubic
    interpolation (Catmull-Rom, exact on linear images) without its means over each parent.

    Args:
        parents: values with `margin` more of them on every side, `INTERPOLATION_MARGIN` or more.

    Returns:
        Of the inner parents' descendants.
    """
    more = margin - INTERPOLATION_MARGIN
    h, w = parents.shape[2:]
    near = parents[..., more : h - more, more : w - more]
    # Without antialiasing torch takes another cubic, which is not exact on linear images.
    smooth = F.interpolate(near, scale_factor=1 << n, mode="bicubic", antialias=True)
    rim = INTERPOLATION_MARGIN << n
    return zero_mean(smooth[..., rim : smooth.shape[2] - rim, rim : smooth.shape[3] - rim], n)
