"""Pictures of images for the eye: parts of them as 8-bit RGB, and where there is most to see."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jobs.preview import to_uint8
from jobs.run import RunConfig
from pipeline.ome import OmeImage


def liveliest(image: OmeImage, y: int, x: int, side: int, crop: int) -> tuple[int, int]:
    """Where, on a grid over a region, a square of `crop` px varies most: (y, x) in the region."""
    best = (-1.0, 0, 0)
    for dy in range(0, side - crop + 1, crop):
        for dx in range(0, side - crop + 1, crop):
            level = min(2, image.num_levels - 1)
            extent = max(crop >> level, 1)
            pixels = image.read((y + dy) >> level, (x + dx) >> level, extent, extent, level)
            best = max(best, (float(pixels.std()), dy, dx))
    return best[1:]


def as_rgb(
    image: OmeImage, y: int, x: int, height: int, width: int, config: RunConfig, level: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """A box of a level of an image, pixel for pixel."""
    pixels = image.read(y, x, height, width, level)
    return to_uint8(pixels.transpose(1, 2, 0).astype(np.float32), config)


def reduced(
    image: OmeImage, y: int, x: int, height: int, width: int, config: RunConfig, longest: int
) -> UInt8[np.ndarray, "h w 3"]:
    """A box of an image whose longer side is shown by `longest` px, from the nearest finer
    level.
    """
    level = 0
    while level + 1 < image.num_levels and max(height, width) >> (level + 1) >= longest:
        level += 1
    rows, columns = max(height >> level, 1), max(width >> level, 1)
    pixels = as_rgb(image, y >> level, x >> level, rows, columns, config, level)
    shown_height, shown_width = (
        max(n * longest // max(height, width), 1) for n in (height, width)
    )
    return np.asarray(Image.fromarray(pixels).resize((shown_width, shown_height)))
