"""Whether the coarser levels of a file are averages of its finest or every so many pixels of it.

Converters differ, and a file does not say it: bioformats2raw, for one, picks pixels by default.
What is picked shows detail that is not there (aliasing), so such levels are not used. A look at
the first coarser level decides for all: at up to nine places, the first with enough texture, the
level is compared with the area means of level 0 and with its pixels at the corners of their
squares, in brightness, since JPEG keeps colour coarsely. A file without texture, or damaged at all
these places, is believed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt

PATCH_PX = 24
MAX_FINE_PX = 1024
PLACES = (0.5, 0.25, 0.75)
LEAST_TEXTURE = 0.01  # of the type's range, between what is picked and what is averaged
CLEARLY = 0.5

Read = Callable[[int, int, int, int, int], UInt[np.ndarray, "c h w"]]


def is_picked(
    read: Read,
    level_shape: tuple[int, int],
    step: int,
    errors: type[Exception] | tuple[type[Exception], ...],
) -> bool:
    """Whether level 1, `step` times coarser than level 0 and of `level_shape`, was picked.

    `read` reads (y, x, height, width, level); where it raises one of `errors`, another place
    decides.
    """
    most = max(1, min(PATCH_PX, MAX_FINE_PX // step))
    height, width = (min(most, side) for side in level_shape)
    for down, across in itertools.product(PLACES, repeat=2):
        y, x = int((level_shape[0] - height) * down), int((level_shape[1] - width) * across)
        try:
            coarse = read(y, x, height, width, 1)
            fine = read(y * step, x * step, height * step, width * step, 0)
        except errors:
            continue
        full = np.iinfo(fine.dtype).max
        coarse, cells = (pixels.mean(axis=0) for pixels in (coarse, fine))
        cells = cells.reshape(height, step, width, step)
        mean, corner = cells.mean(axis=(1, 3)), cells[:, 0, :, 0]
        if _rms(mean - corner) >= LEAST_TEXTURE * full:
            return _rms(coarse - corner) < CLEARLY * _rms(coarse - mean)
    return False


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
