"""One OME-Zarr 0.5 image on disk: a pyramid of 2×2 means that many processes fill, shard by shard.

Level 0 holds the pixels, level k + 1 the 2×2 means of level k (rounded half up, sides ceil(n /
2)), until both sides are at most 512 px. Pixels lie in chunks of 512² inside shards of 4096 / 2^k
at level k: a shard of level 0 and what follows from it on levels 1 to 3 are four objects that no
other shard shares, so one task owns one shard and no two tasks ever touch one object. Levels above
3 follow in `OmeImage.finish`.

A level-0 shard that exists is done: it is written after its coarser levels, under a temporary
name, and renamed. A shard that does not exist is never read as black, it raises
`MissingShardError`. (zarr alone would do the opposite, and would not write an all-black shard at
all; shards are written by `pipeline.shard`.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from jaxtyping import UInt
from zarr.codecs import ZstdCodec

from pipeline.console import write_json_atomic
from pipeline.shard import CHUNK_PX, ZSTD_LEVEL, write_shard

Unit = Literal["micrometer", "meter", "pixel"]

SHARD_PX = 4096
STRIP_ROWS = 64
SHARDED_LEVELS = 4
DTYPES = ("uint8", "uint16")
COLORS = {"red": "FF0000", "green": "00FF00", "blue": "0000FF"}
SHOWN_BANDS = 3


class MissingShardError(ValueError):
    """A part of an image was asked for that has not been written; the message says what to do."""


def halve(pixels: UInt[np.ndarray, "c h w"]) -> UInt[np.ndarray, "c h2 w2"]:
    """The 2×2 means of `pixels`, rounded half up; an odd last row or column is averaged with
    itself.
    """
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    bands, height, width = pixels.shape
    halved = np.empty((bands, height // 2, width // 2), pixels.dtype)
    # Two neighbours of a row are one number of twice the width, its low and its high half, so that
    # no operation has strides; strips stay in the processor's cache.
    pair = np.dtype(f"u{2 * pixels.itemsize}")
    bits = pair.type(8 * pixels.itemsize)
    low = pair.type(np.iinfo(pixels.dtype).max)
    for band in range(bands):
        for top in range(0, height, STRIP_ROWS):
            strip = np.ascontiguousarray(pixels[band, top : top + STRIP_ROWS]).view(pair)
            sums = (strip & low) + (strip >> bits)
            total = sums[::2] + sums[1::2]
            total += pair.type(2)
            total >>= pair.type(2)
            halved[band, top // 2 : (top + STRIP_ROWS) // 2] = total
    return halved


def num_pyramid_levels(height: int, width: int) -> int:
    """How many levels there are until both sides are at most 512 px."""
    levels = 1
    while max(height, width) > CHUNK_PX:
        height, width, levels = -(-height // 2), -(-width // 2), levels + 1
    return levels


def _level_shape(shape: tuple[int, int, int], level: int) -> tuple[int, int, int]:
    return shape[0], -(-shape[1] >> level), -(-shape[2] >> level)


def _shard_sides(level: int, height: int, width: int) -> tuple[int, int]:
    """Sides in px of a shard of `level`, no larger than a level of height × width needs."""
    nominal = max(SHARD_PX >> level, CHUNK_PX)
    return (
        min(nominal, -(-height // CHUNK_PX) * CHUNK_PX),
        min(nominal, -(-width // CHUNK_PX) * CHUNK_PX),
    )


class OmeImage:
    """An image (c, h, w) on disk with its pyramid; made by `OmeImage.create` or `OmeImage.open`.

    `spacing` is the side of a level-0 pixel in `unit`. `attributes` are what the creator added
    beside the OME metadata. Boxes are (y, x, height, width) in pixels of the level they are read
    from.
    """

    def __init__(self, path: Path) -> None:
        metadata = json.loads((path / "zarr.json").read_text())["attributes"]
        if "ome" not in metadata:
            what = "a dataset store" if "gigabrush" in metadata else "no OME-Zarr image"
            raise ValueError(f"{path} is {what}; name an image, such as one of STORE.zarr/images")
        ome = metadata["ome"]
        multiscale = ome["multiscales"][0]
        scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
        self.path = path
        self.num_levels = len(multiscale["datasets"])
        self.spacing = float(scale[1])
        self.unit: Unit = multiscale["axes"][1].get("unit", "pixel")
        channels = ome.get("omero", {}).get("channels", [{"label": "label"}])
        self.bands = tuple(str(channel["label"]) for channel in channels)
        self.attributes: dict[str, Any] = {k: v for k, v in metadata.items() if k != "ome"}
        self._arrays: dict[int, zarr.Array] = {}
        self._present: set[Path] = set()
        level0 = self._array(0)
        self.shape: tuple[int, int, int] = cast(tuple[int, int, int], tuple(level0.shape))
        self.dtype = str(level0.dtype)

    @classmethod
    def open(cls, path: Path) -> OmeImage:
        """Open the image at `path`; a `ValueError` when there is none."""
        if not (path / "zarr.json").is_file():
            raise ValueError(f"{path} is not an OME-Zarr image: it has no zarr.json")
        return cls(path)

    @classmethod
    def create(
        cls,
        path: Path,
        shape: tuple[int, int, int],
        dtype: str,
        spacing: float,
        unit: Unit,
        bands: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        *,
        label_of: OmeImage | None = None,
    ) -> OmeImage:
        """Lay out an image without pixels, or open it when it is already there.

        An image that is the label of another (`label_of`) may be coarser; it shares the other's
        top left corner and has as many levels. Raises a `ValueError` when an image of another
        shape, dtype, spacing or unit is at `path`.
        """
        if (path / "zarr.json").is_file():
            image = cls(path)
            found = (image.shape, image.dtype, image.spacing, image.unit)
            if found != (shape, dtype, spacing, unit):
                raise ValueError(
                    f"{path} already holds an image {found}, not {(shape, dtype, spacing, unit)}; "
                    "choose another name or remove it"
                )
            return image
        if dtype not in DTYPES or min(shape) < 1:
            raise ValueError(
                f"an image of shape {shape} and type {dtype} cannot be stored; "
                f"sides must be at least 1 and the type one of {', '.join(DTYPES)}"
            )
        num_levels = label_of.num_levels if label_of else num_pyramid_levels(*shape[1:])
        for level in range(num_levels):
            level_shape = _level_shape(shape, level)
            shard = _shard_sides(level, *level_shape[1:])
            chunk = (shape[0], CHUNK_PX, CHUNK_PX)
            zarr.create_array(
                str(path / str(level)),
                shape=level_shape,
                chunks=chunk,
                shards=None if shard == chunk[1:] else (shape[0], *shard),
                dtype=dtype,
                fill_value=0,
                compressors=ZstdCodec(level=ZSTD_LEVEL),
                dimension_names=("c", "y", "x"),
                overwrite=True,
            )
        origin = (spacing - label_of.spacing) / 2 if label_of else 0.0
        ome = _ome_metadata(path.name, num_levels, spacing, unit, origin)
        if label_of:
            ome["image-label"] = {}
        else:
            ome["omero"] = {"channels": [_channel(i, b, dtype) for i, b in enumerate(bands)]}
        write_json_atomic(
            path / "zarr.json",
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {**(attributes or {}), "ome": ome},
            },
        )
        return cls(path)

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """Shape (c, h, w) of `level`."""
        assert 0 <= level < self.num_levels, f"level {level} of {self.num_levels}"
        return _level_shape(self.shape, level)

    def read(
        self, y: int, x: int, height: int, width: int, level: int = 0
    ) -> UInt[np.ndarray, "c h w"]:
        """The pixels of a box of `level`.

        Raises `ValueError` when the box leaves the image and `MissingShardError` when a part of it
        was never written.
        """
        bands, full_height, full_width = self.level_shape(level)
        if min(y, x, height, width) < 0 or y + height > full_height or x + width > full_width:
            raise ValueError(
                f"box (y={y}, x={x}, {height} × {width}) leaves level {level} of {self.path}, "
                f"which is {full_height} × {full_width}"
            )
        if 0 in (height, width):
            return np.empty((bands, height, width), self.dtype)
        shard_y, shard_x = _shard_sides(level, full_height, full_width)
        for row in range(y // shard_y, (y + height - 1) // shard_y + 1):
            for column in range(x // shard_x, (x + width - 1) // shard_x + 1):
                if not self._exists(level, (row, column)):
                    raise MissingShardError(
                        f"shard ({row}, {column}) of level {level} of {self.path} was never "
                        "written; run the command that makes this image again"
                    )
        return np.asarray(self._array(level)[:, y : y + height, x : x + width])

    def shard_keys(self) -> list[tuple[int, int]]:
        """The (row, column) of every level-0 shard."""
        _, height, width = self.shape
        shard_y, shard_x = _shard_sides(0, height, width)
        return [
            (row, column)
            for row in range(-(-height // shard_y))
            for column in range(-(-width // shard_x))
        ]

    def shard_box(self, key: tuple[int, int]) -> tuple[int, int, int, int]:
        """The box (y, x, height, width) of a level-0 shard, clipped to the image."""
        return self._clipped_box(0, key)

    def has_shard(self, key: tuple[int, int]) -> bool:
        """Whether a level-0 shard, and with it its part of levels 1 to 3, is written."""
        return self._exists(0, key)

    def write_shard(self, key: tuple[int, int], pixels: UInt[np.ndarray, "c h w"]) -> None:
        """Write a shard on levels 0 to 3, level 0 last. `pixels` must fill `shard_box(key)`
        exactly.
        """
        _, _, height, width = self.shard_box(key)
        if pixels.shape != (self.shape[0], height, width) or str(pixels.dtype) != self.dtype:
            raise ValueError(
                f"shard {key} of {self.path} takes {self.dtype} of shape "
                f"{(self.shape[0], height, width)}, not {pixels.dtype} of shape {pixels.shape}: "
                "two tasks that write parts of one shard destroy it, so write whole shards, "
                "one task each"
            )
        pyramid = [pixels]
        while len(pyramid) < min(SHARDED_LEVELS, self.num_levels):
            pyramid.append(halve(pyramid[-1]))
        for level in reversed(range(len(pyramid))):
            self._write(level, key, pyramid[level])

    def finish(self) -> None:
        """Write the levels above 3 from level 3, one chunk at a time; what is already there is
        kept.
        """
        for level in range(SHARDED_LEVELS, self.num_levels):
            _, parent_height, parent_width = self.level_shape(level - 1)
            for key in self._keys(level):
                if self._exists(level, key):
                    continue
                y, x, height, width = self._clipped_box(level, key)
                parent = self.read(
                    2 * y,
                    2 * x,
                    min(2 * height, parent_height - 2 * y),
                    min(2 * width, parent_width - 2 * x),
                    level - 1,
                )
                self._write(level, key, halve(parent))

    def is_complete(self) -> bool:
        """Whether every level is written."""
        levels = (0, *range(SHARDED_LEVELS, self.num_levels))
        return all(self._exists(level, key) for level in levels for key in self._keys(level))

    def _array(self, level: int) -> zarr.Array:
        if level not in self._arrays:
            self._arrays[level] = zarr.open_array(str(self.path / str(level)), mode="r")
        return self._arrays[level]

    def _keys(self, level: int) -> list[tuple[int, int]]:
        _, height, width = self.level_shape(level)
        shard_y, shard_x = _shard_sides(level, height, width)
        rows, columns = -(-height // shard_y), -(-width // shard_x)
        return [(row, column) for row in range(rows) for column in range(columns)]

    def _clipped_box(self, level: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
        _, height, width = self.level_shape(level)
        shard_y, shard_x = _shard_sides(level, height, width)
        y, x = key[0] * shard_y, key[1] * shard_x
        return y, x, min(shard_y, height - y), min(shard_x, width - x)

    def _exists(self, level: int, key: tuple[int, int]) -> bool:
        item = self._shard_path(level, key)
        if item not in self._present:
            if not item.is_file():
                return False
            self._present.add(item)
        return True

    def _write(self, level: int, key: tuple[int, int], pixels: UInt[np.ndarray, "c h w"]) -> None:
        _, height, width = self.level_shape(level)
        write_shard(self._shard_path(level, key), pixels, _shard_sides(level, height, width))

    def _shard_path(self, level: int, key: tuple[int, int]) -> Path:
        return self.path / str(level) / "c" / "0" / str(key[0]) / str(key[1])


def _channel(index: int, band: str, dtype: str) -> dict[str, Any]:
    top = int(np.iinfo(dtype).max)
    return {
        "label": band,
        "color": COLORS.get(band, "FFFFFF"),
        "active": index < SHOWN_BANDS,
        "window": {"min": 0, "max": top, "start": 0, "end": top},
    }


def _ome_metadata(
    name: str, num_levels: int, spacing: float, unit: Unit, origin: float
) -> dict[str, Any]:
    space = {} if unit == "pixel" else {"unit": unit}
    datasets = []
    for level in range(num_levels):
        side = spacing * 2**level
        centre = origin + (side - spacing) / 2
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, side, side]},
                    {"type": "translation", "translation": [0.0, centre, centre]},
                ],
            }
        )
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", **space} for axis in "yx"]
    multiscale = {"name": name, "axes": axes, "datasets": datasets}
    return {"version": "0.5", "multiscales": [multiscale]}
