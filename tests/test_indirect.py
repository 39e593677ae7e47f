"""Laws of files that name other files: nothing that is not an image on this machine is followed,
however it is named, and nobody on the network is asked.
"""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio import Affine

from pipeline.readers import UnreadableError, open_reader

PIXELS = np.random.default_rng(3).integers(1, 255, (3, 40, 50), np.uint8)
UTM = {"crs": "EPSG:26911", "transform": Affine(0.6, 0, 4e5, 0, -0.6, 4e6)}
SERVICE = (
    '<GDAL_WMS><Service name="TMS"><ServerUrl>{}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service>'
    "<DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY><LowerRightX>1</LowerRightX>"
    "<LowerRightY>1</LowerRightY><SizeX>50</SizeX><SizeY>40</SizeY></DataWindow>"
    "<BandsCount>3</BandsCount></GDAL_WMS>"
)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server of this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        serve = partial(httpd.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def vrt(name: str, relative: int = 0, tag: str = "SourceFilename") -> str:
    """A mosaic of three bands of the image called `name`."""
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{i}"><SimpleSource>'
        f'<{tag} relativeToVRT="{relative}">{escaped(name)}</{tag}><SourceBand>{i}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for i in (1, 2, 3)
    )
    return (
        '<VRTDataset rasterXSize="50" rasterYSize="40"><SRS>EPSG:26911</SRS>'
        f"<GeoTransform>4e5, 0.6, 0, 4e6, 0, -0.6</GeoTransform>{bands}</VRTDataset>"
    )


def write_image(path: Path) -> Path:
    shape = {"count": 3, "height": 40, "width": 50, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **UTM) as data:
        data.write(PIXELS)
    return path


def test_a_mosaic_of_local_files_is_read_and_so_is_one_of_mosaics(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image = write_image(tmp_path / "data" / "a picture.tif")
    (tmp_path / "data" / "inner.vrt").write_text(vrt("a picture.tif", relative=1))
    (tmp_path / "outer.vrt").write_text(vrt("data/inner.vrt", relative=1))
    (tmp_path / "named.tif").write_text(vrt(str(image)))
    for name in ("data/inner.vrt", "outer.vrt", "named.tif"):
        with open_reader(tmp_path / name) as reader:
            assert (reader.unit, reader.spacing) == ("m", 0.6)
            assert np.array_equal(reader.read(3, 4, 30, 40), PIXELS[:, 3:33, 4:44])


def test_what_gdal_itself_writes_for_a_mosaic_and_for_a_warp_is_read(tmp_path: Path) -> None:
    """In real VRTs there are more elements than in those above."""
    from rasterio.shutil import copy
    from rasterio.vrt import WarpedVRT

    image = write_image(tmp_path / "a.tif")
    copy(image, tmp_path / "mosaic.vrt", driver="VRT")
    with rasterio.open(image) as source, WarpedVRT(source, crs="EPSG:26910") as warped:
        copy(warped, tmp_path / "warp.vrt", driver="VRT")
    with open_reader(tmp_path / "mosaic.vrt") as reader:
        assert np.array_equal(reader.read(0, 0, 40, 50), PIXELS)
    with open_reader(tmp_path / "warp.vrt", source_gsd=0.6) as reader:
        assert reader.read(0, 0, 20, 20).any() and reader.attributes["proj:code"] == "EPSG:26910"


ELSEWHERE = [
    "/vsicurl/{}/a.tif",
    "/VSICURL/{}/a.tif",
    "/vsicurl_streaming/{}/a.tif",
    "/vsizip//vsicurl/{}/a.zip/a.tif",
    "/vsigzip//vsicurl/{}/a.gz",
    "/vsis3/bucket/a.tif",
    "/vsigs/bucket/a.tif",
    "/vsiaz/container/a.tif",
    "{}/a.tif",
    "{}/a.png",
    "vrt://{}/a.tif?bands=1",
    "WMS:{}/?LAYERS=a",
    "WMTS:{}/a.xml",
    "WCS:{}/?coverage=a",
    "STACIT:{}/a.json",
    "EEDAI:image",
    "PG:dbname=a",
    "<VRTDataset rasterXSize='1' rasterYSize='1'/>",
]


@pytest.mark.parametrize("name", [*ELSEWHERE, SERVICE])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("tag", ["SourceFilename", "sourcefilename"])
def test_a_name_that_leads_elsewhere_is_refused_and_nobody_is_asked(
    tmp_path: Path, server: tuple[str, list[str]], name: str, depth: int, tag: str
) -> None:
    url, asked = server
    (tmp_path / "0.vrt").write_text(vrt(name.format(url), tag=tag))
    for i in range(depth):
        (tmp_path / f"{i + 1}.vrt").write_text(vrt(f"{i}.vrt", relative=1))
    top = tmp_path / f"{depth}.vrt"
    with pytest.raises(UnreadableError, match="points to") as told:
        open_reader(top)
    assert str(told.value).startswith(str(top)) and "\n" not in str(told.value)
    assert asked == []


BAND = '<VRTRasterBand dataType="Byte" band="1">{}</VRTRasterBand>'
TRICKS = {
    "a name as an attribute": BAND.format('<SimpleSource SourceFilename="/vsicurl/{}/a.tif"/>'),
    "a raw file": '<VRTRasterBand subClass="VRTRawRasterBand"><ImageOffset>0</ImageOffset>'
    "<SourceFilename>/etc/passwd</SourceFilename></VRTRasterBand>",
    "a program": BAND.format(
        "<PixelFunctionLanguage>Python</PixelFunctionLanguage>"
        "<PixelFunctionCode>import os</PixelFunctionCode>"
    ),
    "a model of heights": "<GDALWarpOptions><Transformer><RPCTransformer><DEM>a.vrt</DEM>"
    "</RPCTransformer></Transformer></GDALWarpOptions>",
    "an element of another space": '<x:SourceFilename xmlns:x="a">{}/a.tif</x:SourceFilename>',
    "text": BAND.format("<SimpleSource><SourceFilename>{text}</SourceFilename></SimpleSource>"),
    "a device": BAND.format(
        "<SimpleSource><SourceFilename>/dev/zero</SourceFilename></SimpleSource>"
    ),
    "no XML": "<VRTRasterBand>",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_no_plain_mosaic_is_refused(
    tmp_path: Path, server: tuple[str, list[str]], trick: str
) -> None:
    url, asked = server
    (tmp_path / "text.txt").write_text("not an image")
    inside = TRICKS[trick].replace("{text}", str(tmp_path / "text.txt")).replace("{}", url)
    path = tmp_path / "a.vrt"
    path.write_text(f'<VRTDataset rasterXSize="50" rasterYSize="40">{inside}</VRTDataset>')
    with pytest.raises(UnreadableError, match=r"a\.vrt (is a VRT|points to)"):
        open_reader(path)
    assert asked == []


def test_a_chain_without_end_and_one_too_long_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.vrt").write_text(vrt("b.vrt", relative=1))
    (tmp_path / "b.vrt").write_text(vrt("a.vrt", relative=1))
    with pytest.raises(UnreadableError, match="name itself"):
        open_reader(tmp_path / "a.vrt")
    write_image(tmp_path / "0.vrt")
    for i in range(10):
        (tmp_path / f"{i + 1}.vrt").write_text(vrt(f"{i}.vrt", relative=1))
    with pytest.raises(UnreadableError, match="more than 8 deep"):
        open_reader(tmp_path / "10.vrt")


@pytest.mark.parametrize("suffix", [".tif.msk", ".tif.ovr", ".msk", ".ovr"])
def test_a_mask_or_overview_beside_an_image_must_be_a_tiff(
    tmp_path: Path, server: tuple[str, list[str]], suffix: str
) -> None:
    """GDAL opens them as whatever they are: here as a VRT that names a service."""
    url, asked = server
    image = write_image(tmp_path / "a.tif")
    (tmp_path / f"a{suffix}").write_text(vrt(SERVICE.format(url)))
    (tmp_path / "outer.vrt").write_text(vrt("a.tif", relative=1))
    for path in (image, tmp_path / "outer.vrt"):
        with pytest.raises(UnreadableError, match=r"beside it.*no TIFF"):
            open_reader(path)
    assert asked == []


def test_a_service_described_in_a_file_of_its_own_is_text(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    url, asked = server
    for name in ("a.tif", "a.vrt", "a.xml", "a.jpg"):
        (tmp_path / name).write_text(SERVICE.format(url))
        with pytest.raises(UnreadableError, match="no image that can be read here"):
            open_reader(tmp_path / name)
    assert asked == []
