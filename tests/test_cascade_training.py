"""Laws of a block's objective: what is scored, what is seen, what learns, and what is keyed."""

import dataclasses
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fields import CONFIG, DESIGN, OCTAVES, block_of, condition, denoiser, top_draw, window_of
from torch import Tensor

from model.attention import Condition
from model.cascade.config import BlockConfig
from model.cascade.denoiser import CascadeDenoiser
from model.cascade.objective import (
    HELD_OUT_LOG_SNRS,
    BlockObjective,
    keyed_normals,
    with_noisy_parents,
)
from model.design import Extent
from model.draw import BlockDraw, TopDraw
from model.family import make_objectives
from model.process import precondition

CLOSE = {"atol": 1e-10, "rtol": 0.0}
EVERY = pytest.mark.parametrize("name", CONFIG.names)
BLOCKS = pytest.mark.parametrize("name", ["A", "B"])
SEEDS, UNIFORM = torch.tensor([5, 2**40 + 6, 7]), torch.tensor([0.2, 0.5, 0.8]).double()


def image(batch: int = 3, height: int = 96, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)


def config_of(name: str) -> BlockConfig:
    return next(block for block in CONFIG.blocks if block.name == name)


def draw_of(
    name: str, batch: int = 3, origin: tuple[int, int] | None = None
) -> TopDraw | BlockDraw:
    """The top lattice, or a window that the design draws, unless said otherwise."""
    pixels = image(batch)
    if name == "T":
        return top_draw(pixels)
    block, size = config_of(name), Extent(*pixels.shape[2:])
    number = CONFIG.blocks.index(block)
    keyed = DESIGN.draw(size, (0, 3))[number][0].tolist()
    return window_of(pixels, block, origin or keyed, DESIGN.blocks[number].shape(size))


def part(values: TopDraw | BlockDraw, rows: slice | Tensor) -> TopDraw | BlockDraw:
    parts = {field.name: getattr(values, field.name)[rows] for field in dataclasses.fields(values)}
    return type(values)(**parts)


def repeated(draw: TopDraw | BlockDraw, count: int) -> TopDraw | BlockDraw:
    """The first image of a batch, so many times."""
    return part(draw, torch.zeros(count, dtype=torch.int64))


def given_of(rows: slice = slice(0, 3)) -> Condition:
    whole = condition(3)
    count = len(range(*rows.indices(3)))
    return dataclasses.replace(condition(count), values=whole.values[rows])


def losses(
    name: str,
    draw: TopDraw | BlockDraw,
    *,
    net: CascadeDenoiser | None = None,
    seeds: Tensor = SEEDS,
    uniform: Tensor = UNIFORM,
    given: Condition | None = None,
) -> Tensor:
    objective = BlockObjective(net or denoiser(), name)
    return objective(draw, given or given_of(), seeds[: len(draw.values)], uniform)


@EVERY
def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts(name: str) -> None:
    """However ranks share it."""
    draw = draw_of(name)
    alone = [
        losses(
            name,
            part(draw, slice(i, i + 1)),
            seeds=SEEDS[i : i + 1],
            uniform=UNIFORM[i : i + 1],
            given=given_of(slice(i, i + 1)),
        )
        for i in range(3)
    ]
    together = losses(name, draw)
    assert len(together) == len(BlockObjective(denoiser(), name).levels)
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0), **CLOSE)


def assert_scored_by_weights(name: str, draw: TopDraw | BlockDraw) -> None:
    """The loss is a sum over cells, each with its weight."""
    weights = torch.rand(draw.weight.shape, generator=torch.Generator().manual_seed(1)).double()
    parts = []
    for i in range(weights[0].numel()):
        one = torch.zeros_like(weights).flatten(1)
        one[:, i] = weights.flatten(1)[:, i]
        parts.append(losses(name, dataclasses.replace(draw, weight=one.view_as(weights))))
    whole = losses(name, dataclasses.replace(draw, weight=weights))
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole, **CLOSE)


@BLOCKS
def test_what_is_invalid_is_not_scored(name: str) -> None:
    """Holes inside the image are filled by values that are seen; only the rest is learned. Each
    parent counts by its valid part.
    """
    draw, body = draw_of(name, origin=(0, 0)), block_of(denoiser(), name).body
    assert_scored_by_weights(name, draw)
    nothing = losses(name, dataclasses.replace(draw, weight=torch.zeros_like(draw.weight)))
    assert nothing.tolist() == [0.0] * len(body.offsets)


def test_cells_of_the_top_lattice_are_scored_by_their_weights() -> None:
    draw = draw_of("T")
    assert isinstance(draw, TopDraw)
    assert_scored_by_weights("T", draw)
    half = draw.present.clone()
    half[..., :2] = 0
    shown = losses("T", dataclasses.replace(draw, present=half, weight=half))
    assert 0 < shown < losses("T", draw) * 2
    nothing = torch.zeros_like(half)
    absent = dataclasses.replace(draw, present=nothing, weight=nothing)
    assert losses("T", absent).tolist() == [0.0]


@EVERY
def test_every_parameter_of_the_block_learns_and_none_of_another(name: str) -> None:
    net = denoiser().requires_grad_(True)
    given = dataclasses.replace(given_of(), keep=torch.tensor([True, False, True]))
    objectives = make_objectives(net)
    assert list(objectives) == list(CONFIG.names)
    objectives[name](draw_of(name), given, SEEDS, UNIFORM).sum().backward()
    mine = {id(p) for p in objectives[name].parameters()}
    for each, parameter in net.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-14)
        assert learns == (id(parameter) in mine), each


@EVERY
def test_noise_is_keyed_by_the_seed_of_each_sample(name: str) -> None:
    draw, before = draw_of(name), losses(name, draw_of(name))
    assert torch.equal(losses(name, draw), before)
    assert not torch.allclose(losses(name, draw, seeds=SEEDS + 1), before)
    many = keyed_normals(SEEDS, 3, (2, 40, 50))
    for i in range(3):
        assert torch.equal(keyed_normals(SEEDS[i : i + 1], 3, (2, 40, 50))[0], many[i])
    assert not torch.allclose(keyed_normals(SEEDS, 4, (2, 40, 50)), many)
    assert abs(many.std() - 1) < 0.03 and abs(many.mean()) < 0.03
    correlation = np.corrcoef(many.flatten(1).numpy()) - np.eye(3)
    assert np.abs(correlation).max() < 5 / math.sqrt(4_000)


def test_parents_are_noisy_by_up_to_what_was_asked() -> None:
    """Deviations are uniform between 0 and the largest, one a sample; children stay."""
    draw = draw_of("B", batch=1)
    assert isinstance(draw, BlockDraw)
    seeds = torch.arange(400)
    many = repeated(draw, 400)
    assert isinstance(many, BlockDraw)
    noisy = with_noisy_parents(many, seeds, 0.08)
    found = (noisy.parents - many.parents).flatten(1).std(dim=1) / 0.08
    assert found.max() < 1.15 and abs(found.mean() - 0.5) < 0.06
    assert abs((found < 0.25).double().mean() - 0.25) < 0.09
    assert torch.equal(noisy.values, many.values)
    assert torch.equal(with_noisy_parents(many, seeds, 0.08).parents, noisy.parents)


@BLOCKS
def test_noise_on_the_parents_changes_the_question_and_not_what_is_held_out(name: str) -> None:
    net, draw = denoiser(), draw_of(name)
    quiet = dataclasses.replace(CONFIG, parents_noise=0.0)
    clean = denoiser(config=quiet)
    clean.load_state_dict(net.state_dict())
    assert not torch.allclose(losses(name, draw, net=net), losses(name, draw, net=clean))
    held = [BlockObjective(each, name).held_out(draw, given_of(), SEEDS) for each in (net, clean)]
    assert torch.equal(*held)


@EVERY
def test_the_held_out_error_is_a_pure_function_of_its_batch(name: str) -> None:
    """At fixed noise levels under fixed noise: of 3 images the mean of each one's."""
    objective, draw = BlockObjective(denoiser(), name), draw_of(name)
    found = objective.held_out(draw, given_of(), SEEDS)
    torch.manual_seed(1)
    assert torch.equal(objective.held_out(draw, given_of(), SEEDS), found)
    assert found.shape == (len(HELD_OUT_LOG_SNRS), len(objective.levels))
    alone = [
        objective.held_out(
            part(draw, slice(i, i + 1)), given_of(slice(i, i + 1)), SEEDS[i : i + 1]
        )
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(dim=0), found, **CLOSE)
    level = block_of(denoiser(), name).middle() + HELD_OUT_LOG_SNRS[1]
    expected = objective.losses(
        draw, given_of(), SEEDS, torch.full((3,), level, dtype=torch.float64)
    )
    torch.testing.assert_close(found[1], expected, **CLOSE)


@EVERY
def test_noise_levels_are_drawn_where_octaves_are_decided(name: str) -> None:
    """Within 3 of its own log-SNR zero every octave is drawn with a probability of 0.5 or more;
    all lie in the block's range.
    """
    net = denoiser(config=dataclasses.replace(CONFIG, parents_noise=0.0))
    block, drawn, count = block_of(net, name), [], 2_000
    objective = BlockObjective(net, name)
    with patch.object(objective, "losses", lambda *given: drawn.append(given[-1]) or given[-1]):
        uniform = (torch.arange(count).double() + 0.5) / count
        objective(repeated(draw_of(name), count), condition(count), torch.arange(count), uniform)
    low, high = block.log_snr_range()
    assert low <= drawn[0].min() and drawn[0].max() <= high
    assert drawn[0].mean() == pytest.approx(block.middle(), abs=0.05)
    assert drawn[0].std() == pytest.approx(CONFIG.log_snr_deviation, rel=0.02)
    for offset in block.body.offsets:
        assert ((drawn[0] + offset).abs() < 3).double().mean() > 0.5


@pytest.mark.parametrize("level", range(6))
def test_preconditioning_rebuilds_the_truth_and_has_unit_variance(level: int) -> None:
    """With signal and noise of the variances it was told, c_in y and F have variance 1."""
    signal, noise = OCTAVES.variances(level)
    generator = torch.Generator().manual_seed(level)
    for log_snr in (-12.0, 0.0, 9.0):
        factors = precondition(OCTAVES, level, torch.tensor([log_snr], dtype=torch.float64))
        truth, xi = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
        truth = truth * math.sqrt(signal)
        y = truth + math.exp(-log_snr / 2) * math.sqrt(noise) * xi
        target = (truth - factors.c_skip.flatten() * y) / factors.c_out.flatten()
        assert abs((factors.c_in.flatten() * y).var() - 1) < 0.02
        assert abs(target.var() - 1) < 0.02
        assert abs(torch.corrcoef(torch.stack([target, y]))[0, 1]) < 0.02
        assert factors.log_snr.item() == pytest.approx(log_snr + math.log(signal / noise))
