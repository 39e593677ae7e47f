"""The outlines of a slide's tissue as GeoJSON, as QuPath opens it (File > Import objects, or drag
and drop).

A piece of tissue is a set of cells of 16 px that share sides; its polygon runs along their edges,
holes and all, so that polygons and mask say the same. Coordinates are (x, y) in full-resolution
pixels of the file, not of the store, counted from the corner that `origin_yx` names: where level
0 of the image that was read begins in the coordinates of whoever opens the outlines. It is (0, 0)
for every format in which the two agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import rasterio.features
from jaxtyping import Bool

from pipeline.regions import CELL_PX

COLOUR = (255, 230, 0)
DECIMALS = 2


def tissue_features(
    mask: Bool[np.ndarray, "gy gx"],
    height: int,
    width: int,
    scale: float,
    origin_yx: tuple[float, float] = (0.0, 0.0),
) -> Iterator[dict[str, Any]]:
    """A GeoJSON feature for every piece of tissue of an image of height × width px.

    `scale` is the side of a store pixel in pixels of the file.
    """
    pieces = rasterio.features.shapes(mask.astype(np.uint8), mask=mask, connectivity=4)
    last, corner = np.array([width, height]), np.array(origin_yx[::-1])
    for geometry, _ in pieces:
        rings = []
        for ring in geometry["coordinates"]:
            pixels = np.minimum(np.array(ring) * CELL_PX, last)
            rings.append(np.round(pixels * scale + corner, DECIMALS).tolist())
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Tissue", "color": list(COLOUR)},
            },
        }
