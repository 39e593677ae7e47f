"""Laws of bands: red, green, blue and near-infrared come first wherever the file has them, all
others after them; every number of bands, 8 and 16 bits, tiled as a COG or through a VRT, reaches
the store as it was.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio import Affine
from rasterio.enums import ColorInterp
from rasterio.shutil import copy
from test_ingest import ingest

from pipeline.readers import UnreadableError, open_reader
from pipeline.store import Store

R, G, B, A = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
N, U = ColorInterp.nir, ColorInterp.undefined


def write(path: Path, bands: int, dtype: str = "uint8", **says: Any) -> np.ndarray:
    """A GeoTIFF of noise, of which every pixel of every band holds data; its pixels."""
    rng = np.random.default_rng(bands)
    pixels = rng.integers(1, np.iinfo(dtype).max, (bands, 270, 300), dtype)
    profile: dict[str, Any] = {"count": bands, "height": 270, "width": 300, "dtype": dtype}
    profile |= {"crs": "EPSG:26911", "transform": Affine(0.6, 0, 4e5, 0, -0.6, 4e6)}
    with rasterio.open(path, "w", driver="GTiff", photometric="MINISBLACK", **profile) as data:
        data.write(pixels)
        if "meaning" in says:
            data.colorinterp = says["meaning"]
        for i, name in enumerate(says.get("names", ()), start=1):
            data.set_band_description(i, name)
    return pixels


@pytest.mark.parametrize(
    ("says", "order", "names"),
    [
        ({"meaning": [R, G, B]}, [0, 1, 2], "red green blue"),
        ({"meaning": [B, G, R]}, [2, 1, 0], "red green blue"),
        ({"meaning": [U, U, U]}, [0, 1, 2], "red green blue"),
        ({"meaning": [U, U, U, U]}, [0, 1, 2, 3], "red green blue nir"),
        ({"meaning": [R, G, B, A]}, [0, 1, 2, 3], "red green blue nir"),
        ({"meaning": [N, R, G, B]}, [1, 2, 3, 0], "red green blue nir"),
        ({"meaning": [U, B, G, R]}, [3, 2, 1, 0], "red green blue nir"),
        (
            {"meaning": [U] * 4, "names": ["NIR", "Red", "Green", "Blue"]},
            [1, 2, 3, 0],
            "red green blue nir",
        ),
        ({"meaning": [U] * 5}, [0, 1, 2, 3, 4], "band1 band2 band3 band4 band5"),
        ({"meaning": [R, G, B, U, N]}, [0, 1, 2, 4, 3], "red green blue nir band4"),
        (
            {"meaning": [U] * 6, "names": ["Blue", "Green", "Red", "Red Edge", "NIR", "SWIR 1"]},
            [2, 1, 0, 4, 3, 5],
            "red green blue nir red-edge swir-1",
        ),
        (
            {"meaning": [U] * 6, "names": ["a", "a", "", "x", "y", "z"]},
            [0, 1, 2, 3, 4, 5],
            "band1 band2 band3 band4 band5 band6",
        ),
    ],
)
def test_colours_come_first_and_no_band_is_lost(
    tmp_path: Path, says: dict[str, Any], order: list[int], names: str
) -> None:
    pixels = write(tmp_path / "a.tif", len(order), **says)
    with open_reader(tmp_path / "a.tif") as reader:
        assert " ".join(reader.bands) == names
        assert np.array_equal(reader.read(5, 7, 200, 100), pixels[order, 5:205, 7:107])


@pytest.mark.parametrize("bands", [1, 2, 17])
def test_too_few_and_too_many_are_refused(tmp_path: Path, bands: int) -> None:
    write(tmp_path / "a.tif", bands)
    with pytest.raises(UnreadableError, match=rf"has {bands} band\(s\) of colour"):
        open_reader(tmp_path / "a.tif")


@pytest.mark.parametrize("bands", [3, 4, 7])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("form", ["GTiff", "COG", "VRT"])
def test_every_form_reaches_the_store_as_it_was(
    tmp_path: Path, bands: int, dtype: str, form: str
) -> None:
    meaning = [R, G, B, *([U] * (bands - 3))]
    pixels = write(tmp_path / "plain.tif", bands, dtype, meaning=meaning)
    path = tmp_path / ("a.vrt" if form == "VRT" else "a.tif")
    options = {"BLOCKSIZE": 128} if form == "COG" else {}
    copy(tmp_path / "plain.tif", path, driver=form, **options)
    out = tmp_path / "o.zarr"
    assert ingest(path, "--out", out, "--region", 128, "--cluster", "inline") == 0
    store = Store.open(out)
    (name,) = store.image_ids()
    assert store.spec.dtype == dtype and len(store.spec.bands) == bands
    image = store.image(name)
    assert np.array_equal(image.read(0, 0, 270, 300), pixels)
    assert image.attributes["spatial:transform"] == [0.6, 0, 4e5, 0, -0.6, 4e6]
    assert image.attributes["proj:code"] == "EPSG:26911"
