"""Laws of outlines: valid polygons that say what the mask says, in pixels of the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rasterio import Affine
from shapely.geometry import shape
from test_ingest import draw_slide, ingest, write_slide

from pipeline.outline import tissue_features
from pipeline.store import Store

MASKS = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@settings(max_examples=80)
@given(MASKS, st.integers(0, 15), st.integers(0, 15), st.sampled_from([1.0, 2.0, 1.25]))
def test_polygons_are_valid_and_their_area_is_that_of_the_mask(
    mask: np.ndarray, less_y: int, less_x: int, scale: float
) -> None:
    """Also where the last cells reach beyond the image, holes and pieces that touch included."""
    height, width = 16 * mask.shape[0] - less_y, 16 * mask.shape[1] - less_x
    features = list(tissue_features(mask, height, width, scale, (40.0, 7.0)))
    polygons = [shape(feature["geometry"]) for feature in features]
    assert all(polygon.is_valid for polygon in polygons)
    for feature in features:
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
    pixels = mask.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    assert sum(p.area for p in polygons) == pytest.approx(pixels.sum() * scale**2)
    whole = shapely.union_all(polygons)
    assert whole.area == pytest.approx(sum(p.area for p in polygons))
    if not mask.any():
        return
    # (x, y) of the file back to pixels of the image, and these to a mask again
    back = Affine(scale, 0, 7.0, 0, scale, 40.0)
    drawn = rasterio.features.rasterize(polygons, (height, width), transform=back)
    assert np.array_equal(drawn > 0, pixels)


def test_a_slides_outlines_are_annotations_in_its_own_pixels(tmp_path: Path) -> None:
    """At twice the pixel of the file; QuPath's keys, one feature a piece of tissue."""
    slide, out = write_slide(tmp_path / "s.tif", draw_slide(1500, 1234), 0.25), tmp_path / "o.zarr"
    arguments = (slide, "--out", out, "--mpp", "0.5", "--region", "auto", "--cluster", "inline")
    assert ingest(*arguments) == 0
    store = Store.open(out)
    (name,) = store.image_ids()
    content: dict[str, Any] = json.loads(store.outline_path(name).read_text())
    assert content["type"] == "FeatureCollection" and content["features"]
    polygons = []
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
        polygons.append(shape(feature["geometry"]))
    mask = store.mask(name, 0, 0, 750, 617)
    assert sum(p.area for p in polygons) == pytest.approx(mask.sum() * 4)
    centre = shapely.Point(0.45 * 1234, 0.45 * 1500)
    assert sum(p.contains(centre) for p in polygons) == 1


def test_an_empty_mask_is_an_empty_collection(tmp_path: Path) -> None:
    glass = np.full((600, 600, 3), 243, np.uint8)
    out = tmp_path / "o.zarr"
    slide = write_slide(tmp_path / "glass.tif", glass)
    ingest(slide, "--out", out, "--region", "auto", "--cluster", "inline")
    (name,) = Store.open(out).image_states()
    content = json.loads(Store.open(out).outline_path(name).read_text())
    assert content == {"type": "FeatureCollection", "features": []}
