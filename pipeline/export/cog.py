"""Cloud-optimised GeoTIFF: the pyramid of the image itself, its CRS and its transform.

GDAL's COG driver only copies, so the pyramid is first written as a plain TIFF beside the target,
whose reduced images GDAL takes for overviews; the copy uses those and computes none. Near-infrared
stays a band: what GDAL calls alpha it would turn into a mask and lose.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import CRSError, NotGeoreferencedWarning
from rasterio.transform import Affine

from pipeline.export.tiff import TILE_PX, Compression, PixelFormat, TiffLevel, write_plain

GDAL_CACHE_MIB = 256


def parse_georeference(code: str, transform: Sequence[float]) -> tuple[CRS, Affine]:
    """CRS and affine transform from an image's attributes `proj:code` or `proj:wkt2` and
    `spatial:transform` (a, b, c, d, e, f).
    """
    try:
        crs = CRS.from_string(code)
    except CRSError as error:
        raise ValueError(
            f"the image's proj:code {code!r} is not a coordinate reference system; write one "
            "such as EPSG:26911"
        ) from error
    if len(transform) != 6:
        raise ValueError(
            f"the image's spatial:transform has {len(transform)} numbers but needs the 6 of an "
            "affine transform, "
            "a, b, c, d, e, f"
        )
    return crs, Affine(*transform)


def write_cog(
    path: Path,
    levels: Sequence[TiffLevel],
    pixels: PixelFormat,
    bands: Sequence[str],
    georeference: tuple[CRS, Affine],
    nodata: int | None,
    compression: Compression,
    quality: int,
    software: str,
) -> None:
    """Write a COG of all `levels`. JPEG keeps three bands at most: a `ValueError` for more."""
    if compression == "jpeg" and not (pixels.dtype == "uint8" and pixels.samples in (1, 3)):
        raise ValueError(
            f"a JPEG COG holds 1 or 3 bands of uint8 but this image has {pixels.samples} of "
            f"{pixels.dtype}; "
            "use --compression deflate or zstd"
        )
    plain = path.with_name(path.name.removesuffix(".partial") + ".plain.partial")
    try:
        write_plain(plain, levels, pixels, "zstd", quality, software)
        with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MIB):
            _georeference(plain, georeference, nodata, bands)
            _check_overviews(plain, levels)
            predictor = {} if compression == "jpeg" else {"predictor": "YES"}
            rasterio.shutil.copy(
                plain,
                path,
                driver="COG",
                compress=compression.upper(),
                quality=quality,
                blocksize=TILE_PX,
                overviews="FORCE_USE_EXISTING" if len(levels) > 1 else "NONE",
                bigtiff="IF_SAFER",
                num_threads=1,
                **predictor,
            )
    finally:
        plain.unlink(missing_ok=True)
    with rasterio.open(path) as image:
        assert image.count == pixels.samples and ColorInterp.alpha not in image.colorinterp


def _georeference(
    plain: Path, georeference: tuple[CRS, Affine], nodata: int | None, bands: Sequence[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(plain, "r+") as image:
            image.crs, image.transform = georeference
            if nodata is not None:
                image.nodata = nodata
            image.descriptions = tuple(bands)


def _check_overviews(plain: Path, levels: Sequence[TiffLevel]) -> None:
    with rasterio.open(plain) as image:
        assert len(image.overviews(1)) == len(levels) - 1, (
            "GDAL did not take the levels for overviews"
        )
