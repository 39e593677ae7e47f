"""How far evaluations that are the same in exact arithmetic are apart in float64, float32 and, of
the cascade, with layers in bfloat16.

Tiled and whole, points in another order, and what a draw of training sees against the dense
evaluation of painting, for both kinds of denoiser. Weights are random, those that begin at zero
too, so that no part is trivially absent. Distances are in units of the deviation of what is
compared. The laws themselves are tests (test_cascade, test_sparse_denoiser); here is by how much.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.bench_costs import report, tokens
from torch import Tensor, nn

from model.attention import Condition
from model.cascade.config import CascadeConfig
from model.cascade.denoiser import CascadeDenoiser, LookedUp, OctaveBlock
from model.cascade.painter import BlockPainter, Under, sides
from model.config import preset
from model.generate import ArrayField, Estimator
from model.haar import means
from model.lattice import Box
from model.points import full_lattice
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.painter import SparsePainter
from model.sparse.support import TileSupport

SPARSE_SIDE, LOG_SNR = 256, 0.0
PARENTS = 32
"""A side of a block's field, in parent cells."""
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


def condition(side: int, dtype: torch.dtype, footprint: int = 64) -> Condition:
    torch.manual_seed(1)
    given = tokens(1, side, footprint)
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


def painted(painter: Estimator, u: Tensor) -> Tensor:
    out = torch.empty_like(u)
    for box, _, x0 in painter.estimate(ArrayField(u.numpy()), LOG_SNR):
        out[:, box.y : box.y + box.height, box.x : box.x + box.width] = x0
    return out


def cascade(dtype: torch.dtype, bf16: bool = False) -> dict[str, str]:
    """Each block on a field of its own, under the field's own means."""
    config = preset("tiny", channels=3, token_dim=128)
    assert isinstance(config, CascadeConfig)
    octaves = config.octaves((0.08,) * 13, (0.08,) * config.top.level)
    torch.manual_seed(0)
    net, found = ready(CascadeDenoiser(config, octaves), dtype), {}
    for block in config.blocks:
        owner = net.blocks[block.name]
        given = condition(PARENTS << block.parents, dtype, footprint=2 << block.parents)
        tokens_of = sides(owner, given, 1.0)
        u = noisy(PARENTS << block.octaves, dtype)
        above = ArrayField(means(u[None], block.octaves)[0].numpy())
        under = Under(owner.body, above)
        with torch.autocast("cpu", torch.bfloat16, bf16):
            whole, tiled = (
                painted(BlockPainter(under, tokens_of, 1.0, side << block.octaves), u)
                for side in (PARENTS, 4)
            )
            seen, dense = windows(owner.body, tokens_of[0], u, under, whole)
        found[f"{block.name}: tiles of 4 parents, whole"] = apart(tiled, whole)
        found[f"{block.name}: windows beyond their halo, dense"] = apart(seen, dense)
    return found


def windows(
    body: OctaveBlock, tokens_of: LookedUp | None, u: Tensor, under: Under, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """x0_hat of parents in windows that reach as far as the halo around them, or to the border of
    the field; and what the dense evaluation has there.
    """
    n, halo, seen, dense = body.block.octaves, body.block.halo, [], []
    side, at = 2 * halo + 1, torch.full((1,), LOG_SNR, dtype=u.dtype)
    places = torch.randint(0, PARENTS, (16, 2), generator=torch.Generator().manual_seed(3))
    for y, x in places.tolist():
        top, left = (min(max(first - halo, 0), PARENTS - side) for first in (y, x))
        parents = under.around(Box(body.block.parents, top, left, side, side), u)
        rows, columns = (slice(first << n, (first + side) << n) for first in (top, left))
        base = body.base(parents)
        x0 = body(u[:, rows, columns][None] * 2**0.5 - base, parents, tokens_of, at)
        inside = (
            slice((first - start) << n, (first - start + 1) << n)
            for first, start in ((y, top), (x, left))
        )
        seen.append((base + x0)[(0, slice(None), *inside)])
        dense.append(whole[:, y << n : (y + 1) << n, x << n : (x + 1) << n])
    return torch.stack(seen), torch.stack(dense)


def sparse(dtype: torch.dtype) -> dict[str, str]:
    config = preset("paper-tiny", channels=3, token_dim=128)
    assert isinstance(config, SparseConfig)
    torch.manual_seed(0)
    octaves = config.octaves((0.08,) * 9, ())
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
@pytest.mark.parametrize(("name", "evaluate"), [("tiny", cascade), ("paper-tiny", sparse)])
def test_how_far_equal_evaluations_are_apart(
    name: str, evaluate: Callable[..., dict[str, str]]
) -> None:
    found = [evaluate(torch.float64), evaluate(torch.float32)]
    if evaluate is cascade:
        found.append(cascade(torch.float32, bf16=True))
    rows = [(key, " | ".join(each[key] for each in found)) for key in found[0]]
    report(f"{name}: largest (rms) difference in deviations, float64 | float32 | bfloat16", rows)
