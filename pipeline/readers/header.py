"""What the header of a TIFF claims, checked against the file before anything is decoded.

A header is a few hundred bytes that may ask for any amount of memory. So before a pixel is read:
the index must list every tile, the tiles must lie inside the file, one tile must fit in memory,
and the pixels must not outnumber what a compressor could have made of them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import tifffile

from pipeline.readers.protocol import UnreadableError

MAX_TILE_BYTES = 1 << 28
MAX_COMPRESSION_RATIO = 4000
GEO_TAGS = (33550, 33922, 34264, 34735)
VENDOR_DESCRIPTIONS = ("Aperio", "Hamamatsu", "Leica")
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff")
KINDS = {
    **dict.fromkeys(TIFF_BEGINNINGS, "a damaged TIFF"),
    **dict.fromkeys(IMAGE_BEGINNINGS, "a damaged PNG or JPEG"),
    b"GIF8": "a GIF",
    b"RIFF": "a WebP or other RIFF file",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format": "an SQLite database",
}
KIND_BYTES = 512
CONTROLS = {chr(i) for i in range(32)} - set("\t\n\r\f")
RESOLUTION_UNITS_UM = {2: 25400.0, 3: 10000.0}


@dataclass(frozen=True)
class TiffHeader:
    """The first image of a TIFF file; `mpp_yx` is (y, x) in µm as the resolution tags say it."""

    height: int
    width: int
    samples: int
    bits: int
    compression: int
    is_geo: bool
    is_ome: bool
    is_vendor_slide: bool
    mpp_yx: tuple[float, float] | None
    mpp_source: str


def read_tiff_header(path: Path) -> TiffHeader | None:
    """The header of a TIFF file, None for a file of another kind; `UnreadableError` when it cannot
    be true.
    """
    if not _begins_with(path, TIFF_BEGINNINGS):
        return None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            assert isinstance(page, tifffile.TiffPage)
            return _header(path, page, bool(tiff.is_ome))
    except UnreadableError:
        raise
    # A damaged header makes tifffile raise anything: 1,500 mutated files, eleven kinds of error.
    except Exception as error:
        raise UnreadableError(
            f"{path} is a TIFF of {path.stat().st_size} bytes whose header is damaged or cut off; "
            "copy it again"
        ) from error


def _header(path: Path, page: tifffile.TiffPage, is_ome: bool) -> TiffHeader:
    sides = (page.imagelength, page.imagewidth, *page.chunks)
    if not all(isinstance(n, int) and n > 0 for n in (*sides, page.samplesperpixel)):
        raise ValueError("a side that is no positive number")
    check_claims(path, page)
    description = page.description
    mpp_yx, source = tag_spacing(page)
    return TiffHeader(
        height=page.imagelength,
        width=page.imagewidth,
        samples=page.samplesperpixel,
        bits=page.bitspersample,
        compression=int(page.compression),
        is_geo=any(tag in page.tags for tag in GEO_TAGS),
        is_ome=is_ome,
        is_vendor_slide=description.startswith(VENDOR_DESCRIPTIONS),
        mpp_yx=mpp_yx,
        mpp_source=source,
    )


def begins_like_image(path: Path) -> bool:
    """Whether a file begins as a TIFF, PNG, JPEG or DICOM file does; False for one that cannot
    be opened.
    """
    try:
        return _begins_with(path, (*TIFF_BEGINNINGS, *IMAGE_BEGINNINGS)) or is_dicom(path)
    except OSError:
        return False


def is_dicom(path: Path) -> bool:
    """Whether a file begins as a DICOM file does: 128 bytes of anything, then DICM."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _begins_with(path: Path, beginnings: tuple[bytes, ...]) -> bool:
    with path.open("rb") as stream:
        return stream.read(4).startswith(beginnings)


def kind_of(path: Path) -> str:
    """What the first bytes of a file say that it is, for people."""
    with path.open("rb") as stream:
        start = stream.read(KIND_BYTES)
    for beginning, kind in KINDS.items():
        if start.startswith(beginning):
            return kind
    if start[128:132] == b"DICM":
        return "a DICOM file"
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        text = start[: error.start].decode() if len(start) - error.start < 4 else "\0"
    return "text" if text.isprintable() or not set(text) & CONTROLS else "data of no known kind"


def check_claim(path: Path, height: int, width: int, claimed: int) -> None:
    """Refuse a header that claims more pixels (`claimed` bytes of them) than its file can hold."""
    held = path.stat().st_size
    if claimed > MAX_COMPRESSION_RATIO * held:
        raise UnreadableError(
            f"{path} claims {height} × {width} pixels ({claimed / 1e6:.1f} MB) and has {held} "
            "bytes, more than "
            "any compressor could have saved; the header is wrong or the file is hostile"
        )


def check_claims(path: Path, page: tifffile.TiffPage) -> None:
    """Refuse a page that claims what its file cannot hold, or tiles too large to decode.

    Strips that are not compressed are read row by row, so that they may be of any size.
    """
    size = path.stat().st_size
    depth = page.bitspersample / 8
    tile = math.prod(page.chunks) * depth
    by_row = page.compression == 1 and not page.is_tiled
    if tile > MAX_TILE_BYTES and not by_row:
        raise UnreadableError(
            f"{path} has tiles of {tile / 1e6:.0f} MB each and at most {MAX_TILE_BYTES / 1e6:.0f} "
            "MB are decoded "
            "at once; write it again with tiles of 512 × 512"
        )
    needed = math.prod(page.chunked)
    listed = min(len(page.dataoffsets), len(page.databytecounts))
    if listed < needed:
        raise UnreadableError(
            f"{path} claims {page.imagelength} × {page.imagewidth} pixels, which is {needed} "
            "tiles, and lists "
            f"{listed}; the header is wrong or the file is cut off"
        )
    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
    cut = next((i for i, end in enumerate(ends) if end > size), None)
    if cut is not None:
        y, x = _corner(page, cut)
        raise UnreadableError(
            f"{path} has {size} bytes and its tile at y={y}, x={x} would end at {ends[cut]}; the "
            "file is cut off, copy it again"
        )
    present = sum(count > 0 for count in page.databytecounts)
    check_claim(path, page.imagelength, page.imagewidth, int(present * tile))


def _corner(page: tifffile.TiffPage, index: int) -> tuple[int, int]:
    """(y, x) of the tile or strip that comes as number `index` in the file's list."""
    height, width = (
        (page.tilelength, page.tilewidth)
        if page.is_tiled
        else (page.rowsperstrip, page.imagewidth)
    )
    down, across = -(-page.imagelength // height), -(-page.imagewidth // width)
    row, column = divmod(index % (down * across), across)
    return row * height, column * width


def tag_spacing(page: tifffile.TiffPage) -> tuple[tuple[float, float] | None, str]:
    """(y, x) of a pixel in µm by the resolution tags, None without them; and that they say it."""
    unit = page.tags.get("ResolutionUnit")
    ratios = [page.tags.get(f"{axis}Resolution") for axis in "YX"]
    um = RESOLUTION_UNITS_UM.get(int(unit.value) if unit else 0)
    if um is None or None in ratios:
        return None, ""
    per_unit = [r.value[0] / r.value[1] if r and r.value[1] else math.nan for r in ratios]
    y, x = (um / p if p else math.inf for p in per_unit)
    return (y, x), "TIFF resolution tags"
