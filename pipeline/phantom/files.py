"""Phantoms on disk: a pyramidal TIFF as a slide scanner writes it, and a GeoTIFF with
near-infrared.

Pixels are drawn a tile at a time. The slide's reduced levels grow beside level 0, from the same
tiles, in an unnamed scratch file that vanishes with the process; memory holds one tile.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import rasterio
from jaxtyping import UInt8
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.windows import Window

from pipeline.console import progress, say
from pipeline.export.files import is_made, replacing, stamp_of
from pipeline.export.tiff import TILE_PX, PixelFormat, TiffLevel, write_plain
from pipeline.ome import halve, num_pyramid_levels
from pipeline.phantom.aerial import BANDS, AerialScene
from pipeline.phantom.slide import Slide

DRAWING = 1
"""Raised when the same seed shows another picture, so that files of an older drawing are not kept
as current.
"""
JPEG_QUALITY = 90
AERIAL_CRS = "EPSG:26911"
AERIAL_CORNER_M = (430_000.0, 3_780_000.0)
"""Easting and northing of the scene's upper left corner."""
OVERVIEWS = (2, 4, 8)


SLIDE_BYTES_PER_PX, AERIAL_BYTES_PER_PX = 2, 6
"""Upper bounds of what a picture takes on disk, scratch included."""


def needed_slide_bytes(path: Path, height_px: int, width_px: int, mpp: float, seed: int) -> int:
    """Most that `draw_slide` takes on disk; 0 where the file is there."""
    made = is_made(path, _slide_stamp(height_px, width_px, mpp, seed))
    return 0 if made else SLIDE_BYTES_PER_PX * height_px * width_px


def needed_aerial_bytes(path: Path, height_px: int, width_px: int, gsd: float, seed: int) -> int:
    """Most that `draw_aerial` takes on disk; 0 where the file is there."""
    made = is_made(path, _aerial_stamp(height_px, width_px, gsd, seed))
    return 0 if made else AERIAL_BYTES_PER_PX * height_px * width_px


def draw_slide(
    path: Path, *, height_px: int = 8192, width_px: int = 8192, mpp: float = 0.5, seed: int = 0
) -> None:
    """Draw a slide of `height_px` × `width_px` pixels of `mpp` µm to a pyramidal JPEG TIFF at
    `path`.

    OpenSlide opens it with all levels and its mpp. A file that an equal call made is kept. Raises
    `ValueError` for a size below 1 px, for an mpp outside 0.1 to 2 µm, and when `path` is somebody
    else's file.
    """
    _check_size(height_px, width_px)
    if not 0.1 <= mpp <= 2:
        raise ValueError(
            f"mpp is {mpp} µm but nuclei can only be drawn at 0.1 to 2 µm a pixel; choose an "
            "mpp between"
        )
    stamp = _slide_stamp(height_px, width_px, mpp, seed)
    if is_made(path, stamp):
        say(f"{path} is there and was drawn in this way: kept")
        return
    num_levels = num_pyramid_levels(height_px, width_px)
    slide = Slide(height_px, width_px, mpp, seed)
    with replacing(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as scratch:
        reduced = _reduced_levels(scratch, height_px, width_px, num_levels)

        def draw_tiles() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
            for y, x, height, width in _tiles(height_px, width_px):
                tile = slide.draw(y, x, height, width)
                pixels = tile.transpose(2, 0, 1)
                for level, canvas in enumerate(reduced, start=1):
                    pixels = halve(pixels)
                    top, left = y >> level, x >> level
                    _, rows, columns = pixels.shape
                    canvas[top : top + rows, left : left + columns] = pixels.transpose(1, 2, 0)
                yield tile

        levels = [TiffLevel(height_px, width_px, draw_tiles)]
        levels += [_level_of(canvas) for canvas in reduced]
        pixels = PixelFormat(3, "uint8", mpp, "micrometer")
        write_plain(temporary, levels, pixels, "jpeg", JPEG_QUALITY, stamp)
    say(f"{path}: {height_px} × {width_px} px of {mpp} µm, {num_levels} levels")


def draw_aerial(
    path: Path, *, height_px: int = 4096, width_px: int = 4096, gsd: float = 0.6, seed: int = 0
) -> None:
    """Draw an aerial scene of `height_px` × `width_px` pixels of `gsd` m to a tiled GeoTIFF of
    four bands at `path`.

    Bands are red, green, blue and near-infrared, in UTM zone 11N. A file that an equal call made
    is kept. Raises `ValueError` for a size below 1 px, for a gsd outside 0.1 to 5 m, and when
    `path` is somebody else's file.
    """
    _check_size(height_px, width_px)
    if not 0.1 <= gsd <= 5:
        raise ValueError(
            f"gsd is {gsd} m but roofs and trees can only be drawn at 0.1 to 5 m a pixel; "
            "choose a gsd between"
        )
    stamp = _aerial_stamp(height_px, width_px, gsd, seed)
    if is_made(path, stamp):
        say(f"{path} is there and was drawn in this way: kept")
        return
    scene = AerialScene(gsd, seed)
    with replacing(path) as temporary:
        with rasterio.open(
            temporary,
            "w",
            driver="GTiff",
            height=height_px,
            width=width_px,
            count=len(BANDS),
            dtype="uint8",
            crs=AERIAL_CRS,
            transform=Affine(gsd, 0, AERIAL_CORNER_M[0], 0, -gsd, AERIAL_CORNER_M[1]),
            tiled=True,
            blockxsize=TILE_PX,
            blockysize=TILE_PX,
            compress="deflate",
            predictor=2,
            photometric="RGB",
            alpha="NO",
            bigtiff="IF_SAFER",
        ) as image:
            image.update_tags(TIFFTAG_SOFTWARE=stamp)
            image.descriptions = BANDS
            boxes = list(_tiles(height_px, width_px))
            for y, x, height, width in progress(boxes, total=len(boxes), desc="tiles"):
                image.write(scene.draw(y, x, height, width), window=Window(x, y, width, height))
        with rasterio.open(temporary, "r+") as image:
            factors = [
                factor for factor in OVERVIEWS if max(height_px, width_px) > factor * TILE_PX // 2
            ]
            if factors:
                image.build_overviews(factors, Resampling.average)
    say(f"{path}: {height_px} × {width_px} px of {gsd} m, bands {', '.join(BANDS)}")


def _slide_stamp(height_px: int, width_px: int, mpp: float, seed: int) -> str:
    return stamp_of(["slide", DRAWING, height_px, width_px, mpp, seed])


def _aerial_stamp(height_px: int, width_px: int, gsd: float, seed: int) -> str:
    return stamp_of(["aerial", DRAWING, height_px, width_px, gsd, seed])


def _check_size(height_px: int, width_px: int) -> None:
    if min(height_px, width_px) < 1:
        raise ValueError(
            f"a picture of {height_px} × {width_px} px has no pixels; give sides of at least 1"
        )


def _tiles(height_px: int, width_px: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (y, x, height, width) of the tiles, in rows, clipped to the picture."""
    for y in range(0, height_px, TILE_PX):
        for x in range(0, width_px, TILE_PX):
            yield y, x, min(TILE_PX, height_px - y), min(TILE_PX, width_px - x)


def _reduced_levels(
    scratch: IO[bytes], height_px: int, width_px: int, num_levels: int
) -> list[np.ndarray]:
    """Arrays (h, w, 3) for levels 1 and up, all in one file on disk."""
    arrays: list[np.ndarray] = []
    offset = 0
    for level in range(1, num_levels):
        shape = (-(-height_px >> level), -(-width_px >> level), 3)
        arrays.append(np.memmap(scratch, np.uint8, "w+", offset, shape))
        offset += int(np.prod(shape))
    return arrays


def _level_of(canvas: np.ndarray) -> TiffLevel:
    height, width, _ = canvas.shape

    def tiles() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for y, x, rows, columns in _tiles(height, width):
            yield np.array(canvas[y : y + rows, x : x + columns])

    return TiffLevel(height, width, tiles)
