"""What an ingest cannot do without, in bare processes: read and decode the pixels of every shard's
box, and compress them by zstd-1 in chunks of 512² as they come. Nothing is kept or written. A box
is read at once, or in strips of 512 rows, which stay in the processor's cache.

    python tests/benchmarks/bare_ingest.py slide|raster PROCESSES FILE ...

A module of its own that imports nothing else, as every process pays for what it imports.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numcodecs import Zstd

SHARD_PX, CHUNK_PX = 4096, 512
Box = tuple[int, int, int, int]


def boxes_of(height: int, width: int) -> list[Box]:
    """The boxes (y, x, height, width) of an image's shards."""
    return [
        (y, x, min(SHARD_PX, height - y), min(SHARD_PX, width - x))
        for y in range(0, height, SHARD_PX)
        for x in range(0, width, SHARD_PX)
    ]


def slide(path: Path, box: Box, strip_px: int = CHUNK_PX) -> int:
    """A box through OpenSlide; the bytes that come out."""
    import openslide

    y, x, height, width = box
    total = 0
    with openslide.OpenSlide(path) as opened:
        for top in range(0, height, strip_px):
            image = opened.read_region((x, y + top), 0, (width, min(strip_px, height - top)))
            total += compressed(np.asarray(image)[..., :3])
    return total


def raster(path: Path, box: Box, strip_px: int = CHUNK_PX) -> int:
    """A box through rasterio; the bytes that come out."""
    import rasterio
    from rasterio.windows import Window

    y, x, height, width = box
    total = 0
    with rasterio.open(path) as opened:
        for top in range(0, height, strip_px):
            window = Window(x, y + top, width, min(strip_px, height - top))
            total += compressed(np.moveaxis(opened.read(window=window), 0, -1))
    return total


def compressed(pixels: np.ndarray) -> int:
    """The bytes of pixels (h, w, c) in chunks."""
    zstd, total = Zstd(1), 0
    for y in range(0, pixels.shape[0], CHUNK_PX):
        for x in range(0, pixels.shape[1], CHUNK_PX):
            chunk = pixels[y : y + CHUNK_PX, x : x + CHUNK_PX]
            total += len(zstd.encode(np.ascontiguousarray(chunk)))
    return total


def size_of(kind: str, path: Path) -> tuple[int, int]:
    """(height, width) of a file."""
    if kind == "slide":
        import openslide

        return openslide.OpenSlide(path).dimensions[::-1]
    import rasterio

    with rasterio.open(path) as opened:
        return opened.shape


def main(kind: str, processes: int, paths: list[Path]) -> None:
    """All boxes of all files by that many processes."""
    tasks = [(path, box) for path in paths for box in boxes_of(*size_of(kind, path))]
    work = {"slide": slide, "raster": raster}[kind]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        print(sum(pool.map(work, *zip(*tasks, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
