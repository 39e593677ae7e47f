"""Window designs: chains of square windows, one window a level, level 0 (pixels) first.

The `patch` design, patch diffusion's, draws one window of 256 px a time, on the lattice of the
tiles that were embedded, so that every patch has an embedding of its own. The draws of a region
are a keyed walk through its patches: none comes twice before all have come once.

The `zoom` design, ours, draws the whole coarse lattice (area means over cells of 32 px, say) and
*chains*: from the lattice down to the pixel one window of w x w cells a level, each inside the
valid interior of the one above it, around random places. A denoiser that works level by level then
meets in training exactly the statistics it meets when every level is dense: the same cell sizes,
exact means, complete neighbourhoods. 65,536 uniform pixels of 4096^2 would leave 83 % of them
without one neighbour in a 7x7 kernel.

Windows are placed from the pixel upwards. The level-0 window takes every position that touches the
image with equal probability, so every pixel is drawn equally often (border pixels too), and each
coarser window is placed uniformly among those whose interior holds its child. A window that sticks
out of the image keeps its size; its outer cells are absent and say so.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from model.design.protocol import Extent
from model.lattice import Box


@dataclass(frozen=True)
class PatchDesign:
    """One window of pixels, one of the tiles that were embedded.

    points: budget of values for one image; coarse_level: of the lattice that says what is valid;
    window: side of a patch in pixels, a multiple of the lattice's cell. A patch is drawn where at
    least half of it is valid, or, if none is, as much of it as of the best.
    """

    points: int = 65_536
    coarse_level: int = 5
    window: int = 256

    LEAST_VALID = 0.5
    halo = 0
    lattice = False

    def __post_init__(self) -> None:
        if self.window % (1 << self.coarse_level) or self.window**2 > self.points:
            raise ValueError(
                f"patches of {self.window} px must be whole coarse cells of "
                f"{1 << self.coarse_level} px and within the budget of {self.points} values; "
                f"ask for another --window, or for --points {self.window**2}"
            )

    @property
    def footprint_px(self) -> int | None:
        return self.window

    def shape(self, image: Extent) -> tuple[int, int]:
        if min(image.height_px, image.width_px) < self.window:
            raise ValueError(
                f"regions of {image.height_px}x{image.width_px} px hold no patch of "
                f"{self.window} px; ingest with --region {self.window} or more"
            )
        return 1, 1

    def num_cells(self, image: Extent) -> int:
        self.shape(image)
        return self.window**2

    def num_values(self, image: Extent) -> int:
        return self.num_cells(image)

    def describe(self, image: Extent) -> str:
        return f"one patch of {self.window}x{self.window}"

    def fits(self, image: Extent) -> bool:
        return len(self.places(image)) > 0

    def draws_to_cover(self, image: Extent) -> int:
        return (image.height_px // self.window) * (image.width_px // self.window)

    def places(self, image: Extent) -> Int64[np.ndarray, "n 2"]:
        """Corners (y, x) of the patches that are drawn, row by row."""
        rows, columns = (
            np.arange(first, extent - self.window + 1, self.window)
            for first, extent in zip(
                image.tiles_px, (image.height_px, image.width_px), strict=True
            )
        )
        corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
        if image.present is None or len(corners) == 0:
            return corners.astype(np.int64)
        cell = 1 << self.coarse_level
        cells = np.arange(self.window // cell)
        ys, xs = (corners[:, axis, None] // cell + cells for axis in (0, 1))
        valid = image.present[ys[:, :, None], xs[:, None, :]].mean(axis=(1, 2))
        return corners[valid >= min(self.LEAST_VALID, valid.max())].astype(np.int64)

    def draw(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "chains levels 2"]:
        places = self.places(image)
        walk, step = divmod(key[-1], len(places))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((*key[:-1], walk))))
        return places[random.permutation(len(places))[step]][None, None]

    def view(self, origins: Int64[np.ndarray, "chains levels 2"]) -> Box | None:
        y, x = origins[0, 0].tolist()
        return Box(0, y, x, self.window, self.window)


@dataclass(frozen=True)
class ZoomDesign:
    """The nested draw: one coarse lattice and `chains` chains of windows.

    points: budget of values for one image (cells; each has all channels). coarse_level: level of
    the lattice; chains run over levels coarse_level - 1 ... 0. window: side of a window in cells,
    even. halo: cells at a window's rim whose estimate lacks neighbours; they are neither scored
    nor passed on.
    """

    points: int = 65_536
    coarse_level: int = 5
    window: int = 48
    halo: int = 6

    lattice = True

    def __post_init__(self) -> None:
        if self.window % 2 or self.window < 4 * self.halo + 6:
            raise ValueError(
                f"a window of {self.window} cells with a halo of {self.halo} cannot hold its "
                "child: "
                f"it must be even and at least {4 * self.halo + 6} cells"
            )

    @property
    def footprint_px(self) -> int | None:
        return None

    def shape(self, image: Extent) -> tuple[int, int]:
        lattice = image.lattice_cells(self.coarse_level)
        number = (self.points - lattice) // (self.coarse_level * self.window**2)
        if number < 1:
            raise ValueError(
                f"{self.points} points cannot hold the {lattice} lattice cells of a "
                f"{image.height_px}x{image.width_px} "
                f"region and one chain of {self.coarse_level} windows of "
                f"{self.window}x{self.window}; "
                f"ask for --points {lattice + self.coarse_level * self.window**2} or more"
            )
        return number, self.coarse_level

    def num_cells(self, image: Extent) -> int:
        chains, levels = self.shape(image)
        return chains * levels * self.window**2

    def num_values(self, image: Extent) -> int:
        return image.lattice_cells(self.coarse_level) + self.num_cells(image)

    def describe(self, image: Extent) -> str:
        chains, levels = self.shape(image)
        return f"{chains * levels} windows of {self.window}x{self.window} and the lattice"

    def fits(self, image: Extent) -> bool:
        return True

    def draws_to_cover(self, image: Extent) -> int:
        scored = self.shape(image)[0] * (self.window - 2 * self.halo) ** 2
        return -(-image.pixels // scored)

    def draw(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "chains levels 2"]:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        chains, levels = self.shape(image)
        return nested_windows(image, chains, levels, self.window, self.halo, random)

    def view(self, origins: Int64[np.ndarray, "chains levels 2"]) -> Box | None:
        return None


def nested_windows(
    image: Extent,
    chains: int,
    levels: int,
    window: int,
    halo: int,
    random: np.random.Generator,
) -> Int64[np.ndarray, "chains levels 2"]:
    """First cells of windows around random places, each inside its parent but for a halo and one
    cell.
    """
    origins = np.empty((chains, levels, 2), dtype=np.int64)
    half = window // 2
    for axis, extent in enumerate((image.height_px, image.width_px)):
        child = random.integers(1 - half, -(-extent // 2), size=chains)
        origins[:, 0, axis] = 2 * child
        for level in range(1, levels):
            low = child + half + halo + 1 - window
            high = child - halo - 1
            first_even = -(-low // 2)
            child = random.integers(first_even, high // 2 + 1, size=chains)
            origins[:, level, axis] = 2 * child
    return origins
