"""What ingest writes opens elsewhere: images and masks of slides, aerial images and pictures are
OME-Zarr 0.5 by ome-zarr-models, and ome_zarr's own reader sees every level as we do.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05 import Image, Labels
from test_ingest import draw_slide, ingest, write_aerial, write_slide
from test_sources import write_faces

from pipeline.store import Store

reader = pytest.importorskip("ome_zarr.reader", reason="ome_zarr is not on this machine")
io = pytest.importorskip("ome_zarr.io", reason="ome_zarr is not on this machine")

UNITS = {"slide": "micrometer", "aerial": "meter", "picture": None}


def make(kind: str, folder: Path) -> tuple[Path, list[object]]:
    if kind == "slide":
        slide = write_slide(folder / "s.tif", draw_slide(700, 1100))
        return slide, ["--mpp", 1, "--region", 128]
    if kind == "aerial":
        pixels = np.random.default_rng(0).integers(1, 65535, (4, 1100, 700), np.uint16)
        return write_aerial(folder / "a.tif", pixels, 0.6), ["--region", 256]
    return write_faces(folder / "f", 2), ["--pixels", 1, "--region", 128]


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ome_zarr", "ignore::FutureWarning")
def test_an_ingested_image_is_ome_zarr_to_others(tmp_path: Path, kind: str) -> None:
    source, options = make(kind, tmp_path)
    out = tmp_path / "o.zarr"
    assert ingest(source, "--out", out, "--cluster", "inline", *options) == 0
    store = Store.open(out)
    image = store.image(store.image_ids()[0])
    Image.from_zarr(zarr.open_group(str(image.path), mode="r"))
    Labels.from_zarr(zarr.open_group(str(image.path / "labels"), mode="r"))
    node, *others = list(reader.Reader(io.parse_url(str(image.path)))())
    assert len(node.data) == image.num_levels
    for level, array in enumerate(node.data):
        whole = image.read(0, 0, *image.level_shape(level)[1:], level)
        assert array.dtype == image.dtype and np.array_equal(np.asarray(array), whole)
    axes: list[dict[str, Any]] = node.metadata["axes"]
    assert [axis["name"] for axis in axes] == ["c", "y", "x"]
    assert axes[1].get("unit") == axes[2].get("unit") == UNITS[kind]
    scale, translation = node.metadata["coordinateTransformations"][0]
    assert scale["scale"] == [1.0, image.spacing, image.spacing]
    assert translation["translation"] == [0.0, 0.0, 0.0]
    assert node.metadata.get("channel_names", node.metadata.get("name")) is not None
    masks = [found for other in others for found in other.data]
    label = store.label(store.image_ids()[0])
    assert any(
        np.array_equal(np.squeeze(np.asarray(mask)), label.read(0, 0, *label.shape[1:])[0])
        for mask in masks
        if np.squeeze(np.asarray(mask)).shape == label.shape[1:]
    )
