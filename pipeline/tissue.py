"""What is worth learning from in a slide: where there is tissue.

Stain is coloured and glass is not, so the saturation of the picture, at cells of 16 px and
smoothed over their neighbours, splits in two, and Otsu's threshold finds where. Otsu always
splits, also a picture of nothing but glass or nothing but tissue; so the threshold is held between
a floor that glass does not reach and a ceiling that pale stroma passes. Near-black cells have no
colour to speak of and count as not saturated. Specks are dropped, and small holes (lumens, fat)
belong to the tissue around them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, UInt
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

MIN_SATURATION = 0.04
MAX_SATURATION = 0.08
SMOOTHING_CELLS = 1.0
BLACK = 0.08
SPECK_CELLS = 16
HOLE_CELLS = 64
ROWS_AT_ONCE = 1024


def saturation(picture: UInt[np.ndarray, "3 h w"]) -> Float32[np.ndarray, "h w"]:
    """1 - min / max of the three colours, in [0, 1]; 0 where the picture is nearly black."""
    full = np.float32(np.iinfo(picture.dtype).max)
    brightest = picture.max(axis=0).astype(np.float32)
    darkest = picture.min(axis=0).astype(np.float32)
    colour = np.zeros_like(brightest)
    np.divide(brightest - darkest, brightest, out=colour, where=brightest > BLACK * full)
    return colour


def tissue_mask(picture: UInt[np.ndarray, "3 h w"]) -> Bool[np.ndarray, "h w"]:
    """Where `picture`, one pixel per cell, shows tissue."""
    height, width = picture.shape[1:]
    colour = np.empty((height, width), np.float32)
    for top in range(0, height, ROWS_AT_ONCE):
        colour[top : top + ROWS_AT_ONCE] = saturation(picture[:, top : top + ROWS_AT_ONCE])
    colour = gaussian(colour, SMOOTHING_CELLS, mode="nearest", preserve_range=True)
    threshold = np.clip(_otsu(colour), MIN_SATURATION, MAX_SATURATION)
    mask = remove_small_objects(colour > threshold, max_size=SPECK_CELLS)
    return remove_small_holes(mask, max_size=HOLE_CELLS)


def _otsu(colour: Float32[np.ndarray, "h w"]) -> float:
    return float(threshold_otsu(colour)) if colour.min() < colour.max() else MIN_SATURATION
