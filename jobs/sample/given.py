"""What a sample command is given of its images: their area means over coarser cells (--low), or
some of their pixels (--known, where --mask is white).

Both are OME-Zarr images like those that this command writes and a store holds; they are read box
by box while the image is painted. A mask is a picture.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from jobs.run import RunConfig
from jobs.sample.options import Sample
from model.editing import Edit, Known, KnownPixels, LowImage
from model.family import generated_level
from model.generate import padded
from model.lattice import Box, at_level
from model.sparse.config import SparseConfig
from pipeline.ome import OmeImage
from pipeline.packfile import PackStatistics
from pipeline.store import UNITS

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Standardised:
    """An image on disk as a `model.editing.Source` of u."""

    image: OmeImage
    statistics: PackStatistics

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image.shape

    def read(self, box: Box) -> Float[Tensor, "c h w"]:
        inside = box.clip(*self.shape[1:])
        pixels = self.image.read(inside.y, inside.x, inside.height, inside.width)
        values = self.statistics.standardise(pixels.transpose(1, 2, 0).astype(np.float32))
        return padded(torch.from_numpy(values).permute(2, 0, 1), inside, box)


@dataclass(frozen=True)
class MaskPicture:
    """A mask as a `model.editing.Source` of ones and zeros; a pixel of it stands for a square of
    2^down x 2^down pixels of an image of height x width.
    """

    known: Bool[np.ndarray, "rows columns"]
    height: int
    width: int
    down: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.height, self.width

    def read(self, box: Box) -> Float[Tensor, "1 h w"]:
        inside = box.clip(self.height, self.width)
        rows = np.arange(inside.y, inside.y + inside.height) >> self.down
        columns = np.arange(inside.x, inside.x + inside.width) >> self.down
        values = self.known[np.ix_(rows, columns)].astype(np.float32)
        return padded(torch.from_numpy(values)[None], inside, box)


@dataclass(frozen=True)
class Given:
    """An image that is given, and what of it: means over 2^down x 2^down pixels of the painting,
    or the pixels themselves where a mask says so.

    level: of the pixels that are painted; finer: how many levels below them cells are generated,
    whose means they are. mask_path: where the mask was read.
    """

    image: OmeImage
    statistics: PackStatistics
    level: int
    down: int = 0
    mask: MaskPicture | None = None
    mask_path: Path | None = None
    finer: int = 0

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the painting at the resolution of training."""
        _, height, width = self.image.shape
        return at_level(height << self.down, -self.level), at_level(
            width << self.down, -self.level
        )

    @cached_property
    def edit(self) -> Edit:
        values = Standardised(self.image, self.statistics)
        if self.mask is None:
            return LowImage(values, self.level + self.down)
        return KnownPixels(Known(values, self.mask), self.level)

    @property
    def cell(self) -> int:
        """Tiles are multiples of this many generated cells."""
        return 1 << (self.down + self.finer)

    def identity(self) -> dict[str, Any]:
        """What names it in the record of a painting."""
        path = str(self.image.path.resolve())
        if self.mask is None:
            return {"low": path, "sha256": self._digest}
        assert self.mask_path is not None
        return {"known": path, "mask": str(self.mask_path.resolve()), "sha256": self._digest}

    @cached_property
    def _digest(self) -> str:
        """Of all pixels, and of the mask."""
        digest = hashlib.sha256(str((self.image.shape, self.image.dtype, self.down)).encode())
        _, height, width = self.image.shape
        for y in range(0, height, _ROWS_AT_ONCE):
            rows = self.image.read(y, 0, min(_ROWS_AT_ONCE, height - y), width)
            digest.update(np.ascontiguousarray(rows).data)
        if self.mask is not None:
            digest.update(np.packbits(self.mask.known).data)
        return digest.hexdigest()[:16]

    def in_words(self) -> str:
        """For the plan."""
        if self.mask is None:
            return f"with the area means of {self.image.path}, {1 << self.down} times as coarse"
        part = self.mask.known.mean()
        return f"with {part:.0%} of the pixels of {self.image.path}"


def find_given(options: Sample, config: RunConfig, level: int) -> Given | None:
    """What the options give, or None; a `ValueError` where that does not fit the run or itself.

    level: of the pixels that are painted.
    """
    path = _named(options)
    if path is None:
        return None
    name = "--low" if options.known is None else "--known"
    denoiser = config.denoiser
    if isinstance(denoiser, SparseConfig) and denoiser.mollifier_sigma_px:
        raise ValueError(
            f"{name} gives exact values, but this run paints images that are mollified by "
            f"{denoiser.mollifier_sigma_px:g} px and sharpens them afterwards; use a run of "
            "another preset, or train with --set mollifier_sigma_px=0 on packs made with "
            "--mollifier 0"
        )
    image = _image(name, path, config)
    painted = config.packs.spacing * 2.0**level
    ratio = image.spacing / painted
    if name == "--low":
        down = _halvings(image, ratio, painted)
        finer = level - generated_level(denoiser, level)
        return Given(image, config.statistics, level, down, finer=finer)
    if not math.isclose(ratio, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"{path} has pixels of {image.spacing:g} {image.unit}, but pixels of {painted:g} are "
            "painted, of which some are to be known; name an image at that resolution, or change "
            "--scale"
        )
    if generated_level(denoiser, level) < level:
        raise ValueError(
            f"--scale {options.scale:g} of this run is the area mean of finer pixels, of which "
            "--known says nothing; leave --scale at 1 and reduce the image"
        )
    assert options.mask is not None
    mask = _mask(options.mask, image)
    return Given(image, config.statistics, level, 0, mask, options.mask)


def _named(options: Sample) -> Path | None:
    """The image that is given; a `ValueError` for options that contradict each other."""
    if options.low is not None and options.known is not None:
        raise ValueError(
            "--low gives the means of the whole image and --known some of its pixels, which "
            "cannot both be kept; leave one out"
        )
    if (options.known is None) != (options.mask is None):
        missing, there = ("--mask", "--known") if options.mask is None else ("--known", "--mask")
        raise ValueError(
            f"{there} needs {missing}: an image, and a picture that is white where the image is "
            "kept and black where it is painted anew"
        )
    return options.low or options.known


def _image(name: str, path: Path, config: RunConfig) -> OmeImage:
    image, packs = OmeImage.open(path), config.packs
    found = (image.bands, image.dtype, image.unit)
    wanted = (packs.bands, packs.dtype, UNITS[packs.unit])
    if found != wanted:
        raise ValueError(
            f"{name} {path} holds {_in_words(*found)}, the run was trained on "
            f"{_in_words(*wanted)}, so that its values mean something else; ingest it as the "
            "run's images were"
        )
    if not image.is_complete():
        raise ValueError(
            f"{name} {path} is not written to its end; run the command that makes it again"
        )
    return image


def _in_words(bands: tuple[str, ...], dtype: str, unit: str) -> str:
    return f"{','.join(bands)} as {dtype} with pixels in {unit}"


def _halvings(image: OmeImage, ratio: float, painted: float) -> int:
    """How often pixels of `painted` are doubled to be the image's."""
    down = round(math.log2(ratio))
    if down < 1 or not math.isclose(ratio, 2.0**down, rel_tol=1e-6):
        raise ValueError(
            f"{image.path} has pixels of {image.spacing:g} {image.unit}, {ratio:.4g} times those "
            f"that are painted, {painted:g}; area means are kept over cells that are 2, 4, 8, ... "
            f"times as large, so give an image at {2 * painted:g}, {4 * painted:g}, "
            f"{8 * painted:g}, ... or change --scale"
        )
    return down


def _mask(path: Path, image: OmeImage) -> MaskPicture:
    if not path.is_file():
        raise ValueError(f"--mask {path} does not exist; name a picture, such as a PNG")
    try:
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"--mask {path} cannot be read as a picture ({error}); save it as a PNG, which may be "
            "2, 4, 8, ... times as coarse as the image"
        ) from error
    _, height, width = image.shape
    sizes = [
        (at_level(height, k), at_level(width, k)) for k in range(min(height, width).bit_length())
    ]
    if grey.shape not in sizes:
        raise ValueError(
            f"--mask {path} has {grey.shape[0]}x{grey.shape[1]} pixels, which do not cover the "
            f"{height}x{width} of {image.path}; make it as large, or 2, 4, 8, ... times as coarse"
        )
    known = grey > grey.max() // 2
    if not known.any():
        raise ValueError(
            f"--mask {path} is black all over, so that nothing of {image.path} is kept; make it "
            "white where the image is known, or leave --known and --mask out"
        )
    return MaskPicture(known, height, width, sizes.index(grey.shape))
