"""What the model costs, as ratios in one run: `make bench` prints them with hardware and commit.

Nothing is asserted about time: machines are shared and noisy. Figures to keep go to
docs/benchmarks.md.
"""

import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.run import commit
from model.attention import Condition
from model.config import PyramidConfig, preset
from model.denoiser import PyramidDenoiser
from model.design import Extent, UniformDesign, ZoomDesign
from model.draw import Draw, PointDraw, WindowDraw
from model.generate import ArrayField, Painter
from model.objective import PyramidObjective
from model.process import Octaves
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.objective import SparseObjective
from model.spectrum import NoiseSpectrum

REPEATS = 5
SIDES = (1024, 2048, 4096, 8192, 16_384, 32_768)
VALUES = 65_536
LATTICE = 128  # cells a side at most: a larger image has more levels below it


def seconds(work: Callable[[], object]) -> float:
    """The least of a few runs after one to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def interleaved(works: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """The least seconds of this process's own CPU for each of the works, which take turns, so that
    what a busy machine does to one of them it does to all.
    """
    least = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for key, work in works.items():
            started = time.process_time()
            work()
            least[key] = min(least[key], time.process_time() - started)
    return least


def held_gb(field: str) -> float:
    """What this process holds (`VmRSS`), or held at most (`VmHWM`); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def extra_gb(work: Callable[[], object]) -> float:
    """How much more memory than now this process holds at most during `work`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = held_gb("VmRSS")
    work()
    return held_gb("VmHWM") - before


def report(title: str, rows: list[tuple[str, str]]) -> None:
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"\n## {title}\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, commit {commit()[:12]}, peak memory {peak_gb:.2f} GB"
    )
    for name, value in rows:
        print(f"| {name} | {value} |")


def tiny() -> PyramidDenoiser:
    octaves = Octaves((0.08,) * 13, (0.08,) * 5, NoiseSpectrum(12, 5, 0.005))
    torch.manual_seed(0)
    return PyramidDenoiser(preset("tiny", channels=3, token_dim=128), octaves)


def tokens(batch: int, side: int, footprint: int = 256) -> Condition:
    grid = max(side // footprint, 1)
    places = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"), -1)
    centres = (places.reshape(-1, 2).float() + 0.5) * footprint
    return Condition(
        torch.randn(batch, grid**2, 128),
        centres.expand(batch, -1, -1),
        torch.full((batch, grid**2), float(footprint)),
        (grid, grid),
        torch.ones(batch, dtype=torch.bool),
    )


@dataclass(frozen=True)
class TrainingStep:
    """Loss, noise and gradients of one draw of the budget; called, it does one step.

    The lattice has at most 128 cells a side, so that a larger image has more levels below it; a
    pyramid's finest level lends them its width. Tokens grow with the lattice's cell: 16 x 16 of
    them at most.
    """

    preset: str
    side: int
    device: str = "cpu"
    batch: int = 1
    footprint: int | None = None

    @property
    def level(self) -> int:
        return max(5, (self.side // LATTICE).bit_length() - 1)

    @property
    def design(self) -> ZoomDesign | UniformDesign:
        kind = UniformDesign if "paper" in self.preset else ZoomDesign
        return kind(VALUES, self.level)

    @property
    def values(self) -> int:
        return self.design.num_values(Extent(self.side, self.side))

    def config(self) -> PyramidConfig | SparseConfig:
        config = preset(self.preset, channels=3, token_dim=128)
        if isinstance(config, PyramidConfig):
            more = self.level - config.coarse_level
            widths = config.widths + config.widths[-1:] * more
            blocks = config.blocks + config.blocks[-1:] * more
            return replace(config, coarse_level=self.level, widths=widths, blocks=blocks)
        assert isinstance(config, SparseConfig)
        return replace(config, coarse_level=self.level)

    def draw(self) -> Draw:
        image, cells, batch = Extent(self.side, self.side), self.side >> self.level, self.batch
        lattice = torch.randn(batch, cells, cells, 3)
        there = torch.ones(batch, cells, cells, 1, dtype=torch.bool)
        design, keys = self.design, [(0, number, 0) for number in range(batch)]
        if isinstance(design, UniformDesign):
            drawn = torch.from_numpy(np.stack([design.cells(image, key) for key in keys]))
            here = torch.ones(batch, VALUES, 1, dtype=torch.bool)
            values = torch.randn(batch, VALUES, 3)
            return PointDraw(lattice, there, values, here, drawn, (self.side, self.side))
        origins = torch.from_numpy(np.stack([design.draw(image, key) for key in keys]))
        windows = torch.randn(*origins.shape[:3], design.window, design.window, 3)
        here = torch.ones_like(windows[..., :1], dtype=torch.bool)
        return WindowDraw(lattice, there, windows, here, origins)

    def ready(self) -> Callable[[], object]:
        config, top = self.config(), self.side.bit_length() - 1
        octaves = config.octaves((0.08,) * (top + 1), (0.08,) * self.level, 0.005)
        torch.manual_seed(0)
        objective: PyramidObjective | SparseObjective
        if isinstance(config, SparseConfig):
            backend: Any = "reference" if self.device == "cpu" else "triton"
            objective = SparseObjective(SparseOperatorDenoiser(config, octaves, backend))
        else:
            objective = PyramidObjective(PyramidDenoiser(config, octaves))
        objective = objective.to(self.device)
        footprint = self.footprint or 256 << (self.level - 5)
        given = tokens(self.batch, self.side, footprint).to(torch.device(self.device))
        draw: Any = self.draw().to(torch.device(self.device))
        seeds = torch.arange(self.batch, device=self.device)
        uniform = torch.full((self.batch,), 0.5, device=self.device)
        half = self.device != "cpu"

        def work() -> None:
            with torch.autocast(self.device, torch.bfloat16, half):
                objective(draw, given, seeds, uniform).sum().backward()
            if half:
                torch.cuda.synchronize()

        return work


def memory_of(name: str, side: int) -> tuple[float, float]:
    """(peak of the whole process, of which the first step) in GB."""
    work = TrainingStep(name, side).ready()
    extra = extra_gb(work)
    return held_gb("VmHWM"), extra


def memory_in_a_process_of_its_own(name: str, side: int) -> tuple[float, float]:
    from benchmarks import bench_costs  # by the name that another process knows it by

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(bench_costs.memory_of, name, side).result()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["tiny", "paper-tiny"])
def test_a_training_step_is_flat_in_the_side_of_the_image(name: str) -> None:
    steps = {side: TrainingStep(name, side) for side in SIDES}
    memory = {side: memory_in_a_process_of_its_own(name, side) for side in SIDES}
    rounds = 10 if name == "tiny" else 2
    least = interleaved({side: step.ready() for side, step in steps.items()}, rounds)
    rows = [training_row(steps[side], least, memory[side]) for side in SIDES]
    if name == "tiny":
        many = {"many": TrainingStep(name, 32_768, footprint=256).ready()}
        cost = interleaved(many, 2)["many"]
        rows.append(("32768² px with 128² tokens of 256 px", f"{cost:.2f} s"))
    report(f"one training step of {name}, batch 1, least CPU seconds of one thread", rows)


def training_row(
    step: TrainingStep, least: Mapping[int, float], memory: tuple[float, float]
) -> tuple[str, str]:
    cost, first = least[step.side], TrainingStep(step.preset, min(least))
    each, at_first = cost / step.values, least[first.side] / first.values
    cells = step.side >> step.level
    return (
        f"{step.side}² px, lattice {cells}², {step.level} levels below, {step.values} values",
        f"{cost:.3f} s, {cost / least[first.side]:.2f} × {first.side}²; {1e6 * each:.2f} µs a "
        f"value, {each / at_first:.2f} ×; peak {memory[0]:.2f} GB, the step {memory[1]:.2f} GB",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["paper", "brush"])
def test_a_training_step_is_flat_in_the_side_of_the_image_on_a_gpu(name: str) -> None:
    """As training runs there: bfloat16 layers, Triton kernels, batch 4."""
    batch, rounds = 4, 8
    steps = {side: TrainingStep(name, side, "cuda", batch) for side in SIDES}
    least, memory = dict.fromkeys(SIDES, float("inf")), {}
    for side, step in steps.items():
        torch.manual_seed(0)
        work = step.ready()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for number in range(rounds + 2):
            started = time.perf_counter()
            work()
            if number > 1:
                least[side] = min(least[side], time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated()
        memory[side] = peak / 1e9, (peak - before) / 1e9
        del work
        torch.cuda.empty_cache()
    rows = [training_row(steps[side], least, memory[side]) for side in SIDES]
    report(f"one training step of {name}, batch {batch}, {torch.cuda.get_device_name()}", rows)


def test_painting_costs_in_proportion_to_pixels() -> None:
    """One evaluation of tiny, by the side of the image and of the tile."""
    net, rows = tiny().eval().requires_grad_(False), []
    for side, tile in ((1024, 256), (2048, 256), (2048, 128), (2048, 512)):
        field = ArrayField(np.random.default_rng(0).normal(size=(3, side, side)).astype("float32"))
        painter = Painter(net, tokens(1, side), tile=tile)

        def work(painter: Painter = painter, field: ArrayField = field) -> None:
            for _ in painter.estimate(field, 0.0):
                pass

        cost = seconds(work)
        rows.append((f"{side}², tiles of {tile}", f"{cost / side**2 * 4096**2:.1f} s per 4096²"))
    report("one evaluation of tiny", rows)
