"""The same slide by two other writers, for comparison.

    python tests/benchmarks/other_writers.py dzsave|ome_zarr SLIDE OUT THREADS

dzsave is libvips' own way of a pyramid, tiles of 512 px as JPEG (its default quality). ome_zarr's
writer gets a dask array of OpenSlide's pixels in blocks of 4096² and writes OME-Zarr in chunks of
512² as it does by default otherwise.
"""

import sys
from pathlib import Path


def dzsave(slide: Path, out: Path, threads: int) -> None:
    """A DeepZoom pyramid by libvips."""
    import os

    os.environ["VIPS_CONCURRENCY"] = str(threads)
    import pyvips

    image = pyvips.Image.new_from_file(str(slide), access="sequential")
    image.dzsave(str(out), tile_size=512, overlap=0)


def ome_zarr(slide: Path, out: Path, threads: int) -> None:
    """An OME-Zarr image by `ome_zarr.writer.write_image`."""
    import dask
    import dask.array
    import numpy as np
    import openslide
    import zarr
    from ome_zarr.writer import write_image

    width, height = openslide.OpenSlide(slide).dimensions

    def block(block_info: dict[None, dict[str, list[tuple[int, int]]]]) -> np.ndarray:
        (_, (top, bottom), (left, right)) = block_info[None]["array-location"]
        with openslide.OpenSlide(slide) as opened:
            size = (right - left, bottom - top)
            pixels = np.asarray(opened.read_region((left, top), 0, size))
        return np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))

    sides = [[min(4096, n - i) for i in range(0, n, 4096)] for n in (height, width)]
    chunks = ((3,), tuple(sides[0]), tuple(sides[1]))
    pixels = dask.array.map_blocks(block, chunks=chunks, dtype=np.uint8, meta=np.empty((0,) * 3))
    with dask.config.set(scheduler="threads", num_workers=threads):
        group = zarr.open_group(str(out), mode="w", zarr_format=3)
        write_image(pixels, group, axes="cyx", storage_options={"chunks": (3, 512, 512)})


if __name__ == "__main__":
    writers = {"dzsave": dzsave, "ome_zarr": ome_zarr}
    writers[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
