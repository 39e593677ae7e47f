"""Whole slides, through OpenSlide: 8-bit RGB, spacing in µm.

OpenSlide places a level by one average downsample, so a level whose sides are not exact fractions
of level 0 would be read a fraction of a pixel off, blurred, and differently from tile to tile.
Only levels with whole downsamples are offered. Pixels that a slide does not have come back
transparent; they are painted in its background colour.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import openslide
from jaxtyping import Bool, UInt, UInt8

from pipeline.readers.protocol import (
    MaskKind,
    SpacingUnit,
    UnreadableError,
    check_box,
    checked_spacing,
    number,
    read_patiently,
)

STRIP_PX = 512
OPAQUE = 255
CACHED_ROWS = 16
STATED_MPP = ("aperio.MPP",)  # what OpenSlide drops where it is no number


class SlideReader:
    """A `Reader` of what OpenSlide opens. `source_mpp` replaces what the file says."""

    dtype: Literal["uint8", "uint16"] = "uint8"
    bands: tuple[str, ...] = ("red", "green", "blue")
    unit: SpacingUnit = "um"
    mask_kind: MaskKind = "tissue"

    def __init__(self, path: Path, source_mpp: float | None = None) -> None:
        self.path = path
        self.attributes: dict[str, Any] = {}
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise UnreadableError(
                f"{path} is damaged: OpenSlide knows its kind and cannot open it ({error}); copy "
                "it again"
            ) from error
        sizes = self._slide.level_dimensions
        width, height = sizes[0]
        self.shape = (3, height, width)
        exact = [
            (round(width / w), level)
            for level, (w, h) in enumerate(sizes)
            if h * round(width / w) == height and w * round(width / w) == width
        ]
        by_downsample = dict(reversed(exact))
        self.downsamples = tuple(sorted(by_downsample))
        self._levels = tuple(by_downsample[d] for d in self.downsamples)
        colour = self._slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8)
        self.spacing, self.spacing_source = self._find_spacing(source_mpp)

    def level_shape(self, level: int) -> tuple[int, int]:
        """(h, w) of `level`."""
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

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_rgba(self, box: tuple[int, int, int, int], level: int) -> UInt8[np.ndarray, "4 h w"]:
        downsample = self.downsamples[level]

        def read_box(y: int, x: int, height: int, width: int) -> np.ndarray:
            corner = (x * downsample, y * downsample)
            image = self._slide.read_region(corner, self._levels[level], (width, height))
            return np.moveaxis(np.asarray(image), 2, 0)

        return read_patiently(
            read_box, self._reopen, openslide.OpenSlideError, box, f"level {level} of {self.path}"
        )

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
