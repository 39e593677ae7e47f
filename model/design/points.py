"""Point designs: cells of an image, one by one.

`uniform`, the papers', draws pixels without repeats. The draws of a region are slices of one keyed
permutation of its pixels (`permutation`), so that no pixel comes twice before the next epoch of
the permutation; a rest too small for a draw waits for that. Any first part of a draw is a uniform
draw too.

`mixed` spends part of the budget so and the rest on *stacks*: nested windows of area means, one a
level from the pixel up to the lattice, around random places, so that a local operator meets
complete neighbourhoods. Each cell is drawn once: where windows overlap, stick out of the image or
meet pixels of the permutation's slice, what is saved goes to more pixels of the slice. Given the
windows, every pixel outside of them is equally likely.

`sobol`, the papers' ablation, draws the pixels under a scrambled Sobol sequence (Owen 1998), the
first ones that differ, and moves them round the torus by a random number of pixels: every pixel is
equally likely then, whatever the size of the image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from model.design.permutation import Permutation
from model.design.protocol import Extent, PointDesign

PIXELS_STREAM, WINDOWS_STREAM = 0, 1


@dataclass(frozen=True)
class _Points(ABC):
    """What point designs share.

    points: budget of values for one image. coarse_level: of the lattice; lattice: whether it is
    part of a draw.
    """

    points: int = 65_536
    coarse_level: int = 5
    lattice: bool = False

    @property
    def footprint_px(self) -> int | None:
        return None

    def fits(self, image: Extent) -> bool:
        return True

    @abstractmethod
    def num_cells(self, image: Extent) -> int: ...

    def num_values(self, image: Extent) -> int:
        return self.num_cells(image) + self._lattice_cells(image)

    def _lattice_cells(self, image: Extent) -> int:
        return image.lattice_cells(self.coarse_level) if self.lattice else 0

    def _budget(self, image: Extent) -> int:
        """Cells that may be drawn beside the lattice."""
        held = self._lattice_cells(image)
        cells = self.points - held
        if cells < 1:
            raise ValueError(
                f"{self.points} points cannot hold the {held} lattice cells of a "
                f"{image.height_px}x{image.width_px} region and a point more; ask for --points "
                f"{held + 1} or more, a higher --coarse-level or no --lattice"
            )
        if cells > image.pixels:
            raise ValueError(
                f"{cells} points are more than the {image.pixels} pixels of a "
                f"{image.height_px}x{image.width_px} region; ask for --points "
                f"{held + image.pixels} or fewer, or ingest with a larger --region"
            )
        return cells


@dataclass(frozen=True)
class _Pixels(_Points):
    """What the designs of pixels alone share."""

    def num_cells(self, image: Extent) -> int:
        return self._budget(image)

    def draws_to_cover(self, image: Extent) -> int:
        return -(-image.pixels // self._budget(image))

    def describe(self, image: Extent) -> str:
        return f"{self._budget(image)} pixels"


@dataclass(frozen=True)
class UniformDesign(_Pixels):
    """Pixels, uniformly and without repeats."""

    def of(self, cells: int) -> "UniformDesign":
        return replace(self, points=cells, lattice=False)

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        return _pixels(_slice(image, self.num_cells(image), key), image)


@dataclass(frozen=True)
class SobolDesign(_Pixels):
    """Pixels under a scrambled Sobol sequence, without repeats."""

    BITS = 52

    def of(self, cells: int) -> "SobolDesign":
        return replace(self, points=cells, lattice=False)

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        number, size = self.num_cells(image), (image.height_px, image.width_px)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        shift = [int(random.integers(side)) for side in size]
        drawn = np.empty(0, np.int64)
        for places in self._places(number, random):
            y, x = (np.floor(places[:, axis] * size[axis]).astype(np.int64) for axis in (0, 1))
            drawn = np.concatenate([drawn, y * image.width_px + x])
            _, first = np.unique(drawn, return_index=True)
            drawn = drawn[np.sort(first)]
            if len(drawn) >= number:
                break
        cells = _pixels(drawn[:number], image)
        cells[:, 1:] = (cells[:, 1:] + shift) % size
        return cells

    def _places(self, number: int, random: np.random.Generator) -> Iterator[np.ndarray]:
        """The sequence in [0, 1)^2, in parts after which it is balanced.

        Every small square is met in the end, so a whole image is drawn after finitely many.
        """
        # scipy.stats takes two seconds to import, which no other command should wait for.
        from scipy.stats.qmc import Sobol

        sequence = Sobol(2, scramble=True, bits=self.BITS, rng=random)
        size = (number - 1).bit_length()
        yield sequence.random_base2(size)
        while True:
            yield sequence.random_base2(size)
            size += 1


@dataclass(frozen=True)
class MixedDesign(_Points):
    """Pixels, and stacks of nested windows.

    Stacks run over levels coarse_level - 1 ... 0. window: side of a window in cells, even.
    uniform_part: least part of the cells that are drawn uniformly, in (0, 1).
    """

    window: int = 32
    uniform_part: float = 0.5

    def __post_init__(self) -> None:
        if self.window % 2 or self.window < 6:
            raise ValueError(
                f"a window of {self.window} cells cannot hold its child: it must be even and at "
                "least 6 cells"
            )
        if not 0.0 < self.uniform_part < 1.0:
            raise ValueError(
                "--uniform-part takes the part of a draw that is uniform, between 0 and 1, not "
                f"{self.uniform_part:g}"
            )

    def of(self, cells: int) -> "MixedDesign | UniformDesign":
        if self._stacks(cells) < 1:
            return UniformDesign(cells, self.coarse_level)
        return replace(self, points=cells, lattice=False)

    def num_cells(self, image: Extent) -> int:
        cells = self._budget(image)
        if self._stacks(cells) < 1:
            stack = self.coarse_level * self.window**2
            rest = 1 - self.uniform_part
            least = math.ceil(stack / rest) + self._lattice_cells(image)
            raise ValueError(
                f"{rest:g} of {cells} cells cannot hold one stack of {self.coarse_level} windows "
                f"of {self.window}x{self.window}; ask for --points {least} or more, a smaller "
                "--window or a smaller --uniform-part"
            )
        return cells

    def draws_to_cover(self, image: Extent) -> int:
        cells = self.num_cells(image)
        coarser = self._stacks(cells) * (self.coarse_level - 1) * self.window**2
        return -(-image.pixels // (cells - coarser))

    def describe(self, image: Extent) -> str:
        cells = self.num_cells(image)
        stacks = self._stacks(cells)
        inside = stacks * self.coarse_level * self.window**2
        return (
            f"{cells - inside} pixels or more and {stacks} stacks of {self.coarse_level} windows "
            f"of {self.window}x{self.window}"
        )

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        number = self.num_cells(image)
        windows = self.window_cells(image, key)
        pixels = _slice(image, number, key)
        level, y, x = windows.T
        covered = np.sort((y * image.width_px + x)[level == 0])
        free = pixels[~_contains(covered, pixels)]
        return np.concatenate([windows, _pixels(free[: number - len(windows)], image)])

    def window_cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "m 3"]:
        """The cells of the stacks that lie inside the image, each once, level by level."""
        seed = np.random.SeedSequence((*key, WINDOWS_STREAM))
        random = np.random.Generator(np.random.Philox(seed))
        stacks = self._stacks(self.num_cells(image))
        origins = nested_windows(image, stacks, self.coarse_level, self.window, random)
        offsets = np.arange(self.window)
        parts = []
        for level in range(self.coarse_level):
            h, w = -(-image.height_px >> level), -(-image.width_px >> level)
            y, x = np.broadcast_arrays(
                origins[:, level, 0, None, None] + offsets[:, None],
                origins[:, level, 1, None, None] + offsets,
            )
            inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
            y, x = np.divmod(np.unique(y[inside] * w + x[inside]), w)
            parts.append(np.stack([np.full_like(y, level), y, x], axis=-1))
        return np.concatenate(parts)

    def _stacks(self, cells: int) -> int:
        return int(cells * (1 - self.uniform_part)) // (self.coarse_level * self.window**2)


@dataclass(frozen=True)
class Sampling:
    """How the pixels of images were drawn: by what design, and how many cells a pixel."""

    design: PointDesign
    density: float


EVERY_PIXEL = Sampling(UniformDesign(), 1.0)


def _slice(image: Extent, number: int, key: tuple[int, ...]) -> Int64[np.ndarray, " n"]:
    """Slice key[-1] of the permutations of the pixels that the rest of the key names."""
    epoch, place = divmod(key[-1], image.pixels // number)
    permutation = Permutation(image.pixels, (*key[:-1], epoch, PIXELS_STREAM))
    return permutation.at(np.arange(place * number, (place + 1) * number))


def _pixels(index: Int64[np.ndarray, " n"], image: Extent) -> Int64[np.ndarray, "n 3"]:
    y, x = np.divmod(index, image.width_px)
    return np.stack([np.zeros_like(y), y, x], axis=-1)


def _contains(ordered: Int64[np.ndarray, " m"], values: Int64[np.ndarray, " n"]) -> np.ndarray:
    """Which values are among those in ascending order."""
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[place] == values)


def nested_windows(
    image: Extent,
    chains: int,
    levels: int,
    window: int,
    random: np.random.Generator,
) -> Int64[np.ndarray, "chains levels 2"]:
    """First cells of windows around random places, each inside its parent but for one cell.

    They are placed from the pixel upwards. The level-0 window takes every position that touches
    the image with equal probability, so every pixel is drawn equally often, and each coarser
    window is placed uniformly among those that hold its child.
    """
    origins = np.empty((chains, levels, 2), dtype=np.int64)
    half = window // 2
    for axis, extent in enumerate((image.height_px, image.width_px)):
        child = random.integers(1 - half, -(-extent // 2), size=chains)
        origins[:, 0, axis] = 2 * child
        for level in range(1, levels):
            low = child + half + 1 - window
            high = child - 1
            first_even = -(-low // 2)
            child = random.integers(first_even, high // 2 + 1, size=chains)
            origins[:, level, axis] = 2 * child
    return origins
