"""Whole slides, through OpenSlide: 8-bit RGB, spacing in µm.

OpenSlide places a level by one average downsample, so a level whose sides are not exact fractions
of level 0 would be read a fraction of a pixel off, blurred, and differently from tile to tile.
Only levels with whole downsamples are offered. Pixels that a slide does not have come back
transparent; they are painted in its background colour.

A scanner may have looked at a part of the glass only (MRXS: a tenth), and the file says where
(`openslide.bounds-*`). The reader's image is that part, widened to the left and upwards to whole
pixels of the levels; `attributes["slide:origin"]` is its corner (y, x) in level-0 pixels of the
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import openslide
from jaxtyping import Bool, UInt, UInt8

from pipeline.readers.levels import is_picked
from pipeline.readers.protocol import (
    Closing,
    MaskKind,
    SpacingUnit,
    TileError,
    UnreadableError,
    check_box,
    checked_spacing,
    number,
    read_patiently,
)

STRIP_PX = 512
OPAQUE = 255
GENERIC = "generic-tiff"  # written by anyone; scanners average
CACHED_ROWS = 16
STATED_MPP = ("aperio.MPP",)  # what OpenSlide drops where it is no number
MAX_ALIGNMENT_PX = 64  # levels that are coarser and not whole at the corner are left out


class SlideReader(Closing):
    """A `Reader` of what OpenSlide opens. `source_mpp` replaces what the file says."""

    dtype: Literal["uint8", "uint16"] = "uint8"
    bands: tuple[str, ...] = ("red", "green", "blue")
    unit: SpacingUnit = "um"
    mask_kind: MaskKind = "tissue"

    def __init__(self, path: Path, source_mpp: float | None = None) -> None:
        self.path = path
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise UnreadableError(
                f"{path} is damaged or without the files that belong to it: OpenSlide knows its "
                f"kind and cannot open it ({error}); copy it again"
            ) from error
        sizes = self._slide.level_dimensions
        width, height = sizes[0]
        exact = [
            (round(width / w), level)
            for level, (w, h) in enumerate(sizes)
            if h * round(width / w) == height and w * round(width / w) == width
        ]
        by_downsample = dict(reversed(exact))
        alignment = max(d for d in by_downsample if d <= MAX_ALIGNMENT_PX)
        self._top, self._left, *sides = self._bounds(height, width, alignment)
        self.shape = (3, sides[0], sides[1])
        self.downsamples = tuple(
            d
            for d in sorted(by_downsample)
            if self._top % d == 0 and self._left % d == 0 and min(sides) >= d
        )
        self._levels = tuple(by_downsample[d] for d in self.downsamples)
        self.attributes: dict[str, Any] = {"slide:origin": [self._top, self._left]}
        colour = self._slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8)
        self.spacing, self.spacing_source = self._find_spacing(source_mpp)
        vendor = self._slide.properties.get(openslide.PROPERTY_NAME_VENDOR)
        if (
            vendor == GENERIC
            and len(self.downsamples) > 1
            and is_picked(self.read, self.level_shape(1), self.downsamples[1], TileError)
        ):
            self.downsamples = (1,)

    def level_shape(self, level: int) -> tuple[int, int]:
        """(h, w) of `level`, of its whole pixels."""
        return self.shape[1] // self.downsamples[level], self.shape[2] // self.downsamples[level]

    def read(
        self, y: int, x: int, height: int, width: int, level: int = 0
    ) -> UInt[np.ndarray, "c h w"]:
        """The pixels of a box of `level`; see `Reader.read`."""
        check_box(self.path, self.level_shape(level), y, x, height, width)
        pixels = np.empty((3, height, width), np.uint8)
        for top in range(0, height, STRIP_PX):
            strip = min(STRIP_PX, height - top)
            rgba = self._read_rgba((y + top, x, strip, width), level)
            _paint(rgba, self._background, pixels[:, top : top + strip])
        return pixels

    def read_valid(self, y: int, x: int, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """Which level-0 pixels of a box the slide has."""
        check_box(self.path, self.level_shape(0), y, x, height, width)
        return self._read_rgba((y, x, height, width), 0)[3] == OPAQUE

    def close(self) -> None:
        """Give the handle back."""
        self._slide.close()

    def _read_rgba(self, box: tuple[int, int, int, int], level: int) -> UInt8[np.ndarray, "4 h w"]:
        downsample = self.downsamples[level]

        def read_box(y: int, x: int, height: int, width: int) -> np.ndarray:
            corner = (self._left + x * downsample, self._top + y * downsample)
            image = self._slide.read_region(corner, self._levels[level], (width, height))
            return np.moveaxis(np.asarray(image), 2, 0)

        return read_patiently(
            read_box, self._reopen, openslide.OpenSlideError, box, f"level {level} of {self.path}"
        )

    def _bounds(self, height: int, width: int, alignment: int) -> tuple[int, int, int, int]:
        """The box (y, x, height, width) that was scanned, of a slide of height × width; all of it
        where the file says nothing that can be.
        """
        keys = (
            openslide.PROPERTY_NAME_BOUNDS_Y,
            openslide.PROPERTY_NAME_BOUNDS_X,
            openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
            openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        )
        texts = [self._slide.properties.get(key, "") for key in keys]
        if not all(text.isdecimal() for text in texts):
            return 0, 0, height, width
        y, x, tall, wide = map(int, texts)
        bottom, right = min(y + tall, height), min(x + wide, width)
        top, left = y // alignment * alignment, x // alignment * alignment
        if bottom <= y or right <= x:
            return 0, 0, height, width
        return top, left, bottom - top, right - left

    def _reopen(self) -> None:
        self._slide.close()
        self._slide = openslide.OpenSlide(self.path)

    def _find_spacing(self, source_mpp: float | None) -> tuple[float, str]:
        if source_mpp is not None:
            return checked_spacing(self.path, (source_mpp, source_mpp), "um", "given"), "given"
        properties = self._slide.properties
        texts = [
            properties.get(name)
            for name in (openslide.PROPERTY_NAME_MPP_Y, openslide.PROPERTY_NAME_MPP_X)
        ]
        if None in texts:
            stated = (f"{key} is {properties[key]!r}" for key in STATED_MPP if key in properties)
            return checked_spacing(self.path, None, "um", next(stated, "")), ""
        y, x = (number(text) for text in texts if text is not None)
        source = f"{properties.get(openslide.PROPERTY_NAME_VENDOR)}, openslide.mpp-x"
        return checked_spacing(self.path, (y, x), "um", source), source


def _paint(
    rgba: UInt8[np.ndarray, "4 h w"],
    background: UInt8[np.ndarray, 3],
    into: UInt8[np.ndarray, "3 h w"],
) -> None:
    """Put `rgba` over a background colour into `into`.

    Its four bytes a pixel are taken apart as one number, a few rows at a time, in half the time
    of a copy with strides.
    """
    words = np.ascontiguousarray(np.moveaxis(rgba, 0, 2)).view("<u4")[..., 0]
    if np.bitwise_and.reduce(words, axis=None) >> 24 == OPAQUE:
        for top in range(0, len(words), CACHED_ROWS):
            rows = slice(top, top + CACHED_ROWS)
            for band in range(3):
                out = into[band, rows]
                np.right_shift(words[rows], np.uint32(8 * band), out=out, casting="unsafe")
        return
    alpha = rgba[3].astype(np.uint16)
    under = background[:, None, None].astype(np.uint16) * (OPAQUE - alpha)
    into[:] = (rgba[:3] * alpha + under + OPAQUE // 2) // OPAQUE
