"""Where a pixel of the store lies in the file that it came from, and on the ground.

Pixel (y, x) of level 0 of an image covers [y, y + 1) × [x, x + 1); in the file's level-0 pixels
that is the square of side `source:scale` at `slide:origin` (y, x; where the scanned part of a
slide begins) plus the scale times (y, x). The scale is what was really resampled by, which may
differ a little from the ratio of the two spacings: within a tenth of a per cent pixels are taken
as they are, and 100,000 of them would add up to 100. A georeference (a, b, c, d, e, f) takes
(x, y) to (a x + b y + c, d x + e y + f).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALE, ORIGIN, TRANSFORM = "source:scale", "slide:origin", "spatial:transform"


def place_attributes(attributes: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The attributes of a reader, as those of an image whose pixels are `scale` of the file's."""
    placed = {**attributes, SCALE: scale}
    if TRANSFORM in attributes:
        a, b, c, d, e, f = attributes[TRANSFORM]
        placed[TRANSFORM] = [a * scale, b * scale, c, d * scale, e * scale, f]
    return placed


def to_source(
    attributes: Mapping[str, Any], y: float | int, x: float | int
) -> tuple[float, float]:
    """The point of the file, in its level-0 pixels, that is (y, x) in those of an image with
    `attributes`.
    """
    top, left = attributes.get(ORIGIN, (0, 0))
    return top + attributes[SCALE] * y, left + attributes[SCALE] * x


def to_world(attributes: Mapping[str, Any], y: float | int, x: float | int) -> tuple[float, float]:
    """The (y, x) in its coordinate system of a point (y, x) of a georeferenced image."""
    a, b, c, d, e, f = attributes[TRANSFORM]
    return d * x + e * y + f, a * x + b * y + c
