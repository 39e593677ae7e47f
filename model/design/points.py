"""Designs of scattered cells.

`uniform` is the papers': pixels, uniformly and without repeats. The draws of an image are the
slices of one keyed permutation of its pixels (`permutation`), so they are disjoint until all
pixels are used up, and then follow another permutation.

`sobol` is the papers' ablation: pixels under a scrambled Sobol sequence, more even than chance.

`mixed` spends a part of the budget on uniform pixels and the rest on nested stacks of windows of
area means, so that a local operator meets complete neighbourhoods at every level as well as lone
points. It is meant for denoisers that read the exact lattice, which counts as drawn.

Every pixel is drawn equally often. Cells that fall outside the image, come twice or are not wholly
valid are absent: a draw keeps its size.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from model.design.permutation import Permutation
from model.design.protocol import Extent
from model.design.windows import place_chains


@dataclass(frozen=True)
class UniformDesign:
    """`points` pixels a draw. coarse_level: of the lattice that is stored beside them."""

    points: int = 65_536
    coarse_level: int = 5
    window: int = 1
    halo: int = 0

    @property
    def footprint_px(self) -> int | None:
        return None

    def describe(self, image: Extent) -> str:
        return f"{self.num_drawn(image)} pixels, uniformly"

    def num_drawn(self, image: Extent) -> int:
        return _enough_pixels(self.points, image)

    def num_values(self, image: Extent) -> int:
        return self.num_drawn(image)

    def fits(self, image: Extent) -> bool:
        return True

    def draws_to_cover(self, image: Extent) -> int:
        return -(-image.height_px * image.width_px // self.points)

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        return uniform_pixels(image, self.num_drawn(image), key)


@dataclass(frozen=True)
class SobolDesign:
    """`points` pixels a draw under a scrambled Sobol sequence (Owen, 1998; SciPy's)."""

    points: int = 65_536
    coarse_level: int = 5
    window: int = 1
    halo: int = 0

    @property
    def footprint_px(self) -> int | None:
        return None

    def describe(self, image: Extent) -> str:
        return f"{self.num_drawn(image)} pixels of a Sobol sequence"

    def num_drawn(self, image: Extent) -> int:
        return _enough_pixels(self.points, image)

    def num_values(self, image: Extent) -> int:
        return self.num_drawn(image)

    def fits(self, image: Extent) -> bool:
        return True

    def draws_to_cover(self, image: Extent) -> int:
        return -(-image.height_px * image.width_px // self.points)

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        # Heavy to import, and wanted by this design alone.
        from scipy.stats.qmc import Sobol

        number = self.num_drawn(image)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        sequence = Sobol(2, scramble=True, rng=random)
        extent = np.array([image.height_px, image.width_px])
        pixels = np.empty((0, 2), np.int64)
        block = max((number - 1).bit_length(), 1)
        while len(pixels) < number:
            more = np.floor(sequence.random_base2(block) * extent).astype(np.int64)
            pixels = np.concatenate([pixels, more])
            _, first = np.unique(pixels, axis=0, return_index=True)
            pixels = pixels[np.sort(first)]
        return _at_level_0(pixels[:number])


@dataclass(frozen=True)
class MixedDesign:
    """Uniform pixels and nested stacks of windows at levels 0 ... levels - 1.

    points: budget of values for one image, the lattice included. window: side of a window in
    cells, even. uniform: the part of the budget, without the lattice, for uniform pixels; they
    take what no whole stack fills, too.
    """

    points: int = 65_536
    coarse_level: int = 5
    window: int = 16
    halo: int = 0
    uniform: float = 0.5

    def __post_init__(self) -> None:
        if self.window % 2 or not 0.0 <= self.uniform < 1.0:
            raise ValueError(
                f"mixed draws need windows of an even side and a part in [0, 1) of uniform "
                f"pixels, but got {self.window} and {self.uniform:g}"
            )

    @property
    def footprint_px(self) -> int | None:
        return None

    def describe(self, image: Extent) -> str:
        stacks, pixels = self.parts(image)
        return (
            f"{pixels} pixels, uniformly, and {stacks} stacks of {self.coarse_level} windows of "
            f"{self.window}x{self.window}"
        )

    def parts(self, image: Extent) -> tuple[int, int]:
        """Stacks, and uniform pixels."""
        budget = self.points - image.lattice_cells(self.coarse_level)
        stack = self.coarse_level * self.window**2
        stacks = int(budget * (1.0 - self.uniform)) // stack
        if stacks < 1:
            raise ValueError(
                f"{self.points} points cannot hold the lattice of a {image.height_px}x"
                f"{image.width_px} region and one stack of {self.coarse_level} windows of "
                f"{self.window}x{self.window} beside uniform pixels; ask for more --points or a "
                "smaller --window"
            )
        return stacks, _enough_pixels(budget - stacks * stack, image)

    def num_drawn(self, image: Extent) -> int:
        stacks, pixels = self.parts(image)
        return stacks * self.coarse_level * self.window**2 + pixels

    def num_values(self, image: Extent) -> int:
        return self.num_drawn(image) + image.lattice_cells(self.coarse_level)

    def fits(self, image: Extent) -> bool:
        return True

    def draws_to_cover(self, image: Extent) -> int:
        stacks, pixels = self.parts(image)
        return -(-image.height_px * image.width_px // (stacks * self.window**2 + pixels))

    def cells(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
        stacks, pixels = self.parts(image)
        origins = place_chains(image, key, stacks, self.coarse_level, self.window, halo=0)
        inside = np.arange(self.window)
        grid = np.stack(np.meshgrid(inside, inside, indexing="ij"), axis=-1).reshape(-1, 2)
        places = origins[:, :, None] + grid
        levels = np.arange(self.coarse_level)[None, :, None, None]
        levels = np.broadcast_to(levels, (*places.shape[:3], 1))
        windows = np.concatenate([levels, places], axis=-1).reshape(-1, 3)
        return np.concatenate([windows, uniform_pixels(image, pixels, key)])


def uniform_pixels(image: Extent, number: int, key: tuple[int, ...]) -> Int64[np.ndarray, "n 3"]:
    """The slice of the image's keyed permutation that the last part of the key counts."""
    height, width = image.height_px, image.width_px
    epoch, place = divmod(key[-1], height * width // number)
    order = Permutation(height * width, (*key[:-1], epoch))
    pixels = order(np.arange(place * number, (place + 1) * number))
    return _at_level_0(np.stack([pixels // width, pixels % width], axis=-1))


def first_of_each(cells: Int64[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
    """Which cells have not come before in the list."""
    _, first = np.unique(cells, axis=0, return_index=True)
    once = np.zeros(len(cells), bool)
    once[first] = True
    return once


def _at_level_0(pixels: Int64[np.ndarray, "n 2"]) -> Int64[np.ndarray, "n 3"]:
    return np.pad(pixels, ((0, 0), (1, 0)))


def _enough_pixels(points: int, image: Extent) -> int:
    pixels = image.height_px * image.width_px
    if not 1 <= points <= pixels:
        raise ValueError(
            f"{points} points cannot be drawn without repeats from the {pixels} pixels of a "
            f"{image.height_px}x{image.width_px} region; ask for --points {pixels} or fewer"
        )
    return points
