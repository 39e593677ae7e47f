"""What the header of a TIFF claims, checked against the file before anything is decoded.

A header is a few hundred bytes that may ask for any amount of memory. So before a pixel is read:
the index must list every tile, the tiles must lie inside the file, one tile must fit in memory,
and the pixels must not outnumber what a compressor could have made of them.
"""

from __future__ import annotations

import logging
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from pipeline.readers.protocol import UnreadableError

MAX_TILE_BYTES = 1 << 28
MAX_COMPRESSION_RATIO = 4000
GEO_TAGS = (33550, 33922, 34264, 34735)
VENDOR_DESCRIPTIONS = ("Aperio", "Hamamatsu", "Leica")
UM_PER = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0}
RESOLUTION_UNITS_UM = {2: 25400.0, 3: 10000.0}


@dataclass(frozen=True)
class TiffHeader:
    """The first image of a TIFF file; `mpp_yx` is (y, x) in µm as OME-XML or the resolution tags
    say it.
    """

    height: int
    width: int
    samples: int
    bits: int
    is_geo: bool
    is_vendor_slide: bool
    mpp_yx: tuple[float, float] | None
    mpp_source: str


def read_tiff_header(path: Path) -> TiffHeader | None:
    """The header of a TIFF file, None for a file of another kind; `UnreadableError` when it cannot
    be true.
    """
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        tiff = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return None
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise UnreadableError(f"{path} is a TIFF whose header is damaged ({error})") from error
    with tiff:
        try:
            page = tiff.pages.first
            assert isinstance(page, tifffile.TiffPage)
        except (IndexError, struct.error, ValueError, AssertionError) as error:
            raise UnreadableError(
                f"{path} is a TIFF whose first image is damaged or cut off"
            ) from error
        _check_claims(path, page)
        description = page.description
        mpp_yx, source = _spacing(page, description, bool(tiff.is_ome))
        return TiffHeader(
            height=int(page.imagelength),
            width=int(page.imagewidth),
            samples=int(page.samplesperpixel),
            bits=int(page.bitspersample),
            is_geo=any(tag in page.tags for tag in GEO_TAGS),
            is_vendor_slide=description.startswith(VENDOR_DESCRIPTIONS),
            mpp_yx=mpp_yx,
            mpp_source=source,
        )


def check_claim(path: Path, height: int, width: int, claimed: int) -> None:
    """Refuse a header that claims more pixels (`claimed` bytes of them) than its file can hold."""
    held = path.stat().st_size
    if claimed > MAX_COMPRESSION_RATIO * held:
        raise UnreadableError(
            f"{path} claims {height} × {width} pixels ({claimed / 1e9:.1f} GB) and has {held} "
            "bytes, more than "
            "any compressor could have saved; the header is wrong or the file is hostile"
        )


def _check_claims(path: Path, page: tifffile.TiffPage) -> None:
    size = path.stat().st_size
    depth = page.bitspersample / 8
    tile = math.prod(page.chunks) * depth
    if tile > MAX_TILE_BYTES:
        raise UnreadableError(
            f"{path} has tiles of {tile / 1e6:.0f} MB each and at most {MAX_TILE_BYTES / 1e6:.0f} "
            "MB are decoded "
            "at once; write it again with tiles of 512 × 512"
        )
    needed = math.prod(page.chunked)
    if len(page.dataoffsets) < needed:
        raise UnreadableError(
            f"{path} claims {page.imagelength} × {page.imagewidth} pixels, which is {needed} "
            "tiles, and lists "
            f"{len(page.dataoffsets)}; the header is wrong or the file is cut off"
        )
    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if max(ends, default=0) > size:
        raise UnreadableError(
            f"{path} has {size} bytes and its last tile would end at {max(ends)}; the file is cut "
            "off, copy it again"
        )
    present = sum(count > 0 for count in page.databytecounts)
    check_claim(path, page.imagelength, page.imagewidth, int(present * tile))


def _spacing(
    page: tifffile.TiffPage, description: str, is_ome: bool
) -> tuple[tuple[float, float] | None, str]:
    if is_ome:
        pixels = ElementTree.fromstring(description).find(".//{*}Pixels")
        sizes = {} if pixels is None else pixels.attrib
        if "PhysicalSizeX" in sizes:
            x, y = (
                float(sizes[f"PhysicalSize{axis}"])
                * UM_PER.get(sizes.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
                for axis in "XY"
            )
            return (y, x), "OME PhysicalSize"
    unit = page.tags.get("ResolutionUnit")
    ratios = [page.tags.get(f"{axis}Resolution") for axis in "YX"]
    um = RESOLUTION_UNITS_UM.get(int(unit.value) if unit else 0)
    if um is None or None in ratios:
        return None, "nowhere"
    per_unit = [r.value[0] / r.value[1] if r and r.value[1] else math.nan for r in ratios]
    y, x = (um / p if p else math.inf for p in per_unit)
    return (y, x), "TIFF resolution tags"
