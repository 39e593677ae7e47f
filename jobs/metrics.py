"""Numbers that say how good painted images are.

Here so far: whether an image follows its condition. Both are reduced to a thumbnail, where only
the layout is left, and compared with every region of the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from skimage.transform import resize

from pipeline.ome import OmeImage
from pipeline.store import Region, Store

THUMBNAIL_PX = 64


@dataclass(frozen=True)
class LayoutMatch:
    """Root mean square distances, in pixel values, between thumbnails.

    own: to the region that conditioned the image. nearest_other: the least to any other region,
    and that region's number.
    """

    own: float
    nearest_other: float
    nearest_other_region: int

    @property
    def follows(self) -> bool:
        """Whether the image is nearer to its own region than to every other."""
        return self.own < self.nearest_other


def thumbnail(image: OmeImage, y: int, x: int, side: int) -> Float[np.ndarray, "c 64 64"]:
    """A square of an image reduced to 64 x 64 area means, from the nearest finer level."""
    level = 0
    while level + 1 < image.num_levels and side >> (level + 1) >= 4 * THUMBNAIL_PX:
        level += 1
    _, height, width = image.level_shape(level)
    top, left = min(y >> level, height - 1), min(x >> level, width - 1)
    rows, columns = min(side >> level, height - top), min(side >> level, width - left)
    pixels = image.read(top, left, rows, columns, level).astype(np.float64)
    return np.stack(
        [
            resize(band, (THUMBNAIL_PX, THUMBNAIL_PX), order=1, anti_aliasing=True)
            for band in pixels
        ]
    )


def layout_match(
    painted: OmeImage, store: Store, own: Region, regions: Sequence[Region]
) -> LayoutMatch:
    """Compare a painted image with its own region and with every other of `regions`.

    An image larger than its region is compared by the square that the region conditioned, a
    smaller one with the same corner of every region.
    """
    side = min(own.side, *painted.shape[1:])
    generated = thumbnail(painted, 0, 0, side)
    distances = {}
    for region in regions:
        real = thumbnail(store.image(region.image), region.y, region.x, side)
        distances[region.index] = float(np.sqrt(np.square(generated - real).mean()))
    others = {k: d for k, d in distances.items() if k != own.index} or {own.index: float("inf")}
    nearest = min(others, key=lambda k: others[k])
    return LayoutMatch(distances[own.index], others[nearest], nearest)
