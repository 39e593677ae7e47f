"""python -m pipeline.export: an image of the store, or a generated one, as a file that viewers
open.

Levels are read from the OME-Zarr's own pyramid, a strip of tiles at a time, so memory does not
grow with the image.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from pipeline.console import EXIT_DONE, check_free_disk, run, say, say_plan
from pipeline.export.cog import parse_georeference, write_cog
from pipeline.export.files import is_made, replacing, stamp_of
from pipeline.export.tiff import (
    TILE_PX,
    Compression,
    PixelFormat,
    TiffLevel,
    Tile,
    write_ome,
    write_plain,
)
from pipeline.ome import OmeImage

Format = Literal["ome-tiff", "tiff", "cog"]
FORMATS: tuple[Format, ...] = ("ome-tiff", "tiff", "cog")
DEFAULT_COMPRESSION: dict[Format, Compression] = {
    "ome-tiff": "zstd",
    "tiff": "deflate",
    "cog": "deflate",
}
READ_TILES = 8
"""Tiles read at once: a slice of eight costs a tenth, per tile, of eight single reads."""
JPEG_RATIO = 0.3
"""Upper bound of a JPEG's size over the raw pixels', for the plan."""


@dataclass(frozen=True)
class ExportOptions:
    """Write an OME-Zarr image as a pyramidal TIFF, an OME-TIFF or a cloud-optimised GeoTIFF.

        python -m pipeline.export images/NAME.zarr --out image.ome.tif
        python -m pipeline.export images/NAME.zarr --out image.tif --format tiff --compression jpeg

    ome-tiff opens in QuPath, Bio-Formats, napari and viv; tiff opens in OpenSlide with all its
    levels; cog opens in GIS.
    """

    image: tyro.conf.Positional[Path]
    """The image: a folder such as dataset.zarr/images/ID or out/IMAGE.zarr."""
    out: Path
    """The file to write."""
    format: Format | None = None
    """Left out: .ome.tif means ome-tiff; .tif means cog where the image has a CRS, else tiff."""
    compression: Compression | None = None
    """Left out: zstd for ome-tiff, deflate for tiff and cog. Both are lossless; jpeg is not."""
    quality: int = 90
    """JPEG's quality, 1 to 100."""
    dry_run: bool = False
    """Print the plan and stop."""


def infer_format(out: Path, has_crs: bool) -> Format:
    """The format that the name of `out` stands for."""
    name = out.name.lower()
    if name.endswith((".ome.tif", ".ome.tiff")):
        return "ome-tiff"
    if name.endswith((".tif", ".tiff")):
        return "cog" if has_crs else "tiff"
    raise ValueError(
        f"{out.name} does not say which format it should have; end it in .ome.tif or .tif, or "
        "give --format "
        f"({', '.join(FORMATS)})"
    )


def export_image(
    source: Path,
    out: Path,
    format: Format,
    compression: Compression | None = None,
    quality: int = 90,
) -> None:
    """Write the OME-Zarr image `source`, with all its levels, to `out`.

    A file that an equal call made is kept. `compression` is zstd for ome-tiff and deflate
    otherwise. Raises `ValueError` when the image is unfinished, when `format` or `compression`
    cannot hold it, and when `out` is somebody else's file.
    """
    export = _Export.planned(source, out, format, compression, quality)
    check_free_disk(out.parent, export.needed_bytes())
    export.write()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(ExportOptions, _export, argv, prog="python -m pipeline.export")


def _export(options: ExportOptions) -> int:
    has_crs = _has_crs(OmeImage.open(options.image))
    chosen = options.format or infer_format(options.out, has_crs)
    export = _Export.planned(
        options.image, options.out, chosen, options.compression, options.quality
    )
    say_plan(export.description(), options.out.parent, export.needed_bytes())
    if not options.dry_run:
        export.write()
    return EXIT_DONE


@dataclass(frozen=True)
class _Export:
    """One image on its way into one file, all of it checked."""

    image: OmeImage
    out: Path
    format: Format
    compression: Compression
    quality: int

    @classmethod
    def planned(
        cls,
        source: Path,
        out: Path,
        format: Format,
        compression: Compression | None,
        quality: int,
    ) -> "_Export":
        if format not in FORMATS:
            raise ValueError(f"{format!r} is not a format; choose one of {', '.join(FORMATS)}")
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG quality is {quality} but must lie between 1 and 100")
        image = OmeImage.open(source)
        if not image.is_complete():
            raise ValueError(
                f"{source} is not finished, some of its pixels are missing; run the command "
                "that makes it again"
            )
        bands, dtype = image.shape[0], image.dtype
        chosen = compression or DEFAULT_COMPRESSION[format]
        is_rgb = bands == 3 and dtype == "uint8"
        if format == "tiff" and not is_rgb:
            raise ValueError(
                f"OpenSlide's tiff holds 3 bands of uint8 but {source} has {bands} of {dtype}; "
                "use --format ome-tiff"
            )
        if chosen == "jpeg" and dtype != "uint8":
            raise ValueError(
                f"JPEG holds uint8 but {source} is {dtype}; use --compression zstd or deflate"
            )
        if format == "cog" and not _has_crs(image):
            raise ValueError(
                f"{source} has no coordinate reference system, which a COG needs; use --format "
                "ome-tiff or tiff"
            )
        return cls(image, out, format, chosen, quality)

    def description(self) -> str:
        """The plan, in one line."""
        bands, height, width = self.image.shape
        return (
            f"{self.image.path} ({bands} × {height} × {width} {self.image.dtype}, "
            f"{self.image.num_levels} levels) -> "
            f"{self.out} ({self.format}, {self.compression})"
        )

    def needed_bytes(self) -> int:
        """An upper bound of the disk that writing takes; 0 where the file is there."""
        if is_made(self.out, self.stamp):
            return 0
        shapes = [self.image.level_shape(level) for level in range(self.image.num_levels)]
        raw = sum(int(np.prod(shape)) for shape in shapes) * np.dtype(self.image.dtype).itemsize
        most = int(raw * JPEG_RATIO) if self.compression == "jpeg" else raw
        return most + raw if self.format == "cog" else most

    @cached_property
    def stamp(self) -> str:
        """Names the image and everything that decides the file."""
        return stamp_of([_fingerprint(self.image), self.format, self.compression, self.quality])

    def write(self) -> None:
        """Write the file, unless it is there."""
        stamp = self.stamp
        if is_made(self.out, stamp):
            say(f"{self.out} is there and was made from this image in this way: kept")
            return
        if self.out.exists():
            say(f"{self.out} was made from another image or in another way: replaced")
        image = self.image
        levels = [_level(image, level) for level in range(image.num_levels)]
        pixels = PixelFormat(image.shape[0], image.dtype, image.spacing, image.unit)
        how = (self.compression, self.quality, stamp)
        with replacing(self.out) as temporary:
            if self.format == "ome-tiff":
                write_ome(temporary, levels, pixels, image.bands, *how)
            elif self.format == "tiff":
                write_plain(temporary, levels, pixels, *how)
            else:
                known = image.attributes
                code = known.get("proj:code") or known["proj:wkt2"]
                georeference = parse_georeference(code, known["spatial:transform"])
                nodata = known.get("nodata")
                write_cog(temporary, levels, pixels, image.bands, georeference, nodata, *how)
        say(f"{self.out}: {self.out.stat().st_size / 1e6:.1f} MB, {len(levels)} levels")


def _has_crs(image: OmeImage) -> bool:
    known = image.attributes.keys()
    return bool({"proj:code", "proj:wkt2"} & known) and "spatial:transform" in known


def _level(image: OmeImage, level: int) -> TiffLevel:
    _, height, width = image.level_shape(level)

    def tiles() -> Iterator[Tile]:
        for y in range(0, height, TILE_PX):
            rows = min(TILE_PX, height - y)
            for x in range(0, width, READ_TILES * TILE_PX):
                columns = min(READ_TILES * TILE_PX, width - x)
                strip = image.read(y, x, rows, columns, level).transpose(1, 2, 0)
                for left in range(0, columns, TILE_PX):
                    yield np.ascontiguousarray(strip[:, left : left + TILE_PX])

    return TiffLevel(height, width, tiles)


def _fingerprint(image: OmeImage) -> str:
    """A hash of the image's metadata and of its files' sizes and times."""
    digest = hashlib.sha256((image.path / "zarr.json").read_bytes())
    for item in sorted((image.path / "0").rglob("*")):
        status = item.stat()
        if item.is_file():
            digest.update(f"{item.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
