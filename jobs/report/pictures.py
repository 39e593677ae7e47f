"""The pictures of one painting, written beside the page: panels that show one place each.

    whole    what fits on a screen, JPEG
    full     every pixel, JPEG; reduced by a power of two where a browser could not hold it
    crop     a square at full resolution, PNG: for 8-bit RGB exactly the pixels of the image

Panels are the condition, the painting, and the nearest training region. Their pixels are those of
the painting: at a scale below 1 the real ones come from that level of the store, above 1 they are
shown as squares of several. A painting larger than its region is conditioned on the region and its
mirror images, or on several regions side by side (`conditioning.layout`), so that is what the
panel of the condition shows.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from conditioning.layout import recorded_layout
from jobs.pictures import as_rgb, liveliest, reduced
from jobs.report.material import Material, Painting
from jobs.run import RunConfig
from model.lattice import coarser
from pipeline.ome import OmeImage
from pipeline.store import Region

WHOLE_PX, CROP_PX, FULL_MAX_PX = 1280, 512, 8192
STRIP_PX = 1024
QUALITY = 92


@dataclass(frozen=True)
class Place:
    """A box of a painting, in its pixels."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class Source:
    """Where a panel's pixels come from: a box of `level` of an image, which need not be stored."""

    image: OmeImage
    y: int
    x: int
    height: int
    width: int
    level: int

    def rgb(self, place: Place, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """A part of the box, pixel for pixel."""
        if self.level < 0:
            return self._repeated(place, config)
        stored = min(self.level, self.image.num_levels - 1)
        finer = self.level - stored
        y, x, height, width = (
            n << finer for n in (self.y + place.y, self.x + place.x, place.height, place.width)
        )
        pixels = as_rgb(self.image, y, x, height, width, config, stored)
        return np.asarray(Image.fromarray(pixels).reduce(1 << finer))

    def _repeated(self, place: Place, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """A part whose pixels are finer than any that are stored."""
        times = 1 << -self.level
        top, left = self.y + place.y, self.x + place.x
        y, x = top // times, left // times
        height, width = (
            -(-(top + place.height) // times) - y,
            -(-(left + place.width) // times) - x,
        )
        pixels = as_rgb(self.image, y, x, height, width, config, 0)
        large = pixels.repeat(times, axis=0).repeat(times, axis=1)
        top, left = top - y * times, left - x * times
        return large[top : top + place.height, left : left + place.width]

    def coarser(self, levels: int) -> "Source":
        y, x, height, width = (n >> levels for n in (self.y, self.x, self.height, self.width))
        return Source(self.image, y, x, height, width, self.level + levels)

    def whole(self, longest: int, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """All of it, the longer side shown by `longest` px."""
        y, x, height, width = (
            coarser(n, -self.level) for n in (self.y, self.x, self.height, self.width)
        )
        return reduced(self.image, y, x, height, width, config, longest)

    def full(self, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """All of it, pixel for pixel, read strip by strip."""
        canvas = np.empty((self.height, self.width, 3), np.uint8)
        for y in range(0, self.height, STRIP_PX):
            strip = Place(y, 0, min(STRIP_PX, self.height - y), self.width)
            canvas[y : y + strip.height] = self.rgb(strip, config)
        return canvas


@dataclass(frozen=True)
class Mosaic:
    """Several boxes of one size side by side, as one."""

    cells: tuple[tuple[Source, ...], ...]

    @property
    def height(self) -> int:
        return sum(row[0].height for row in self.cells)

    @property
    def width(self) -> int:
        return sum(cell.width for cell in self.cells[0])

    def rgb(self, place: Place, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """A part of the first box, pixel for pixel."""
        return self.cells[0][0].rgb(place, config)

    def coarser(self, levels: int) -> "Mosaic":
        return Mosaic(tuple(tuple(cell.coarser(levels) for cell in row) for row in self.cells))

    def whole(self, longest: int, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """All of it, the longer side shown by about `longest` px."""
        share = longest / max(self.height, self.width)
        side = max(round(share * max(self.cells[0][0].height, self.cells[0][0].width)), 1)
        return _joined([[cell.whole(side, config) for cell in row] for row in self.cells])

    def full(self, config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
        """All of it, pixel for pixel."""
        return _joined([[cell.full(config) for cell in row] for row in self.cells])


def _joined(cells: list[list[UInt8[np.ndarray, "h w 3"]]]) -> UInt8[np.ndarray, "h2 w2 3"]:
    return np.concatenate([np.concatenate(row, axis=1) for row in cells], axis=0)


@dataclass(frozen=True)
class Panel:
    """The files of one panel, and what they show.

    role: condition, generated or nearest. size: height and width in pixels of the painting, of
    which `real` is not mirrored. full_reduction: pixels of the painting a side of one of `full`.
    """

    role: str
    whole: str
    full: str
    crop: str
    size: tuple[int, int]
    real: tuple[int, int]
    full_reduction: int
    full_bytes: int


@dataclass(frozen=True)
class Panels:
    """All panels of a painting, and the place of their crops."""

    panels: tuple[Panel, ...]
    crop: Place


def draw_panels(
    material: Material, painting: Painting, nearest: Region | None, folder: Path, slug: str
) -> Panels:
    """Write the pictures of a painting into `folder`, their names beginning with `slug`."""
    crop = _crop_place(material, painting)

    def draw(role: str, source: Source | Mosaic, size: tuple[int, int]) -> Panel:
        return _draw(material.config, role, source, size, crop, folder / f"{slug}-{role}")

    condition = _conditions(material, painting)
    panels = [
        draw("condition", condition, painting.size),
        draw("generated", Source(painting.image, 0, 0, *painting.size, 0), painting.size),
    ]
    if nearest is not None:
        source = _of_region(material, painting, nearest)
        panels.append(draw("nearest", source, painting.conditioned))
    return Panels(tuple(panels), crop)


def _conditions(material: Material, painting: Painting) -> Source | Mosaic:
    """The region that conditioned a painting, or those that did side by side."""
    try:
        layout = recorded_layout(painting.record["identity"], material.store, painting.region)
    except ValueError:  # the table of regions has changed; what lay beside is not known
        layout = ((painting.region,),)
    if layout == ((painting.region,),):
        return _of_region(material, painting, painting.region)
    level = painting.level
    side = coarser(painting.region.side, level)

    def source(region: Region) -> Source:
        image = material.store.image(region.image)
        y, x = coarser(region.y, level), coarser(region.x, level)
        return Source(image, y, x, side, side, level)

    return Mosaic(tuple(tuple(source(region) for region in row) for row in layout))


def _of_region(material: Material, painting: Painting, region: Region) -> Source:
    level = painting.level
    image = material.store.image(region.image)
    y, x = coarser(region.y, level), coarser(region.x, level)
    return Source(image, y, x, *painting.conditioned, level)


def _crop_place(material: Material, painting: Painting) -> Place:
    """The liveliest square of the condition."""
    region, level = painting.region, painting.level
    side = min(painting.conditioned)
    crop = min(side, CROP_PX)
    image = material.store.image(region.image)
    box = coarser(side, -level), coarser(crop, -level)
    y, x = liveliest(image, region.y, region.x, *box)
    return Place(coarser(y, level), coarser(x, level), crop, crop)


def _draw(
    config: RunConfig,
    role: str,
    source: Source | Mosaic,
    size: tuple[int, int],
    crop: Place,
    stem: Path,
) -> Panel:
    """Write the three files of a panel of `size`, continued by reflection where `source` ends."""
    shown = min(WHOLE_PX / max(size), 1.0)
    height, width = (max(round(n * shown), 1) for n in size)
    longest = max(round(max(source.height, source.width) * shown), 1)
    names = [f"{stem.name}-{kind}" for kind in ("whole.jpg", "full.jpg", "crop.png")]
    whole, full, cropped = (stem.with_name(name) for name in names)
    _save_jpeg(_mirrored(source.whole(longest, config), height, width), whole)
    levels = 0
    while max(size) >> levels > FULL_MAX_PX:
        levels += 1
    pixels = source.coarser(levels).full(config)
    _save_jpeg(_mirrored(pixels, size[0] >> levels, size[1] >> levels), full)
    Image.fromarray(source.rgb(crop, config)).save(cropped)
    return Panel(
        role=role,
        whole=whole.name,
        full=full.name,
        crop=cropped.name,
        size=size,
        real=(min(source.height, size[0]), min(source.width, size[1])),
        full_reduction=1 << levels,
        full_bytes=full.stat().st_size,
    )


def _mirrored(
    pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """`pixels` cut or continued by reflection to another size."""
    more = [(0, max(n - have, 0)) for n, have in zip((height, width), pixels.shape, strict=False)]
    return np.pad(pixels, [*more, (0, 0)], mode="symmetric")[:height, :width]


def _save_jpeg(pixels: UInt8[np.ndarray, "h w 3"], file: Path) -> None:
    Image.fromarray(pixels).save(file, "jpeg", quality=QUALITY, subsampling=0)


@dataclass(frozen=True)
class StepPicture:
    """What a run painted at one of its steps."""

    step: int
    file: str
    height: int
    width: int


def draw_steps(samples: Path, folder: Path, most: int) -> list[StepPicture]:
    """Copy at most `most` of a run's sample pictures, evenly, the last always."""
    found = sorted(samples.glob("step-*.png"))
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    steps = []
    for file in (found[i] for i in places):
        shutil.copyfile(file, folder / file.name)
        with Image.open(file) as picture:
            width, height = picture.size
        step = int(file.stem.removeprefix("step-"))
        steps.append(StepPicture(step, file.name, height, width))
    return steps


def picture_bytes(material: Material) -> int:
    """About what the pictures take on disk; noise takes all of it, tissue half."""
    pixels = sum(3 * p.size[0] * p.size[1] for p in material.paintings)
    return pixels + 4_000_000 * len(material.paintings)
