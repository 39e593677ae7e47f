"""What a training step of sparse operators costs by the side of the image, and what all benchmarks
share: `make bench` prints ratios in one run with hardware and commit.

Nothing is asserted about time: machines are shared and noisy. Figures to keep go to
docs/benchmarks.md. The cascade's are in bench_cascade.
"""

import ctypes
import gc
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
from model.config import preset
from model.design import Extent, UniformDesign
from model.draw import PointDraw
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.objective import SparseObjective

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
    """How much more memory than now this process holds at most during `work`; Linux, glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # nothing is held back that is not used
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = held_gb("VmRSS")
    work()
    return held_gb("VmHWM") - before


def in_a_process_of_its_own(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module of `benchmarks` returns in a new process, in which shapes are
    not checked. Pytest knows the module by another name than the process does.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        name = work.__module__.rpartition(".")[2]
        return pool.submit(_call, f"benchmarks.{name}", work.__name__, arguments).result()


def _call(module: str, name: str, arguments: tuple[Any, ...]) -> Any:
    from importlib import import_module

    return getattr(import_module(module), name)(*arguments)


def report(title: str, rows: list[tuple[str, str]]) -> None:
    peak_gb = max(
        resource.getrusage(who).ru_maxrss * 1024 / 1e9
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"\n## {title}\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, commit {commit()[:12]}, peak memory {peak_gb:.2f} GB"
    )
    for name, value in rows:
        print(f"| {name} | {value} |")


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

    The lattice has at most 128 cells a side, so that a larger image has more levels below it.
    Tokens grow with the lattice's cell: 16 x 16 of them at most.
    """

    preset: str
    side: int
    device: str = "cpu"
    batch: int = 1

    @property
    def level(self) -> int:
        return max(5, (self.side // LATTICE).bit_length() - 1)

    @property
    def design(self) -> UniformDesign:
        return UniformDesign(VALUES, self.level)

    @property
    def values(self) -> int:
        return self.design.num_values(Extent(self.side, self.side))

    def draw(self) -> PointDraw:
        image, cells, batch = Extent(self.side, self.side), self.side >> self.level, self.batch
        lattice = torch.randn(batch, cells, cells, 3)
        there = torch.ones(batch, cells, cells, 1, dtype=torch.bool)
        drawn = [self.design.cells(image, (0, number, 0)) for number in range(batch)]
        here = torch.ones(batch, VALUES, 1, dtype=torch.bool)
        values, places = torch.randn(batch, VALUES, 3), torch.from_numpy(np.stack(drawn))
        return PointDraw(lattice, there, values, here, places, (self.side, self.side))

    def ready(self) -> Callable[[], object]:
        config = preset(self.preset, channels=3, token_dim=128)
        assert isinstance(config, SparseConfig)
        config, top = replace(config, coarse_level=self.level), self.side.bit_length() - 1
        octaves = config.octaves((0.08,) * (top + 1), (0.08,) * self.level)
        torch.manual_seed(0)
        backend: Any = "reference" if self.device == "cpu" else "triton"
        objective = SparseObjective(SparseOperatorDenoiser(config, octaves, backend))
        objective = objective.to(self.device)
        given = tokens(self.batch, self.side, 256 << (self.level - 5))
        given = given.to(torch.device(self.device))
        draw = self.draw().to(torch.device(self.device))
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


@pytest.mark.timeout(3600)
def test_a_training_step_is_flat_in_the_side_of_the_image() -> None:
    name = "paper-tiny"
    steps = {side: TrainingStep(name, side) for side in SIDES}
    memory = {side: in_a_process_of_its_own(memory_of, name, side) for side in SIDES}
    least = interleaved({side: step.ready() for side, step in steps.items()}, 2)
    rows = [training_row(steps[side], least, memory[side]) for side in SIDES]
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
def test_a_training_step_is_flat_in_the_side_of_the_image_on_a_gpu() -> None:
    """As training runs there: bfloat16 layers, Triton kernels, batch 4."""
    name, batch, rounds = "paper", 4, 8
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
