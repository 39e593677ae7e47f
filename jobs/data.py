"""Training batches from pixel packs, as a function of (seed, step) alone.

Sample n of a run is pack pi(n) under a permutation keyed by the epoch; its noise, its noise level,
whether its condition is dropped and how it is turned are keyed by n. Ranks take slices of the
global batch. So one rank with a batch of four and two ranks with two see the same thing, and so
does a run that was resumed.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt16
from torch import Tensor

from conditioning.tokens import TokenScale, dihedral, to_condition, with_labels, within
from model.attention import Condition
from model.design import WindowDesign
from model.draw import Draw, PointDraw, WindowDraw
from pipeline.embeddings import TokenLattice
from pipeline.packfile import (
    ABSENT,
    Drawn,
    DrawnPoints,
    DrawnWindows,
    PackSet,
    RegionEntry,
)

PREFETCHED = 2


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
    drawn = sample.drawn
    lattice = drawn.lattice.swapaxes(0, 1) if element & 4 else drawn.lattice
    for axis in (0, 1):
        lattice = np.flip(lattice, axis) if element & (1 << axis) else lattice
    if isinstance(drawn, DrawnPoints):
        cells = drawn.cells[:, [0, 2, 1]] if element & 4 else drawn.cells.copy()
        for axis in (0, 1):
            if element & (1 << axis):
                cells[:, 1 + axis] = (side_px >> cells[:, 0]) - 1 - cells[:, 1 + axis]
        turned: Drawn = DrawnPoints(lattice, drawn.values, cells)
    else:
        windows, origins = drawn.windows, drawn.origins.copy()
        levels, window = windows.shape[1:3]
        if element & 4:
            windows, origins = windows.swapaxes(2, 3), origins[..., ::-1].copy()
        for axis in (0, 1):
            if element & (1 << axis):
                windows = np.flip(windows, 2 + axis)
                extent = side_px >> np.arange(levels)
                origins[..., axis] = extent - origins[..., axis] - window
        turned = DrawnWindows(lattice, windows, origins)
    return Sample(turned, dihedral(sample.tokens, element, side_px), sample.label)


@dataclass(frozen=True)
class Batches:
    """The batches of a run.

    batch: size of the global batch. condition_dropout: how often a condition is dropped, for
    classifier-free guidance; a label is dropped as often on its own, and in half of the samples
    whose tokens are, so that guidance knows images without either. augment: whether samples are
    turned and mirrored.
    """

    packs: PackSet
    batch: int
    seed: int
    condition_dropout: float = 0.1
    augment: bool = True
    split: str = "train"

    def __post_init__(self) -> None:
        if not self._entries:
            raise ValueError(f"{self.packs.path} has no regions in split {self.split!r}")

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
        share = self.batch // world
        numbers = range(step * self.batch + rank * share, step * self.batch + (rank + 1) * share)
        samples, seeds, uniform, keep, keep_label = [], [], [], [], []
        for number in numbers:
            random = np.random.Generator(
                np.random.Philox(np.random.SeedSequence((self.seed, 1, number)))
            )
            seeds.append(int(random.integers(2**62)))
            # Stratified over the global batch: position j draws from the j-th part of the range.
            uniform.append((number % self.batch + random.random()) / self.batch)
            keep.append(bool(random.random() >= self.condition_dropout))
            element = int(random.integers(8)) if self.augment else 0
            dropout = self.condition_dropout if keep[-1] else 0.5
            keep_label.append(bool(random.random() >= dropout))
            sample = turn(self._sample(number), element, self.packs.settings.side_px)
            samples.append(self._in_view(sample))
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
        pairs = len(self._entries) * self.packs.settings.packs_per_region
        order = _permutation(self.seed, number // pairs, pairs)
        region, pack = divmod(int(order[number % pairs]), self.packs.settings.packs_per_region)
        entry = self._entries[region]
        return Sample(self.packs.draw(entry, pack), self.packs.tokens(entry), entry.label)

    def _in_view(self, sample: Sample) -> Sample:
        """The sample with the tokens that condition its draw."""
        if not isinstance(sample.drawn, DrawnWindows):
            return sample
        assert isinstance(self.packs.design, WindowDesign)
        view = self.packs.design.view(sample.drawn.origins)
        return sample if view is None else replace(sample, tokens=within(sample.tokens, view))

    def draw(self, drawn: list[Drawn]) -> Draw:
        """Draws of the packs, standardised and collated."""
        lattice, lattice_present = self._standardise([d.lattice for d in drawn])
        points = [d for d in drawn if isinstance(d, DrawnPoints)]
        if points:
            values, present = self._standardise([d.values for d in points])
            cells = torch.from_numpy(np.stack([d.cells for d in points]))
            size_px = (self.packs.settings.side_px,) * 2
            return PointDraw(lattice, lattice_present, values, present, cells, size_px)
        windows = [d for d in drawn if isinstance(d, DrawnWindows)]
        values, present = self._standardise([d.windows for d in windows])
        origins = torch.from_numpy(np.stack([d.origins for d in windows]))
        return WindowDraw(lattice, lattice_present, values, present, origins)

    def _standardise(self, parts: list[UInt16[np.ndarray, "*shape"]]) -> tuple[Tensor, Tensor]:
        fixed = np.stack(parts)
        present = fixed[..., :1] != ABSENT
        pixels = fixed.astype(np.float32) / self.packs.settings.value_scale
        values = self.packs.statistics.standardise(pixels) * present
        return torch.from_numpy(values), torch.from_numpy(present)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Int64[np.ndarray, " n"]:
    key = np.random.SeedSequence((seed, 0, epoch))
    return np.random.Generator(np.random.Philox(key)).permutation(size)
