"""The `patch` design, patch diffusion's: one window of 256 px a draw, on the lattice of the tiles
that were embedded, so that every patch has an embedding of its own. The draws of a region are a
keyed walk through its patches: none comes twice before all have come once.
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

    def num_cells(self, image: Extent) -> int:
        if min(image.height_px, image.width_px) < self.window:
            raise ValueError(
                f"regions of {image.height_px}x{image.width_px} px hold no patch of "
                f"{self.window} px; ingest with --region {self.window} or more"
            )
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

    def draw(self, image: Extent, key: tuple[int, ...]) -> Int64[np.ndarray, "2"]:
        """First pixel (y, x) of the patch; key: non-negative integers (seed, region, pack)."""
        places = self.places(image)
        walk, step = divmod(key[-1], len(places))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((*key[:-1], walk))))
        return places[random.permutation(len(places))[step]]

    def view(self, origin: Int64[np.ndarray, "2"]) -> Box:
        """The pixels whose tokens condition the patch there."""
        y, x = origin.tolist()
        return Box(0, y, x, self.window, self.window)
