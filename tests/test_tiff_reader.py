"""Laws of OME-TIFF and plain TIFF: any box of any layout is what was written, only what a box
touches is read, a pyramid is read level by level; what is no image of colour is refused by one
sentence.
"""

import tracemalloc
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from damage import read_damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.readers import Reader, TileError, UnreadableError, open_reader
from pipeline.readers.ome_xml import describe_ome
from pipeline.readers.raster import RasterReader
from pipeline.readers.segments import picture_size
from pipeline.readers.slide import SlideReader
from pipeline.readers.tiff import TiffReader
from pipeline.resample import Resampled

RESOLUTION: dict[str, Any] = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
UM = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}


def texture(height: int, width: int, dtype: str = "uint8") -> np.ndarray:
    """A picture (h, w, 3) whose every pixel is its own, smooth enough for lossy codecs."""
    y, x = np.mgrid[:height, :width]
    full = np.iinfo(dtype).max
    waves = [np.sin(y / 17 + k) + np.cos(x / (11 + k)) + 2 for k in range(3)]
    return (np.stack(waves, axis=-1) / 4 * full).astype(dtype)


def write_ome(path: Path, pixels: np.ndarray, axes: str, **options: Any) -> Path:
    """An OME-TIFF with its pyramid of `levels` 2×2 means in SubIFDs."""
    levels = options.pop("levels", 0)
    metadata = {"axes": axes, **UM, **options.pop("metadata", {})}
    layout: dict[str, Any] = {"tile": (64, 64), "compression": "zlib", **options}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(pixels, subifds=levels, metadata=metadata, **layout)
        for _ in range(levels):
            down = 1 if axes == "CYX" else 0
            pixels = halved(pixels, down)
            tiff.write(pixels, subfiletype=1, metadata=None, **layout)
    return path


def halved(pixels: np.ndarray, first_axis: int) -> np.ndarray:
    """Means over whole squares of two pixels, an odd last row or column left out."""
    ys, xs = first_axis, first_axis + 1
    size = [n // 2 * 2 if axis in (ys, xs) else n for axis, n in enumerate(pixels.shape)]
    even = pixels[tuple(slice(n) for n in size)].astype(np.float64)
    tall = (even.take(range(0, size[ys], 2), ys) + even.take(range(1, size[ys], 2), ys)) / 2
    wide = (tall.take(range(0, size[xs], 2), xs) + tall.take(range(1, size[xs], 2), xs)) / 2
    return np.floor(wide + 0.5).astype(pixels.dtype)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (64, 48)},
    "big tiles": {"tile": (64, 48), "bigtiff": True},
    "strips": {"rowsperstrip": 7},
    "one strip": {"rowsperstrip": 10_000},
    "planar tiles": {"tile": (48, 64), "planarconfig": "separate"},
    "planar strips": {"rowsperstrip": 16, "planarconfig": "separate"},
}
CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "deflate and differences": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw"},
    "zstd": {"compression": "zstd"},
    "lzma": {"compression": "lzma"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_any_box_of_any_layout_is_what_was_written(
    tmp_path: Path, layout: str, codec: str, dtype: str, order: str
) -> None:
    pixels, path = texture(131, 173, dtype), tmp_path / "p.tif"
    how = LAYOUTS[layout] | CODECS[codec] | RESOLUTION
    written = np.moveaxis(pixels, 2, 0) if "planar" in layout else pixels
    tifffile.imwrite(path, written, photometric="rgb", metadata=None, byteorder=order, **how)
    rng = np.random.default_rng(0)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.is_tiled == ("tiles" in layout)
    with TiffReader(path) as reader:
        assert isinstance(reader, Reader)
        assert (reader.shape, reader.dtype, reader.spacing) == ((3, 131, 173), dtype, 0.5)
        for _ in range(12):
            y, x = int(rng.integers(0, 131)), int(rng.integers(0, 173))
            height, width = int(rng.integers(0, 132 - y)), int(rng.integers(0, 174 - x))
            box = pixels[y : y + height, x : x + width]
            assert np.array_equal(reader.read(y, x, height, width), np.moveaxis(box, 2, 0))
            assert reader.read_valid(y, x, height, width).all()
        with pytest.raises(ValueError, match="leaves"):
            reader.read(0, 0, 132, 1)


@settings(max_examples=40)
@given(st.data())
def test_a_pyramid_is_read_level_by_level(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Of 203 × 310 px the levels have 101 × 155, 50 × 77 and 25 × 38: interleaved or one plane a
    colour, each box of each is the crop of what was written, and a target takes the coarsest that
    is fine enough.
    """
    axes = data.draw(st.sampled_from(["YXS", "CYX"]))
    path = tmp_path_factory.getbasetemp() / f"{axes}.ome.tif"
    pixels = texture(203, 310, "uint16")
    pixels = pixels if axes == "YXS" else np.moveaxis(pixels, 2, 0)
    options: dict[str, Any] = {"photometric": "rgb"}
    if axes == "CYX":
        options = {"photometric": "minisblack", "metadata": {"Channel": {"Name": list("RGB")}}}
    if not path.exists():
        write_ome(path, pixels, axes, levels=3, **options)
    with open_reader(path) as reader:
        assert isinstance(reader, TiffReader)
        assert reader.downsamples == (1, 2, 4, 8) and reader.bands == ("red", "green", "blue")
        assert (reader.unit, reader.spacing, reader.dtype) == ("um", 0.5, "uint16")
        level = data.draw(st.integers(0, 3))
        for _ in range(level):
            pixels = halved(pixels, 0 if axes == "YXS" else 1)
        planes = np.moveaxis(pixels, 2, 0) if axes == "YXS" else pixels
        assert reader.level_shape(level) == planes.shape[1:]
        y = data.draw(st.integers(0, planes.shape[1]))
        x = data.draw(st.integers(0, planes.shape[2]))
        height = data.draw(st.integers(0, planes.shape[1] - y))
        width = data.draw(st.integers(0, planes.shape[2] - x))
        found = reader.read(y, x, height, width, level)
        assert np.array_equal(found, planes[:, y : y + height, x : x + width])
        target = Resampled(reader, 0.5 * 2**level)
        assert (target.level, target.factor, target.scale) == (level, 1.0, 2**level)


@pytest.mark.parametrize("how", ["ome", "plain", "openslide"])
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("is_average", [True, False])
@pytest.mark.parametrize("codec", ["zlib", "jpeg"])
def test_levels_of_picked_pixels_are_not_used(
    tmp_path: Path, how: str, step: int, is_average: bool, codec: str
) -> None:
    """Also beside lossy compression, and where most of the image is glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((640, 960, 3), 243, np.uint8)
    grain = rng.integers(60, 200, (320, 360, 3), np.uint8)
    pixels[:640, :720] = grain.repeat(2, axis=0).repeat(2, axis=1)
    means = pixels.reshape(640 // step, step, 960 // step, step, 3).mean(axis=(1, 3))
    level = means.round().astype(np.uint8) if is_average else pixels[::step, ::step].copy()
    if step == 2:  # a grain of two pixels at that phase is its own mean
        pixels = np.roll(pixels, 1, axis=(0, 1))
        means = pixels.reshape(320, 2, 480, 2, 3).mean(axis=(1, 3))
        level = means.round().astype(np.uint8) if is_average else pixels[::2, ::2].copy()
    layout: dict[str, Any] = {"photometric": "rgb", "compression": codec, "tile": (128, 128)}
    layout |= {"compressionargs": {"level": 92}} if codec == "jpeg" else {}
    path = tmp_path / ("p.ome.tif" if how == "ome" else "p.tif")
    with tifffile.TiffWriter(path, ome=how == "ome") as tiff:
        extra = {"metadata": {"axes": "YXS", **UM}, "subifds": 1} if how == "ome" else RESOLUTION
        tiff.write(pixels, **({"metadata": None} | extra), **layout)
        tiff.write(level, subfiletype=1, metadata=None, **layout)
    made = TiffReader if how != "openslide" else SlideReader
    with made(path, True) if how == "ome" else made(path) as reader:
        assert reader.downsamples == ((1, step) if is_average else (1,))


def test_levels_that_are_none_of_the_image_are_not_offered(tmp_path: Path) -> None:
    """A level larger than the first, of another type, or of sides that fit no whole number."""
    path = tmp_path / "p.ome.tif"
    pixels = texture(200, 300)
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(pixels, subifds=4, photometric="rgb", metadata={"axes": "YXS", **UM})
        for shape in ((400, 600), (67, 90), (50, 75), (100, 150)):
            dtype = "uint16" if shape == (100, 150) else "uint8"
            tiff.write(texture(*shape, dtype), subfiletype=1, photometric="rgb", metadata=None)
    with open_reader(path) as reader:
        assert reader.downsamples == (1, 4)
    plain = tmp_path / "p.tif"
    with tifffile.TiffWriter(plain) as tiff:
        for step, reduced in ((1, 0), (2, 1), (4, 1), (3, 0)):
            part = texture(200, 300, "uint16")[::step, ::step]
            tiff.write(part, subfiletype=reduced, photometric="rgb", metadata=None, **RESOLUTION)
    with open_reader(plain) as reader:
        assert isinstance(reader, TiffReader) and reader.downsamples == (1, 2, 4)


def test_each_file_gets_the_reader_that_can_read_it(tmp_path: Path) -> None:
    """By content: compressions that neither OpenSlide nor GDAL knows, strips, 16 bits, OME-XML go
    to tifffile; tiles that OpenSlide decodes to OpenSlide; four bands to rasterio.
    """
    tiles: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    pixels = texture(150, 130)
    for codec in ("jpeg2000", "jpegxl", "png", "webp", "lzma", "zstd", "jpeg", "lzw"):
        path = tmp_path / f"{codec}.svs"
        options = {"compressionargs": {"lossless": True}} if codec == "webp" else {}
        tifffile.imwrite(path, pixels, compression=codec, **tiles, **options, **RESOLUTION)
        with open_reader(path) as reader:
            by_openslide = codec in ("zstd", "jpeg", "lzw")
            assert isinstance(reader, SlideReader if by_openslide else TiffReader), codec
            found = reader.read(3, 5, 140, 120)
        with tifffile.TiffFile(path) as tiff:
            decoded = np.moveaxis(tiff.asarray()[3:143, 5:125], 2, 0)
        assert np.array_equal(found, decoded), codec
        if codec not in ("jpeg", "jpegxl"):
            assert np.array_equal(decoded, np.moveaxis(pixels[3:143, 5:125], 2, 0)), codec
    strips = tmp_path / "strips.tif"
    tifffile.imwrite(strips, pixels, photometric="rgb", metadata=None, **RESOLUTION)
    four = tmp_path / "four.tif"
    tifffile.imwrite(four, np.dstack([pixels, pixels[..., :1]]), metadata=None)
    for path, kind in ((strips, TiffReader), (four, RasterReader)):
        with open_reader(path, source_gsd=None if path == strips else 0.6) as reader:
            assert isinstance(reader, kind)


def test_only_the_tiles_that_a_box_touches_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.ome.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    write_ome(path, pixels, "YXS", photometric="rgb", tile=(128, 128))
    read: list[int] = []
    with open_reader(path) as reader:
        honest = tifffile.FileHandle.read

        def counted(handle: tifffile.FileHandle, size: int = -1) -> bytes:
            data = honest(handle, size)
            read.append(len(data))
            return data

        monkeypatch.setattr(tifffile.FileHandle, "read", counted)
        reader.read(130, 250, 120, 100)
    assert len(read) == 2 and sum(read) < 2.2 * 128 * 128 * 3


def test_a_huge_strip_costs_the_rows_of_a_box_and_a_lie_costs_nothing(tmp_path: Path) -> None:
    """3 GB in one strip, uncompressed, of which the disk holds a hole; and one byte less."""
    path, side = tmp_path / "huge.tif", 32_000
    with tifffile.TiffWriter(path) as tiff:
        one_strip = {"rowsperstrip": side, "photometric": "rgb", "metadata": None, **RESOLUTION}
        tiff.write(None, shape=(side, side, 3), dtype=np.uint8, **one_strip)
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages.first.dataoffsets[0] + side * side * 3
    with path.open("r+b") as stream:
        stream.truncate(end)
        stream.seek(end - 6)
        stream.write(bytes((1, 2, 3, 4, 5, 6)))
    tracemalloc.start()
    with open_reader(path) as reader:
        assert isinstance(reader, TiffReader)
        corner = reader.read(side - 100, side - 2, 100, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corner[:, -1].tolist() == [[1, 4], [2, 5], [3, 6]] and not corner[:, :-1].any()
    assert peak < 40e6
    with path.open("r+b") as stream:
        stream.truncate(end - 1)
    with pytest.raises(UnreadableError, match="would end at"):
        open_reader(path)


def damage(path: Path, tile: int, change: Any) -> None:
    """Replace the bytes of one tile by what `change` makes of them, of the same length."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as stream:
        stream.seek(offset)
        data = change(stream.read(count))
        assert len(data) == count
        stream.seek(offset)
        stream.write(data)


def test_a_tile_that_claims_to_be_a_huge_picture_is_named_and_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "p.ome.tif"
    write_ome(path, texture(1200, 700), "YXS", photometric="rgb", compression="jpeg")

    def claim(data: bytes) -> bytes:
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]

    damage(path, 11 * 9 + 9, claim)
    with open_reader(path) as reader:
        assert reader.read(0, 0, 500, 700).shape == (3, 500, 700)
        with pytest.raises(TileError, match=r"tile at y=512, x=512 .* claims 65535 × 65535"):
            reader.read(0, 0, 1200, 700)
        assert reader.read(0, 0, 500, 700).shape == (3, 500, 700)
    lossless = tmp_path / "z.ome.tif"
    write_ome(lossless, texture(300, 300), "YXS", photometric="rgb", compression="zlib")
    damage(lossless, 0, lambda data: bytes(len(data)))
    with (
        open_reader(lossless) as reader,
        pytest.raises(TileError, match=r"tile at y=0, x=0 \(300 × 300\) of .*z\.ome\.tif"),
    ):
        reader.read(0, 0, 300, 300)


@pytest.mark.parametrize(
    ("codec", "compression"),
    [
        ("jpeg8", 7),
        ("jpeg2k", 34712),
        ("png", 34933),
        ("webp", 50001),
        ("webp lossless", 50001),
        ("jpegxl", 50002),
        ("jpegxl lossless", 50002),
    ],
)
@pytest.mark.parametrize("shape", [(64, 64), (37, 301), (1000, 8), (512, 256), (300, 400)])
def test_the_size_of_a_picture_is_read_from_its_header(
    codec: str, compression: int, shape: tuple[int, int]
) -> None:
    name, _, lossless = codec.partition(" ")
    options = {"lossless": True} if lossless else {}
    data = getattr(imagecodecs, f"{name}_encode")(texture(*shape), **options)
    assert picture_size(data, compression) == shape


def test_what_a_file_does_not_hold_was_never_scanned(tmp_path: Path) -> None:
    path = tmp_path / "p.ome.tif"

    def tiles() -> Any:
        for i in range(4):
            yield None if i == 1 else np.full((64, 64, 3), 7, np.uint8)

    with tifffile.TiffWriter(path, ome=True) as tiff:
        layout: dict[str, Any] = {"shape": (128, 100, 3), "dtype": np.uint8, "tile": (64, 64)}
        tiff.write(tiles(), photometric="rgb", metadata={"axes": "YXS", **UM}, **layout)
    with open_reader(path) as reader:
        missing = np.zeros((128, 100), bool)
        missing[:64, 64:] = True
        assert np.array_equal(reader.read(0, 0, 128, 100)[1] == 255, missing)
        assert np.array_equal(reader.read_valid(3, 9, 120, 90), ~missing[3:123, 9:99])


@pytest.mark.parametrize(
    ("size", "unit", "mpp"),
    [(0.25, None, 0.25), (250, "nm", 0.25), (2.5e-4, "mm", 0.25), (0.00001, "in", 0.254)],
)
def test_physical_sizes_have_units(
    tmp_path: Path, size: float, unit: str | None, mpp: float
) -> None:
    metadata: dict[str, Any] = {"PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = write_ome(
        tmp_path / "p.ome.tif", texture(64, 80), "YXS", photometric="rgb", metadata=metadata
    )
    with open_reader(path) as reader:
        assert reader.spacing == pytest.approx(mpp)
        assert reader.spacing_source == "OME PhysicalSize"
    with open_reader(path, source_mpp=1.0) as reader:
        assert reader.spacing == 1.0


@pytest.mark.parametrize(
    ("unit", "problem"), [("pixel", "does not say its mpp"), ("parsec", "nan × nan .*credible")]
)
def test_a_unit_without_a_length_is_no_resolution(tmp_path: Path, unit: str, problem: str) -> None:
    metadata = {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = write_ome(
        tmp_path / "p.ome.tif", texture(64, 80), "YXS", photometric="rgb", metadata=metadata
    )
    with pytest.raises(UnreadableError, match=problem):
        open_reader(path)
    with open_reader(path, plain=True) as reader:
        assert (reader.unit, reader.spacing) == ("px", 1.0)


OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">{}</OME>'
PIXELS = (
    '<Image><Pixels SizeX="{}" SizeY="30" SizeC="{}" SizeZ="{}" SizeT="{}">{}</Pixels></Image>'
)


def xml(*, x: int = 40, c: int = 3, z: int = 1, t: int = 1, inside: str = "") -> str:
    return PIXELS.format(x, c, z, t, inside)


def named(*names: str) -> str:
    return "".join(f'<Channel Name="{name}"/>' for name in names)


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        (
            xml(c=4, inside=named("DAPI", "FITC", "Cy3", "Cy5")),
            r"4 channel\(s\) \(dapi, fitc, cy3",
        ),
        (xml(c=3, inside=named("DAPI", "FITC", "Cy5")), "fluorescence"),
        (xml(c=4), "without names"),
        (xml(c=1), r"1 channel\(s\)"),
        (xml(z=12), "12 planes in depth"),
        (xml(t=10**12), "1000000000000 points in time"),
        (xml(x=-1), "SizeX '-1'"),
        (xml(inside='<TiffData FirstC="1" IFD="5"/>'), "names no page for plane 0 of 3"),
        (
            xml(inside='<TiffData IFD="0"><UUID FileName="b.tif">urn:uuid:2</UUID></TiffData>'),
            "spread over several files, such as b.tif",
        ),
        ('<BinaryOnly MetadataFile="a.companion.ome"/>', "description is in another file"),
        ("<Image>", "broken"),
    ],
)
def test_what_is_no_image_of_colour_is_refused_by_its_description(
    description: str, problem: str
) -> None:
    with pytest.raises(UnreadableError, match=problem):
        describe_ome(Path("a.tif"), OME.format(description))


def test_the_largest_image_counts_and_its_planes_are_found_where_the_xml_says() -> None:
    small, planes = xml(x=10), named("b", "G", "red")
    order = "".join(f'<TiffData FirstC="{c}" IFD="{9 - c}"/>' for c in range(3))
    with pytest.raises(UnreadableError, match=r"\(b, g, red\)"):
        describe_ome(Path("a.tif"), OME.format(small + xml(inside=planes + order)))
    planes = named("r", "G", "blue", "Near-Infrared")
    found = describe_ome(Path("a.tif"), OME.format(small + xml(c=4, inside=planes + small)))
    assert (found.image, found.images, found.planes) == (1, 2, (0, 1, 2, 3))
    assert found.bands == ("red", "green", "blue", "nir") and found.mpp_yx is None
    many = '<TiffData PlaneCount="1000000000000"/>'
    found = describe_ome(Path("a.tif"), OME.format(xml(inside=named("r", "g", "b") + many)))
    assert found.planes == (0, 1, 2)
    found = describe_ome(Path("a.tif"), OME.format(xml(inside=named("r", "g", "b") + order)))
    assert found.planes == (9, 8, 7)


def test_pages_that_are_no_image_of_colour_are_refused(tmp_path: Path) -> None:
    rgb, grey = texture(40, 50), texture(40, 50)[..., 0]
    files: dict[str, tuple[Any, dict[str, Any], str]] = {
        "grey": (grey, {"photometric": "minisblack"}, r"1 band\(s\) of colour"),
        "float": (rgb.astype(np.float32), {"photometric": "rgb"}, "32 bits"),
        "signed": (rgb.astype(np.int16), {"photometric": "rgb"}, r"16 bits \(int"),
        "lab": (rgb, {"photometric": "cielab"}, "codes its colours as cielab"),
        "stack": (np.stack([rgb] * 3), {"photometric": "rgb"}, "is a stack"),
        "imagej": (np.stack([rgb] * 3), {"photometric": "rgb", "imagej": True}, "is a stack"),
        "xr": (rgb, {"photometric": "rgb", "compression": "jpegxr"}, "JPEG|compress|no image"),
    }
    for name, (pixels, options, problem) in files.items():
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, pixels, **options, **RESOLUTION)
        with pytest.raises(UnreadableError, match=problem) as told:
            open_reader(path)
        assert path.name in str(told.value) and "\n" not in str(told.value)
    wrong = write_ome(tmp_path / "wrong.ome.tif", rgb, "YXS", photometric="rgb")
    payload = wrong.read_bytes()
    wrong.write_bytes(payload.replace(b'SizeX="50"', b'SizeX="60"'))
    with pytest.raises(UnreadableError, match="40 × 60 pixels and a page of 40 × 50"):
        open_reader(wrong)


BASE = "base.ome.tif"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small OME-TIFF."""
    folder = tmp_path_factory.mktemp("mutated")
    write_ome(folder / BASE, texture(150, 140), "YXS", photometric="rgb", levels=1)
    return folder


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 1499), st.sampled_from([0, 1, 34, 255])), min_size=1))
def test_no_damage_to_an_ome_tiff_is_more_than_a_refusal(
    base: Path, changes: list[tuple[int, int]]
) -> None:
    read_damaged(base / BASE, changes)


def test_real_ome_tiffs_of_bio_formats(shared_data: Path) -> None:
    for name, side in (("OS-1-detail.ome.tif", 1101), ("OS-2-ndpi.ome.tif", 2202)):
        path = shared_data / "slides" / name
        with open_reader(path) as reader:
            assert isinstance(reader, TiffReader) and reader.shape == (3, side, side)
            assert reader.spacing == pytest.approx(0.2271, abs=1e-4)
            found = reader.read(100, 200, 700, 800)
        with tifffile.TiffFile(path) as tiff:
            whole = tiff.asarray()
        assert np.array_equal(found, np.moveaxis(whole[100:800, 200:1000], 2, 0))
