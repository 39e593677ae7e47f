"""Laws of the store: what is written reads back, the pyramid is means, nothing missing reads as
black.
"""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image, Labels

from pipeline.ome import MissingShardError, OmeImage
from pipeline.store import Region, Store, StoreSpec

SPEC = StoreSpec("um", 0.5, ("red", "green", "blue"), "uint8", 1024)


def random_pixels(shape: tuple[int, int, int], dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(dtype).max, shape, dtype)


def written(path: Path, pixels: np.ndarray) -> OmeImage:
    bands = [f"band{i}" for i in range(len(pixels))]
    image = OmeImage.create(path, pixels.shape, str(pixels.dtype), 0.5, "micrometer", bands)
    for key in image.shard_keys():
        y, x, height, width = image.shard_box(key)
        image.write_shard(key, pixels[:, y : y + height, x : x + width])
    image.finish()
    return image


def halved(pixels: np.ndarray) -> np.ndarray:
    """2×2 means in float64, half up; beyond an odd side the last row or column repeats."""
    _, height, width = pixels.shape
    padded = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    cells = padded.reshape(len(pixels), padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    return np.floor(cells.mean(axis=(2, 4)) + 0.5).astype(pixels.dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 1, 1), "uint8"), ((4, 513, 1030), "uint16"), ((1, 4097, 8195), "uint8")],
)
def test_every_level_is_the_means_of_the_one_below(
    tmp_path: Path, shape: tuple[int, int, int], dtype: str
) -> None:
    pixels = random_pixels(shape, dtype)
    image = written(tmp_path / "image", pixels)
    assert image.is_complete()
    for level in range(image.num_levels):
        _, height, width = image.level_shape(level)
        assert np.array_equal(image.read(0, 0, height, width, level), pixels)
        pixels = halved(pixels)
    assert max(image.level_shape(image.num_levels - 1)[1:]) <= 512
    assert image.num_levels == 1 or max(image.level_shape(image.num_levels - 2)[1:]) > 512


@settings(max_examples=25)
@given(st.data())
def test_any_box_equals_the_crop(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "boxes"
    pixels = random_pixels((3, 700, 1300))
    image = OmeImage.open(path) if path.exists() else written(path, pixels)
    y, x = data.draw(st.integers(0, 699)), data.draw(st.integers(0, 1299))
    height, width = data.draw(st.integers(0, 700 - y)), data.draw(st.integers(0, 1300 - x))
    assert np.array_equal(
        image.read(y, x, height, width), pixels[:, y : y + height, x : x + width]
    )


def test_boxes_outside_are_refused(tmp_path: Path) -> None:
    image = written(tmp_path / "image", random_pixels((3, 20, 30)))
    for box in [(-1, 0, 5, 5), (0, 0, 21, 5), (0, 26, 5, 5)]:
        with pytest.raises(ValueError, match="leaves level 0"):
            image.read(*box)


def test_missing_shard_raises_and_black_shard_is_black(tmp_path: Path) -> None:
    image = OmeImage.create(tmp_path / "i", (1, 4096, 4200), "uint8", 1.0, "pixel", ["gray"])
    image.write_shard((0, 0), np.zeros((1, 4096, 4096), np.uint8))
    assert not image.read(0, 0, 4096, 4096).any()
    assert image.has_shard((0, 0)) and not image.has_shard((0, 1)) and not image.is_complete()
    for level in range(3):
        with pytest.raises(MissingShardError, match="never written"):
            image.read(0, (4096 >> level) - 1, 2, 2, level)
    reopened = OmeImage.open(tmp_path / "i")
    assert not reopened.read(0, 0, 10, 10).any()
    assert reopened.unit == "pixel"


def test_only_whole_shards_are_taken(tmp_path: Path) -> None:
    image = OmeImage.create(tmp_path / "i", (3, 600, 600), "uint8", 1.0, "meter", SPEC.bands)
    with pytest.raises(ValueError, match="whole shards"):
        image.write_shard((0, 0), np.zeros((3, 512, 512), np.uint8))


def test_create_is_idempotent_and_refuses_another_image(tmp_path: Path) -> None:
    pixels = random_pixels((3, 40, 50))
    written(tmp_path / "i", pixels)
    bands = ["band0", "band1", "band2"]
    again = OmeImage.create(tmp_path / "i", (3, 40, 50), "uint8", 0.5, "micrometer", bands)
    assert np.array_equal(again.read(0, 0, 40, 50), pixels)
    with pytest.raises(ValueError, match="already holds"):
        OmeImage.create(tmp_path / "i", (3, 40, 51), "uint8", 0.5, "micrometer", bands)


@pytest.mark.parametrize("cell", [1, 16])
def test_mask_is_the_label_at_the_nearest_cell_and_ome_models_accept_both(
    tmp_path: Path, cell: int
) -> None:
    store = Store.create(tmp_path / "s", SPEC)
    height, width = 613, 777
    image = written(store.image_path("a-1"), random_pixels((3, height, width)))
    label = store.create_label(image, "tissue", cell)
    cells = np.random.default_rng(0).integers(0, 2, label.shape, np.uint8)
    label.write_shard((0, 0), cells)
    label.finish()
    rows, columns = np.arange(100, 400) // cell, np.arange(7, 777) // cell
    expected = cells[0][rows[:, None], columns] > 0
    assert np.array_equal(store.mask("a-1", 100, 7, 300, 770), expected)
    assert store.mask_kind("a-1") == "tissue"
    Image.from_zarr(zarr.open_group(str(image.path), mode="r"))
    Labels.from_zarr(zarr.open_group(str(image.path / "labels"), mode="r"))


def test_region_table_round_trips_sorted_and_names_the_store(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", SPEC)
    with pytest.raises(ValueError, match="no region table"):
        store.regions()
    table = [Region(9, "b", 0, 0, 64, 0.5, "val"), Region(9, "a", 64, 0, 64, 1.0, "train")]
    store.write_regions([*table, Region(9, "a", 0, 64, 64, 0.25, "train")])
    regions = Store.open(tmp_path / "s").regions()
    assert [(r.index, r.image, r.y) for r in regions] == [(0, "a", 0), (1, "a", 64), (2, "b", 0)]
    before = store.fingerprint()
    store.write_regions(regions[:2])
    assert store.fingerprint() != before


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(1, 200),
)
@settings(max_examples=40)
def test_region_tokens_are_those_with_their_centre_inside(
    tmp_path_factory: pytest.TempPathFactory, gy: int, gx: int, y: int, x: int, side: int
) -> None:
    store = Store.create(tmp_path_factory.mktemp("s"), SPEC)
    store.register_encoder("tiny-0123", {"names": ["a/b"]})
    footprints = {16: (gy, gx), 48: (max(1, gy // 3), max(1, gx // 3))}
    for footprint, (rows, columns) in footprints.items():
        index = np.arange(rows * columns).reshape(rows, columns, 1)
        store.write_embedding("tiny-0123", footprint, "a", index.astype(np.float16), {})
    found = {
        (
            lattice.footprint_px,
            lattice.y_px + i * lattice.footprint_px,
            lattice.x_px + j * lattice.footprint_px,
        ): float(value)
        for lattice in store.region_tokens("tiny-0123", Region(0, "a", y, x, side, 1.0, "train"))
        for (i, j, _), value in np.ndenumerate(lattice.values)
    }
    expected = {}
    for footprint, (rows, columns) in footprints.items():
        for i, j in np.ndindex(rows, columns):
            cy, cx = (i + 0.5) * footprint, (j + 0.5) * footprint
            if y <= cy < y + side and x <= cx < x + side:
                expected[(footprint, cy - y, cx - x)] = float(i * columns + j)
    assert found == expected


def test_encoders_are_found_by_key_slug_and_name(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", SPEC)
    store.register_encoder("vit-small-abc1", {"names": ["hf-hub:x/y"]})
    store.register_encoder("vit-small-def2", {"names": ["mine"]})
    assert store.resolve_encoder("mine") == "vit-small-def2"
    assert store.resolve_encoder("vit-small-abc1") == "vit-small-abc1"
    with pytest.raises(ValueError, match="ambiguous"):
        store.resolve_encoder("vit-small")
    with pytest.raises(ValueError, match="vit-small-abc1, vit-small-def2 there"):
        store.resolve_encoder("other")
