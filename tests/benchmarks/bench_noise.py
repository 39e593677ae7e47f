"""What noise costs by the side of the image: in windows and at scattered cells.

Nothing is asserted about time, but that points equal the dense field.
"""

import time

import numpy as np
import pytest
import torch
from benchmarks.bench_costs import SIDES, VALUES, interleaved, report, seconds

from model.design import Extent, UniformDesign
from model.lattice import Box
from model.mollify import MollifiedNoise
from model.noise import Noise, NoiseTree
from model.noise_band import BandNoise
from model.points import Points
from model.spectrum import NoiseSpectrum


def scattered(side: int) -> Points:
    cells = torch.from_numpy(UniformDesign(VALUES).cells(Extent(side, side), (0, 0, 0)))
    zero = torch.zeros(VALUES, dtype=torch.int64)
    return Points(zero, zero, cells[:, 1], cells[:, 2], torch.tensor([[side, side]]))


def test_noise_in_windows_is_flat_in_the_side_of_the_image() -> None:
    """Windows of 48 x 48 cells at random places: only the depth of the tree grows."""
    rows, first = [], None
    for side in (1024, 4096, 32_768):
        tree = NoiseTree(NoiseSpectrum(int(np.log2(side))), channels=3)
        corners = np.random.default_rng(0).integers(side, size=(28, 2)).tolist()

        def work(tree: NoiseTree = tree, corners: list[list[int]] = corners) -> None:
            for y, x in corners:
                tree.box(0, Box(0, y, x, 48, 48))

        cost = seconds(work)
        first = first or cost
        rows.append((f"{side}² px", f"{cost / first:.2f} × the cost at 1024² ({cost:.3f} s)"))
    report("noise at 64,512 cells x 3 channels, 28 windows", rows)


@pytest.mark.timeout(3600)
def test_noise_at_scattered_cells_grows_with_the_depth_of_the_tree_alone() -> None:
    """65,536 pixels of an image against all of them, by extrapolation beyond 2048^2."""

    def kinds(side: int) -> dict[str, Noise]:
        top = side.bit_length() - 1
        white = NoiseTree(NoiseSpectrum(top), channels=3)
        band, mollified = BandNoise(white, parents=2), MollifiedNoise(white, 1.0)
        return {"white": white, "band": band, "mollified": mollified}

    seed, fields = torch.tensor([0]), {side: kinds(side) for side in SIDES}
    points = {side: scattered(side) for side in SIDES}
    works = {
        (name, side): (lambda noise=noise, side=side: noise.at(seed, points[side]))
        for side in SIDES
        for name, noise in fields[side].items()
    }
    least = interleaved(works, 2)
    for name in ("white", "band", "mollified"):
        dense, rows = {}, []
        for side in SIDES[:2]:
            box = Box(0, 0, 0, side, side)
            started = time.process_time()
            whole = fields[side][name].box(0, box)
            dense[side] = time.process_time() - started
            there = points[side]
            sparse = fields[side][name].at(seed, there)
            assert torch.equal(sparse, whole[:, there.y, there.x].T)
        for side in SIDES:
            cost = least[name, side]
            known = dense.get(side, dense[2048] * (side / 2048) ** 2)
            said = "" if side in dense else " (extrapolated)"
            rows.append(
                (
                    f"{side}² px, {side.bit_length() - 1} levels",
                    f"{cost:.2f} s, {cost / least[name, 1024]:.2f} × 1024²; all pixels "
                    f"{known:.1f} s{said}, {known / cost:.0f} ×",
                )
            )
        report(f"{name} noise at {VALUES} scattered cells x 3 channels", rows)
