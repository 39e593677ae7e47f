"""What the cascade costs: a training step of each block, by the side of the image too, one
evaluation of each block, and whole images.

Every figure is taken in a process of its own, in which shapes are not checked. Seconds are the
process's own CPU seconds, the least of a few rounds. Operations are those of convolutions and
matrix products, counted by torch; a training step's are three times those of its forward pass, as
is usual.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.bench_costs import (
    SIDES,
    extra_gb,
    held_gb,
    in_a_process_of_its_own,
    interleaved,
    report,
    tokens,
)
from torch.utils.flop_counter import FlopCounterMode

from jobs.data import MOST_FOR_ONE
from jobs.optimizer import make_optimizer
from jobs.painting import Recipe, paint
from model.cascade.config import CascadeConfig
from model.cascade.denoiser import CascadeDenoiser
from model.cascade.objective import BlockObjective
from model.config import preset
from model.design import CascadeDesign, Extent
from model.draw import BlockDraw, TopDraw
from model.family import make_passes
from model.generate import ArrayField, Estimator, Field, Pass
from model.haar import up

BATCH, CHANNELS, TOKEN_DIM, TOKEN_PX = 8, 3, 128, 128
NAMES = ("T", "A", "B", "C", "D")
USUAL = 4096
"""Side of a region, by default."""


def denoiser(side: int, name: str = "tiny") -> CascadeDenoiser:
    config = preset(name, channels=CHANNELS, token_dim=TOKEN_DIM)
    assert isinstance(config, CascadeConfig)
    octaves = config.octaves((0.08,) * side.bit_length(), (0.08,) * config.top.level)
    torch.manual_seed(0)
    return CascadeDenoiser(config, octaves)


def gigaflops(work: Callable[[], object]) -> float:
    """Of convolutions and matrix products, 1e9 operations; a product and a sum are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops() / 1e9)


@dataclass(frozen=True)
class BlockStep:
    """Training steps of one block on draws of an image, at the places that the design names, with
    the tokens of 128 px that a window is told of.
    """

    name: str
    side: int
    bf16: bool
    batch: int = BATCH
    device: str = "cpu"
    preset: str = "tiny"

    def draw(self, config: CascadeConfig) -> TopDraw | BlockDraw:
        image, samples = Extent(self.side, self.side), self.samples(config)
        if self.name == config.top.name:
            values = torch.randn(samples, CHANNELS, *self.shape(config)[1])
            origin = torch.zeros(samples, 2, dtype=torch.int64)
            everywhere = torch.ones_like(values[:, :1])
            return TopDraw(values, everywhere, everywhere, origin)
        number = config.names.index(self.name) - 1
        block, design, margin = config.blocks[number], CascadeDesign(), config.margin
        drawn = [design.draw(image, (0, n, 0))[number][0] for n in range(samples)]
        h, w = design.blocks[number].shape(image)
        origins, extent = torch.from_numpy(np.stack(drawn)), self.side >> block.parents
        rows, columns = (
            origins[:, axis, None] + torch.arange(-margin, cells + margin)
            for axis, cells in enumerate((h, w))
        )
        there = [(place >= 0) & (place < extent) for place in (rows, columns)]
        present = (there[0][:, :, None] & there[1][:, None, :]).float()[:, None]
        inner = slice(margin, -margin)
        y_px, x_px = ((n[:, inner] + 0.5) * 2.0**block.parents for n in (rows, columns))
        parents = torch.randn(samples, CHANNELS, h + 2 * margin, w + 2 * margin)
        details = torch.randn(samples, CHANNELS, h << block.octaves, w << block.octaves)
        values = details + up(parents[..., inner, inner], block.octaves)
        return BlockDraw(values, parents, present, present[..., inner, inner], y_px, x_px)

    def shape(self, config: CascadeConfig) -> tuple[int, tuple[int, int]]:
        """Side of a window, and what it is in this image, in parents or top cells."""
        if self.name == config.top.name:
            side = min(self.side >> config.top.level, config.top.training_side)
            return config.top.training_side, (side, side)
        block = CascadeDesign().blocks[config.names.index(self.name) - 1]
        return block.window, block.shape(Extent(self.side, self.side))

    def samples(self, config: CascadeConfig) -> int:
        """In a batch, as `jobs.data.Batches.size`."""
        window, (h, w) = self.shape(config)
        return self.batch * min(window**2 // (h * w), MOST_FOR_ONE)

    def told_px(self, config: CascadeConfig) -> int:
        """Side of the square whose tokens a window is told of."""
        side = self.shape(config)[1][0]
        if self.name == config.top.name:
            around = 2 * TOKEN_PX if self.side >> config.top.level > side else 0
            return (side << config.top.level) + around
        block = config.blocks[config.names.index(self.name) - 1]
        around = (-(-(side << block.parents) // TOKEN_PX) + 2) * TOKEN_PX
        return min(around, self.side) if block.tokens else TOKEN_PX

    def ready(self) -> "ReadyStep":
        net, device = denoiser(self.side, self.preset), torch.device(self.device)
        objective, samples = BlockObjective(net, self.name).to(device), self.samples(net.config)
        return ReadyStep(
            objective,
            self.draw(net.config).to(device),
            tokens(samples, self.told_px(net.config), TOKEN_PX).to(device),
            torch.arange(samples, device=device),
            ((torch.arange(samples) + 0.5) / samples).to(device),
            self.bf16,
        )


@dataclass
class ReadyStep:
    """A block with its batch; called, it does one step as training does."""

    objective: BlockObjective
    draw: Any
    condition: Any
    seeds: torch.Tensor
    uniform: torch.Tensor
    bf16: bool
    weights: list[torch.Tensor] = field(init=False)
    averaged: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = list(self.objective.parameters())
        self.averaged = [weight.detach().clone() for weight in self.weights]
        self.optimizer = make_optimizer(self.objective, "muon", 1e-3)

    def losses(self) -> torch.Tensor:
        with torch.autocast(self.seeds.device.type, torch.bfloat16, self.bf16):
            return self.objective(self.draw, self.condition, self.seeds, self.uniform)

    def gradients(self) -> None:
        self.losses().mean().backward()

    def move(self) -> None:
        """What `jobs.parts` and DeepSpeed do with gradients: clip, step, average."""
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, [w.detach() for w in self.weights], 0.01)

    def __call__(self) -> None:
        self.gradients()
        self.move()


def blocks_of(side: int, rounds: int) -> dict[str, tuple[float, ...]]:
    """By block: operations of a step, and its CPU seconds in float32 and bfloat16, each without
    and with what moves the weights.
    """
    torch.set_num_threads(1)
    steps = {(name, bf16): BlockStep(name, side, bf16) for name in NAMES for bf16 in (False, True)}
    ready = {key: step.ready() for key, step in steps.items()}
    works: dict[Any, Callable[[], object]] = {}
    for key, step in ready.items():
        step()
        works[*key, "gradients"], works[*key, "move"] = step.gradients, step.move
    least = interleaved(works, rounds)
    found = {}
    for name in NAMES:
        operations = 3 * gigaflops(ready[name, False].losses)
        parts = [
            least[name, bf16, part] for bf16 in (False, True) for part in ("gradients", "move")
        ]
        found[name] = (operations, *parts)
    return found


@pytest.mark.timeout(1200)
def test_a_training_step_of_each_block() -> None:
    found, rows = in_a_process_of_its_own(blocks_of, USUAL, 8), []
    for name, (operations, *parts) in found.items():
        cells = []
        for kind, (gradients, move) in (("float32", parts[:2]), ("bfloat16", parts[2:])):
            cells.append(
                f"{kind} {1e3 * (gradients + move):.0f} ms, of which the weights {1e3 * move:.0f};"
                f" {operations / gradients:.0f} GFLOP/s of the gradients, "
                f"{operations / (gradients + move):.0f} of all"
            )
        faster = sum(parts[:2]) / sum(parts[2:])
        rows.append((f"{name}, {operations:.1f} GFLOP", f"{'; '.join(cells)}; {faster:.2f} ×"))
    report(f"a training step of tiny at {USUAL}², batch {BATCH}, CPU seconds of one thread", rows)


def sides_of(name: str, rounds: int) -> dict[int, tuple[float, float, float]]:
    """By side of the image: CPU seconds of a step of a block in bfloat16, and memory, of the step
    and of all.
    """
    torch.set_num_threads(1)
    ready = {side: BlockStep(name, side, bf16=True).ready() for side in SIDES}
    memory = {side: (extra_gb(step), held_gb("VmHWM")) for side, step in ready.items()}
    works: dict[Any, Callable[[], object]] = dict(ready)
    least = interleaved(works, rounds)
    return {side: (least[side], *memory[side]) for side in SIDES}


@pytest.mark.timeout(3600)
def test_a_training_step_is_flat_in_the_side_of_the_image() -> None:
    """Of images smaller than a window a batch holds more. The mixture weights blocks by the steps
    that they take in their shares of the time at 4096².
    """
    config, design, rows = denoiser(USUAL).config, CascadeDesign(), []
    for side in SIDES:
        image = Extent(side, side)
        rows.append((f"{side}²: {design.describe(image)}", f"{design.num_values(image)} values"))
    cost = {}
    for name in NAMES:
        found = in_a_process_of_its_own(sides_of, name, 8)
        cost[name] = {side: found[side][0] for side in SIDES}
        for side, (seconds, extra, peak) in found.items():
            per_minute = 60 * config.shares[name] / seconds
            rows.append(
                (
                    f"{name}, {side}²",
                    f"{1e3 * seconds:.0f} ms, {seconds / found[1024][0]:.2f} × 1024², "
                    f"{seconds / found[USUAL][0]:.2f} × {USUAL}²; {per_minute:.0f} steps in "
                    f"its share of a minute; the step {extra:.2f} GB of {peak:.2f}",
                )
            )
    for names in (NAMES, NAMES[1:]):
        mixture = {
            side: sum(config.shares[n] * cost[n][side] / cost[n][USUAL] for n in names)
            for side in SIDES
        }
        ratios = ", ".join(f"{side}² {m / mixture[1024]:.2f}" for side, m in mixture.items())
        rows.append((f"mixture of {', '.join(names)}, over 1024²", ratios))
    report(f"a training step of tiny in bfloat16, batch {BATCH}, one thread", rows)


def passes_of(net: CascadeDenoiser, side: int, tile: int = 1024) -> list[Pass]:
    given = tokens(1, side, TOKEN_PX)
    return make_passes(net, given, guidance=1.0, tile=tile, level=0, steps=None)


def evaluate(painter: Estimator, field: Field, bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, bf16):
        for _ in painter.estimate(field, 0.0):
            pass


def evaluations_of(side: int, tile: int) -> dict[str, tuple[float, ...]]:
    """By block: how many evaluations an image takes, and of one its cells, its operations, CPU
    seconds in float32 and in bfloat16, and memory.
    """
    torch.set_num_threads(1)
    net = denoiser(side).eval().requires_grad_(False)
    random, found, above = np.random.default_rng(0), {}, None
    for each in passes_of(net, side, tile):
        shape = (CHANNELS, side >> each.level, side >> each.level)
        noisy = ArrayField(random.normal(size=shape).astype(np.float32))
        painter, _ = each.prepare(above)
        above = noisy

        work, half = (partial(evaluate, painter, noisy, bf16) for bf16 in (False, True))
        extra = extra_gb(work)
        works: dict[Any, Callable[[], object]] = {0: work, 1: half}
        least = interleaved(works, 2 if each.level == 0 else 4)
        cells = shape[1] * shape[2]
        found[each.name] = (each.evaluations, cells, gigaflops(work), least[0], least[1], extra)
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("side", "tile"), [(2048, 1024), (4096, 512), (4096, 1024)])
def test_one_evaluation_of_each_block(side: int, tile: int) -> None:
    rows, total = [], [0.0, 0.0]
    for name, row in in_a_process_of_its_own(evaluations_of, side, tile).items():
        evaluations, cells, operations, single, half, extra = row
        rows.append(
            (
                f"{name}, {cells} cells, {evaluations} evaluations",
                f"float32 {single:.2f} s, {operations / single:.0f} GFLOP/s; bfloat16 "
                f"{half:.2f} s, {operations / half:.0f} GFLOP/s; {operations:.1f} GFLOP, "
                f"{1e6 * operations / cells:.0f} thousand a cell; {extra:.2f} GB",
            )
        )
        total = [t + evaluations * each for t, each in zip(total, (single, half), strict=True)]
    rows.append(("all evaluations", f"float32 {total[0]:.1f} s, bfloat16 {total[1]:.1f} s"))
    report(f"one evaluation of tiny, {side}², tiles of {tile} cells, one thread", rows)


def image_of(side: int, bf16: bool, threads: int) -> tuple[float, float, float]:
    """CPU seconds, seconds and peak memory of a whole image with the default evaluations."""
    torch.set_num_threads(threads)
    net = denoiser(side).eval().requires_grad_(False)
    recipe = Recipe(side, side, None, seed=0, guidance=1.0, solver="dpm++2m", bf16=bf16)
    began, began_cpu = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, bf16):
        paint(passes_of(net, side), recipe, channels=CHANNELS)
    return time.process_time() - began_cpu, time.perf_counter() - began, held_gb("VmHWM")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("side", [2048, 4096])
def test_a_whole_image(side: int) -> None:
    rows = []
    for bf16 in (False, True):
        for threads in (1, 2):
            cpu, wall, peak = in_a_process_of_its_own(image_of, side, bf16, threads)
            rows.append(
                (
                    f"{'bfloat16' if bf16 else 'float32'}, threads: {threads}",
                    f"{cpu:.1f} CPU s, {wall:.1f} s, peak {peak:.2f} GB",
                )
            )
    report(f"an image of {side}² of tiny, the default evaluations, untrained", rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_of_brush_on_a_gpu(name: str) -> None:
    rows = []
    for side in SIDES:
        step = BlockStep(name, side, True, device="cuda", preset="brush").ready()
        step()
        torch.cuda.reset_peak_memory_stats()
        least = float("inf")
        for _ in range(8):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            least = min(least, time.perf_counter() - started)
        rate = 3e-3 * gigaflops(step.losses) / least
        peak = torch.cuda.max_memory_allocated() / 1e9
        rows.append((f"{side}²", f"{1e3 * least:.0f} ms, {rate:.1f} TFLOP/s, peak {peak:.2f} GB"))
        del step
        torch.cuda.empty_cache()
    report(f"a training step of {name} of brush, batch {BATCH}", rows)
