"""Laws of export: every level survives, sizes and places are right, half a file never counts."""

import shutil
import socket
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import rasterio
import tifffile
from rasterio.enums import ColorInterp, MaskFlags

import pipeline.ingest
from pipeline.export import export_image, infer_format, main
from pipeline.ome import OmeImage

MPP, GSD = 0.5037, 0.6
TRANSFORM = (GSD, 0.0, 431_000.4, 0.0, -GSD, 3_779_000.2)
UTM = {"proj:code": "EPSG:26911", "spatial:transform": list(TRANSFORM)}


def _smooth_picture(bands: int, height: int, width: int, top: int) -> np.ndarray:
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(y / (31 + 7 * band)) + np.cos(x / (23 + 5 * band)) for band in range(bands)]
    return (top * (0.5 + 0.2 * np.stack(waves))).astype(int)


def _make(
    path: Path, pixels: np.ndarray, spacing: float, unit: str, bands: list[str], attributes: dict
) -> OmeImage:
    image = OmeImage.create(
        path, pixels.shape, str(pixels.dtype), spacing, unit, bands, attributes
    )
    for key in image.shard_keys():
        y, x, height, width = image.shard_box(key)
        image.write_shard(key, pixels[:, y : y + height, x : x + width])
    image.finish()
    return image


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> OmeImage:
    """An RGB slide with odd sides and three levels: noise on a smooth picture."""
    noise = np.random.default_rng(0).integers(0, 40, (3, 1033, 1401))
    pixels = (_smooth_picture(3, 1033, 1401, 200) + noise).astype(np.uint8)
    path = tmp_path_factory.mktemp("slide") / "slide.zarr"
    return _make(path, pixels, MPP, "micrometer", ["red", "green", "blue"], {})


@pytest.fixture(scope="module")
def aerial(tmp_path_factory: pytest.TempPathFactory) -> OmeImage:
    """Four bands with a place on Earth."""
    noise = np.random.default_rng(1).integers(0, 40, (4, 701, 1100))
    pixels = (_smooth_picture(4, 701, 1100, 200) + noise).astype(np.uint8)
    path = tmp_path_factory.mktemp("aerial") / "scene.zarr"
    return _make(path, pixels, GSD, "meter", ["red", "green", "blue", "nir"], UTM)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> OmeImage:
    """Four bands of uint16."""
    pixels = np.random.default_rng(2).integers(0, 60_000, (4, 600, 530)).astype(np.uint16)
    path = tmp_path_factory.mktemp("deep") / "deep.zarr"
    return _make(path, pixels, GSD, "meter", ["red", "green", "blue", "nir"], UTM)


def _levels(image: OmeImage) -> list[np.ndarray]:
    return [
        image.read(0, 0, *image.level_shape(level)[1:], level) for level in range(image.num_levels)
    ]


def _tifffile_levels(path: Path) -> list[np.ndarray]:
    """Every level as tifffile sees it, bands first."""
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        return [
            level.asarray() if series.axes.startswith("C") else level.asarray().transpose(2, 0, 1)
            for level in series.levels
        ]


def _assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("compression", ["zstd", "deflate"])
@pytest.mark.parametrize("name", ["slide", "aerial", "deep"])
def test_ome_tiff_keeps_every_pixel_of_every_level(tmp_path, request, name, compression):
    image = request.getfixturevalue(name)
    out = tmp_path / "image.ome.tif"
    export_image(image.path, out, "ome-tiff", compression)
    _assert_same(_tifffile_levels(out), _levels(image))
    with tifffile.TiffFile(out) as file:
        assert file.is_ome
        assert len(file.pages.first.subifds or ()) == image.num_levels - 1


@pytest.mark.parametrize(("name", "size", "unit"), [("slide", MPP, "µm"), ("aerial", GSD, "m")])
def test_ome_metadata_gives_sizes_and_names(tmp_path, request, name, size, unit):
    image = request.getfixturevalue(name)
    out = tmp_path / "image.ome.tif"
    export_image(image.path, out, "ome-tiff")
    with tifffile.TiffFile(out) as file:
        root = ElementTree.fromstring(file.ome_metadata or "")
    space = {"ome": root.tag[1:].split("}")[0]}
    pixels = root.find(".//ome:Pixels", space)
    assert pixels is not None
    for axis in "XY":
        assert float(pixels.attrib[f"PhysicalSize{axis}"]) == pytest.approx(size)
        assert pixels.attrib[f"PhysicalSize{axis}Unit"] == unit
    assert (int(pixels.attrib["SizeY"]), int(pixels.attrib["SizeX"])) == image.shape[1:]
    channels = root.findall(".//ome:Channel", space)
    if name == "aerial":
        assert [channel.attrib["Name"] for channel in channels] == list(image.bands)
    else:
        assert [channel.attrib["SamplesPerPixel"] for channel in channels] == ["3"]


@pytest.mark.parametrize("compression", ["zstd", "deflate"])
def test_openslide_sees_every_level_and_the_mpp_of_the_tiff(tmp_path, slide, compression):
    out = tmp_path / "slide.tif"
    export_image(slide.path, out, "tiff", compression)
    levels = _levels(slide)
    _assert_same(_tifffile_levels(out), levels)
    with openslide.OpenSlide(out) as file:
        assert file.level_dimensions == tuple(level.shape[:0:-1] for level in levels)
        assert float(file.properties["openslide.mpp-x"]) == pytest.approx(MPP, rel=1e-6)
        assert float(file.properties["openslide.mpp-y"]) == pytest.approx(MPP, rel=1e-6)
        for level, expected in enumerate(levels):
            region = file.read_region((0, 0), level, file.level_dimensions[level])
            found = np.asarray(region.convert("RGB")).transpose(2, 0, 1)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("format", ["tiff", "ome-tiff"])
def test_jpeg_keeps_colours(tmp_path, format):
    colours = [(221, 172, 192), (92, 52, 128), (243, 242, 244), (200, 90, 120)]
    pixels = np.zeros((3, 560, 640), np.uint8)
    for index, colour in enumerate(colours):
        pixels[:, :, 160 * index : 160 * (index + 1)] = np.array(colour)[:, None, None]
    image = _make(tmp_path / "i.zarr", pixels, 0.5, "micrometer", ["red", "green", "blue"], {})
    out = tmp_path / "image.tif"
    export_image(image.path, out, format, "jpeg", 90)
    with openslide.OpenSlide(out) as file:
        shown = np.asarray(file.read_region((0, 0), 0, (640, 560)).convert("RGB"), float)
    for index, colour in enumerate(colours):
        patch = shown[:, 160 * index + 16 : 160 * (index + 1) - 16]
        assert np.abs(patch - colour).max() <= 3
    with tifffile.TiffFile(out) as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
        assert file.pages.first.tags["YCbCrSubSampling"].value == (2, 2)


@pytest.mark.parametrize("compression", ["zstd", "deflate"])
@pytest.mark.parametrize("name", ["aerial", "deep"])
def test_cog_keeps_place_bands_and_levels(tmp_path, request, name, compression):
    image = request.getfixturevalue(name)
    out = tmp_path / "scene.tif"
    export_image(image.path, out, "cog", compression)
    levels = _levels(image)
    with rasterio.open(out) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.crs.to_epsg() == 26911
        assert tuple(file.transform)[:6] == TRANSFORM
        assert file.count == 4 and str(file.dtypes[0]) == image.dtype
        assert file.descriptions == ("red", "green", "blue", "nir")
        assert rasterio.enums.ColorInterp.alpha not in file.colorinterp
        assert not any(rasterio.enums.MaskFlags.alpha in flags for flags in file.mask_flag_enums)
        np.testing.assert_array_equal(file.read(), levels[0])
        assert len(file.overviews(1)) == len(levels) - 1
    for level in range(1, len(levels)):
        with rasterio.open(out, overview_level=level - 1) as file:
            np.testing.assert_array_equal(file.read(), levels[level])


def test_the_format_follows_from_the_name():
    assert infer_format(Path("a.ome.tif"), has_crs=True) == "ome-tiff"
    assert infer_format(Path("a.OME.TIFF"), has_crs=False) == "ome-tiff"
    assert infer_format(Path("a.tif"), has_crs=False) == "tiff"
    assert infer_format(Path("a.tiff"), has_crs=True) == "cog"
    with pytest.raises(ValueError, match=r"a\.png does not say"):
        infer_format(Path("a.png"), has_crs=False)


def test_the_command_chooses_keeps_and_replaces(tmp_path, slide, aerial, capsys):
    out = tmp_path / "a" / "slide.tif"
    assert main([str(slide.path), "--out", str(out), "--dry-run"]) == 0
    assert not out.exists() and "(tiff, deflate" in capsys.readouterr().out
    assert main([str(slide.path), "--out", str(out)]) == 0
    made = out.stat().st_mtime_ns
    assert main([str(slide.path), "--out", str(out)]) == 0
    assert out.stat().st_mtime_ns == made and "kept" in capsys.readouterr().out
    assert main([str(slide.path), "--out", str(out), "--compression", "zstd"]) == 0
    assert out.stat().st_mtime_ns != made and "replaced" in capsys.readouterr().out
    assert main([str(aerial.path), "--out", str(out)]) == 0
    with rasterio.open(out) as file:
        assert file.crs.to_epsg() == 26911
    assert [path.name for path in out.parent.iterdir()] == ["slide.tif"]


def test_what_a_killed_process_left_is_swept_and_never_counts(tmp_path, slide):
    out = tmp_path / "slide.tif"
    dead = tmp_path / f".slide.tif.{socket.gethostname()}.4194305.partial"
    elsewhere = tmp_path / ".slide.tif.another-node.17.partial"
    for leftover in (dead, elsewhere):
        leftover.write_bytes(b"half")
    export_image(slide.path, out, "tiff")
    assert not dead.exists() and elsewhere.exists()
    _assert_same(_tifffile_levels(out), _levels(slide))


def test_a_failure_leaves_nothing(tmp_path, slide):
    broken = tmp_path / "broken.zarr"
    shutil.copytree(slide.path, broken)
    shard = next(path for path in (broken / "2" / "c").rglob("*") if path.is_file())
    shard.unlink()
    with pytest.raises(ValueError, match="never written"):
        export_image(broken, tmp_path / "out" / "slide.tif", "tiff")
    assert list((tmp_path / "out").iterdir()) == []


def test_mistakes_are_named(tmp_path, slide, aerial, deep, capsys):
    out = tmp_path / "out.tif"
    cases = [
        ((aerial, "tiff", None, 90), "4 of uint8"),
        ((deep, "ome-tiff", "jpeg", 90), "uint16"),
        ((aerial, "cog", "jpeg", 90), "1 or 3 bands"),
        ((slide, "cog", None, 90), "no coordinate reference system"),
        ((slide, "tiff", "jpeg", 0), "quality is 0"),
    ]
    for (image, format, compression, quality), sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            export_image(image.path, out, format, compression, quality)
    unfinished = OmeImage.create(
        tmp_path / "u.zarr",
        (3, 600, 600),
        "uint8",
        0.5,
        "micrometer",
        ["red", "green", "blue"],
        {},
    )
    with pytest.raises(ValueError, match="not finished"):
        export_image(unfinished.path, out, "tiff")
    out.write_bytes(b"a thesis")
    assert main([str(slide.path), "--out", str(out)]) == 2
    assert "did not make it" in capsys.readouterr().err
    assert out.read_bytes() == b"a thesis"
    assert main([str(tmp_path / "nothing.zarr"), "--out", str(out)]) == 2


def test_an_aerial_image_comes_back_as_it_was_with_any_crs_and_its_nodata(tmp_path):
    crs = rasterio.CRS.from_proj4("+proj=tmerc +lat_0=1 +lon_0=7 +k=0.9996 +x_0=500 +ellps=GRS80")
    pixels = np.random.default_rng(3).integers(1, 255, (4, 300, 520), np.uint8)
    pixels[:, :, 400:] = 0
    profile = {"count": 4, "height": 300, "width": 520, "dtype": "uint8", "crs": crs, "nodata": 0}
    profile |= {"transform": rasterio.Affine(0.6, 0, 4e5, 0, -0.6, 4e6), "driver": "GTiff"}
    with rasterio.open(tmp_path / "a.tif", "w", photometric="RGB", ALPHA="YES", **profile) as file:
        file.write(pixels)
    out = tmp_path / "o.zarr"
    arguments = ["--region", "auto", "--cluster", "inline"]
    assert pipeline.ingest.main([str(tmp_path / "a.tif"), "--out", str(out), *arguments]) == 0
    (image,) = (out / "images").glob("*-*")
    assert main([str(image), "--out", str(tmp_path / "b.tif")]) == 0
    with rasterio.open(tmp_path / "a.tif") as before, rasterio.open(tmp_path / "b.tif") as after:
        np.testing.assert_array_equal(after.read(), pixels)
        assert after.crs == before.crs and after.transform == before.transform
        assert after.nodata == 0 and ColorInterp.alpha not in after.colorinterp
        assert after.descriptions == ("red", "green", "blue", "nir")
        assert set(after.mask_flag_enums[0]) == {MaskFlags.nodata}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif", "o.zarr"]
