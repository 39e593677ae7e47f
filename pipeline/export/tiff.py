"""Pyramidal TIFF in its two dialects, written tile by tile.

No single layout serves every reader. OpenSlide sees a pyramid whose reduced images stand in the
main chain of directories (NewSubfileType 1); Bio-Formats, QuPath and viv follow OME-TIFF, whose
reduced images are SubIFDs of the full one. Both take the same levels: a size, and the tiles of 512
px in rows. JPEG is stored as YCbCr 4:2:0, the one variant all of them decode to the right colours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from jaxtyping import UInt

from pipeline.console import progress
from pipeline.ome import Unit

TILE_PX = 512
BIGTIFF_BYTES = 3_500_000_000
"""Above this many bytes of raw pixels offsets take 64 bits, for no compression is promised."""

Compression = Literal["zstd", "deflate", "jpeg"]
CODECS = {"zstd": "zstd", "deflate": "adobe_deflate", "jpeg": "jpeg"}
LOSSLESS_EFFORT = {"zstd": 5, "deflate": 6}
UM_PER_UNIT = {"micrometer": 1.0, "meter": 1e6}
OME_UNITS = {"micrometer": "µm", "meter": "m", "pixel": "pixel"}

Tile = UInt[np.ndarray, "h w s"]


@dataclass(frozen=True)
class TiffLevel:
    """One image of a pyramid: its size in pixels, and a function that yields its tiles in rows,
    clipped to the image.
    """

    height: int
    width: int
    tiles: Callable[[], Iterator[Tile]]

    @property
    def num_tiles(self) -> int:
        """How many tiles cover the level."""
        return -(-self.height // TILE_PX) * -(-self.width // TILE_PX)


@dataclass(frozen=True)
class PixelFormat:
    """What every level's pixels have in common; `spacing` is the side of a level-0 pixel in
    `unit`.
    """

    samples: int
    dtype: str
    spacing: float
    unit: Unit

    @property
    def is_rgb(self) -> bool:
        """Whether viewers show the samples as one colour image."""
        return self.samples == 3 and self.dtype == "uint8"

    def resolution(self, level: int) -> dict[str, Any]:
        """TIFF resolution of `level`: pixels a centimetre, or none where a pixel has no size."""
        if self.unit == "pixel":
            return {"resolution": (1, 1), "resolutionunit": "NONE"}
        per_cm = 1e4 / (self.spacing * UM_PER_UNIT[self.unit] * 2**level)
        return {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}


def encoding(compression: Compression, quality: int) -> dict[str, Any]:
    """tifffile's arguments for `compression`; `quality` (1 to 100) is JPEG's."""
    if compression == "jpeg":
        arguments: dict[str, Any] = {"level": quality}
        return {"compression": CODECS[compression], "compressionargs": arguments}
    arguments = {"level": LOSSLESS_EFFORT[compression]}
    return {
        "compression": CODECS[compression],
        "compressionargs": arguments,
        "predictor": True,
    }


def write_plain(
    path: Path,
    levels: Sequence[TiffLevel],
    pixels: PixelFormat,
    compression: Compression,
    quality: int,
    software: str,
) -> None:
    """Write a pyramid whose reduced levels follow in the main chain; samples are interleaved.

    A fourth sample and those after it are marked as unspecified, never as alpha.
    """
    with tifffile.TiffWriter(path, bigtiff=_needs_bigtiff(levels, pixels)) as file:
        for index, level in enumerate(levels):
            file.write(
                _padded(level, pixels, index),
                shape=(level.height, level.width, pixels.samples),
                dtype=pixels.dtype,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb" if pixels.samples >= 3 else "minisblack",
                planarconfig="contig" if pixels.samples > 1 else None,
                subfiletype=1 if index else 0,
                metadata=None,
                software=software,
                extrasamples=["unspecified"] * (pixels.samples - 3) or None,
                **encoding(compression, quality),
                **pixels.resolution(index),
            )


def write_ome(
    path: Path,
    levels: Sequence[TiffLevel],
    pixels: PixelFormat,
    bands: Sequence[str],
    compression: Compression,
    quality: int,
    software: str,
) -> None:
    """Write an OME-TIFF whose reduced levels are SubIFDs: RGB as one image, anything else as one
    channel per band.
    """
    unit = OME_UNITS[pixels.unit]
    metadata: dict[str, Any] = {
        "axes": "YXS" if pixels.is_rgb else "CYX",
        "PhysicalSizeX": pixels.spacing,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": pixels.spacing,
        "PhysicalSizeYUnit": unit,
    }
    if not pixels.is_rgb:
        metadata["Channel"] = {"Name": list(bands)}
    with tifffile.TiffWriter(path, ome=True, bigtiff=_needs_bigtiff(levels, pixels)) as file:
        for index, level in enumerate(levels):
            size = (level.height, level.width)
            file.write(
                _padded(level, pixels, index) if pixels.is_rgb else _planes(level, pixels, index),
                shape=(*size, 3) if pixels.is_rgb else (pixels.samples, *size),
                dtype=pixels.dtype,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb" if pixels.is_rgb else "minisblack",
                subifds=0 if index else len(levels) - 1,
                subfiletype=1 if index else 0,
                metadata=None if index else metadata,
                software=software,
                **encoding(compression, quality),
                **pixels.resolution(index),
            )


def _needs_bigtiff(levels: Sequence[TiffLevel], pixels: PixelFormat) -> bool:
    values = sum(level.height * level.width for level in levels) * pixels.samples
    return values * np.dtype(pixels.dtype).itemsize > BIGTIFF_BYTES


def _padded(level: TiffLevel, pixels: PixelFormat, index: int) -> Iterator[np.ndarray]:
    """Whole tiles; those on the border repeat their last row and column, which JPEG compresses
    without ringing.
    """
    for tile in progress(level.tiles(), total=level.num_tiles, desc=f"level {index}"):
        assert tile.shape[2] == pixels.samples and str(tile.dtype) == pixels.dtype
        below, right = TILE_PX - tile.shape[0], TILE_PX - tile.shape[1]
        if below or right:
            tile = np.pad(tile, ((0, below), (0, right), (0, 0)), mode="edge")
        yield tile if pixels.samples > 1 else tile[..., 0]


def _planes(level: TiffLevel, pixels: PixelFormat, index: int) -> Iterator[np.ndarray]:
    """Whole tiles of one band after another."""
    for band in range(pixels.samples):
        for tile in _padded(level, pixels, index):
            yield tile[..., band] if pixels.samples > 1 else tile
