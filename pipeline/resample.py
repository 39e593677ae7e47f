"""An image at the resolution of the store, whatever resolution the file has.

A target pixel is the exact area mean of the source over its square: the source taken as constant
within each of its pixels, which is what "pixel" means everywhere in this project. Along one axis
target pixel i covers the source interval [i·f, (i + 1)·f), f the factor, and its weights are the
overlaps with source pixels over f; two axes are two passes. The weights depend on i alone and are
added tap by tap, so a pixel has one value however the image is cut into shards. Source pixels that
no whole target pixel covers, fewer than f on the far sides, are left out.

The source level is the coarsest that is still as fine as the target. At the target resolution
itself nothing is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt

from pipeline.readers import Reader, UnreadableError
from pipeline.readers.protocol import NAMES, SpacingUnit

SAME_SPACING = 1e-3
EDGE_TOLERANCE_PX = 1e-6
ALL_VALID = 1 - 1e-4
STRIP_SOURCE_VALUES = 1 << 25


@dataclass(frozen=True)
class Axis:
    """The taps of target pixels start .. start + count along one axis of `size` source pixels.

    Row k of `indexes` and `weights` is tap k of every target pixel; indexes count from `low`.
    """

    low: int
    high: int
    indexes: Int[np.ndarray, "taps n"]
    weights: Float32[np.ndarray, "taps n"]


def axis_taps(start: int, count: int, factor: float, size: int) -> Axis:
    """Which source pixels the target pixels from `start` on are means of, and with what weight."""
    left = np.arange(start, start + count) * factor
    right = left + factor
    first = np.floor(left + EDGE_TOLERANCE_PX).astype(np.int64)
    source = first + np.arange(math.ceil(factor) + 1)[:, None]
    overlap = np.minimum(right, source + 1) - np.maximum(left, source)
    overlap = np.where((overlap > EDGE_TOLERANCE_PX) & (source < size), overlap, 0.0)
    source = np.minimum(source, size - 1)
    low, high = int(source[0, 0]), int(source[overlap > 0].max()) + 1
    weights = (overlap / overlap.sum(axis=0)).astype(np.float32)
    return Axis(low, high, np.clip(source - low, 0, high - low - 1), weights)


def area_mean(
    source: UInt[np.ndarray, "c hs ws"] | Bool[np.ndarray, "c hs ws"], rows: Axis, columns: Axis
) -> Float32[np.ndarray, "c h w"]:
    """The area means of the source box [rows.low, rows.high) × [columns.low, columns.high)."""
    values = source.astype(np.float32)
    tall = np.zeros((len(source), rows.weights.shape[1], source.shape[2]), np.float32)
    for index, weight in zip(rows.indexes, rows.weights, strict=True):
        tall += values[:, index] * weight[:, None]
    mean = np.zeros((*tall.shape[:2], columns.weights.shape[1]), np.float32)
    for index, weight in zip(columns.indexes, columns.weights, strict=True):
        mean += tall[:, :, index] * weight
    return mean


class FinerThanFileError(UnreadableError):
    """The target is finer than the file, and detail cannot be made up."""


@dataclass(frozen=True)
class Native:
    """What an image at another resolution is planned from, of the reader of the file."""

    path: Path
    unit: SpacingUnit
    spacing: float
    bands: int
    downsamples: tuple[int, ...]
    level_shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, reader: Reader) -> Native:
        """That of an open reader."""
        shapes = tuple(reader.level_shape(level) for level in range(len(reader.downsamples)))
        return cls(
            reader.path,
            reader.unit,
            reader.spacing,
            reader.shape[0],
            reader.downsamples,
            shapes,
        )


@dataclass(frozen=True)
class Sampling:
    """Level `level` of a file, reduced by `factor`, is an image of `shape` (c, h, w); a pixel of
    it is `scale` level-0 pixels of the file.
    """

    level: int
    factor: float
    scale: float
    shape: tuple[int, int, int]


def choose_sampling(native: Native, spacing: float) -> Sampling:
    """How `native` becomes an image at `spacing` (in its unit).

    Raises a `FinerThanFileError` where that is finer than the file.
    """
    total = spacing / native.spacing
    if total < 1 - SAME_SPACING:
        name = NAMES[native.unit]
        raise FinerThanFileError(
            f"{native.path} has {name} {native.spacing:g} and the target is {spacing:g}, finer "
            "than the file, which would invent detail; the finest that works is "
            f"--{name} {native.spacing:g}"
        )
    fitting = [k for k, d in enumerate(native.downsamples) if d <= total * (1 + SAME_SPACING)]
    level = max(fitting)
    factor = total / native.downsamples[level]
    factor = 1.0 if abs(factor - 1) <= SAME_SPACING else factor
    height, width = (
        max(1, math.floor(side / factor + EDGE_TOLERANCE_PX))
        for side in native.level_shapes[level]
    )
    scale = factor * native.downsamples[level]
    return Sampling(level, factor, scale, (native.bands, height, width))


class Resampled:
    """`reader` at `spacing` (in its unit): an image of shape (c, h, w) that is read by box.

    Raises what `choose_sampling` raises.
    """

    def __init__(self, reader: Reader, spacing: float) -> None:
        sampling = choose_sampling(Native.of(reader), spacing)
        self.reader = reader
        self.level, self.factor, self.scale = sampling.level, sampling.factor, sampling.scale
        self.shape = sampling.shape
        self._source_shape = reader.level_shape(self.level)

    def read(self, y: int, x: int, height: int, width: int) -> UInt[np.ndarray, "c h w"]:
        """The pixels of a box, rounded to nearest; memory does not grow with the factor."""
        if self.factor == 1.0:
            return self.reader.read(y, x, height, width, self.level)
        pixels = np.empty((self.shape[0], height, width), self.reader.dtype)
        columns = axis_taps(x, width, self.factor, self._source_shape[1])
        for top, strip in self._strips(height, self.shape[0] * (columns.high - columns.low)):
            rows = axis_taps(y + top, strip, self.factor, self._source_shape[0])
            source = self.reader.read(*_source_box(rows, columns), self.level)
            pixels[:, top : top + strip] = area_mean(source, rows, columns) + 0.5
        return pixels

    def read_valid(self, y: int, x: int, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """Which pixels of a box are means of nothing but data."""
        scale = self.scale
        if scale == 1.0:
            return self.reader.read_valid(y, x, height, width)
        valid = np.empty((height, width), bool)
        columns = axis_taps(x, width, scale, self.reader.shape[2])
        for top, strip in self._strips(height, columns.high - columns.low):
            rows = axis_taps(y + top, strip, scale, self.reader.shape[1])
            source = self.reader.read_valid(*_source_box(rows, columns))
            valid[top : top + strip] = area_mean(source[None], rows, columns)[0] > ALL_VALID
        return valid

    def _strips(self, height: int, source_row_values: int) -> list[tuple[int, int]]:
        """(first row, number of rows) of strips of the target whose source is of bounded size."""
        rows = max(1, int(STRIP_SOURCE_VALUES / (source_row_values * self.factor)))
        return [(top, min(rows, height - top)) for top in range(0, height, rows)]


def _source_box(rows: Axis, columns: Axis) -> tuple[int, int, int, int]:
    return rows.low, columns.low, rows.high - rows.low, columns.high - columns.low
