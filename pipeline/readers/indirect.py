"""Files that name other files: VRTs, and the masks and overviews that lie beside an image.

GDAL follows such a name wherever it leads: into a URL, a bucket, a service, a program. So a VRT is
read here first, and everything that it names, VRTs in turn, must be an image in a file of this
machine. Only what a mosaic or a warp of local files is made of is allowed in it, element by
element and attribute by attribute, in any case of letters, as GDAL reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from pipeline.readers.header import IMAGE_BEGINNINGS, TIFF_BEGINNINGS
from pipeline.readers.protocol import UnreadableError

VRT_MARK = b"<VRTDataset"
GDAL_HEADER_BYTES = 1024
MAX_VRT_BYTES = 1 << 26
MAX_DEPTH = 8
JPEG_2000_BEGINNINGS = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
BEGINNINGS = (*TIFF_BEGINNINGS, *IMAGE_BEGINNINGS, *JPEG_2000_BEGINNINGS, b"EHFA_HEADER")
SIDECARS = (".msk", ".ovr")
NAMING = ("sourcefilename", "sourcedataset")
MOSAIC = """
    vrtdataset srs geotransform gcplist gcp metadata mdi overviewlist maskband vrtrasterband
    colorinterp nodatavalue hidenodatavalue description unittype offset scale categorynames
    category colortable entry histograms histitem histmin histmax bucketcount includeoutofrange
    approximate histcounts blockxsize blockysize overview simplesource complexsource averagedsource
    kernelfilteredsource kernel size coefs sourceband sourceproperties openoptions ooi srcrect
    dstrect nodata usemaskband scaleoffset scaleratio lut colortablecomponent exponent srcmin
    srcmax dstmin dstmax clamp resampling pixelfunctiontype pixelfunctionarguments
    sourcetransfertype
"""
WARP = """
    gdalwarpoptions warpmemorylimit resamplealg workingdatatype option transformer
    approxtransformer maxerror maxerrorforward maxerrorreverse basetransformer
    genimgprojtransformer srcgeotransform srcinvgeotransform dstgeotransform dstinvgeotransform
    reprojecttransformer reprojectiontransformer sourcesrs targetsrs options bandlist bandmapping
    srcnodatareal srcnodataimag dstnodatareal dstnodataimag srcalphaband dstalphaband
    sourcecrs targetcrs
"""
ALLOWED = """
    rasterxsize rasterysize subclass datatype band blockxsize blockysize relativetovrt shared
    xoff yoff xsize ysize key domain format dataaxistosrsaxismapping coordinateepoch resampling
    name c1 c2 c3 c4 id info pixel line x y z projection normalized src dst
"""
ELEMENTS = frozenset((*MOSAIC.split(), *WARP.split(), *NAMING))
ATTRIBUTES = frozenset(ALLOWED.split())


def is_vrt(path: Path) -> bool:
    """Whether GDAL would take a file for a VRT."""
    with path.open("rb") as stream:
        return VRT_MARK.lower() in stream.read(GDAL_HEADER_BYTES).lower()


def check_indirect(path: Path) -> None:
    """Raise an `UnreadableError` unless all that the image at `path` names is on this machine."""
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(path, ())]
    seen: set[Path] = set()
    while waiting:
        item, above = waiting.pop()
        place = item.resolve()
        if place in above or len(above) > MAX_DEPTH:
            what = "itself" if place in above else f"VRTs, more than {MAX_DEPTH} deep"
            raise UnreadableError(
                f"{path} is a VRT that names VRTs that name {what}; make one file of it "
                "(gdal_translate)"
            )
        if place in seen:
            continue
        seen.add(place)
        _check_sidecars(path, item)
        if is_vrt(item):
            waiting += [(source, (*above, place)) for source in _sources(path, item)]


def _check_sidecars(path: Path, item: Path) -> None:
    """A mask or overviews in a file beside `item` must be a TIFF: GDAL opens them whatever they
    are.
    """
    for suffix in SIDECARS:
        for beside in (item.with_name(item.name + suffix), item.with_suffix(suffix)):
            if beside != item and beside.is_file() and not _begins_with(beside, TIFF_BEGINNINGS):
                raise UnreadableError(
                    f"{path} has {beside.name} beside it, which GDAL would read as its mask or "
                    "overviews and which is no TIFF; move it away"
                )


def _sources(path: Path, vrt: Path) -> Iterator[Path]:
    """The files that a VRT names."""
    if vrt.stat().st_size > MAX_VRT_BYTES:
        raise UnreadableError(
            f"{path} has a description of more than {MAX_VRT_BYTES >> 20} MiB; make one file of "
            "it (gdal_translate)"
        )
    try:
        root = ElementTree.fromstring(vrt.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UnreadableError(
            f"{path} is a VRT whose XML is broken ({error}); write it again"
        ) from error
    for element in root.iter():
        tag = element.tag.lower()
        unknown = sorted(k for k in element.attrib if k.lower() not in ATTRIBUTES)
        if tag not in ELEMENTS or unknown:
            what = f"{element.tag} {unknown[0]}" if unknown else element.tag
            raise UnreadableError(
                f"{path} is a VRT with {what}, and only mosaics and warps of files of this "
                "machine are followed; make one file of it (gdal_translate)"
            )
        if tag in NAMING:
            yield _source(path, vrt, element)


def _source(path: Path, vrt: Path, element: ElementTree.Element) -> Path:
    """The file that an element names, if it is an image of this machine."""
    text = (element.text or "").strip()
    relative = {k.lower(): v for k, v in element.attrib.items()}.get("relativetovrt", "0")
    named = vrt.parent / text if relative.strip() == "1" else Path(text)
    # A name that GDAL does not take for a path never begins as one: wms:, http://, /vsicurl/, <.
    if "/vsi" in text.lower() or "://" in text or text.startswith("<") or "\0" in text:
        raise UnreadableError(
            f"{path} points to {text[:200]!r}, which is not a file of this machine, and nothing "
            "is fetched from elsewhere; download what it names first"
        )
    if not named.is_file():
        raise UnreadableError(
            f"{path} points to {text[:200]!r}, and there is no such file; put it there or name "
            "another"
        )
    if not _begins_with(named, BEGINNINGS) and not is_vrt(named):
        raise UnreadableError(
            f"{path} points to {text[:200]!r}, which is no TIFF, PNG, JPEG, JPEG 2000, ERDAS "
            "image or VRT; convert it"
        )
    return named


def _begins_with(path: Path, beginnings: tuple[bytes, ...]) -> bool:
    with path.open("rb") as stream:
        return stream.read(max(map(len, beginnings))).startswith(beginnings)
