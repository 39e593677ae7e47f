"""Square tiles of an image at any footprint, as counts at a size that an encoder sees.

A footprint of f pixels at level 0 has f / 2^k pixels at level k of the pyramid. A tile is read
from the coarsest level that still has at least the wanted resolution and on which its edges fall
between pixels (2^k divides f), then resampled with antialiasing and rounded to the image's own
type. The tiles of a lattice are cut from blocks, not read one by one: a read costs about a
millisecond however small it is.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8, UInt16
from torch.nn import functional

from pipeline.ome import OmeImage
from pipeline.store import Region, Store

T = TypeVar("T")
Tiles = UInt8[np.ndarray, "n c h w"] | UInt16[np.ndarray, "n c h w"]
SquareTiles = (
    UInt8[np.ndarray, "n c {side_px} {side_px}"] | UInt16[np.ndarray, "n c {side_px} {side_px}"]
)

BLOCK_PX = 512
MAX_BLOCK_WIDTH_PX = 4096
MAX_TILES_PER_BLOCK = 16


def resize_tiles(tiles: Tiles, side_px: int) -> SquareTiles:
    """The tiles at `side_px` x `side_px`: bilinear, antialiased when shrinking, rounded to their
    own type.
    """
    if tiles.shape[2:] == (side_px, side_px):
        return tiles
    pixels = torch.from_numpy(np.ascontiguousarray(tiles))
    if tiles.dtype == np.uint8:
        # Directly in uint8: 25 times faster than through float, and equal to within one count.
        return functional.interpolate(
            pixels, size=side_px, mode="bilinear", antialias=True
        ).numpy()
    resized = functional.interpolate(
        pixels.to(torch.float32), size=side_px, mode="bilinear", antialias=True
    )
    return resized.round_().clamp_(0, np.iinfo(tiles.dtype).max).numpy().astype(tiles.dtype)


def lattice_shape(image: OmeImage, footprint_px: int) -> tuple[int, int]:
    """(gy, gx): how many whole footprints fit down and across the image."""
    _, height, width = image.shape
    return height // footprint_px, width // footprint_px


def tile_level(image: OmeImage, footprint_px: int, side_px: int) -> int:
    """The coarsest level k with footprint / 2^k >= `side_px` and 2^k dividing the footprint."""
    level = 0
    while (
        level + 1 < image.num_levels
        and footprint_px % 2 ** (level + 1) == 0
        and footprint_px >> (level + 1) >= side_px
    ):
        level += 1
    return level


@dataclass(frozen=True)
class TileBlock:
    """Neighbouring tiles of one lattice: `tiles[r, q]` is the tile at row `row + r`, column
    `column + q`.
    """

    row: int
    column: int
    tiles: UInt8[np.ndarray, "rows columns c h w"] | UInt16[np.ndarray, "rows columns c h w"]


def lattice_blocks(image: OmeImage, footprint_px: int, side_px: int) -> Iterator[TileBlock]:
    """Every tile of the lattice at `side_px`, each once, in blocks of at most about 512 x 4096
    pixels of the level read.

    Tile (i, j) covers the rows [i f, (i + 1) f) and the columns [j f, (j + 1) f) of level 0.
    """
    level = tile_level(image, footprint_px, side_px)
    step = footprint_px >> level
    num_rows, num_columns = lattice_shape(image, footprint_px)
    rows_at_once, columns_at_once = max(BLOCK_PX // step, 1), max(MAX_BLOCK_WIDTH_PX // step, 1)
    for row in range(0, num_rows, rows_at_once):
        rows = min(rows_at_once, num_rows - row)
        for column in range(0, num_columns, columns_at_once):
            columns = min(columns_at_once, num_columns - column)
            block = image.read(row * step, column * step, rows * step, columns * step, level)
            bands = block.shape[0]
            grid = block.reshape(bands, rows, step, columns, step).transpose(1, 3, 0, 2, 4)
            tiles = resize_tiles(grid.reshape(-1, bands, step, step), side_px)
            yield TileBlock(row, column, tiles.reshape(rows, columns, *tiles.shape[1:]))


@dataclass(frozen=True)
class TileSampler:
    """Tiles at random places of random `regions`, with footprints log-uniform between the two
    `footprints_px`.

    Every tile lies inside its region; footprints above the smallest region's side are cut to it.
    `seed` and the key given to `sample` fix the draw.
    """

    store: Store
    regions: Sequence[Region]
    side_px: int
    footprints_px: tuple[int, int]
    seed: int

    def sample(self, num_tiles: int, *key: int) -> Tiles:
        """`num_tiles` tiles at `side_px`, ordered by footprint.

        Tiles of similar footprint share a read: as many as fit side by side into a block of 512
        px, at most 16.
        """
        rng = np.random.default_rng([self.seed, *key])
        longest = min(region.side for region in self.regions)
        low, high = (np.log(min(footprint, longest)) for footprint in self.footprints_px)
        footprints = np.sort(np.exp(rng.uniform(low, high, num_tiles)))
        spec = self.store.spec
        tiles = np.empty((num_tiles, len(spec.bands), self.side_px, self.side_px), spec.dtype)
        images: dict[str, OmeImage] = {}
        done = 0
        while done < num_tiles:
            region = self.regions[int(rng.integers(len(self.regions)))]
            if region.image not in images:
                images[region.image] = self.store.image(region.image)
            image = images[region.image]
            finest_enough = max(int(np.log2(footprints[done] / self.side_px)), 0)
            level = min(finest_enough, image.num_levels - 1)
            block = _random_block(image, region, level, round(footprints[done] / 2**level), rng)
            block_px = block.shape[1]
            side_by_side = max(block_px // max(round(footprints[done] / 2**level), 1), 1)
            count = min(side_by_side**2, MAX_TILES_PER_BLOCK, num_tiles - done)
            for footprint in footprints[done : done + count]:
                step = min(max(round(footprint / 2**level), 1), block_px)
                y, x = rng.integers(block_px - step + 1, size=2)
                tile = block[None, :, y : y + step, x : x + step]
                tiles[done] = resize_tiles(tile, self.side_px)[0]
                done += 1
        return tiles


def _random_block(
    image: OmeImage, region: Region, level: int, least_px: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "c b b"] | UInt16[np.ndarray, "c b b"]:
    """A square of `level` inside the region, of 512 px or `least_px` if that is more, or all of
    the region.
    """
    scale = 2**level
    top, left = -(-region.y // scale), -(-region.x // scale)
    bottom, right = (region.y + region.side) // scale, (region.x + region.side) // scale
    extent = min(bottom - top, right - left)
    side = min(extent, max(BLOCK_PX, least_px))
    y, x = (start + int(rng.integers(extent - side + 1)) for start in (top, left))
    return image.read(y, x, side, side, level)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one prepared by a thread while the caller works on this one."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = reader.submit(next, items, end)
            yield item  # type: ignore[misc]
