"""The `cascade` design, ours: the top lattice of an image, and windows of every block of octaves.

A block of octaves is trained on windows of its fine cells with their parents (`WindowsBelow`), in
which it meets exactly what it meets when a whole image is generated: exact area means in complete
neighbourhoods. 65,536 uniform pixels of 4096^2 would leave 83 % of them without one neighbour in a
7x7 kernel. Blocks are trained on their own, so that windows of different blocks lie anywhere.

Windows lie inside the image (`window_starts`), so that no cell of a batch is spent on what is not
there. Cells near the border are drawn somewhat more often by this; each weighs in the loss in
inverse proportion (`rarity`), so that every pixel counts alike, border pixels too. Where an image
has no more parents a side than a window, the window is all of it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from model.design.protocol import Extent


def window_starts(
    random: np.random.Generator, side: int, extent: int, number: int
) -> Int64[np.ndarray, " number"]:
    """First cells of so many windows of `side` cells along an axis of `extent` cells.

    Places are drawn as if windows could stick out, each that touches the axis alike, and then
    moved inside: places that lie inside alone would leave cells near the border scarce.
    """
    return random.integers(1 - side, extent, number).clip(0, extent - side)


def rarity(side: int, extent: int) -> Float32[np.ndarray, " extent"]:
    """Weights of the cells of an axis, inverse to how often `window_starts` draws each; 1 on
    average over what is drawn.

    On an axis hardly longer than a window its two ends weigh up to 2, a corner of the image up to
    4. Effective samples (Kish) are at least 88 % of those drawn an axis, 78 % of a window.
    """
    starts = np.ones(extent - side + 1)
    starts[[0, -1]] += side - 1
    often = np.convolve(starts, np.ones(side))
    return (often.mean() / often).astype(np.float32)


@dataclass(frozen=True)
class WindowsBelow:
    """Windows of `window` x `window` parent cells, with all their descendants of level `fine`."""

    fine: int
    parents: int
    window: int

    @property
    def octaves(self) -> int:
        return self.parents - self.fine

    def shape(self, image: Extent) -> tuple[int, int]:
        """(height, width) of a window in parent cells."""
        return min(self.window, image.height_px >> self.parents), min(
            self.window, image.width_px >> self.parents
        )

    def cells(self, image: Extent, margin: int) -> int:
        """Values of a window: its fine cells, and its parents with a margin."""
        h, w = self.shape(image)
        return (h * w << 2 * self.octaves) + (h + 2 * margin) * (w + 2 * margin)

    def __str__(self) -> str:
        return f"{self.window}x{self.window} of level {self.parents} down to {self.fine}"


@dataclass(frozen=True)
class CascadeDesign:
    """The top lattice and windows of every block, within a budget of values.

    points: the budget for one image (cells; each has all channels). coarse_level: of the top
    lattice. blocks: coarse to fine. margin: parents around a window that are drawn with it. parts:
    of the budget, for each block's windows; by default PARTS of four blocks, else all alike.
    """

    points: int = 65_536
    coarse_level: int = 8
    blocks: tuple[WindowsBelow, ...] = (
        WindowsBelow(6, 8, 8),
        WindowsBelow(4, 6, 8),
        WindowsBelow(2, 4, 16),
        WindowsBelow(0, 2, 32),
    )
    margin: int = 3
    parts: tuple[float, ...] = ()

    lattice = True
    PARTS = 0.12, 0.16, 0.4, 0.32

    def __post_init__(self) -> None:
        if self.coarse_level != self.blocks[0].parents:
            raise ValueError(
                f"the first block's parents are cells of level {self.blocks[0].parents}, but a "
                f"lattice of level {self.coarse_level} was asked for; leave --coarse-level out"
            )

        joins = (*(block.parents for block in self.blocks[1:]), 0)
        if [block.fine for block in self.blocks] != [*joins]:
            raise ValueError(
                f"blocks {', '.join(map(str, self.blocks))} do not join: each begins where the "
                "one before it ends, and the last ends at level 0"
            )

    @property
    def footprint_px(self) -> int | None:
        return None

    def numbers(self, image: Extent) -> tuple[int, ...]:
        """How many windows of each block a draw holds; a `ValueError` where image or budget are
        too small.
        """
        cell = 1 << self.coarse_level
        if image.height_px % cell or image.width_px % cell:
            raise ValueError(
                f"regions of {image.height_px}x{image.width_px} px do not divide into the top "
                f"cells of the cascade, {cell} px; ingest with a --region that is a multiple"
            )
        costs = [block.cells(image, self.margin) for block in self.blocks]
        lattice = image.lattice_cells(self.coarse_level)
        left = self.points - lattice - sum(costs)
        if left < 0:
            raise ValueError(
                f"{self.points} points cannot hold the {lattice} lattice cells of a "
                f"{image.height_px}x{image.width_px} region and a window of each block; ask for "
                f"--points {lattice + sum(costs)} or more"
            )
        count, numbers = len(self.blocks), []
        parts = self.parts or (self.PARTS if count == len(self.PARTS) else (1 / count,) * count)
        for block, cost, part in zip(self.blocks, costs, parts, strict=True):
            wanted = max(int(part * (self.points - lattice) / cost) - 1, 0)
            everything = block.window >= max(
                image.height_px >> block.parents, image.width_px >> block.parents
            )
            more = 0 if everything else min(wanted, left // cost)
            left -= more * cost
            numbers.append(1 + more)
        return tuple(numbers)

    def num_cells(self, image: Extent) -> int:
        costs = (block.cells(image, self.margin) for block in self.blocks)
        return sum(n * cost for n, cost in zip(self.numbers(image), costs, strict=True))

    def num_values(self, image: Extent) -> int:
        return image.lattice_cells(self.coarse_level) + self.num_cells(image)

    def describe(self, image: Extent) -> str:
        numbers = self.numbers(image)
        windows = (f"{n} of {block}" for n, block in zip(numbers, self.blocks, strict=True))
        return f"the top lattice; windows: {', '.join(windows)}"

    def fits(self, image: Extent) -> bool:
        return True

    def draws_to_cover(self, image: Extent) -> int:
        finest, number = self.blocks[-1], self.numbers(image)[-1]
        h, w = finest.shape(image)
        return -(-image.pixels // (number * (h * w << 2 * finest.parents)))

    def draw(self, image: Extent, key: tuple[int, ...]) -> list[Int64[np.ndarray, "n 2"]]:
        """First parent cells (y, x) of the windows of each block, coarse to fine.

        key: non-negative integers (seed, region, pack) that name this draw.
        """
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        found = []
        for block, number in zip(self.blocks, self.numbers(image), strict=True):
            origins = np.zeros((number, 2), dtype=np.int64)
            for axis, extent in enumerate((image.height_px, image.width_px)):
                cells, side = extent >> block.parents, block.shape(image)[axis]
                origins[:, axis] = window_starts(random, side, cells, number)
            found.append(origins)
        return found
