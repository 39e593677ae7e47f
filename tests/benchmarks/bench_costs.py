"""What the model costs, as ratios in one run: `make bench` prints them with hardware and commit.

Nothing is asserted about time: machines are shared and noisy. Figures to keep go to
docs/benchmarks.md.
"""

import os
import platform
import resource
import time
from collections.abc import Callable

import numpy as np
import torch

from jobs.run import commit
from model.attention import Condition
from model.config import preset
from model.denoiser import PyramidDenoiser
from model.design import Extent, ZoomDesign
from model.draw import WindowDraw
from model.generate import ArrayField, Painter
from model.lattice import Box
from model.noise import NoiseTree
from model.objective import PyramidObjective
from model.process import Octaves
from model.spectrum import NoiseSpectrum

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """The least of a few runs after one to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


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


def tokens(batch: int, side: int) -> Condition:
    grid = max(side // 256, 1)
    places = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"), -1)
    centres = (places.reshape(-1, 2).float() + 0.5) * 256
    return Condition(
        torch.randn(batch, grid**2, 128),
        centres.expand(batch, -1, -1),
        torch.full((batch, grid**2), 256.0),
        (grid, grid),
        torch.ones(batch, dtype=torch.bool),
    )


def test_noise_at_sparse_cells_is_flat_in_the_side_of_the_image() -> None:
    """Windows of 48 x 48 cells at random places: only the depth of the tree grows."""
    rows, first = [], None
    for side in (1024, 4096, 32_768):
        tree = NoiseTree(NoiseSpectrum(int(np.log2(side)), 5, 0.005), channels=3)
        corners = np.random.default_rng(0).integers(side, size=(28, 2)).tolist()

        def work(tree: NoiseTree = tree, corners: list[list[int]] = corners) -> None:
            for y, x in corners:
                tree.box(0, Box(0, y, x, 48, 48))

        cost = seconds(work)
        first = first or cost
        rows.append((f"{side}² px", f"{cost / first:.2f} × the cost at 1024² ({cost:.3f} s)"))
    report("noise at 64,512 cells x 3 channels, 28 windows", rows)


def test_a_training_step_is_flat_in_the_side_of_the_image() -> None:
    """Loss, gradients and noise of one draw of 65,536 values; the same budget at every side."""
    rows, first = [], None
    for side in (1024, 2048, 4096):
        objective, design = PyramidObjective(tiny()), ZoomDesign()
        image = Extent(side, side)
        chains, cells = design.shape(image)[0], side // 32
        origins = torch.from_numpy(design.draw(image, (0,)))[None]
        draw = WindowDraw(
            torch.randn(1, cells, cells, 3),
            torch.ones(1, cells, cells, 1, dtype=torch.bool),
            torch.randn(1, chains, 5, 48, 48, 3),
            torch.ones(1, chains, 5, 48, 48, 1, dtype=torch.bool),
            origins,
        )
        batch = (draw, tokens(1, side), torch.tensor([0]), torch.tensor([0.5]))

        def work(objective=objective, batch=batch) -> None:  # type: ignore[no-untyped-def]
            objective(*batch).sum().backward()

        cost = seconds(work)
        first = first or cost
        values = design.num_values(image)
        rows.append(
            (f"{side}² px", f"{cost / first:.2f} × 1024² ({cost:.2f} s for {values} values)")
        )
    report("one training step of tiny, batch 1", rows)


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
