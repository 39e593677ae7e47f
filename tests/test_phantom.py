"""Laws of the phantoms: pure functions of place, right colours, files that readers open."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.phantom import draw_aerial, draw_slide, main
from pipeline.phantom.aerial import AerialScene
from pipeline.phantom.architecture import NUM_COMPARTMENTS, Architecture
from pipeline.phantom.noise import SmoothNoise, Texture, jittered_sites, keyed_uniform
from pipeline.phantom.slide import EOSIN, GLASS, HAEMATOXYLIN, Slide

SIZE_PX = 700


@pytest.fixture(scope="module")
def slide() -> Slide:
    return Slide(SIZE_PX, SIZE_PX, 0.5, seed=3)


@pytest.fixture(scope="module")
def whole_slide(slide: Slide) -> np.ndarray:
    return slide.draw(0, 0, SIZE_PX, SIZE_PX)


@pytest.fixture(scope="module")
def scene() -> AerialScene:
    return AerialScene(0.6, seed=1)


@pytest.fixture(scope="module")
def whole_scene(scene: AerialScene) -> np.ndarray:
    return scene.draw(0, 0, SIZE_PX, SIZE_PX)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    y, x = draw(st.integers(0, SIZE_PX - 1)), draw(st.integers(0, SIZE_PX - 1))
    height = draw(st.integers(1, min(300, SIZE_PX - y)))
    width = draw(st.integers(1, min(300, SIZE_PX - x)))
    return y, x, height, width


@settings(max_examples=12, deadline=None, derandomize=True)
@given(box=boxes())
def test_a_window_of_the_slide_equals_the_crop_of_the_whole(slide, whole_slide, box):
    y, x, height, width = box
    window = slide.draw(y, x, height, width)
    np.testing.assert_array_equal(window, whole_slide[y : y + height, x : x + width])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(box=boxes())
def test_a_window_of_the_scene_equals_the_crop_of_the_whole(scene, whole_scene, box):
    y, x, height, width = box
    window = scene.draw(y, x, height, width)
    np.testing.assert_array_equal(window, whole_scene[:, y : y + height, x : x + width])


def test_the_picture_is_a_function_of_the_seed(slide, whole_slide):
    again = Slide(SIZE_PX, SIZE_PX, 0.5, seed=3).draw(100, 200, 150, 150)
    np.testing.assert_array_equal(again, whole_slide[100:250, 200:350])
    other = Slide(SIZE_PX, SIZE_PX, 0.5, seed=4).draw(100, 200, 150, 150)
    assert (other != again).mean() > 0.5


def test_another_resolution_shows_the_same_section():
    fine = Slide(1024, 1024, 0.5, seed=0).draw(256, 256, 512, 512).astype(float)
    coarse = Slide(512, 512, 1.0, seed=0).draw(128, 128, 256, 256).astype(float)
    cells_of_16_um = [
        image.reshape(16, side, 16, side, 3).mean(axis=(1, 3))
        for image, side in ((fine, 32), (coarse, 16))
    ]
    correlation = np.corrcoef(cells_of_16_um[0].ravel(), cells_of_16_um[1].ravel())[0, 1]
    assert correlation > 0.95


def test_colours_are_those_of_two_stains(whole_slide):
    """Optical density lies in the plane of the two stains; only the camera's grain remains."""
    density = -np.log(np.maximum(whole_slide.reshape(-1, 3), 1) / GLASS)
    normal = np.cross(HAEMATOXYLIN, EOSIN)
    outside = density @ (normal / np.linalg.norm(normal))
    assert np.sqrt((outside**2).mean()) < 0.03 * np.sqrt((density**2).sum(axis=1).mean())
    stains = np.linalg.lstsq(np.stack([HAEMATOXYLIN, EOSIN], axis=1), density.T, rcond=None)[0]
    assert stains.min() > -0.1
    assert np.quantile(stains[0], 0.98) > 0.8, "nuclei are dark in haematoxylin"


def test_glass_surrounds_tissue_and_every_compartment_is_there():
    architecture = Architecture(2048.0, 2048.0, seed=0)
    axis = np.arange(8, 2048, 16.0)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    tissue = architecture.depth_um(y, x) > 0
    assert 0.4 < tissue.mean() < 0.95
    assert not tissue.any(axis=1).all() or not tissue.any(axis=0).all()
    shares = architecture.shares(y, x)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    assert shares.shape[0] == NUM_COMPARTMENTS
    assert (shares[:, tissue].mean(axis=1) > 0.03).all()


def test_regions_of_the_slide_differ():
    slide = Slide(4096, 4096, 0.5, seed=0)
    colours = [
        slide.draw(y, x, 128, 128).mean(axis=(0, 1))
        for y in range(448, 4096, 800)
        for x in range(448, 4096, 800)
    ]
    assert np.std(colours, axis=0).max() > 15


def test_openslide_reads_the_slide_with_its_levels_and_mpp(tmp_path: Path):
    path = tmp_path / "slide.tif"
    draw_slide(path, height_px=1201, width_px=1333, mpp=0.5037, seed=5)
    with openslide.OpenSlide(path) as file:
        assert file.level_dimensions == ((1333, 1201), (667, 601), (334, 301))
        assert float(file.properties["openslide.mpp-x"]) == pytest.approx(0.5037, rel=1e-6)
        assert float(file.properties["openslide.mpp-y"]) == pytest.approx(0.5037, rel=1e-6)
        level2 = np.asarray(file.read_region((0, 0), 2, (334, 301)).convert("RGB"), float)
        level0 = np.asarray(file.read_region((500, 400), 0, (512, 512)).convert("RGB"), float)
    drawn = Slide(1201, 1333, 0.5037, seed=5)
    assert np.abs(level0 - drawn.draw(400, 500, 512, 512)).mean() < 4
    halved = drawn.draw(0, 0, 1200, 1332).reshape(300, 4, 333, 4, 3).mean(axis=(1, 3))
    assert np.abs(level2[:300, :333] - halved).mean() < 4


def test_the_same_slide_is_drawn_once_and_foreign_files_are_kept(tmp_path: Path, capsys):
    path = tmp_path / "slide.tif"
    (tmp_path / ".slide.tif.elsewhere.1.partial").write_bytes(b"half a slide")
    draw_slide(path, height_px=300, width_px=200, seed=1)
    before = path.stat().st_mtime_ns
    draw_slide(path, height_px=300, width_px=200, seed=1)
    assert path.stat().st_mtime_ns == before
    assert "kept" in capsys.readouterr().out
    draw_slide(path, height_px=300, width_px=200, seed=2)
    assert path.stat().st_mtime_ns != before
    path.write_bytes(b"not ours")
    with pytest.raises(ValueError, match="did not make it"):
        draw_slide(path, height_px=300, width_px=200, seed=2)
    assert path.read_bytes() == b"not ours"


def test_georeferencing_round_trips_and_near_infrared_is_no_alpha(tmp_path: Path):
    path = tmp_path / "scene.tif"
    draw_aerial(path, height_px=600, width_px=701, gsd=0.6, seed=1)
    with rasterio.open(path) as image:
        assert (image.count, image.height, image.width) == (4, 600, 701)
        assert image.crs.to_epsg() == 26911 and image.crs.linear_units == "metre"
        assert image.block_shapes == [(512, 512)] * 4
        assert [i.name for i in image.colorinterp] == ["red", "green", "blue", "undefined"]
        assert image.descriptions == ("red", "green", "blue", "nir")
        assert tuple(image.transform)[:6] == (0.6, 0, 430_000, 0, -0.6, 3_780_000)
        pixels = image.read()
    np.testing.assert_array_equal(pixels, AerialScene(0.6, 1).draw(0, 0, 600, 701))
    with tifffile.TiffFile(path) as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.RGB
        assert file.pages.first.extrasamples == (tifffile.EXTRASAMPLE.UNSPECIFIED,)


def test_vegetation_has_the_higher_vegetation_index(scene: AerialScene):
    size = 1400
    red, _, _, nir = scene.draw(0, 0, size, size).astype(float)
    ground = scene.ground(0, 0, size, size)
    index = (nir - red) / (nir + red)
    water, forest = ground.is_water & (ground.water < -3), ground.is_forest
    assert water.mean() > 0.01 and forest.mean() > 0.01
    assert np.median(index[water]) < 0 < 0.2 < np.median(index[forest])
    assert np.median(nir[water]) < 40


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys):
    assert main(["slide", "--out", str(tmp_path / "a.tif"), "--mpp", "80"]) == 2
    assert "80.0 µm" in capsys.readouterr().err
    assert main(["aerial", "--out", str(tmp_path / "a.tif"), "--height-px", "0"]) == 2
    assert "0 × 4096" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_draws(tmp_path: Path):
    path = tmp_path / "new" / "a.tif"
    assert main(["aerial", "--out", str(path), "--height-px", "90", "--width-px", "70"]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["a.tif"]


def test_smooth_noise_is_standardised_and_continuous():
    noise = SmoothNoise(0, 1, 10.0)
    axis = np.arange(0, 4000, 7.3)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    values = noise.at(y, x)
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05
    np.testing.assert_allclose(noise.at(y + 1e-7, x), values, atol=1e-6)
    np.testing.assert_array_equal(noise.at(y[5:9, 3:4], x[5:9, 3:4]), values[5:9, 3:4])


def test_uniform_numbers_are_uniform_and_differ_by_stream():
    rows, columns = np.meshgrid(np.arange(-200, 200), np.arange(-200, 200), indexing="ij")
    values = keyed_uniform(7, 3, rows, columns)
    counts, _ = np.histogram(values, bins=64, range=(0, 1))
    expected = values.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120
    assert np.unique(values).size == values.size
    other = keyed_uniform(7, 4, rows, columns)
    assert abs(np.corrcoef(values.ravel(), other.ravel())[0, 1]) < 0.02


def test_sites_do_not_depend_on_the_box_they_are_asked_for():
    wide = jittered_sites(0, 1, 10.0, 0.8, (-100.0, -100.0, 100.0, 100.0))
    narrow = jittered_sites(0, 1, 10.0, 0.8, (-20.0, 0.0, 5.0, 30.0))
    everywhere = {
        (r, c): (y, x) for r, c, y, x in zip(wide.row, wide.column, wide.y, wide.x, strict=True)
    }
    for r, c, y, x in zip(narrow.row, narrow.column, narrow.y, narrow.x, strict=True):
        assert everywhere[r, c] == (y, x)
    inside = (wide.y > -20) & (wide.y < 5) & (wide.x > 0) & (wide.x < 30)
    found = set(zip(narrow.row, narrow.column, strict=True))
    assert set(zip(wide.row[inside], wide.column[inside], strict=True)) <= found


def test_a_texture_interpolates_its_table_and_repeats():
    texture = Texture.drawn(0, 1, size=16)
    nodes = np.arange(16.0)
    y, x = np.meshgrid(nodes, nodes, indexing="ij")
    np.testing.assert_allclose(texture.at(y, x), texture.table, atol=1e-6)
    np.testing.assert_allclose(texture.at(y - 16, x + 32), texture.table, atol=1e-6)
    between = texture.at(np.array([2.5]), np.array([3.0]))
    np.testing.assert_allclose(between, texture.table[2:4, 3].mean(), atol=1e-6)
