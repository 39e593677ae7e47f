"""Which reader a file gets: by its tags and its content, never by its name and never by trying one
first.

OpenSlide opens tiled GeoTIFFs as slides, sees one level of an OME-TIFF and of some compressions
nothing; rasterio opens slides as plain TIFFs. So an OME-TIFF goes to tifffile; a TIFF that is
georeferenced (or said to be aerial) or has more than three bands, to rasterio; what a scanner
wrote, to OpenSlide, and so does a tiled TIFF that it can decode; every other TIFF, to tifffile.
What is no TIFF goes to OpenSlide where that recognises it, else to rasterio.
"""

from __future__ import annotations

from pathlib import Path

import openslide

from pipeline.readers.header import TiffHeader, read_tiff_header
from pipeline.readers.protocol import Reader, UnreadableError
from pipeline.readers.raster import RasterReader
from pipeline.readers.segments import DECODABLE
from pipeline.readers.slide import GENERIC, SlideReader
from pipeline.readers.tiff import TiffReader

SLIDE_SAMPLES, SLIDE_BITS = 3, 8
OPENSLIDE_COMPRESSIONS = (1, 5, 7, 8, 32946, 32773, 50000)


def open_reader(
    path: Path,
    *,
    source_mpp: float | None = None,
    source_gsd: float | None = None,
    plain: bool = False,
) -> Reader:
    """Open the image at `path`.

    `source_mpp` (µm) or `source_gsd` (m) replaces the spacing that the file states or lacks; with
    `plain` a pixel is the unit of length whatever it states.
    Raises an `UnreadableError`, one sentence, when the file cannot be used.
    """
    if not path.is_file():
        raise UnreadableError(f"{path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise UnreadableError(f"{path} is empty (0 bytes); copy it again")
    header = read_tiff_header(path)
    if header is None:
        if source_gsd is None and not plain and _format(path) is not None:
            return SlideReader(path, source_mpp)
        return RasterReader(path, None, source_mpp, source_gsd, plain)
    if header.is_ome:
        return TiffReader(path, True, source_mpp, source_gsd, plain)
    if header.is_geo or header.samples > SLIDE_SAMPLES or source_gsd is not None:
        return RasterReader(path, header, source_mpp, source_gsd, plain)
    if not plain and _is_for_openslide(path, header):
        return SlideReader(path, source_mpp)
    if header.compression in DECODABLE:
        return TiffReader(path, False, source_mpp, source_gsd, plain)
    return RasterReader(path, header, source_mpp, source_gsd, plain)


def _is_for_openslide(path: Path, header: TiffHeader) -> bool:
    """Whether a TIFF is a slide of a scanner, or a tiled one that OpenSlide can decode."""
    if header.bits > SLIDE_BITS:
        return False
    found = _format(path)
    if found is None and header.is_vendor_slide:
        raise UnreadableError(
            f"{path} was written by a slide scanner and OpenSlide does not accept it, so it is "
            "damaged or cut off; copy it again"
        )
    decodes = header.compression in OPENSLIDE_COMPRESSIONS
    return found is not None and (found != GENERIC or decodes)


def _format(path: Path) -> str | None:
    try:
        return openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError as error:
        raise UnreadableError(
            f"{path} is damaged: OpenSlide cannot tell its kind ({error}); copy it again"
        ) from error
