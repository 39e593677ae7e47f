"""What every reader promises, and what all readers share.

A reader is one open image. Its level 0 is the file's finest; level k, where there is one, is an
area mean of it over squares of `downsamples[k]` px, a whole number. A handle that has failed once
is not trusted again: `read_patiently` opens the file once more, and a tile that fails twice is
named.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt

SpacingUnit = Literal["um", "m", "px"]
MaskKind = Literal["tissue", "valid"]

TILE_PX = 512
MPP_RANGE_UM = (0.05, 50.0)
ANISOTROPY_TOLERANCE = 0.02
PRINTER_DPI = (72, 96, 100, 120, 150, 200, 240, 300, 400, 600, 1200)
OVERRIDES = {"um": "--source-mpp", "m": "--source-gsd"}
NAMES = {"um": "mpp", "m": "gsd", "px": "pixels"}
HINTS = {
    "um": " (about 0.25 at 40x, 0.5 at 20x), or measure plain pictures by --pixels",
    "m": "",
}
SIGNS = {"um": "µm", "m": "m", "px": "px"}
BANDS = ("red", "green", "blue", "nir")
NIR_NAMES = ("nir", "nir1", "near infrared", "near-infrared", "nearinfrared")


class UnreadableError(ValueError):
    """A file cannot be used; the message is one sentence that says why and what to do."""


class TileError(RuntimeError):
    """A tile of an otherwise readable image cannot be read; the message names it."""


@runtime_checkable
class Reader(Protocol):
    """An open image.

    path: the file. shape: (c, h, w) of level 0. dtype: uint8 or uint16. bands: their names in the
    order in which `read` returns them. unit, spacing: the side of a level-0 pixel in µm ("um",
    slides), m ("m", aerial) or pixels ("px", plain pictures, where it is 1); a file that does not
    say it, where nobody else does, has no reader. spacing_source: where the spacing comes from,
    for people. mask_kind: whether what is worth learning from is found by looking for tissue or is
    the file's valid data. downsamples: whole numbers, 1 first, rising. attributes: what else is
    worth keeping: georeference, and where in its file a slide's scanned part begins
    (`pipeline.places`).
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: Literal["uint8", "uint16"]
    bands: tuple[str, ...]
    unit: SpacingUnit
    spacing: float
    spacing_source: str
    mask_kind: MaskKind
    downsamples: tuple[int, ...]
    attributes: dict[str, Any]

    def level_shape(self, level: int) -> tuple[int, int]:
        """(h, w) of `level`."""

    def read(
        self, y: int, x: int, height: int, width: int, level: int = 0
    ) -> UInt[np.ndarray, "c h w"]:
        """The pixels of a box of `level`, in pixels of that level.

        Raises `ValueError` when the box leaves the level and `TileError` when a tile cannot be
        read.
        """

    def read_valid(self, y: int, x: int, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """Which level-0 pixels of a box hold data; the same errors as `read`."""

    def close(self) -> None:
        """Give the handle back; a second call does nothing."""

    def __enter__(self) -> Reader: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def check_box(path: Path, shape: tuple[int, int], y: int, x: int, height: int, width: int) -> None:
    """Raise a `ValueError` when a box leaves an image of `shape` (h, w)."""
    if min(y, x, height, width) < 0 or y + height > shape[0] or x + width > shape[1]:
        raise ValueError(
            f"box (y={y}, x={x}, {height} × {width}) leaves {path}, which is {shape[0]} × "
            f"{shape[1]}"
        )


R = TypeVar("R", bound="Closing")


class Closing(ABC):
    """What is closed where its `with` ends, whatever happened."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_patiently(
    read_box: Callable[[int, int, int, int], np.ndarray],
    reopen: Callable[[], None],
    errors: type[Exception] | tuple[type[Exception], ...],
    box: tuple[int, int, int, int],
    name: str,
) -> np.ndarray:
    """`read_box(*box)`, an array (..., h, w); after an error once more through a new handle, tile
    by tile.

    Raises a `TileError` that names the first tile of 512 px that fails again.
    """
    try:
        return read_box(*box)
    except errors:
        reopen()
    top, left, height, width = box
    rows = []
    for y in range(top, top + height, TILE_PX):
        row = []
        for x in range(left, left + width, TILE_PX):
            tile = (y, x, min(TILE_PX, top + height - y), min(TILE_PX, left + width - x))
            try:
                row.append(read_box(*tile))
            except errors as error:
                raise TileError(
                    f"the tile at y={y}, x={x} ({tile[2]} × {tile[3]}) of {name} cannot be read: "
                    f"{error}"
                ) from error
        rows.append(np.concatenate(row, axis=-1))
    return np.concatenate(rows, axis=-2)


def number(text: str, otherwise: float = math.nan) -> float:
    """The number that a file's metadata states, `otherwise` where it states none."""
    try:
        value = float(text)
    except ValueError:
        return otherwise
    return value if math.isfinite(value) else otherwise


def checked_spacing(
    path: Path, spacing_yx: tuple[float, float] | None, unit: SpacingUnit, source: str
) -> float:
    """The side of a pixel, if it is credible and the same on both axes; or `UnreadableError`.

    `source` says where the file states it; where it states none, `source` is what it says instead,
    or empty.
    """
    name, option = NAMES[unit], OVERRIDES[unit]
    if spacing_yx is None:
        raise UnreadableError(
            f"{path} does not say its {name}{f' ({source})' if source else ''}, without which "
            f"nothing in it has a size; give it with {option}"
            f"{HINTS[unit]}"
        )
    y, x = spacing_yx
    if unit == "um" and any(math.isclose(25400 / dpi, x, rel_tol=1e-3) for dpi in PRINTER_DPI):
        raise UnreadableError(
            f"{path} says mpp {x:g} ({source}), which is {25400 / x:.0f} dots per inch, a "
            f"printer's resolution and not a scanner's; give the true one with {option}"
        )
    low, high = MPP_RANGE_UM if unit == "um" else (0.0, math.inf)
    if not all(math.isfinite(s) and low <= s <= high and s > 0 for s in (y, x)):
        raise UnreadableError(
            f"{path} says {name} {x:g} × {y:g} ({source}), which is not credible"
            f"{f' (outside {low:g}–{high:g} µm)' if unit == 'um' else ''}; give the true one with "
            f"{option}"
        )
    if abs(y / x - 1) > ANISOTROPY_TOLERANCE:
        raise UnreadableError(
            f"{path} has pixels of {y:g} × {x:g} {'µm' if unit == 'um' else 'm'} (height × "
            "width), and only "
            f"square pixels are supported; resample it, or say which side to believe with {option}"
        )
    return float(f"{(y + x) / 2:.9g}")
