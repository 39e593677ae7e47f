"""What is worth learning from in a slide: where there is tissue, in cells of 16 px.

Stain is coloured and glass is not. So the glass is found first, as the commonest colour of bright
cells that equal their neighbours, and divided out: tinted light does not look like stain. Of what
remains, the saturation, smoothed over neighbouring cells, splits in two, and Otsu's threshold
finds where. Otsu always splits, also a picture of nothing but glass or nothing but tissue; so the
threshold is held between a floor that glass does not reach and a ceiling that pale stroma passes.

Three things have colour and are no tissue. *Blur*: areas without fine detail (`pipeline.focus`),
which is also what most pen marks are, as ink lies on the cover slip. *Coloured ink*: cells whose
optical density is higher in red than in green, as that of green pens is, or high in red and low in
blue, as that of blue pens is even over tissue. Haematoxylin takes less red than green out, and
eosin hardly any (on real H&E: red over green at most 0.86, blue over red at least 0.6). Where
most of what is in focus has the colour of ink, that is the stain (Giemsa) and no ink. *Black
ink*: dark and grey, in brightfield slides. Ink counts in pieces and takes its faint border with
it. Red ink over tissue in focus looks like blood, and stays. At the end specks are dropped, and
small holes (lumens, fat) belong to the tissue around them.

Everything is local but a few numbers (glass, threshold, whether the stain is blue), which are
counted in a first pass. So the mask is found strip by strip, with a margin that no rule reaches
across, and is the same however the image is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from scipy.ndimage import binary_dilation
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from pipeline.focus import (
    BLOCK_CELLS,
    CELL_LEVEL,
    FocusMap,
    cell_details,
    detail_level,
    halved_with_detail,
)
from pipeline.ome import OmeImage
from pipeline.regions import CELL_PX

STRIP_CELLS = 256
HISTOGRAM_BINS = 1024


@dataclass(frozen=True)
class TissueSettings:
    """Every threshold, as it is recorded with each slide. Brightness and saturation are in [0, 1],
    optical densities of ink natural logarithms, details in grey levels of 255, lengths in µm or
    cells of 16 px.
    """

    min_saturation: float = 0.04
    max_saturation: float = 0.08
    smoothing_cells: float = 1.0
    near_black: float = 0.08
    speck_cells: int = 16
    hole_cells: int = 64
    glass_brightness: float = 0.7
    glass_saturation: float = 0.15
    glass_roughness: float = 1.5
    min_glass_share: float = 0.005
    detail_um: float = 1.0
    min_detail: float = 4.0
    min_detail_ratio: float = 0.4
    focus_window_um: float = 100.0
    ink_saturation: float = 0.3
    ink_red_over_green: float = 1.25
    blue_ink_red: float = 0.7
    blue_ink_red_over_green: float = 0.75
    blue_ink_blue_over_red: float = 0.5
    black_ink_brightness: float = 0.4
    black_ink_saturation: float = 0.3
    ink_cells: int = 64
    ink_border_cells: int = 2

    @property
    def margin_cells(self) -> int:
        """How far from a cell anything decides about it."""
        smoothing = int(4 * self.smoothing_cells + 0.5)
        sizes = self.ink_cells + self.speck_cells + self.hole_cells + 3
        return smoothing + sizes + self.ink_border_cells


@dataclass(frozen=True)
class Tissue:
    """A mask (one value a cell of 16 px) and how it was found: the settings, and the numbers that
    the slide decided.
    """

    mask: Bool[np.ndarray, "gy gx"]
    facts: dict[str, Any]


def find_tissue(
    image: OmeImage, settings: TissueSettings | None = None, strip_cells: int = STRIP_CELLS
) -> Tissue:
    """Where `image`, whole with its pyramid, shows tissue; memory holds a few strips of it.

    `image.spacing` is in µm; `strip_cells` changes nothing but memory.
    """
    rules = settings or TissueSettings()
    rows, columns = (-(-side // CELL_PX) for side in image.shape[1:])
    glass, is_brightfield = _find_glass(image, rules, rows, strip_cells)
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    for top, bottom, low, high in _strips(rows, strip_cells, rules.margin_cells):
        colour = _smooth_saturation(_cells(image, low, high) / glass, rules)
        counts += np.histogram(colour[top - low : bottom - low], HISTOGRAM_BINS, (0.0, 1.0))[0]
    threshold = float(np.clip(_otsu(counts, rules), rules.min_saturation, rules.max_saturation))
    focus = _map_focus(image, rules, glass, rows, columns)
    sharp = focus.in_focus(
        rules.focus_window_um / image.spacing, rules.min_detail, rules.min_detail_ratio
    )
    inky, seen = focus.inky[sharp].sum(), focus.count[sharp].sum()
    is_blue = bool(2 * inky > seen)
    mask = np.zeros((rows, columns), bool)
    dropped = {"ink": 0, "blur": 0}
    for top, bottom, low, high in _strips(rows, strip_cells, rules.margin_cells):
        cells = _cells(image, low, high) / glass
        coloured = _smooth_saturation(cells, rules) > threshold
        ink = _ink(cells, rules, is_blue, is_brightfield)
        blur = ~_spread(sharp, low, high, columns)
        found = remove_small_objects(coloured & ~ink & ~blur, max_size=rules.speck_cells)
        found = remove_small_holes(found, max_size=rules.hole_cells) & ~ink
        inside = slice(top - low, bottom - low)
        mask[top:bottom] = found[inside]
        dropped["ink"] += int((coloured & ink)[inside].sum())
        dropped["blur"] += int((coloured & blur & ~ink & ~found)[inside].sum())
    return Tissue(
        mask,
        {
            "settings": asdict(rules),
            "glass": [round(float(value), 4) for value in glass.ravel()],
            "saturation": round(threshold, 4),
            "blue_stain": is_blue,
            "brightfield": is_brightfield,
            "tissue": round(float(mask.mean()), 4),
            **{name: round(count / mask.size, 4) for name, count in dropped.items()},
        },
    )


def saturation(
    colours: Float32[np.ndarray, "3 h w"], near_black: float
) -> Float32[np.ndarray, "h w"]:
    """1 - min / max of the three colours, in [0, 1]; 0 where the picture is nearly black."""
    brightest, darkest = colours.max(axis=0), colours.min(axis=0)
    found = np.zeros_like(brightest)
    np.divide(brightest - darkest, brightest, out=found, where=brightest > near_black)
    return found


def _cells(
    image: OmeImage, top: int, bottom: int, left: int = 0, right: int | None = None
) -> Float32[np.ndarray, "3 gy gx"]:
    """Red, green and blue of the cells in rows `top` to `bottom` and columns `left` to `right`, in
    [0, 1].
    """
    level = min(CELL_LEVEL, image.num_levels - 1)
    side = CELL_PX >> level
    _, height, width = image.level_shape(level)
    end = width if right is None else min(right * side, width)
    box = (top * side, left * side, min(bottom * side, height) - top * side, end - left * side)
    pixels = image.read(*box, level)[:3]
    full = np.float32(np.iinfo(pixels.dtype).max)
    if side > 1:
        starts = [np.arange(0, n, side) for n in pixels.shape[1:]]
        sums = np.add.reduceat(pixels, starts[0], axis=1, dtype=np.float32)
        sums = np.add.reduceat(sums, starts[1], axis=2)
        spans = [np.diff(np.append(s, n)) for s, n in zip(starts, pixels.shape[1:], strict=True)]
        return (sums / (spans[0][:, None] * spans[1] * full)).astype(np.float32)
    return pixels.astype(np.float32) / full


def _strips(rows: int, strip: int, margin: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, top with margin, bottom with margin) of strips of rows."""
    for top in range(0, rows, strip):
        bottom = min(top + strip, rows)
        yield top, bottom, max(0, top - margin), min(rows, bottom + margin)


def _find_glass(
    image: OmeImage, rules: TissueSettings, rows: int, strip_cells: int
) -> tuple[Float32[np.ndarray, "3 1 1"], bool]:
    """The colour of bare glass, white where there is hardly any, and whether the slide is bright.

    Glass is bright and hardly coloured, and its cells equal their neighbours.
    """
    colours = np.zeros((3, 256), np.int64)
    seen = bright = 0
    for top, bottom, *_ in _strips(rows, strip_cells, 0):
        cells = _cells(image, top, bottom)
        brightest = cells.max(axis=0)
        seen += brightest.size
        bright += int((brightest > rules.black_ink_brightness).sum())
        height, width = (n // 2 * 2 for n in cells.shape[1:])
        means, energy = halved_with_detail(cells[:, :height, :width] * np.float32(255))
        plain = (energy < rules.glass_roughness**2) & (
            means.max(axis=0) > 255 * rules.glass_brightness
        )
        plain &= saturation(means / 255, rules.near_black) < rules.glass_saturation
        for band, values in enumerate(means):
            colours[band] += np.bincount(values[plain].round().astype(int), minlength=256)
    is_bright = 2 * bright > seen
    if 4 * colours[0].sum() < rules.min_glass_share * seen:
        return np.ones((3, 1, 1), np.float32), is_bright
    middle = [int(np.searchsorted(c.cumsum(), c.sum() / 2)) for c in colours]
    return (np.array(middle, np.float32) / 255).reshape(3, 1, 1), is_bright


def _smooth_saturation(
    colours: Float32[np.ndarray, "3 h w"], rules: TissueSettings
) -> Float32[np.ndarray, "h w"]:
    found = saturation(np.minimum(colours, 1), rules.near_black)
    return gaussian(found, rules.smoothing_cells, mode="nearest", preserve_range=True)


def _otsu(counts: np.ndarray, rules: TissueSettings) -> float:
    """Otsu's threshold of a histogram over [0, 1]."""
    if (counts > 0).sum() < 2:
        return rules.min_saturation
    centres = (np.arange(HISTOGRAM_BINS) + 0.5) / HISTOGRAM_BINS
    return float(threshold_otsu(hist=(counts, centres)))


def _map_focus(
    image: OmeImage,
    rules: TissueSettings,
    glass: Float32[np.ndarray, "3 1 1"],
    rows: int,
    columns: int,
) -> FocusMap:
    """Detail and ink, block by block; one shard of level 1 or 2 is in memory at a time."""
    focus = FocusMap.empty(rows, columns)
    fine = detail_level(image.spacing, rules.detail_um)
    level = min(fine, image.num_levels - 1)
    for key in image.shard_keys():
        y, x, height, width = image.shard_box(key)
        top, left = y // CELL_PX, x // CELL_PX
        bottom, right = -(-(y + height) // CELL_PX), -(-(x + width) // CELL_PX)
        cells = _cells(image, top, bottom, left, right) / glass
        coloured = saturation(np.minimum(cells, 1), rules.near_black) > rules.min_saturation
        if not coloured.any():
            continue
        box = (y >> level, x >> level, -(-height >> level), -(-width >> level))
        details = cell_details(image.read(*box, level)[:3], level, fine)
        focus.add(top, left, coloured, _takes_red(cells, rules), *details)
    return focus


def _takes_red(
    colours: Float32[np.ndarray, "3 h w"], rules: TissueSettings
) -> Bool[np.ndarray, "h w"]:
    """Saturated cells whose optical densities are those of green or blue ink."""
    red, green, blue = -np.log(np.clip(colours, 1 / 255, 1))
    strong = saturation(np.minimum(colours, 1), rules.near_black) > rules.ink_saturation
    is_blue = (red > rules.blue_ink_red) & (red > rules.blue_ink_red_over_green * green)
    is_blue &= blue < rules.blue_ink_blue_over_red * red
    return strong & (is_blue | (red > rules.ink_red_over_green * green))


def _ink(
    colours: Float32[np.ndarray, "3 h w"],
    rules: TissueSettings,
    is_blue: bool,
    is_brightfield: bool,
) -> Bool[np.ndarray, "h w"]:
    """Pieces of pen marks, coloured or black, with their border."""
    ink = np.zeros(colours.shape[1:], bool)
    if not is_blue:
        ink |= _takes_red(colours, rules)
    if is_brightfield:
        brightest, darkest = colours.max(axis=0), colours.min(axis=0)
        grey = brightest - darkest < rules.black_ink_saturation * brightest
        ink |= grey & (brightest < rules.black_ink_brightness)
    ink = remove_small_objects(ink, max_size=rules.ink_cells)
    return binary_dilation(ink, iterations=rules.ink_border_cells)


def _spread(
    blocks: Bool[np.ndarray, "by bx"], low: int, high: int, columns: int
) -> Bool[np.ndarray, "gy gx"]:
    """The rows of cells from `low` to `high` of a map of blocks."""
    rows = np.arange(low, high) // BLOCK_CELLS
    return blocks[rows[:, None], np.arange(columns) // BLOCK_CELLS]
