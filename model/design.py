"""Designs: which cells of an image one training sample draws, never more than its budget of
values.

The `zoom` design draws the whole coarse lattice (area means over cells of 32 px, say) and
*chains*: from the lattice down to the pixel one window of w x w cells a level, each inside the
valid interior of the one above it, around random places. A denoiser that works level by level then
meets in training exactly the statistics it meets when every level is dense: the same cell sizes,
exact means, complete neighbourhoods. 65,536 uniform pixels of 4096^2 would leave 83 % of them
without one neighbour in a 7x7 kernel.

Windows are placed from the pixel upwards. The level-0 window takes every position that touches the
image with equal probability, so every pixel is drawn equally often (border pixels too), and each
coarser window is placed uniformly among those whose interior holds its child. A window that sticks
out of the image keeps its size; its outer cells are absent and say so. A draw is a pure function
of its key.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


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

    def __post_init__(self) -> None:
        if self.window % 2 or self.window < 4 * self.halo + 4:
            raise ValueError(
                f"a window of {self.window} cells with a halo of {self.halo} cannot hold its "
                "child: "
                f"it must be even and at least {4 * self.halo + 4} cells"
            )

    def chains(self, height_px: int, width_px: int) -> int:
        """Chains that the budget leaves for an image of this size, at least one."""
        lattice = (height_px >> self.coarse_level) * (width_px >> self.coarse_level)
        number = (self.points - lattice) // (self.coarse_level * self.window**2)
        if number < 1:
            raise ValueError(
                f"{self.points} points cannot hold the {lattice} lattice cells of a "
                f"{height_px}x{width_px} "
                f"region and one chain of {self.coarse_level} windows of "
                f"{self.window}x{self.window}; "
                f"ask for --points {lattice + self.coarse_level * self.window**2} or more"
            )
        return number

    def num_values(self, height_px: int, width_px: int) -> int:
        """Cells that one draw holds, lattice included; at most `points`."""
        lattice = (height_px >> self.coarse_level) * (width_px >> self.coarse_level)
        return lattice + self.chains(height_px, width_px) * self.coarse_level * self.window**2

    def draw(
        self, height_px: int, width_px: int, key: tuple[int, ...]
    ) -> Int64[np.ndarray, "chains levels 2"]:
        """First cells (y, x) of the windows, in cells of their level; [:, l] is level l.

        Args:
            height_px, width_px: size of the image.
            key: non-negative integers, e.g. (seed, region, pack), that name this draw.
        """
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        number = self.chains(height_px, width_px)
        origins = np.empty((number, self.coarse_level, 2), dtype=np.int64)
        half = self.window // 2
        for axis, extent in enumerate((height_px, width_px)):
            child = random.integers(1 - half, extent // 2, size=number)
            origins[:, 0, axis] = 2 * child
            for level in range(1, self.coarse_level):
                low = child + half + self.halo + 1 - self.window
                high = child - self.halo - 1
                first_even = -(-low // 2)
                child = random.integers(first_even, high // 2 + 1, size=number)
                origins[:, level, axis] = 2 * child
        return origins
