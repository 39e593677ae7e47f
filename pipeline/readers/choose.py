"""Which reader a file gets: by its tags and its content, never by its name and never by trying one
first.

OpenSlide opens tiled GeoTIFFs as slides and rasterio opens slides as plain TIFFs. So a TIFF that
is georeferenced, has more than three bands or more than 8 bits goes to rasterio, what OpenSlide
recognises goes to OpenSlide, and the rest to rasterio.
"""

from __future__ import annotations

from pathlib import Path

import openslide

from pipeline.readers.header import read_tiff_header
from pipeline.readers.protocol import Reader, UnreadableError
from pipeline.readers.raster import RasterReader
from pipeline.readers.slide import SlideReader

SLIDE_SAMPLES, SLIDE_BITS = 3, 8


def open_reader(
    path: Path, *, source_mpp: float | None = None, source_gsd: float | None = None
) -> Reader:
    """Open the image at `path`.

    `source_mpp` (µm) or `source_gsd` (m) replaces the spacing that the file states or lacks.
    Raises an `UnreadableError`, one sentence, when the file cannot be used.
    """
    if not path.is_file():
        raise UnreadableError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise UnreadableError(f"{path} is empty (0 bytes); copy it again")
    header = read_tiff_header(path)
    for_rasterio = header is not None and (
        header.is_geo or header.samples > SLIDE_SAMPLES or header.bits > SLIDE_BITS
    )
    if source_gsd is None and not for_rasterio and _is_slide(path):
        return SlideReader(path, source_mpp)
    if header is not None and header.is_vendor_slide:
        raise UnreadableError(
            f"{path} was written by a slide scanner and OpenSlide does not accept it, so it is "
            "damaged or cut off; "
            "copy it again"
        )
    return RasterReader(path, header, source_mpp, source_gsd)


def _is_slide(path: Path) -> bool:
    try:
        return openslide.OpenSlide.detect_format(path) is not None
    except openslide.OpenSlideError as error:
        raise UnreadableError(
            f"{path} is damaged: OpenSlide cannot tell its kind ({error}); copy it again"
        ) from error
