"""Laws of resolution and place: a target pixel is the area mean of the file's, whichever level it
is taken from; and a point of the store lies in the file, and on the ground, where it was.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio import Affine
from test_ingest import draw_slide, ingest, write_slide
from test_readers import CoordinateReader, area_mean_matrix
from test_tiff_reader import texture, write_ome

from pipeline.places import to_source, to_world
from pipeline.readers import open_reader
from pipeline.resample import Resampled
from pipeline.store import Store


class PyramidReader(CoordinateReader):
    """A reader of `pixels` whose levels are their means over whole squares, rounded."""

    def __init__(self, pixels: np.ndarray, downsamples: tuple[int, ...]) -> None:
        super().__init__(*pixels.shape[1:], downsamples)
        self.pixels = pixels

    def whole(self, level: int) -> np.ndarray:
        height, width = self.level_shape(level)
        step = self.downsamples[level]
        cut = self.pixels[:, : height * step, : width * step]
        means = cut.reshape(3, height, step, width, step).mean(axis=(2, 4))
        return np.floor(means + 0.5).astype(np.uint16)


def exact_mean(pixels: np.ndarray, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """The area mean of every target pixel over level 0, in float64."""
    down = area_mean_matrix(pixels.shape[1], shape[1], scale)
    across = area_mean_matrix(pixels.shape[2], shape[2], scale)
    return down @ pixels.astype(np.float64) @ across.T


@settings(max_examples=30)
@given(
    st.integers(48, 130),
    st.integers(48, 130),
    st.sampled_from([(1, 2, 4), (1, 3), (1, 4, 16), (1, 2, 6)]),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_a_target_that_is_a_whole_multiple_of_a_level_is_the_mean_of_level_0(
    height: int, width: int, downsamples: tuple[int, ...], multiple: int, level: int
) -> None:
    """For any pixels at all, within what two roundings are: half a grey level each."""
    factor = downsamples[min(level, len(downsamples) - 1)] * multiple
    pixels = np.random.default_rng(height * width).integers(0, 65535, (3, height, width))
    reader = PyramidReader(pixels.astype(np.uint16), downsamples)
    target = Resampled(reader, reader.spacing * factor)
    assert downsamples[target.level] == max(d for d in downsamples if d <= factor)
    found = target.read(0, 0, *target.shape[1:])
    exact = exact_mean(pixels, target.shape, factor)
    assert factor % downsamples[target.level] or np.abs(found - exact).max() <= 1.0 + 0.05


@settings(max_examples=30)
@given(st.floats(1.0, 9.0), st.floats(0, 7), st.booleans())
def test_any_target_of_a_smooth_image_is_its_mean_whatever_the_level(
    factor: float, phase: float, has_levels: bool
) -> None:
    """Where a level's pixels are cut, they are taken as constant: that moves light by less than
    their side. Of a wave of amplitude A and period P it is an error of at most 2π A d / 2P.
    """
    amplitude, period_px, side = 20_000, 160.0, 230
    y, x = np.mgrid[:side, :side]
    wave = amplitude * np.sin(2 * math.pi * (0.8 * x + 0.6 * y) / period_px + phase) + 30_000
    pixels = np.stack([wave] * 3).round().astype(np.uint16)
    reader = PyramidReader(pixels, (1, 2, 4, 8) if has_levels else (1,))
    target = Resampled(reader, reader.spacing * factor)
    step = reader.downsamples[target.level]
    exact = exact_mean(pixels, target.shape, target.scale)
    found = target.read(0, 0, *target.shape[1:])
    bound = 0.0 if step == 1 else math.pi * amplitude * step / period_px / 2
    assert np.abs(found - exact).max() <= 1.05 + bound


def test_the_finest_pattern_does_not_come_back_as_a_coarse_one() -> None:
    """A checkerboard of single pixels, resampled to 1 / 2.1, beats if every other pixel is
    picked; its area means stay within a fourth of the contrast, and average to grey.
    """
    y, x = np.mgrid[:210, :210]
    pixels = np.stack([(x + y) % 2 * 60_000] * 3).astype(np.uint16)
    reader = PyramidReader(pixels, (1,))
    target = Resampled(reader, reader.spacing * 2.1)
    found = target.read(0, 0, *target.shape[1:]).astype(float)
    assert np.abs(found - 30_000).max() < 30_000 * (0.1 / 2.1) ** 0.5
    assert abs(found.mean() - 30_000) < 100
    assert np.ptp(pixels[:, ::2, ::2][:, :, :5]) == 0  # what picking would do: one colour


def spot(height: int, width: int, y: int, x: int, side: int) -> np.ndarray:
    """Red (h, w, 3) of 150 everywhere, as of tissue in focus, but for a black square with its
    corner at (y, x).
    """
    pixels = np.full((height, width, 3), 150, np.uint8)
    pixels[..., 1] = np.random.default_rng(0).integers(20, 140, (height, width))
    pixels[y : y + side, x : x + side] = 0
    return pixels


def centre_of_black(image: Any) -> tuple[float, float]:
    """The centre of mass of the black square, in pixels of level 0 of an image of the store."""
    darkness = 150.0 - image.read(0, 0, *image.shape[1:])[0]
    ys, xs = (np.arange(n) + 0.5 for n in darkness.shape)
    total = darkness.sum()
    return (
        float((darkness.sum(axis=1) * ys).sum() / total),
        float((darkness.sum(axis=0) * xs).sum() / total),
    )


@pytest.mark.parametrize("mpp", [0.5, 0.50045, 1.0, 1.37, 2.0009])
def test_a_point_of_the_store_lies_in_the_slide_where_it_was(tmp_path: Path, mpp: float) -> None:
    """To a hundredth of a pixel, 5,600 px from the corner; also where the target is within a tenth
    of a per cent of a level, whose pixels are then taken as they are.
    """
    y, x, side = 310, 5600, 84
    slide = tmp_path / "s.ome.tif"
    write_ome(slide, spot(420, 5740, y, x, side), "YXS", photometric="rgb", levels=2)
    out = tmp_path / "o.zarr"
    command = (slide, "--out", out, "--mpp", mpp, "--region", 64, "--min-tissue", 0)
    assert ingest(*command, "--cluster", "inline") == 0
    image = Store.open(out).image(Store.open(out).image_ids()[0])
    found = to_source(image.attributes, *centre_of_black(image))
    assert found == pytest.approx((y + side / 2, x + side / 2), abs=0.02)
    ratio = mpp / 0.5
    assert image.attributes["source:scale"] == pytest.approx(ratio, rel=1.1e-3)
    if abs(ratio / round(ratio) - 1) < 1e-3:
        assert image.attributes["source:scale"] == round(ratio)


@pytest.mark.parametrize("gsd", [0.6, 0.6005, 1.5])
@pytest.mark.parametrize("turn_degrees", [0, 30])
def test_a_point_of_the_store_lies_on_the_ground_where_it_was(
    tmp_path: Path, gsd: float, turn_degrees: float
) -> None:
    y, x, side = 120, 3100, 60
    transform = (
        Affine.translation(4e5, 4e6) @ Affine.rotation(turn_degrees) @ Affine.scale(0.6, -0.6)
    )
    pixels = np.moveaxis(spot(240, 3200, y, x, side), 2, 0)
    profile: dict[str, Any] = {"crs": "EPSG:26911", "transform": transform, "count": 3}
    profile |= {"height": 240, "width": 3200, "dtype": "uint8", "photometric": "RGB"}
    path, out = tmp_path / "a.tif", tmp_path / "o.zarr"
    with rasterio.open(path, "w", driver="GTiff", **profile) as data:
        data.write(pixels)
    command = (path, "--out", out, "--gsd", gsd, "--region", 64, "--min-tissue", 0)
    assert ingest(*command, "--cluster", "inline") == 0
    image = Store.open(out).image(Store.open(out).image_ids()[0])
    assert image.attributes["proj:code"] == "EPSG:26911"
    east, north = transform @ (x + side / 2, y + side / 2)
    found = to_world(image.attributes, *centre_of_black(image))
    assert found == pytest.approx((north, east), abs=0.6 * 0.02)
    corners = [to_world(image.attributes, i, j) for i in (0, 50) for j in (0, 500)]
    scale = image.attributes["source:scale"]
    wanted = [(transform @ (j * scale, i * scale))[::-1] for i in (0, 50) for j in (0, 500)]
    assert np.allclose(corners, wanted, atol=1e-6)


@pytest.mark.parametrize("axes", ["YXS", "CYX"])
def test_an_ome_tiff_of_16_bits_is_in_the_store_what_it_was(tmp_path: Path, axes: str) -> None:
    """At its own resolution exactly; at four times that the level that is, exactly."""
    grain = np.random.default_rng(0).uniform(0.6, 1.0, (700, 900, 1))
    pixels = (texture(700, 900, "uint16") * grain).astype(np.uint16)
    path = tmp_path / "s.ome.tif"
    names = {"Channel": {"Name": ["Red", "Green", "Blue"]}}
    planes = np.moveaxis(pixels, 2, 0)
    if axes == "CYX":
        write_ome(path, planes, axes, photometric="minisblack", metadata=names, levels=2)
    else:
        write_ome(path, pixels, axes, photometric="rgb", levels=2)
    for mpp, level in ((0.5, 0), (2.0, 2)):
        out = tmp_path / f"{mpp}.zarr"
        command = (path, "--out", out, "--mpp", mpp, "--region", 64, "--min-tissue", 0)
        assert ingest(*command, "--cluster", "inline") == 0
        image = Store.open(out).image(Store.open(out).image_ids()[0])
        with open_reader(path) as reader:
            whole = reader.read(0, 0, *reader.level_shape(level), level)
        assert image.dtype == "uint16" and np.array_equal(
            image.read(0, 0, *image.shape[1:]), whole
        )
        exact = exact_mean(planes, image.shape, 2.0**level)
        assert np.abs(whole - exact).max() <= 0.5 * max(level, 0) + 1e-6


def test_a_slide_too_coarse_for_a_store_that_exists_is_not_told_to_change_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = write_slide(tmp_path / "fine.tif", draw_slide(400, 400), mpp=0.5)
    coarse = write_slide(tmp_path / "coarse.tif", draw_slide(300, 300), mpp=1.0)
    out = tmp_path / "o.zarr"
    options = ("--out", out, "--region", 128, "--cluster", "inline")
    assert ingest(fine, *options) == 0
    assert ingest(fine, coarse, *options) == 3
    said = capsys.readouterr().out
    assert f"{coarse} has mpp 1 and {out} has 0.5, finer than the file" in said
    assert "with --mpp 1 or more into a store of its own" in said
    assert "the finest that works" not in said
    options = ("--out", tmp_path / "p.zarr", "--region", 128, "--cluster", "inline")
    assert ingest(fine, coarse, *options, "--mpp", 1) == 0
