"""One shard of an image on disk, written at once: what zarr would write, without its detours.

A shard is a file of zarr v3's sharding codec: chunks of 512², all bands in each, compressed by
zstd one after the other, and at the end their index (offset and size of each as 64-bit integers,
all ones for a chunk outside the image) with its CRC-32C. A shard of one chunk is that chunk alone,
without an index. Only one chunk is in memory beside the pixels. zarr reads it back; this module
exists since zarr spends twice as much on writing one.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import google_crc32c
import numpy as np
from jaxtyping import UInt
from numcodecs import Zstd

CHUNK_PX = 512
ZSTD_LEVEL = 1
OUTSIDE = np.uint64(2**64 - 1)


def write_shard(path: Path, pixels: UInt[np.ndarray, "c h w"], sides: tuple[int, int]) -> None:
    """Write the shard of `sides` px at `path`, under a temporary name until all of it is there.

    `pixels` may be smaller where the shard reaches beyond the image; a chunk's rest is 0.
    """
    rows, columns = (side // CHUNK_PX for side in sides)
    index = np.full((rows, columns, 2), OUTSIDE, "<u8")
    zstd, offset = Zstd(ZSTD_LEVEL), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as stream:
            for y in range(0, pixels.shape[1], CHUNK_PX):
                for x in range(0, pixels.shape[2], CHUNK_PX):
                    payload = zstd.encode(_chunk(pixels, y, x))
                    stream.write(payload)
                    index[y // CHUNK_PX, x // CHUNK_PX] = offset, len(payload)
                    offset += len(payload)
            if rows * columns > 1:
                tail = index.tobytes()
                stream.write(tail + google_crc32c.value(tail).to_bytes(4, "little"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _chunk(pixels: UInt[np.ndarray, "c h w"], y: int, x: int) -> UInt[np.ndarray, "c 512 512"]:
    part = pixels[:, y : y + CHUNK_PX, x : x + CHUNK_PX]
    _, height, width = part.shape
    if (height, width) != (CHUNK_PX, CHUNK_PX):
        part = np.pad(part, ((0, 0), (0, CHUNK_PX - height), (0, CHUNK_PX - width)))
    return np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
