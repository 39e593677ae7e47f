"""Boxes of one page of a TIFF, decoded tile by tile or strip by strip through tifffile.

A page is a lattice of segments (tiles or strips), for each sample anew where samples are planar.
Only those that a box touches are read, and of strips that are not compressed only the rows. What a
segment decodes to is bounded before it is decoded: a codec of pictures (JPEG, JPEG 2000, PNG,
WebP, JPEG XL) would allocate whatever the picture inside claims to be, so its claim must be that
of the page. A segment that the file does not hold was never scanned.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import tifffile
from jaxtyping import Bool, UInt

NOTHING = (1,)
BYTES_OF_ONE_SIZE = (5, 8, 32946, 32773, 50000, 34926, 34925)
JPEG, JPEG_2000, PNG, WEBP, JPEG_XL = (7,), (34712,), (34933,), (50001, 34927), (50002, 52546)
PICTURES = (*JPEG, *JPEG_2000, *PNG, *WEBP, *JPEG_XL)
DECODABLE = frozenset((*NOTHING, *BYTES_OF_ONE_SIZE, *PICTURES))
FRAMES_OF_JPEG = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
ALONE_IN_JPEG = frozenset((0x01, *range(0xD0, 0xDA)))
CODESTREAM_2000 = b"\xff\x4f\xff\x51"


class SegmentError(ValueError):
    """A tile or strip cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Segment:
    """Where one tile or strip lies: its number in the file's list, its sample, its corner."""

    index: int
    sample: int
    y: int
    x: int


class Page:
    """One page (h, w) of `samples` colours, read by box."""

    def __init__(self, page: tifffile.TiffPage) -> None:
        self._page = page
        self.samples: int = page.samplesperpixel
        self.shape: tuple[int, int] = (page.imagelength, page.imagewidth)
        self._is_planar = self.samples > 1 and page.planarconfig == 2
        self._side = (
            (page.tilelength, page.tilewidth)
            if page.is_tiled
            else (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        )

    def read(
        self, y: int, x: int, height: int, width: int, missing: int
    ) -> UInt[np.ndarray, "samples h w"]:
        """The pixels of a box, `missing` where the file holds no segment; `SegmentError`."""
        dtype = cast(np.dtype, self._page.dtype)
        pixels = np.full((self.samples, height, width), missing, dtype)
        for segment in self._segments(y, x, height, width):
            top, left = max(y, segment.y), max(x, segment.x)
            bottom = min(y + height, segment.y + self._side[0], self.shape[0])
            right = min(x + width, segment.x + self._side[1], self.shape[1])
            values = self._decode(segment, top - segment.y, bottom - segment.y)
            if values is not None:
                samples = slice(segment.sample, segment.sample + values.shape[2])
                part = values[:, left - segment.x : right - segment.x]
                place = pixels[samples, top - y : bottom - y, left - x : right - x]
                place[...] = np.moveaxis(part, 2, 0)
        return pixels

    def read_held(self, y: int, x: int, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """Which pixels of a box the file holds."""
        held = np.ones((height, width), bool)
        for segment in self._segments(y, x, height, width):
            if self._page.databytecounts[segment.index] == 0:
                top, left = max(segment.y - y, 0), max(segment.x - x, 0)
                bottom, right = segment.y + self._side[0] - y, segment.x + self._side[1] - x
                held[top:bottom, left:right] = False
        return held

    def _segments(self, y: int, x: int, height: int, width: int) -> Iterator[Segment]:
        """The segments that a box touches, in the order of the file's list."""
        tall, wide = self._side
        down, across = -(-self.shape[0] // tall), -(-self.shape[1] // wide)
        for sample in range(self.samples if self._is_planar else 1):
            for row in range(y // tall, -(-(y + height) // tall)):
                for column in range(x // wide, -(-(x + width) // wide)):
                    index = (sample * down + row) * across + column
                    yield Segment(index, sample, row * tall, column * wide)

    def _decode(self, segment: Segment, top: int, bottom: int) -> np.ndarray | None:
        """Rows top .. bottom of a segment as (rows, w, samples), None where there is none."""
        page, stream = self._page, self._page.parent.filehandle
        offset, count = page.dataoffsets[segment.index], page.databytecounts[segment.index]
        if count == 0:
            return None
        samples = 1 if self._is_planar else self.samples
        if page.compression in NOTHING and page.predictor == 1 and page.fillorder == 1:
            dtype = cast(np.dtype, page.dtype).newbyteorder(page.parent.byteorder)
            row_bytes = self._side[1] * samples * dtype.itemsize
            stream.seek(offset + top * row_bytes)
            data = stream.read((bottom - top) * row_bytes)
            if len(data) < (bottom - top) * row_bytes or bottom * row_bytes > count:
                raise SegmentError(f"it has {count} bytes, too few for {bottom} rows")
            return np.frombuffer(data, dtype).reshape(bottom - top, self._side[1], samples)
        stream.seek(offset)
        data = stream.read(count)
        self._check_picture(data)
        # What tifffile and imagecodecs raise for damaged data has no common base but Exception.
        try:
            more = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            values, _, _ = page.decode(data, segment.index, **more)
        except Exception as error:
            raise SegmentError(f"{type(error).__name__}: {error}") from error
        assert values is not None
        return values[0, top:bottom]

    def _check_picture(self, data: bytes) -> None:
        """Refuse a picture that claims to be larger than its segment."""
        if self._page.compression not in PICTURES:
            return
        try:
            claim = picture_size(data, self._page.compression)
        except (IndexError, struct.error, ValueError) as error:
            raise SegmentError("its picture has no header that can be read") from error
        if claim[0] > self._side[0] or claim[1] > self._side[1]:
            raise SegmentError(
                f"its picture claims {claim[0]} × {claim[1]} pixels and the page has tiles or "
                f"strips of {self._side[0]} × {self._side[1]}"
            )


def picture_size(data: bytes, compression: int) -> tuple[int, int]:
    """(h, w) that the header of an encoded picture claims; a `ValueError`, `IndexError` or
    `struct.error` for one without.
    """
    if compression in JPEG:
        return _jpeg_size(data)
    if compression in JPEG_2000:
        start = data.index(CODESTREAM_2000) + 8  # marker, length, capabilities; then the grid
        width, height, left, top = struct.unpack_from(">4I", data, start)
        return height - top, width - left
    if compression in PNG:
        width, height = struct.unpack_from(">2I", data, 16)
        return height, width
    if compression in WEBP:
        return _webp_size(data)
    return _jpeg_xl_size(data)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """From the frame header of a JPEG, which comes after other markers."""
    place = 2
    while True:
        while data[place] != 0xFF or data[place + 1] == 0xFF:
            place += 1
        marker = data[place + 1]
        if marker in FRAMES_OF_JPEG:
            height, width = struct.unpack_from(">2H", data, place + 5)
            return height, width
        place += 2
        if marker not in ALONE_IN_JPEG:
            place += struct.unpack_from(">H", data, place)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<2H", data, 26))
    return height, width


def _jpeg_xl_size(data: bytes) -> tuple[int, int]:
    """From the first bits of a JPEG XL codestream, alone or in the `jxlc` box of its container."""
    start = 0 if data[:2] == b"\xff\x0a" else data.index(b"jxlc\xff\x0a") + 4
    bits, place = int.from_bytes(data[start + 2 : start + 14], "little"), 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return bits >> (place - count) & ((1 << count) - 1)

    def side() -> int:
        return take((9, 13, 18, 30)[take(2)]) + 1

    def small_side() -> int:
        return (take(5) + 1) * 8

    read_side = small_side if take(1) else side
    height = read_side()
    ratio = take(3)
    over = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
    return height, height * over[ratio - 1][0] // over[ratio - 1][1] if ratio else read_side()
