"""OME-TIFF and plain TIFF, through tifffile: red, green, blue (and near-infrared) of 8 or 16 bits.

An OME-TIFF describes itself (`pipeline.readers.ome_xml`); of a plain TIFF the first page is the
image, and a second one of the same size makes it a stack, which is refused. Coarser levels come
from the page's SubIFDs, and in a plain TIFF from reduced pages that follow; a level is offered
where its sides are those of level 0 over a whole number, rounded down or up, and only its whole
pixels are; none where levels were picked instead of averaged (`pipeline.readers.levels`). Tiles
that the file does not hold were never scanned and come back white.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tifffile
from jaxtyping import Bool, UInt

from pipeline.readers.header import check_claims, tag_spacing
from pipeline.readers.levels import is_picked
from pipeline.readers.ome_xml import OmeDescription, describe_ome
from pipeline.readers.protocol import (
    BANDS,
    Closing,
    MaskKind,
    SpacingUnit,
    TileError,
    UnreadableError,
    check_box,
    checked_spacing,
    read_patiently,
)
from pipeline.readers.segments import DECODABLE, JPEG, Page, SegmentError

ERRORS = (SegmentError, OSError)
TYPES = {8: "uint8", 16: "uint16"}
UNSIGNED, MIN_IS_BLACK, RGB, YCBCR = 1, 1, 2, 6
MAX_LEVELS = 16


class TiffReader(Closing):
    """A `Reader` of what tifffile opens. `source_mpp` replaces what the file says; with `plain`
    it is measured by pixels.
    """

    def __init__(
        self,
        path: Path,
        is_ome: bool = False,
        source_mpp: float | None = None,
        source_gsd: float | None = None,
        plain: bool = False,
    ) -> None:
        self.path = path
        self._is_ome = is_ome
        self._tiff = tifffile.TiffFile(path)
        try:
            planes, ome = self._describe()
            self.unit: SpacingUnit
            self.spacing, self.unit, self.spacing_source = self._find_spacing(
                planes[0], ome, source_mpp, source_gsd, plain
            )
        except UnreadableError:
            self.close()
            raise
        # A damaged page makes tifffile raise anything, as in `read_tiff_header`.
        except Exception as error:
            self.close()
            raise UnreadableError(
                f"{path} is a TIFF of which a page is damaged or cut off "
                f"({type(error).__name__}: {error}); copy it again"
            ) from error
        self.mask_kind: MaskKind = "tissue" if self.unit == "um" else "valid"

    def _describe(self) -> tuple[list[tifffile.TiffPage], OmeDescription | None]:
        """Find planes and levels; the planes, and what the OME-XML says."""
        first = cast(tifffile.TiffPage, self._tiff.pages.first)
        ome = describe_ome(self.path, first.description) if self._is_ome else None
        planes = [self._page(plane) for plane in (ome.planes if ome else (0,))]
        self.bands: tuple[str, ...] = ome.bands if ome else BANDS[:3]
        self._check(planes, ome)
        if ome is None:
            self._refuse_stack(planes[0])
        self.dtype = cast(Literal["uint8", "uint16"], str(planes[0].dtype))
        self.shape = (len(self.bands), planes[0].imagelength, planes[0].imagewidth)
        levels = self._find_levels(planes)
        self.downsamples = tuple(sorted(levels))
        self._levels = [[Page(page) for page in levels[d]] for d in self.downsamples]
        if len(levels) > 1:
            step = self.downsamples[1]
            if is_picked(self.read, self.level_shape(1), step, (TileError, ValueError)):
                self.downsamples = (1,)
        self.attributes: dict[str, Any] = {}
        if ome is not None and ome.images > 1:
            self.attributes["ome:image"] = ome.image
        return planes, ome

    def level_shape(self, level: int) -> tuple[int, int]:
        """(h, w) of `level`."""
        return self.shape[1] // self.downsamples[level], self.shape[2] // self.downsamples[level]

    def read(
        self, y: int, x: int, height: int, width: int, level: int = 0
    ) -> UInt[np.ndarray, "c h w"]:
        """The pixels of a box of `level`; see `Reader.read`."""
        check_box(self.path, self.level_shape(level), y, x, height, width)
        white = int(np.iinfo(self.dtype).max)

        def read_box(*box: int) -> np.ndarray:
            y, x, height, width = box
            if len(self._levels[level]) == 1:
                return self._levels[level][0].read(y, x, height, width, white)
            pixels = np.empty((len(self.bands), height, width), self.dtype)
            done = 0
            for page in self._levels[level]:
                pixels[done : done + page.samples] = page.read(y, x, height, width, white)
                done += page.samples
            return pixels

        name = f"level {level} of {self.path}" if level else str(self.path)
        return read_patiently(read_box, self._reopen, ERRORS, (y, x, height, width), name)

    def read_valid(self, y: int, x: int, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """Which level-0 pixels of a box the file holds."""
        check_box(self.path, self.level_shape(0), y, x, height, width)
        held = [page.read_held(y, x, height, width) for page in self._levels[0]]
        return np.logical_and.reduce(held)

    def close(self) -> None:
        """Give the handle back."""
        self._tiff.close()

    def _reopen(self) -> None:
        """A new handle; where pages lie was read once and stays."""
        self._tiff.filehandle.close()
        self._tiff.filehandle.open()

    def _page(self, index: int) -> tifffile.TiffPage:
        try:
            page = self._tiff.pages[index]
        except IndexError as error:
            raise UnreadableError(
                f"{self.path} has OME-XML that names page {index}, and the file has "
                f"{len(self._tiff.pages)}; it is cut off or was written wrongly"
            ) from error
        assert isinstance(page, tifffile.TiffPage)
        return page

    def _check(self, planes: Sequence[tifffile.TiffPage], ome: OmeDescription | None) -> None:
        """Raise an `UnreadableError` for pages that are not what the image should be made of."""
        first = planes[0]
        samples = len(self.bands) // len(planes)
        colour = (MIN_IS_BLACK,) if samples == 1 else (RGB, YCBCR)
        for page in planes:
            check_claims(self.path, page)
            if not any(page.databytecounts):
                raise UnreadableError(
                    f"{self.path} claims {page.imagelength} × {page.imagewidth} pixels and holds "
                    "none of them; it was never written to its end, copy it again"
                )
            if page.compression not in DECODABLE:
                raise UnreadableError(
                    f"{self.path} is compressed in a way ({_name(page.compression)}) that cannot "
                    "be read here; convert it, for example to deflate"
                )
            if page.bitspersample not in TYPES or page.sampleformat != UNSIGNED:
                raise UnreadableError(
                    f"{self.path} has values of {page.bitspersample} bits "
                    f"({_name(page.sampleformat)}) and only unsigned ones of 8 and 16 bits are "
                    "supported; convert it"
                )
            if page.samplesperpixel != samples or page.imagedepth != 1:
                raise UnreadableError(
                    f"{self.path} has {page.samplesperpixel} band(s) of colour and 3 (red, green, "
                    "blue) are supported; convert it"
                )
            is_coded = page.photometric == YCBCR and page.compression not in JPEG
            if page.photometric not in colour or is_coded:
                raise UnreadableError(
                    f"{self.path} codes its colours as {_name(page.photometric)}, and "
                    f"{'grey' if samples == 1 else 'RGB'} is supported; convert it"
                )
            if (page.shape, page.dtype) != (first.shape, first.dtype):
                raise UnreadableError(
                    f"{self.path} has planes of {first.shape} {first.dtype} and of {page.shape} "
                    f"{page.dtype}, and those of one image are alike; write it again"
                )
        if ome and (ome.height, ome.width) != (first.imagelength, first.imagewidth):
            raise UnreadableError(
                f"{self.path} has OME-XML of an image of {ome.height} × {ome.width} pixels and "
                f"a page of {first.imagelength} × {first.imagewidth}; write it again"
            )

    def _refuse_stack(self, first: tifffile.TiffPage) -> None:
        """Refuse a plain TIFF whose pages are planes in depth or time."""
        if not first.is_imagej:
            try:
                second = self._tiff.pages[1]
            except IndexError:
                return
            if second.shape != first.shape or second.offset == first.offset:
                return
        elif int((self._tiff.imagej_metadata or {}).get("images", 1)) < 2:
            return
        raise UnreadableError(
            f"{self.path} is a stack: it has several pages of {first.imagelength} × "
            f"{first.imagewidth} pixels, and an image here has one; write the wanted one to a "
            "file of its own"
        )

    def _find_levels(
        self, planes: Sequence[tifffile.TiffPage]
    ) -> dict[int, list[tifffile.TiffPage]]:
        """The pages of every level that is usable, by its downsample."""
        coarser: list[list[Any]] = []
        if planes[0].subifds:
            counts = [len(page.subifds or ()) for page in planes]
            for k in range(min(*counts, MAX_LEVELS) if len(counts) > 1 else counts[0]):
                coarser.append([cast(Any, page.pages)[k] for page in planes])
        elif not self._is_ome:
            following = self._tiff.pages[1 : MAX_LEVELS + 1]
            coarser = [[page] for page in following if getattr(page, "is_reduced", False)]
        levels = {1: list(planes)}
        for pages in coarser[:MAX_LEVELS]:
            downsample = _downsample(planes[0], pages[0])
            if downsample in levels or not all(_alike(planes[0], page) for page in pages):
                continue
            if downsample > 1 and len({page.shape for page in pages}) == 1:
                for page in pages:
                    check_claims(self.path, page)
                levels[downsample] = pages
        return levels

    def _find_spacing(
        self,
        page: tifffile.TiffPage,
        ome: OmeDescription | None,
        source_mpp: float | None,
        source_gsd: float | None,
        plain: bool,
    ) -> tuple[float, SpacingUnit, str]:
        if plain:
            return 1.0, "px", "pixels"
        if source_mpp is not None:
            given = (source_mpp, source_mpp)
            return checked_spacing(self.path, given, "um", "given"), "um", "given"
        if source_gsd is not None:
            given = (source_gsd, source_gsd)
            return checked_spacing(self.path, given, "m", "given"), "m", "given"
        if ome is not None and ome.mpp_yx is not None:
            source = "OME PhysicalSize"
            return checked_spacing(self.path, ome.mpp_yx, "um", source), "um", source
        mpp, source = tag_spacing(page)
        return checked_spacing(self.path, mpp, "um", source), "um", source


def _name(value: Any) -> str:
    return str(getattr(value, "name", value)).lower()


def _downsample(first: tifffile.TiffPage, page: tifffile.TiffPage) -> int:
    """By which whole number a page is coarser than the first on both axes, 0 for none."""
    downsample = round(first.imagewidth / max(page.imagewidth, 1))
    sides = ((first.imagelength, page.imagelength), (first.imagewidth, page.imagewidth))
    if downsample < 2 or any(
        coarse not in (fine // downsample, -(-fine // downsample)) or fine < downsample
        for fine, coarse in sides
    ):
        return 0
    return downsample


def _alike(first: tifffile.TiffPage, page: Any) -> bool:
    """Whether a page holds values of the same kind as the first and can be decoded."""
    return (
        isinstance(page, tifffile.TiffPage)
        and (page.dtype, page.samplesperpixel) == (first.dtype, first.samplesperpixel)
        and page.compression in DECODABLE
        and (page.photometric == first.photometric or page.photometric in (RGB, YCBCR))
        and not (page.photometric == YCBCR and page.compression not in JPEG)
        and page.bitspersample == first.bitspersample
    )
