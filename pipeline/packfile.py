"""Pixel packs at rest: WebDataset tar shards and an index of offsets.

One sample of a shard is one region: `KEY.json` (place, valid fraction, label), `KEY.tokens.npy`
(once, not once per pack), `KEY.coarse.npy` (the lattice of area means) and `KEY.p00.bin`,
`KEY.p01.bin` ..., one draw each: the values of its cells, of points in the order of the design, of
a patch in the order (y, x, channel), of a cascade window after window (`WindowLayout`). KEY is an
integer. Any WebDataset reader can stream a shard; random access takes a few ranges of it through
the index.

Values are uint16 in fixed point: pixel value x `value_scale`, so that area means of 8-bit pixels
are kept to 1/256 of a grey level. 65,535 marks a cell that is absent: outside the image, or not
wholly valid. Where cells lie is not stored: it follows from the design, the lattice's valid cells,
the tokens' places and the key (seed, region, pack).
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Int64, UInt16

from model.design import (
    EVERY_PIXEL,
    CascadeDesign,
    Design,
    Extent,
    PatchDesign,
    PointDesign,
    Sampling,
    WindowsBelow,
    make_design,
)
from pipeline.embeddings import TokenLattice

ABSENT = 65_535
PART_SCALE = 65_535
"""Of the valid part of a cell, as an integer."""
VALUE_SCALE = {"uint8": 256, "uint16": 1}
INDEX_NAME, PLAN_NAME = "index.json", "settings.json"


@dataclass(frozen=True)
class PackSettings:
    """Everything that a pack was made with; a trainer or a second run that differs says so and
    stops.

    lattices: (footprint_px, gy, gx) of the token lattices of a region, the finest first. window,
    uniform_part: of the design, None where it has none. lattice: whether draws of points
    hold the lattice too. mollifier_sigma_px: of the Gaussian that smoothed the pixels before the
    draw, 0 for none. classes: the labels that training regions have, sorted; a label's number is
    its place here. blocks: (level of parents, fine level, window) of a cascade, coarse to fine; ()
    in older packs. windows_inside: whether a cascade's windows lie inside their region; not so in
    older packs.
    """

    store: str
    store_fingerprint: str
    encoder_key: str
    lattices: tuple[tuple[int, int, int], ...]
    design: str
    points: int
    coarse_level: int
    window: int | None
    packs_per_region: int
    seed: int
    side_px: int
    unit: str
    spacing: float
    bands: tuple[str, ...]
    dtype: str
    lattice: bool = False
    uniform_part: float | None = None
    mollifier_sigma_px: float = 0.0
    classes: tuple[str, ...] = ()
    blocks: tuple[tuple[int, int, int], ...] = ()
    windows_inside: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> "PackSettings":
        """The inverse of `dataclasses.asdict` and JSON; `where` names the packs in a refusal."""
        values = dict(tuples_from_json(content))
        if values.get("design") == "zoom":
            raise ValueError(
                f"{where} holds draws of the joint pyramid (--design zoom), which the cascade of "
                "octave blocks has replaced; pack and train again"
            )
        values.pop("halo", None)  # of zoom draws alone
        return cls(**values)

    def make_design(self) -> Design:
        return make_design(
            self.design,
            points=self.points,
            coarse_level=self.coarse_level,
            window=self.window,
            lattice=self.lattice,
            uniform_part=self.uniform_part,
            blocks=self.blocks,
        )

    def sampling(self) -> Sampling:
        """How regions were drawn, the lattice apart; windows take part in no sums."""
        design, region = self.make_design(), Extent(self.side_px, self.side_px)
        if not isinstance(design, PointDesign):
            return EVERY_PIXEL
        return Sampling(design, design.num_cells(region) / region.pixels)

    @property
    def value_scale(self) -> int:
        return VALUE_SCALE[self.dtype]


@dataclass(frozen=True)
class PackStatistics:
    """Measured on the training regions.

    mean: per band, in pixel values. colour: the symmetric square root of the bands' covariance, so
    that pixel = mean + colour u for a standardised u whose bands are uncorrelated. signal,
    residual: variances of u's octaves (see `model.process.Octaves`). token_mean, token_std: per
    embedding dimension. low, high: of the values of cells, a row a level from the pixel on, a
    column a band, outside of which hardly any lie; () in older packs.
    """

    mean: tuple[float, ...]
    colour: tuple[tuple[float, ...], ...]
    signal: tuple[float, ...]
    residual: tuple[float, ...]
    token_mean: tuple[float, ...]
    token_std: tuple[float, ...]
    low: tuple[tuple[float, ...], ...] = ()
    high: tuple[tuple[float, ...], ...] = ()

    def standardise(self, pixels: Float32[np.ndarray, "*n c"]) -> Float32[np.ndarray, "*n c"]:
        """Pixel values -> u."""
        # In C order: numpy multiplies by a transposed view 40 times more slowly.
        whiten = np.ascontiguousarray(np.linalg.inv(np.array(self.colour)).T, np.float32)
        return (pixels - np.array(self.mean, np.float32)) @ whiten

    def to_pixels(self, values: Float32[np.ndarray, "*n c"]) -> Float32[np.ndarray, "*n c"]:
        """u -> pixel values, neither rounded nor clipped."""
        colour = np.ascontiguousarray(np.array(self.colour).T, np.float32)
        return values @ colour + np.array(self.mean, np.float32)


@dataclass(frozen=True)
class RegionEntry:
    """Where one region lies in the store and in the packs.

    key: its number in the store's region table. offsets: (start, length) in bytes of its tokens,
    its lattice and its packs, in this order, in `shard`. first_px: (y, x) of the first token's
    centre, for each lattice. label: the class of its image, if it was given one.
    """

    key: int
    image: str
    y: int
    x: int
    split: str
    shard: str
    first_px: tuple[tuple[float, float], ...]
    offsets: tuple[tuple[int, int], ...]
    label: str | None = None


def extent_of(
    side_px: int,
    footprint_px: int,
    first_token_px: Sequence[float],
    lattice: UInt16[np.ndarray, "hl wl c"] | None = None,
) -> Extent:
    """A region as designs see it: its fixed-point lattice, once there is one, says what is valid,
    the centre (y, x) of its first token where embedded tiles begin.
    """
    y, x = (int(centre - footprint_px / 2) % footprint_px for centre in first_token_px)
    present = None if lattice is None else lattice[..., 0] != ABSENT
    return Extent(side_px, side_px, present, (y, x))


@dataclass(frozen=True)
class WindowLayout:
    """How the windows of one block of a cascade lie in a draw: `number` of them from byte `start`
    on, each its fine cells, its parents with a margin and the valid parts of the inner parents.

    shape: (height, width) in parents.
    """

    block: WindowsBelow
    margin: int
    shape: tuple[int, int]
    number: int
    start: int
    channels: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of uint16 values: of fine cells, parents and valid parts."""
        (h, w), more = self.shape, 2 * self.margin
        fine = self.channels * h * w << 2 * self.block.octaves
        return fine, self.channels * (h + more) * (w + more), h * w

    @property
    def window_bytes(self) -> int:
        return 2 * sum(self.sizes)


def window_layouts(design: CascadeDesign, image: Extent, channels: int) -> list[WindowLayout]:
    """Of every block, in the order of a draw."""
    found, start = [], 0
    for block, number in zip(design.blocks, design.numbers(image), strict=True):
        layout = WindowLayout(block, design.margin, block.shape(image), number, start, channels)
        found.append(layout)
        start += number * layout.window_bytes
    return found


@dataclass(frozen=True)
class DrawnTop:
    """The top lattice of a region or a window of it, fixed point; origin: its first cell."""

    lattice: UInt16[np.ndarray, "hl wl c"]
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class DrawnWindow:
    """One window of a block of octaves: fixed-point values of its fine cells and of its parents
    with a margin, the valid parts of the inner parents, and the first inner parent (y, x).
    """

    block: WindowsBelow
    fine: UInt16[np.ndarray, "hk wk c"]
    parents: UInt16[np.ndarray, "hp wp c"]
    weight: UInt16[np.ndarray, "h w"]
    origin: Int64[np.ndarray, "2"]


@dataclass(frozen=True)
class DrawnPatch:
    """One patch of a region: fixed-point pixels, and its first (y, x)."""

    values: UInt16[np.ndarray, "w w c"]
    origin: Int64[np.ndarray, "2"]


@dataclass(frozen=True)
class DrawnPoints:
    """One draw of a region: fixed-point values, and their cells (level, y, x).

    The lattice has no cells where it is not part of the draw.
    """

    lattice: UInt16[np.ndarray, "hl wl c"]
    values: UInt16[np.ndarray, "n c"]
    cells: Int64[np.ndarray, "n 3"]


Drawn = DrawnTop | DrawnWindow | DrawnPatch | DrawnPoints


class PackSet:
    """A folder of packs, opened for reading; safe to open in many processes."""

    def __init__(
        self,
        path: Path,
        settings: PackSettings,
        statistics: PackStatistics,
        regions: list[RegionEntry],
    ) -> None:
        self.path, self.settings, self.statistics, self.regions = (
            path,
            settings,
            statistics,
            regions,
        )
        self.design = settings.make_design()

    @classmethod
    def open(cls, path: Path) -> "PackSet":
        """Open finished packs; a `ValueError` when `path` holds none."""
        index = path / INDEX_NAME
        if not index.is_file():
            raise ValueError(
                f"{path} holds no finished packs; make them with python -m pipeline.pack"
            )
        content = json.loads(index.read_text())
        settings = PackSettings.from_json(content["settings"], str(path))
        if settings.design == "cascade" and not (settings.blocks and settings.windows_inside):
            raise ValueError(
                f"{path} was drawn by an older version, for other blocks or with windows that "
                "stick out of regions; pack again into another folder (a demo, a comparison: "
                "choose another --out)"
            )
        return cls(
            path,
            settings,
            PackStatistics(**tuples_from_json(content["statistics"])),
            [RegionEntry(**tuples_from_json(entry)) for entry in content["regions"]],
        )

    def tokens(self, entry: RegionEntry) -> list[TokenLattice]:
        """The condition of a region, the finest lattice first; mapped, so that what a window needs
        of a large region is all that is read.
        """
        values = self._mapped(entry, 0)
        lattices, start = [], 0
        for (footprint, gy, gx), (y, x) in zip(
            self.settings.lattices, entry.first_px, strict=True
        ):
            part = values[start : start + gy * gx].reshape(gy, gx, -1)
            lattices.append(TokenLattice(part, footprint, y, x))
            start += gy * gx
        return lattices

    def lattice(self, entry: RegionEntry) -> UInt16[np.ndarray, "hl wl c"]:
        """The coarse lattice of a region, fixed point."""
        return np.load(io.BytesIO(self._range(entry, 1)))

    def draw(self, entry: RegionEntry, pack: int) -> DrawnPoints | DrawnPatch:
        """One draw of points, or a patch; where its cells lie is computed again."""
        settings, channels, design = self.settings, len(self.settings.bands), self.design
        key = (settings.seed, entry.key, pack)
        values = np.frombuffer(self._range(entry, 2 + pack), np.uint16).reshape(-1, channels)
        if isinstance(design, PointDesign):
            extent = Extent(settings.side_px, settings.side_px)
            none = np.empty((0, 0, channels), np.uint16)
            lattice = self.lattice(entry) if design.lattice else none
            return DrawnPoints(lattice, values, design.cells(extent, key))
        assert isinstance(design, PatchDesign)
        lattice = self.lattice(entry)
        extent = extent_of(settings.side_px, settings.lattices[0][0], entry.first_px[0], lattice)
        shape = (design.window, design.window, channels)
        return DrawnPatch(values.reshape(shape), design.draw(extent, key))

    def windows(self, block: int) -> WindowLayout:
        """How the windows of a block, counted from the coarsest, lie in every draw."""
        assert isinstance(self.design, CascadeDesign)
        region = Extent(self.settings.side_px, self.settings.side_px)
        return window_layouts(self.design, region, len(self.settings.bands))[block]

    def window(self, entry: RegionEntry, pack: int, block: int, number: int) -> DrawnWindow:
        """One window of a block of a draw; only its bytes are read."""
        assert isinstance(self.design, CascadeDesign)
        layout, last, settings = self.windows(block), self.windows(-1), self.settings
        if entry.offsets[2 + pack][1] != last.start + last.number * last.window_bytes:
            raise ValueError(
                f"{self.path} was drawn by another cascade design than this version's; pack again"
            )
        part = (layout.start + number * layout.window_bytes, layout.window_bytes)
        values = np.frombuffer(self._range(entry, 2 + pack, part), np.uint16)
        fine, parents, weight = np.split(values, np.cumsum(layout.sizes)[:-1])
        (h, w), n, more = layout.shape, layout.block.octaves, 2 * layout.margin
        key = (settings.seed, entry.key, pack)
        origins = self.design.draw(Extent(settings.side_px, settings.side_px), key)
        return DrawnWindow(
            layout.block,
            fine.reshape(h << n, w << n, -1),
            parents.reshape(h + more, w + more, -1),
            weight.reshape(h, w),
            origins[block][number],
        )

    def _mapped(self, entry: RegionEntry, member: int) -> np.ndarray:
        """An array in a shard that is read where it is looked at."""
        start, length = entry.offsets[member]
        with (self.path / entry.shard).open("rb") as stream:
            self._check_end(stream, entry, start + length)
            stream.seek(start)
            assert np.lib.format.read_magic(stream) == (1, 0)
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
            assert not by_columns
            return np.memmap(stream, dtype, "r", stream.tell(), shape)

    def _range(
        self, entry: RegionEntry, member: int, part: tuple[int, int] | None = None
    ) -> bytes:
        """The bytes of a member; part: (start, length) within it, if not all."""
        start, length = entry.offsets[member]
        if part is not None:
            start, length = start + part[0], part[1]
        with (self.path / entry.shard).open("rb") as stream:
            self._check_end(stream, entry, start + length)
            stream.seek(start)
            return stream.read(length)

    def _check_end(self, stream: BinaryIO, entry: RegionEntry, needed: int) -> None:
        """A `ValueError` where a shard was cut off."""
        if os.fstat(stream.fileno()).st_size < needed:
            raise ValueError(
                f"{self.path / entry.shard} ends before byte {needed}; "
                "delete the folder and run python -m pipeline.pack again"
            )


def index_content(
    settings: PackSettings, statistics: PackStatistics, regions: list[RegionEntry]
) -> dict[str, Any]:
    """What `PackSet.open` reads."""
    return {
        "settings": asdict(settings),
        "statistics": asdict(statistics),
        "regions": [asdict(entry) for entry in regions],
    }


def tuples_from_json(value: Any) -> Any:
    """JSON's lists as tuples, all the way down; dictionaries keep their keys."""
    if isinstance(value, list):
        return tuple(tuples_from_json(item) for item in value)
    if isinstance(value, dict):
        return {key: tuples_from_json(item) for key, item in value.items()}
    return value
