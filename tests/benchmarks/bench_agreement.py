"""How far evaluations that are the same in exact arithmetic are apart in float64 and float32.

Tiled and whole, points or windows in another order, and what a draw of training sees against the
dense evaluation of painting, for both kinds of denoiser. Weights are random, those that begin at
zero too, so that no part is trivially absent. Distances are in units of the deviation of what is
compared. The laws themselves are tests (test_denoiser, test_sparse_denoiser); here is by how much.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.bench_costs import report, tokens
from fields import levels_of
from torch import Tensor, nn

from model.attention import Condition
from model.config import PyramidConfig, preset
from model.denoiser import Layer, PyramidDenoiser, crop
from model.design import Extent, ZoomDesign
from model.generate import ArrayField, Painter
from model.lattice import Box
from model.points import full_lattice
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.painter import SparsePainter
from model.sparse.support import TileSupport

PYRAMID_SIDE, SPARSE_SIDE, LOG_SNR = 512, 256, 0.0
SCATTERED = 4096


def apart(found: Tensor, wanted: Tensor) -> str:
    """The largest and the root mean square difference."""
    difference = (found - wanted).double() / wanted.double().std()
    return f"{float(difference.abs().max()):.1e} ({float(difference.square().mean().sqrt()):.1e})"


def ready(net: nn.Module, dtype: torch.dtype) -> Any:
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.1)
    return net.to(dtype).eval().requires_grad_(False)


def condition(side: int, dtype: torch.dtype) -> Condition:
    torch.manual_seed(1)
    given = tokens(1, side, footprint=64)
    values, places, sides = (
        part.to(dtype) for part in (given.values, given.centres_px, given.footprints_px)
    )
    return Condition(values, places, sides, given.grid, given.keep)


def noisy(side: int, dtype: torch.dtype) -> Tensor:
    """u_t with power at every octave."""
    draw = torch.Generator().manual_seed(2)
    total = torch.zeros(3, side, side, dtype=torch.float64)
    for level in range(side.bit_length()):
        cells = torch.randn(3, side >> level, side >> level, generator=draw, dtype=torch.float64)
        total += 0.3 * cells.repeat_interleave(1 << level, 1).repeat_interleave(1 << level, 2)
    return total.to(dtype)


def painted(painter: Painter | SparsePainter, u: Tensor) -> Tensor:
    out = torch.empty_like(u)
    for box, _, x0 in painter.estimate(ArrayField(u.numpy()), LOG_SNR):
        out[:, box.y : box.y + box.height, box.x : box.x + box.width] = x0
    return out


def windows(net: PyramidDenoiser, y: Tensor, origins: Tensor, given: Condition) -> Tensor:
    """x0_hat at the pixels of chains of windows, as in training."""
    coarse, side = net.config.coarse_level, ZoomDesign().window
    levels, encoded = levels_of(y, coarse), net.encode(given)
    ones = [torch.ones_like(level[..., :1]) for level in levels]
    at = torch.full((1,), LOG_SNR, dtype=y.dtype)
    layer: Layer = net.lattice(levels[coarse], ones[coarse], at, encoded).layer
    index = torch.zeros(len(origins), dtype=torch.int64)
    places, corner = index, torch.zeros_like(origins[:, 0])
    for level in reversed(range(coarse)):
        here = origins[:, level]
        parents = layer.crop(places, here // 2 - corner - 1, (side // 2 + 2,) * 2)
        observed, present = (
            crop(values[level], index, here, (side, side)) for values in (levels, ones)
        )
        layer = net.descend(
            level, parents, observed, present, here, at[index], encoded, index
        ).layer
        places, corner = torch.arange(len(origins)), here
    return layer.estimate


def pyramid(dtype: torch.dtype) -> dict[str, str]:
    config = preset("tiny", channels=3, token_dim=128)
    assert isinstance(config, PyramidConfig)
    octaves = config.octaves((0.08,) * 10, (0.08,) * 5, 0.005)
    torch.manual_seed(0)
    net = ready(PyramidDenoiser(config, octaves), dtype)
    u, given = noisy(PYRAMID_SIDE, dtype), condition(PYRAMID_SIDE, dtype)
    whole = painted(Painter(net, given, tile=PYRAMID_SIDE), u)
    design = ZoomDesign()
    origins = torch.from_numpy(design.draw(Extent(PYRAMID_SIDE, PYRAMID_SIDE), (0, 0, 0)))
    y = u.permute(1, 2, 0)[None] * 2**0.5
    order = torch.randperm(len(origins), generator=torch.Generator().manual_seed(3))
    seen = windows(net, y, origins, given)
    inside = (slice(None), *(slice(design.halo, design.window - design.halo),) * 2)
    index, side = torch.zeros(len(origins), dtype=torch.int64), (design.window,) * 2
    dense, there = (
        crop(part, index, origins[:, 0], side)[inside]
        for part in (whole.permute(1, 2, 0)[None], torch.ones(1, *u.shape[1:], 1))
    )
    there = there[..., 0] > 0
    return {
        "tiles of 64 px, whole": apart(painted(Painter(net, given, tile=64), u), whole),
        "chains in another order, as drawn": apart(
            windows(net, y, origins[order], given), seen[order]
        ),
        "windows of a draw, dense": apart(seen[inside][there], dense[there]),
    }


def sparse(dtype: torch.dtype) -> dict[str, str]:
    config = preset("paper-tiny", channels=3, token_dim=128)
    assert isinstance(config, SparseConfig)
    torch.manual_seed(0)
    octaves = config.octaves((0.08,) * 9, (), 0.0)
    net = ready(SparseOperatorDenoiser(config, octaves), dtype)
    side = SPARSE_SIDE
    u, given = noisy(side, dtype), condition(side, dtype)
    whole = painted(SparsePainter(net, given, tile=side), u)
    evaluation = net.prepare(given, torch.full((1,), LOG_SNR, dtype=dtype))
    observed, every, box = (
        u.flatten(1).T * 2**0.5,
        full_lattice(side, side),
        Box(0, 0, 0, side, side),
    )
    tile = TileSupport(box, box, side, side, config, torch.device("cpu"))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(3))[:SCATTERED]
    again = torch.randperm(SCATTERED, generator=torch.Generator().manual_seed(4))
    as_drawn, reordered = (
        net(observed[chosen], net.support(every.take(chosen)), evaluation)
        for chosen in (order, order[again])
    )
    return {
        "tiles of 64 px, whole": apart(painted(SparsePainter(net, given, tile=64), u), whole),
        "points in another order, as drawn": apart(reordered, as_drawn[again]),
        "all pixels as points, dense": apart(
            net(observed, net.support(every), evaluation), net(observed, tile, evaluation)
        ),
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "evaluate"), [("tiny", pyramid), ("paper-tiny", sparse)])
def test_how_far_equal_evaluations_are_apart(
    name: str, evaluate: Callable[[torch.dtype], dict[str, str]]
) -> None:
    double, single = evaluate(torch.float64), evaluate(torch.float32)
    rows = [(key, f"{double[key]} | {single[key]}") for key in double]
    report(f"{name}: largest (rms) difference in deviations, float64 | float32", rows)
