"""Aerial images and plain pictures, through rasterio: red, green, blue, near-infrared and more,
8 or 16 bits.

A file is read in its own pixel space, never warped, and only at full resolution: overviews are
usually picked, not averaged. A fourth band is near-infrared unless the file says that it is alpha
*and* it behaves like alpha, which has hardly a value but 0 and full. Data is where the file's
mask, its nodata value or its alpha says so, and never where every band is 0. GDAL is kept off the
network: what a file names is looked at first (`pipeline.readers.indirect`).
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import rasterio
from jaxtyping import Bool, UInt
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from pipeline.readers.header import TiffHeader, check_claim, kind_of
from pipeline.readers.indirect import check_indirect, is_vrt
from pipeline.readers.protocol import (
    BANDS,
    NIR_NAMES,
    Closing,
    MaskKind,
    SpacingUnit,
    UnreadableError,
    check_box,
    checked_spacing,
    read_patiently,
)

DRIVERS = ("GTiff", "PNG", "JPEG", "JP2OpenJPEG", "HFA", "BMP")
GDAL_ERRORS = (rasterio.errors.RasterioError, CPLE_BaseError)
ALPHA_SAMPLE_PX = 512
ALPHA_PURITY = 0.99
MAX_BANDS = 16


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """GDAL without network, and without warnings about files that have no georeference, or
    that have both a nodata value and a band called alpha.
    """
    with (
        warnings.catch_warnings(),
        rasterio.Env(
            CPL_VSIL_CURL_ALLOWED_EXTENSIONS=".none", GDAL_PAM_ENABLED="NO", GDAL_CACHEMAX=64
        ),
    ):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        warnings.simplefilter("ignore", rasterio.errors.NodataShadowWarning)
        yield


class RasterReader(Closing):
    """A `Reader` of what rasterio opens. `source_mpp` or `source_gsd` replaces its spacing; with
    `plain` it is measured by pixels, and black is a colour like others.
    """

    downsamples: tuple[int, ...] = (1,)

    def __init__(
        self,
        path: Path,
        header: TiffHeader | None = None,
        source_mpp: float | None = None,
        source_gsd: float | None = None,
        plain: bool = False,
    ) -> None:
        self.path = path
        check_indirect(path)
        self._drivers = ("VRT",) if is_vrt(path) else DRIVERS
        try:
            self._data = self._open()
        except GDAL_ERRORS as error:
            raise UnreadableError(
                f"{path} is {kind_of(path)} and no image that can be read here; name an image, or "
                "convert it to TIFF"
            ) from error
        try:
            self._describe(header, source_mpp, source_gsd, plain)
        except GDAL_ERRORS as error:
            self.close()
            raise UnreadableError(
                f"{path} is damaged: GDAL knows its kind and cannot describe it ({error}); copy "
                "it again"
            ) from error
        except BaseException:
            self.close()
            raise

    def _describe(
        self,
        header: TiffHeader | None,
        source_mpp: float | None,
        source_gsd: float | None,
        plain: bool,
    ) -> None:
        data = self._data
        if set(data.dtypes) - {"uint8", "uint16"}:
            raise UnreadableError(
                f"{self.path} has values of type {'/'.join(sorted(set(data.dtypes)))} and only "
                "uint8 and "
                "uint16 are supported; convert it (gdal_translate -ot Byte or UInt16)"
            )
        if data.driver != "VRT":
            pixel_bytes = data.count * np.dtype(data.dtypes[0]).itemsize
            check_claim(self.path, data.height, data.width, data.height * data.width * pixel_bytes)
        self._last: tuple[tuple[int, ...], np.ndarray] = (), np.empty(0)
        self._alpha = self._find_alpha()
        self._indexes, self.bands = self._find_bands()
        self.shape = (len(self.bands), data.height, data.width)
        self.dtype = cast(Literal["uint8", "uint16"], data.dtypes[self._indexes[0] - 1])
        self.unit: SpacingUnit
        self.spacing, self.unit, self.spacing_source = (
            (1.0, "px", "pixels") if plain else self._find_spacing(header, source_mpp, source_gsd)
        )
        self.mask_kind: MaskKind = "tissue" if self.unit == "um" else "valid"
        self.attributes = self._georeference()

    def level_shape(self, level: int) -> tuple[int, int]:
        """(h, w) of `level`, which must be 0."""
        assert level == 0
        return self.shape[1:]

    def read(
        self, y: int, x: int, height: int, width: int, level: int = 0
    ) -> UInt[np.ndarray, "c h w"]:
        """The pixels of a box; see `Reader.read`."""
        check_box(self.path, self.level_shape(level), y, x, height, width)
        pixels = self._read_patiently(
            lambda w: self._data.read(self._indexes, window=w), y, x, height, width
        )
        self._last = (y, x, height, width), pixels
        return pixels

    def read_valid(self, y: int, x: int, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """Which pixels of a box hold data; of the box that was read last, from its pixels."""
        box, pixels = self._last
        if box != (y, x, height, width):
            pixels = self.read(y, x, height, width)
        valid = np.ones((height, width), bool)
        if self.unit != "px":
            valid = (pixels != 0).any(axis=0)
        with _offline():
            flags = self._data.mask_flag_enums[self._indexes[0] - 1]
        if self._alpha is not None:
            alpha = self._alpha
            return valid & (
                self._read_patiently(
                    lambda w: self._data.read(alpha, window=w), y, x, height, width
                )
                > 0
            )
        if MaskFlags.alpha in flags or MaskFlags.all_valid in flags:
            return valid
        if MaskFlags.nodata in flags:
            nothing = [self._data.nodatavals[index - 1] for index in self._indexes]
            if not all(value in range(np.iinfo(self.dtype).max + 1) for value in nothing):
                return valid
            differs = pixels != np.array(nothing, self.dtype)[:, None, None]
            return np.asarray(valid & differs.any(axis=0))
        masks = self._read_patiently(
            lambda w: self._data.read_masks(self._indexes, window=w), y, x, height, width
        )
        return valid & (masks > 0).any(axis=0)

    def close(self) -> None:
        """Give the handle back."""
        self._data.close()

    def _open(self) -> rasterio.DatasetReader:
        with _offline():
            return rasterio.DatasetReader(str(self.path), driver=list(self._drivers))

    def _reopen(self) -> None:
        self._data.close()
        self._data = self._open()

    def _read_patiently(
        self, read_window: Any, y: int, x: int, height: int, width: int
    ) -> np.ndarray:
        def read_box(top: int, left: int, rows: int, columns: int) -> np.ndarray:
            with _offline():
                return read_window(Window(left, top, columns, rows))

        return read_patiently(
            read_box, self._reopen, GDAL_ERRORS, (y, x, height, width), str(self.path)
        )

    def _find_alpha(self) -> int | None:
        """The index of the band that says alpha and behaves like it; a PNG's always does."""
        for index, meaning in enumerate(self._data.colorinterp, start=1):
            if meaning == ColorInterp.alpha and self._data.driver == "PNG":
                return index
            if meaning == ColorInterp.alpha:
                sides = (min(s, ALPHA_SAMPLE_PX) for s in (self._data.height, self._data.width))
                with _offline():
                    sample = self._data.read(index, out_shape=tuple(sides))
                full = np.iinfo(sample.dtype).max
                if np.isin(sample, (0, full)).mean() >= ALPHA_PURITY:
                    return index
        return None

    def _find_bands(self) -> tuple[list[int], tuple[str, ...]]:
        """The indexes of the bands to read and their names: red, green, blue, near-infrared
        first, as far as the file says which they are, then the others in its order.
        """
        colour = [i for i in range(1, self._data.count + 1) if i != self._alpha]
        if not 3 <= len(colour) <= MAX_BANDS or ColorInterp.palette in self._data.colorinterp:
            raise UnreadableError(
                f"{self.path} has {len(colour)} band(s) of colour and 3 (RGB), 4 (RGB and "
                f"near-infrared) or more up to {MAX_BANDS} are supported; choose bands with "
                "gdal_translate -b"
            )
        words = {i: (self._data.descriptions[i - 1] or "").strip().lower() for i in colour}
        described = {"nir" if word in NIR_NAMES else word: i for i, word in words.items()}
        meant = {self._data.colorinterp[i - 1].name: i for i in colour}
        found = next((d for d in (described, meant) if d.keys() >= set(BANDS[:3])), {})
        if not found and len(colour) <= len(BANDS):
            found = dict(zip(BANDS, colour, strict=False))
        first = [found[name] for name in BANDS if name in found]
        rest = [i for i in colour if i not in first]
        names = [name for name in BANDS if name in found]
        if len(colour) == len(BANDS) and names == list(BANDS[:3]):
            return first + rest, BANDS
        others = [re.sub(r"[^a-z0-9]+", "-", words[i]).strip("-") or f"band{i}" for i in rest]
        unique = len({*names, *others}) == len(colour)
        return first + rest, (*names, *(others if unique else (f"band{i}" for i in rest)))

    def _find_spacing(
        self, header: TiffHeader | None, source_mpp: float | None, source_gsd: float | None
    ) -> tuple[float, SpacingUnit, str]:
        path, data = self.path, self._data
        if source_mpp is not None:
            return checked_spacing(path, (source_mpp, source_mpp), "um", "given"), "um", "given"
        if source_gsd is not None:
            return checked_spacing(path, (source_gsd, source_gsd), "m", "given"), "m", "given"
        if data.crs is None and data.transform.is_identity:
            mpp, source = (header.mpp_yx, header.mpp_source) if header else (None, "")
            if mpp is None and len(self.bands) > 3:
                return checked_spacing(path, None, "m", source), "m", source
            return checked_spacing(path, mpp, "um", source), "um", source
        if data.crs is None or data.transform.is_identity:
            missing = "coordinate system" if data.crs is None else "transform"
            raise UnreadableError(
                f"{path} is georeferenced but has no {missing}, so that its gsd is unknown; give "
                "it with --source-gsd"
            )
        if data.crs.is_geographic:
            raise UnreadableError(
                f"{path} is in degrees ({data.crs.to_string()}), which have no fixed length; warp "
                "it to metres "
                "(gdalwarp -t_srs), or give its gsd with --source-gsd"
            )
        a, b, _, d, e, _ = tuple(data.transform)[:6]
        metres = float(data.crs.linear_units_factor[1])
        x, y = math.hypot(a, d) * metres, math.hypot(b, e) * metres
        if abs(a * b + d * e) * metres**2 > 1e-3 * x * y:
            raise UnreadableError(
                f"{path} has sheared pixels, and only square ones are supported; warp it, or give "
                "its gsd with --source-gsd"
            )
        source = f"transform in {data.crs.to_string()[:40]}"
        return checked_spacing(path, (y, x), "m", source), "m", source

    def _georeference(self) -> dict[str, Any]:
        if self._data.crs is None:
            return {}
        epsg = self._data.crs.to_epsg()
        code = {"proj:code": f"EPSG:{epsg}"} if epsg else {"proj:wkt2": self._data.crs.to_wkt()}
        nodata = self._data.nodata
        known = nodata is not None and nodata in range(np.iinfo(self.dtype).max + 1)
        return {
            **code,
            "spatial:transform": list(self._data.transform)[:6],
            **({"nodata": int(nodata)} if known else {}),
        }
