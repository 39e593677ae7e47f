"""Training batches from pixel packs, as a function of (seed, step) alone.

Sample n is draw pi(n) under a permutation keyed by the epoch; its noise, its noise level, whether
its condition is dropped and how it is turned are keyed by n. Each block of a cascade has samples
of its own: single windows of draws, or windows of top lattices. Ranks take slices of the global
batch. So one rank with a batch of four and two ranks with two see the same thing, and so does a
run that was resumed.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt16
from torch import Tensor

from conditioning.tokens import (
    TokenScale,
    around,
    dihedral,
    to_condition,
    with_labels,
    within,
)
from model.attention import Condition
from model.design import CascadeDesign, PatchDesign, rarity, window_starts
from model.draw import BlockDraw, Draw, PatchDraw, PointDraw, TopDraw
from pipeline.embeddings import TokenLattice
from pipeline.packfile import (
    ABSENT,
    PART_SCALE,
    Drawn,
    DrawnPatch,
    DrawnPoints,
    DrawnTop,
    DrawnWindow,
    PackSet,
    RegionEntry,
)

PREFETCHED = 2
MOST_FOR_ONE = 4
"""Samples of a small region in place of one window, at most: small stores are learned by heart
where a batch holds most of them.
"""


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch.

    seeds: noise fields. uniform: position of the noise level in its range, in [0, 1).
    """

    draw: Draw
    condition: Condition
    seeds: Int64[Tensor, " b"]
    uniform: Float[Tensor, " b"]

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.draw.to(device),
            self.condition.to(device),
            self.seeds.to(device),
            self.uniform.to(device),
        )


@dataclass(frozen=True)
class Sample:
    """One pack, turned, still in numpy."""

    drawn: Drawn
    tokens: list[TokenLattice]
    label: str | None = None


def turn(sample: Sample, element: int, side_px: int) -> Sample:
    """A symmetry of the square: bit 2 transposes, then bits 0 and 1 mirror y and x."""
    tokens = dihedral(sample.tokens, element, side_px)
    return Sample(_turned(sample.drawn, element, side_px), tokens, sample.label)


def _turned(drawn: Drawn, element: int, side_px: int) -> Drawn:
    if isinstance(drawn, DrawnTop):
        return DrawnTop(_turned_array(drawn.lattice, element))
    if isinstance(drawn, DrawnWindow):
        parts = (drawn.fine, drawn.parents, drawn.weight)
        fine, parents, weight = (_turned_array(part, element) for part in parts)
        extent = side_px >> drawn.block.parents
        origin = _turned_origin(drawn.origin, element, extent, weight.shape)
        return DrawnWindow(drawn.block, fine, parents, weight, origin)
    if isinstance(drawn, DrawnPatch):
        values = _turned_array(drawn.values, element)
        return DrawnPatch(values, _turned_origin(drawn.origin, element, side_px, values.shape))
    cells = drawn.cells[:, [0, 2, 1]] if element & 4 else drawn.cells.copy()
    for axis in (0, 1):
        if element & (1 << axis):
            cells[:, 1 + axis] = (side_px >> cells[:, 0]) - 1 - cells[:, 1 + axis]
    return DrawnPoints(_turned_array(drawn.lattice, element), drawn.values, cells)


def _turned_array(values: np.ndarray, element: int) -> np.ndarray:
    """A rectangle of cells, (y, x, ...)."""
    values = values.swapaxes(0, 1) if element & 4 else values
    for axis in (0, 1):
        values = np.flip(values, axis) if element & (1 << axis) else values
    return values


def _turned_origin(
    origin: Int64[np.ndarray, "2"], element: int, extent: int, shape: tuple[int, ...]
) -> Int64[np.ndarray, "2"]:
    """The first cell of a rectangle in a square of `extent` cells; shape: of it once turned."""
    turned = origin[::-1].copy() if element & 4 else origin.copy()
    for axis in (0, 1):
        if element & (1 << axis):
            turned[axis] = extent - turned[axis] - shape[axis]
    return turned


@dataclass(frozen=True)
class Batches:
    """The batches of a run.

    batch: windows in a global batch (its `size` may be larger). condition_dropout: how often a
    condition is dropped, for classifier-free guidance; a label is dropped as often on its own, and
    in half of the samples whose tokens are, so that guidance knows images without either. augment:
    whether samples are turned and mirrored. part: of a cascade, 0 for its top block, k for its
    k-th block of octaves; None where draws are whole. tokens: whether the part reads any.
    top_window: cells a side of a top lattice that are trained on at once, of a larger one a
    window; None for all of it. most_for_one: samples of a small region in place of one window.
    """

    packs: PackSet
    batch: int
    seed: int
    condition_dropout: float = 0.1
    augment: bool = True
    split: str = "train"
    part: int | None = None
    tokens: bool = True
    top_window: int | None = None
    most_for_one: int = MOST_FOR_ONE

    def __post_init__(self) -> None:
        if not self._entries:
            raise ValueError(f"{self.packs.path} has no regions in split {self.split!r}")

    @cached_property
    def size(self) -> int:
        """Samples in a global batch: of regions smaller than a window as many more as have the
        same number of cells, so that a step costs the same.
        """
        if self.part is None:
            return self.batch
        if self.part == 0:
            side = self._top_side
            window, (h, w) = side if self.top_window is None else self.top_window, (side, side)
        else:
            layout = self.packs.windows(self.part - 1)
            window, (h, w) = layout.block.window, layout.shape
        return self.batch * min(window**2 // (h * w), self.most_for_one)

    @property
    def _top_level(self) -> int:
        assert isinstance(self.packs.design, CascadeDesign)
        return self.packs.design.coarse_level

    @property
    def _top_side(self) -> int:
        """Of a sample of the top block, in cells."""
        whole = self.packs.settings.side_px >> self._top_level
        return whole if self.top_window is None else min(whole, self.top_window)

    @cached_property
    def _entries(self) -> list[RegionEntry]:
        return [entry for entry in self.packs.regions if entry.split == self.split]

    def iterate(self, first_step: int, rank: int, world: int) -> Generator[Batch, None, None]:
        """Batches from `first_step` on, for ever, read ahead by a thread."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            steps = range(first_step, first_step + PREFETCHED)
            waiting = [reader.submit(self.at, step, rank, world) for step in steps]
            while True:
                batch = waiting.pop(0).result()
                first_step += 1
                waiting.append(reader.submit(self.at, first_step + PREFETCHED - 1, rank, world))
                yield batch

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The slice of rank `rank` of `world` of the global batch of one step."""
        share = self.size // world
        numbers = range(step * self.size + rank * share, step * self.size + (rank + 1) * share)
        samples, seeds, uniform, keep, keep_label = [], [], [], [], []
        for number in numbers:
            random = np.random.Generator(
                np.random.Philox(np.random.SeedSequence((self.seed, 1, number, self.part or 0)))
            )
            seeds.append(int(random.integers(2**62)))
            # Stratified over the global batch: position j draws from the j-th part of the range.
            uniform.append((number % self.size + random.random()) / self.size)
            keep.append(bool(random.random() >= self.condition_dropout))
            element = int(random.integers(8)) if self.augment else 0
            dropout = self.condition_dropout if keep[-1] else 0.5
            keep_label.append(bool(random.random() >= dropout))
            sample = turn(self._sample(number), element, self.packs.settings.side_px)
            samples.append(self._in_view(sample, random))
        statistics = self.packs.statistics
        scale = TokenScale(
            np.array(statistics.token_mean, np.float32), np.array(statistics.token_std, np.float32)
        )
        condition = to_condition([sample.tokens for sample in samples], scale, keep)
        labels = [sample.label for sample in samples]
        return Batch(
            self.draw([sample.drawn for sample in samples]),
            with_labels(condition, self.packs.settings.classes, labels, keep_label),
            torch.tensor(seeds, dtype=torch.int64),
            torch.tensor(uniform, dtype=torch.float32),
        )

    def _sample(self, number: int) -> Sample:
        packs, draws = self.packs, self.packs.settings.packs_per_region
        each = {None: draws, 0: 1}.get(self.part, draws * self._windows)
        total = len(self._entries) * each
        order = _permutation((self.seed, 0, number // total, self.part or 0), total)
        region, place = divmod(int(order[number % total]), each)
        entry = self._entries[region]
        if self.part is None:
            drawn: Drawn = packs.draw(entry, place)
        elif self.part == 0:
            drawn = DrawnTop(packs.lattice(entry))
        else:
            pack, window = divmod(place, self._windows)
            drawn = packs.window(entry, pack, self.part - 1, window)
        return Sample(drawn, self._tokens_of(entry, drawn), entry.label)

    def _tokens_of(self, entry: RegionEntry, drawn: Drawn) -> list[TokenLattice]:
        """Those that condition a draw. A window is told of the finest around it alone, whose
        number does not grow with the region; a part that reads none is given one empty token.
        """
        if not self.tokens:
            dim, pitch = len(self.packs.statistics.token_mean), self.packs.settings.lattices[0][0]
            return [TokenLattice(np.zeros((1, 1, dim), np.float16), pitch, pitch / 2, pitch / 2)]
        tokens = self.packs.tokens(entry)
        if not isinstance(drawn, DrawnWindow):
            return tokens
        first_px = drawn.origin << drawn.block.parents
        side_px = max(drawn.weight.shape) << drawn.block.parents
        return [around(tokens[0], (int(first_px[0]), int(first_px[1])), side_px)]

    @cached_property
    def _windows(self) -> int:
        """Windows of the part's block in one draw."""
        return self.packs.windows(self.part - 1).number if self.part else 0

    def _in_view(self, sample: Sample, random: np.random.Generator) -> Sample:
        """The sample with the tokens that condition its draw; of a large top lattice a window."""
        if isinstance(sample.drawn, DrawnTop):
            return self._top_window(sample, sample.drawn.lattice, random)
        if not isinstance(sample.drawn, DrawnPatch):
            return sample
        assert isinstance(self.packs.design, PatchDesign)
        view = self.packs.design.view(sample.drawn.origin)
        return replace(sample, tokens=within(sample.tokens, view))

    def _top_window(
        self, sample: Sample, lattice: UInt16[np.ndarray, "hl wl c"], random: np.random.Generator
    ) -> Sample:
        """A window of a top lattice with the tokens around it."""
        side, extent = self._top_side, lattice.shape[0]
        if side == extent:
            return sample
        level = self._top_level
        y, x = (int(start) for start in window_starts(random, side, extent, 2))
        corner_px = (y << level, x << level)
        return replace(
            sample,
            drawn=DrawnTop(lattice[y : y + side, x : x + side], (y, x)),
            tokens=[around(tokens, corner_px, side << level) for tokens in sample.tokens],
        )

    def _rarity(
        self, origin: Int64[np.ndarray, "b 2"], side: int, level: int
    ) -> Float[Tensor, "b 1 side side"]:
        """Weights of the cells of windows of a level, with which all cells count alike."""
        weights = rarity(side, self.packs.settings.side_px >> level)
        y, x = (weights[start[:, None] + np.arange(side)] for start in origin.T)
        return torch.from_numpy(y[:, None, :, None] * x[:, None, None, :])

    def draw(self, drawn: Sequence[Drawn]) -> Draw:
        """Draws of one kind, standardised and collated."""
        tops = [d for d in drawn if isinstance(d, DrawnTop)]
        if tops:
            values, present = self._standardise([d.lattice for d in tops])
            there = _channels_first(present).float()
            origin = np.array([d.origin for d in tops])
            weight = there * self._rarity(origin, self._top_side, self._top_level)
            return TopDraw(_channels_first(values), there, weight, torch.from_numpy(origin))
        windows = [d for d in drawn if isinstance(d, DrawnWindow)]
        if windows:
            return self._block_draw(windows)
        patches = [d for d in drawn if isinstance(d, DrawnPatch)]
        if patches:
            values, present = self._standardise([d.values for d in patches])
            return PatchDraw(_channels_first(values), _channels_first(present))
        points = [d for d in drawn if isinstance(d, DrawnPoints)]
        lattice, lattice_present = self._standardise([d.lattice for d in points])
        values, present = self._standardise([d.values for d in points])
        cells = torch.from_numpy(np.stack([d.cells for d in points]))
        size_px = (self.packs.settings.side_px,) * 2
        return PointDraw(lattice, lattice_present, values, present, cells, size_px)

    def _block_draw(self, windows: Sequence[DrawnWindow]) -> BlockDraw:
        values, _ = self._standardise([d.fine for d in windows])
        parents, _ = self._standardise([d.parents for d in windows])
        valid = np.stack([d.weight for d in windows]).astype(np.float32) / PART_SCALE
        level, (h, w) = windows[0].block.parents, valid.shape[1:]
        margin = (parents.shape[1] - h) // 2
        extent = self.packs.settings.side_px >> level
        origins = np.stack([d.origin for d in windows])
        rows, columns = (
            origins[:, axis, None] + np.arange(-margin, side + margin)
            for axis, side in enumerate((h, w))
        )
        there_y, there_x = (rows >= 0) & (rows < extent), (columns >= 0) & (columns < extent)
        present = (there_y[:, :, None] & there_x[:, None, :]).astype(np.float32)
        inner = slice(margin, -margin)
        y_px, x_px = (
            torch.from_numpy(((cells[:, inner] + 0.5) * 2.0**level).astype(np.float32))
            for cells in (rows, columns)
        )
        return BlockDraw(
            _channels_first(values),
            _channels_first(parents),
            torch.from_numpy(present)[:, None],
            torch.from_numpy(valid)[:, None] * self._rarity(origins, h, level),
            y_px,
            x_px,
        )

    def _standardise(self, parts: list[UInt16[np.ndarray, "*shape"]]) -> tuple[Tensor, Tensor]:
        fixed = np.stack(parts)
        present = fixed[..., :1] != ABSENT
        pixels = fixed.astype(np.float32) / self.packs.settings.value_scale
        values = self.packs.statistics.standardise(pixels) * present
        return torch.from_numpy(values), torch.from_numpy(present)


def held_out_split(packs: PackSet) -> str:
    """The split on which training is judged: one that is not trained on, if there is any."""
    splits = {entry.split for entry in packs.regions}
    return next(name for name in ("val", "test", "train") if name in splits)


def _channels_first(values: Tensor) -> Tensor:
    return values.permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=8)
def _permutation(entropy: tuple[int, ...], size: int) -> Int64[np.ndarray, " n"]:
    key = np.random.SeedSequence(entropy)
    return np.random.Generator(np.random.Philox(key)).permutation(size)
