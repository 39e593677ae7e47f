"""Laws of reading: the right reader by content, exact pixels, area means, one sentence for what is
wrong.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio import Affine

from pipeline.readers import Reader, TileError, UnreadableError, open_reader
from pipeline.readers.protocol import Closing, check_box, read_patiently
from pipeline.readers.raster import RasterReader
from pipeline.readers.slide import SlideReader
from pipeline.resample import Resampled

RNG = np.random.default_rng(5)


class CoordinateReader(Closing):
    """A reader whose pixels are their coordinates, and which checks that it is called within
    bounds while open.
    """

    path = Path("coordinates")
    dtype: Literal["uint8", "uint16"] = "uint16"
    bands: tuple[str, ...] = ("red", "green", "blue")
    unit: Literal["um", "m"] = "um"
    spacing = 0.5
    spacing_source = "made up"
    mask_kind: Literal["tissue", "valid"] = "valid"

    def __init__(self, height: int, width: int, downsamples: tuple[int, ...] = (1,)) -> None:
        self.shape = (3, height, width)
        self.downsamples = downsamples
        self.attributes: dict[str, Any] = {}
        self.levels_read: set[int] = set()
        self.is_open = True

    def level_shape(self, level: int) -> tuple[int, int]:
        step = self.downsamples[level]
        return self.shape[1] // step, self.shape[2] // step

    def whole(self, level: int) -> np.ndarray:
        height, width = self.level_shape(level)
        y, x = np.mgrid[:height, :width]
        return np.stack([y, x, (y * 7919 + x * 104729) % 65521]).astype(np.uint16)

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        assert self.is_open
        check_box(self.path, self.level_shape(level), y, x, height, width)
        self.levels_read.add(level)
        return self.whole(level)[:, y : y + height, x : x + width]

    def read_valid(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        assert self.is_open
        check_box(self.path, self.level_shape(0), y, x, height, width)
        return self.whole(0)[2, y : y + height, x : x + width] % 11 > 0

    def close(self) -> None:
        self.is_open = False


def area_mean_matrix(size: int, count: int, factor: float) -> np.ndarray:
    """Row i: the share of each source pixel in target pixel i, from intervals, in float64."""
    left = np.arange(count)[:, None] * factor
    source = np.arange(size)[None, :]
    overlap = np.minimum(left + factor, source + 1) - np.maximum(left, source)
    weights = overlap.clip(0)
    return weights / weights.sum(axis=1, keepdims=True)


@settings(max_examples=40)
@given(st.integers(5, 90), st.integers(5, 90), st.floats(1.01, 4.9), st.data())
def test_resampling_is_the_area_mean_and_has_no_seams(
    height: int, width: int, factor: float, data: st.DataObject
) -> None:
    reader = CoordinateReader(height, width)
    assert isinstance(reader, Reader)
    target = Resampled(reader, reader.spacing * factor)
    _, rows, columns = target.shape
    whole = target.read(0, 0, rows, columns)
    down = area_mean_matrix(height, rows, target.factor)
    across = area_mean_matrix(width, columns, target.factor)
    exact = np.einsum("ij,cjk,lk->cil", down, reader.whole(0).astype(np.float64), across)
    assert np.abs(whole - exact).max() <= 0.5 + 0.05
    y, x = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    part = target.read(y, x, rows - y, columns - x)
    assert np.array_equal(part, whole[:, y:, x:])
    valid = target.read_valid(y, x, rows - y, columns - x)
    share = down @ reader.read_valid(0, 0, height, width) @ across.T
    assert np.array_equal(valid, (share > 1 - 1e-4)[y:, x:])


def test_native_resolution_is_what_the_reader_returns() -> None:
    reader = CoordinateReader(300, 400)
    for spacing in (0.5, 0.5 * (1 + 9e-4)):
        target = Resampled(reader, spacing)
        assert target.shape == reader.shape
        assert np.array_equal(target.read(13, 17, 200, 100), reader.read(13, 17, 200, 100))
        assert np.array_equal(target.read_valid(13, 17, 20, 10), reader.read_valid(13, 17, 20, 10))


def test_the_coarsest_level_that_is_fine_enough_is_read() -> None:
    reader = CoordinateReader(640, 640, downsamples=(1, 2, 4, 16))
    Resampled(reader, 0.5 * 5).read(0, 0, 30, 30)
    assert reader.levels_read == {2}


def test_a_target_finer_than_the_file_names_the_value_that_works() -> None:
    with pytest.raises(UnreadableError, match=r"finest that works is --mpp 0\.5"):
        Resampled(CoordinateReader(10, 10), 0.4)


def test_a_tile_is_named_only_when_it_fails_twice() -> None:
    calls: list[str] = []

    def read_box(y: int, x: int, height: int, width: int) -> np.ndarray:
        bad = y <= 600 < y + height and x <= 600 < x + width
        if bad and (broken or "reopened" not in calls):
            raise OSError("bad marker")
        return np.full((height, width), y)

    broken = False
    box = (0, 0, 1200, 900)
    assert read_patiently(read_box, lambda: calls.append("reopened"), OSError, box, "f").shape == (
        1200,
        900,
    )
    assert calls == ["reopened"]
    broken = True
    with pytest.raises(TileError, match=r"tile at y=512, x=512 \(512 × 388\) of f .* bad marker"):
        read_patiently(read_box, lambda: None, OSError, box, "f")


def write_geotiff(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    profile: dict[str, Any] = {"crs": "EPSG:26911", "transform": Affine(0.6, 0, 4e5, 0, -0.6, 4e6)}
    profile |= options
    alpha = profile.pop("alpha", "NO")
    count, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=pixels.dtype,
        photometric="RGB",
        ALPHA=alpha,
        **profile,
    ) as data:
        data.write(pixels)
    return path


def write_slide(path: Path, pixels: np.ndarray, mpp: float | None = 0.5) -> Path:
    """A tiled RGB TIFF (h, w, 3), which OpenSlide opens as generic-tiff."""
    resolution = (
        {}
        if mpp is None
        else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    )
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="zlib",
        metadata=None,
        **resolution,
    )
    return path


def test_tiled_geotiffs_are_not_slides_and_slides_are_not_rasters(tmp_path: Path) -> None:
    pixels = RNG.integers(1, 255, (4, 600, 512), np.uint8)
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256}
    geo = write_geotiff(tmp_path / "a.svs", pixels[:3], **tiled)
    slide = write_slide(tmp_path / "b.jpg", np.moveaxis(pixels[:3], 0, 2))
    with open_reader(geo) as reader:
        assert isinstance(reader, RasterReader) and (reader.unit, reader.spacing) == ("m", 0.6)
        assert reader.attributes["proj:code"] == "EPSG:26911"
        assert np.array_equal(reader.read(5, 7, 500, 300), pixels[:3, 5:505, 7:307])
    with open_reader(slide) as reader:
        assert isinstance(reader, SlideReader) and (reader.unit, reader.spacing) == ("um", 0.5)
        assert np.array_equal(reader.read(5, 7, 500, 300), pixels[:3, 5:505, 7:307])
        with pytest.raises(ValueError, match="leaves"):
            reader.read(0, 300, 10, 300)


def test_band_four_is_near_infrared_unless_it_is_alpha_and_behaves_like_it(tmp_path: Path) -> None:
    pixels = RNG.integers(1, 255, (4, 64, 80), np.uint8)
    with open_reader(write_geotiff(tmp_path / "nir.tif", pixels, alpha="YES")) as reader:
        assert reader.bands == ("red", "green", "blue", "nir")
        assert np.array_equal(reader.read(0, 0, 64, 80), pixels)
        assert reader.read_valid(0, 0, 64, 80).all()
    pixels[3] = 255 * (np.arange(80) > 30)
    with open_reader(write_geotiff(tmp_path / "alpha.tif", pixels, alpha="YES")) as reader:
        assert reader.bands == ("red", "green", "blue")
        assert np.array_equal(reader.read_valid(0, 0, 64, 80), pixels[3] > 0)


def test_nodata_and_a_black_collar_are_not_valid(tmp_path: Path) -> None:
    pixels = RNG.integers(1, 255, (3, 40, 40), np.uint8)
    pixels[:, :10] = 0
    pixels[0, 20:, :] = 0
    for name, options in {"declared": {"nodata": 0}, "silent": {}}.items():
        with open_reader(write_geotiff(tmp_path / f"{name}.tif", pixels, **options)) as reader:
            assert np.array_equal(reader.read_valid(0, 0, 40, 40), (pixels > 0).any(axis=0))


@pytest.mark.parametrize(
    ("mpp", "problem"),
    [
        (None, "does not say its mpp"),
        (0.01, "credible"),
        (70.0, "credible"),
        (25400 / 600, "printer"),
    ],
)
def test_spacing_that_cannot_be_is_refused_and_can_be_given(
    tmp_path: Path, mpp: float | None, problem: str
) -> None:
    path = write_slide(tmp_path / "s.tif", np.zeros((300, 300, 3), np.uint8), mpp)
    with pytest.raises(UnreadableError, match=f"(?s){problem}.*--source-mpp"):
        open_reader(path)
    with open_reader(path, source_mpp=0.25) as reader:
        assert (reader.spacing, reader.spacing_source) == (0.25, "given")


def test_headers_that_lie_are_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    honest = write_slide(tmp_path / "s.tif", RNG.integers(0, 255, (600, 600, 3), np.uint8))
    payload = honest.read_bytes()
    (tmp_path / "cut.tif").write_bytes(payload[: len(payload) // 2])
    lying = bytearray(payload)
    with tifffile.TiffFile(honest) as tiff:
        lying_at = tiff.pages.first.tags["ImageLength"].valueoffset
    lying[lying_at : lying_at + 4] = (2_000_000).to_bytes(4, "little")
    (tmp_path / "lying.tif").write_bytes(lying)
    (tmp_path / "empty.svs").write_bytes(b"")
    (tmp_path / "text.svs").write_text("not an image")
    problems = {
        "cut.tif": "cut off|damaged",
        "lying.tif": "lists",
        "empty.svs": "0 bytes",
        "text.svs": "no image",
    }
    for name, problem in problems.items():
        with pytest.raises(UnreadableError, match=problem):
            open_reader(tmp_path / name)


@pytest.mark.timeout(120)
def test_nothing_in_the_nasty_folder_does_more_than_be_refused(shared_data: Path) -> None:
    opened = 0
    for path in sorted((shared_data / "nasty").rglob("*")):
        if not path.is_file():
            continue
        try:
            with open_reader(path) as reader:
                height, width = (min(side, 300) for side in reader.shape[1:])
                assert reader.read(0, 0, height, width).shape == (reader.shape[0], height, width)
                opened += 1
        except (UnreadableError, TileError) as error:
            assert path.name in str(error)
    assert opened > 20


def test_one_slide_under_three_names_reads_the_same(shared_data: Path) -> None:
    names = [
        "slides/CMU-1-Small-Region.svs",
        "nasty/slides/valid_svs_named.jpg",
        "nasty/slides/valid_svs_no_extension",
    ]
    pixels = []
    for name in names:
        with open_reader(shared_data / name) as reader:
            assert (reader.spacing, reader.unit) == (0.499, "um")
            pixels.append(reader.read(1000, 500, 400, 300))
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])
