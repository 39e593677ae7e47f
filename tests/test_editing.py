"""Laws of editing: what is known is kept exactly, whatever painter, solver and tiles."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fields
import numpy as np
import pytest
import torch
from sparse_points import normal
from torch import Tensor

from jobs.painting import Recipe, paint
from model.config import PatchConfig
from model.editing import AreaMeans, Constraint, Edited, Known, start_from
from model.family import Denoiser, make_denoiser, make_painter
from model.generate import (
    ArrayField,
    Estimator,
    Field,
    Trajectory,
    advance,
    finish,
    fresh_noise,
    start,
)
from model.lattice import Box, tiles
from model.noise import NoiseTree
from model.solver import DDIM, DPMSolverPP2M, Solver, uniform_steps
from model.sparse.config import SparseConfig

SEED = 7
LOW, HIGH = -9.0, 9.0
SHAPE = (2, 64, 96)
FLOORED = NoiseTree(fields.OCTAVES.noise, 2)
UNET = {"unet_widths": (8, 16), "unet_attention": 1, "unet_head_dim": 8, "unet_groups": 4}
SPARSE = SparseConfig(
    channels=2,
    token_dim=6,
    coarse_level=3,
    width=8,
    blocks=1,
    kernel=3,
    heads=2,
    token_width=8,
    embedding_width=8,
    unet_layers=1,
    resampling="splat",
    mollifier_sigma_px=0.0,
    **UNET,
)
PATCH = PatchConfig(channels=2, token_dim=6, patch_px=16, unshuffle=2, token_width=8, **UNET)


def with_weights(net: Denoiser) -> Denoiser:
    """Float64, and nothing that is zero."""
    for parameter in net.double().parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def network(kind: str) -> Denoiser:
    torch.manual_seed(0)
    if kind == "pyramid":
        return fields.denoiser()
    config = SPARSE if kind == "sparse" else PATCH
    octaves = config.octaves(fields.OCTAVES.signal, fields.OCTAVES.residual, 0.005)
    return with_weights(make_denoiser(config, octaves))


def painter_of(net: Denoiser, tile: int, level: int = 0) -> Estimator:
    given = fields.condition(1)
    return make_painter(net, given, guidance=1.5, tile=tile, level=level, overlap=0.5)


def source(*shape: int, seed: int = 3) -> ArrayField:
    return ArrayField(normal(*shape, seed=seed).numpy())


def mask(part: str) -> ArrayField:
    """One channel over SHAPE: a ragged piece, crossing tiles and cells."""
    values = np.zeros((1, *SHAPE[1:]))
    if part == "all":
        values[:] = 1
    elif part == "some":
        values[0, 13:50, 7:41] = 1
        values[0, 30:, 70:] = 1
    return ArrayField(values)


@dataclass(frozen=True)
class GaussianPainter:
    """The exact denoiser of independent pixels of variance `ratio` times the noise's, mean 0."""

    tile: int
    ratio: float = 2.5

    def estimate(self, field: Field, log_snr: float) -> Iterator[tuple[Box, Tensor, Tensor]]:
        alpha, variance = 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
        gain = alpha * self.ratio / (alpha**2 * self.ratio + variance)
        for box in tiles(*field.shape[1:], self.tile):
            u = field.read(box)
            yield box, u, gain * u


@dataclass(frozen=True)
class Recorder:
    """A painter that keeps the (log-SNR, u_t) that it was given."""

    painter: Estimator
    seen: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def estimate(self, field: Field, log_snr: float) -> Iterator[tuple[Box, Tensor, Tensor]]:
        self.seen.append((log_snr, field.read(Box(0, 0, 0, *field.shape[1:])).numpy()))
        yield from self.painter.estimate(field, log_snr)


def painted(
    painter: Estimator,
    constraint: Constraint | None,
    solver: Solver,
    *,
    shape: tuple[int, int, int] = SHAPE,
    bounds: tuple[float, float] = (LOW, HIGH),
    steps: int = 4,
    level: int = 0,
) -> np.ndarray:
    """What `jobs.painting.paint` does, in float64."""
    pair, memory = ([ArrayField(np.zeros(shape)) for _ in range(2)] for _ in range(2))
    start(pair[0], FLOORED, SEED, bounds[0], level=level)
    if constraint is not None:
        start_from(pair[0], constraint, bounds[0], level=level, tile=32)
        painter = Edited(painter, constraint)
    for i, step in enumerate(uniform_steps(*bounds, steps)):
        a, b = i % 2, (i + 1) % 2
        state = Trajectory(pair[a], pair[b], memory[a], memory[b])
        advance(painter, solver, step, state, fresh=fresh_noise(FLOORED, SEED, i))
    finish(painter, bounds[1], Trajectory(pair[steps % 2], pair[(steps + 1) % 2]))
    return pair[(steps + 1) % 2].array


def means(values: np.ndarray, down: int) -> np.ndarray:
    c, h, w = values.shape
    side = 1 << down
    return values.reshape(c, h // side, side, w // side, side).mean(axis=(2, 4))


def up(values: np.ndarray, down: int) -> np.ndarray:
    return values.repeat(1 << down, axis=1).repeat(1 << down, axis=2)


SOLVERS = pytest.mark.parametrize("solver", [DDIM(), DDIM(0.6), DPMSolverPP2M()], ids=str)


PAINTERS = pytest.mark.parametrize(
    ("kind", "steps"), [("pyramid", 2), ("sparse", 1), ("patch", 1)]
)


@PAINTERS
def test_area_means_are_those_given_and_tiles_change_nothing(kind: str, steps: int) -> None:
    net, down = network(kind), 2
    given = AreaMeans(source(2, 16, 24), down)
    results = [
        painted(painter_of(net, tile), given, DPMSolverPP2M(), bounds=(-6.0, 5.0), steps=steps)
        for tile in (96, 40)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-9, rtol=1e-9)
    low = normal(2, 16, 24, seed=3).numpy()
    np.testing.assert_allclose(means(results[0], down), low, atol=1e-12)
    assert np.abs(results[0] - up(low, down)).max() > 0.1


@PAINTERS
def test_known_pixels_are_kept_and_tiles_change_nothing(kind: str, steps: int) -> None:
    net, known = network(kind), source(*SHAPE)
    given = Known(known, mask("some"))
    results = [
        painted(painter_of(net, tile), given, DDIM(0.6), bounds=(-6.0, 5.0), steps=steps)
        for tile in (96, 40)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-9, rtol=1e-9)
    kept = np.broadcast_to(given.mask.read(Box(0, 0, 0, *SHAPE[1:])).numpy() > 0, SHAPE)
    np.testing.assert_array_equal(results[0][kept], known.array[kept])
    if kind == "pyramid":
        plain = painted(painter_of(net, 96), None, DDIM(0.6), bounds=(-6.0, 5.0), steps=steps)
        # The known part reaches beyond itself.
        assert np.abs(results[0] - plain)[~kept].max() > 1e-3


@SOLVERS
def test_everything_known_is_the_image_and_nothing_known_the_plain_painting(
    solver: Solver,
) -> None:
    painter, known = painter_of(fields.denoiser(), 32), source(*SHAPE)
    everything = painted(painter, Known(known, mask("all")), solver, steps=2)
    np.testing.assert_array_equal(everything, known.array)
    nothing = painted(painter, Known(known, mask("none")), solver, steps=2)
    np.testing.assert_array_equal(nothing, painted(painter, None, solver, steps=2))


@SOLVERS
def test_the_known_part_is_read_with_the_noise_of_its_time(solver: Solver) -> None:
    """u_t = sqrt(abar) u_0 + sqrt(1 - abar) n, with n the one field of a plain trajectory: keyed
    at the start, and as the steps mix fresh noise into it.
    """
    steps, known = 6, source(*SHAPE)
    box = Box(0, 0, 0, *SHAPE[1:])
    recorder = Recorder(GaussianPainter(32))
    painted(recorder, Known(known, mask("some")), solver, steps=steps)
    noise = FLOORED.box(SEED, box).double().numpy()
    kept = np.broadcast_to(mask("some").array > 0, SHAPE)
    for i, step in enumerate([*uniform_steps(LOW, HIGH, steps), None]):
        log_snr, u = recorder.seen[i]
        alpha, sigma = 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))
        np.testing.assert_allclose(
            u[kept], (alpha * known.array + sigma * noise)[kept], atol=1e-6, rtol=1e-6
        )
        if step is not None:
            part = solver.noise_scale(step) * math.sqrt(1 + math.exp(step.after))
            fresh = fresh_noise(FLOORED, SEED, i)(box, torch.device("cpu")).numpy()
            noise = math.sqrt(1 - part**2) * noise + part * fresh


@SOLVERS
def test_super_resolution_paints_details_as_if_nothing_were_given(solver: Solver) -> None:
    """Details of independent pixels know nothing of the means: their variance is what plain
    painting gives them, and the means' own trajectory is the process's.
    """
    down, steps = 3, 6
    low = source(2, 8, 12)
    recorder = Recorder(GaussianPainter(32))
    given = painted(recorder, AreaMeans(low, down), solver, steps=steps)
    plain = painted(GaussianPainter(32), None, solver, steps=steps)
    details, expected = (each - up(means(each, down), down) for each in (given, plain))
    np.testing.assert_allclose(details, expected, atol=1e-9)
    assert details.std() > 0.5
    log_snr, u = recorder.seen[0]
    alpha, sigma = 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))
    noise = FLOORED.box(SEED, Box(down, 0, 0, 8, 12)).numpy()
    np.testing.assert_allclose(means(u, down), alpha * low.array + sigma * noise, atol=1e-6)


def test_what_is_painted_follows_what_is_known() -> None:
    """Of images of one value each, the rest of one is the value of its known half."""

    @dataclass(frozen=True)
    class OneValue:
        variance: float = 1.0

        def estimate(self, field: Field, log_snr: float) -> Iterator[tuple[Box, Tensor, Tensor]]:
            _, height, width = field.shape
            box = Box(0, 0, 0, height, width)
            u, snr = field.read(box), math.exp(log_snr) * height * width
            mean = u.mean(dim=(1, 2), keepdim=True) * math.sqrt(1 + math.exp(-log_snr))
            gain = self.variance * snr / (self.variance * snr + 1)
            yield box, u, (gain * mean).expand_as(u)

    value = np.array([1.5, -0.5])[:, None, None]
    known = ArrayField(np.broadcast_to(value, SHAPE).copy())
    half = np.zeros((1, *SHAPE[1:]))
    half[:, :, :48] = 1
    result = painted(OneValue(), Known(known, ArrayField(half)), DDIM(), steps=200)
    assert np.abs(result - value).max() < 0.2
    assert np.abs(painted(OneValue(), None, DDIM(), steps=200) - value).max() > 0.5


def test_what_ends_before_the_field_binds_no_further() -> None:
    given = AreaMeans(source(2, 5, 7), 3)
    x0 = normal(*SHAPE, seed=8)
    result = given.project(Box(0, 0, 0, *SHAPE[1:]), x0).numpy()
    np.testing.assert_allclose(means(result, 3)[:, :5, :7], given.low.read(Box(3, 0, 0, 5, 7)))
    np.testing.assert_array_equal(result[:, 40:], x0[:, 40:].numpy())
    np.testing.assert_array_equal(result[:, :, 56:], x0[:, :, 56:].numpy())
    beyond = Box(0, 48, 64, 16, 32)
    assert torch.equal(given.project(beyond, x0[:, 48:, 64:]), x0[:, 48:, 64:])
    some = Known(source(2, 40, 56), ArrayField(np.ones((1, 40, 56))))
    result = some.project(Box(0, 0, 0, *SHAPE[1:]), x0)
    assert torch.equal(result[:, :40, :56], normal(2, 40, 56, seed=3))
    assert torch.equal(result[:, 40:], x0[:, 40:]) and torch.equal(result[..., 56:], x0[..., 56:])
    assert torch.equal(some.project(beyond, x0[:, 48:, 64:]), x0[:, 48:, 64:])


def test_a_preview_keeps_the_means_of_its_own_cells() -> None:
    """A field of level 1 and means four times as coarse: cells of level 3."""
    net, low = fields.denoiser(), source(2, 8, 12)
    painter = painter_of(net, 16, level=1)
    bounds = {"bounds": (-6.0, 5.0), "steps": 2}
    given = AreaMeans(low, 2)
    result = painted(painter, given, DDIM(), shape=(2, 32, 48), level=1, **bounds)
    np.testing.assert_allclose(means(result, 2), low.array, atol=1e-12)


class KilledError(Exception):
    pass


def test_an_edited_painting_killed_amid_a_step_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    net = fields.denoiser()
    painter = painter_of(net, 32)
    recipe = Recipe(64, 96, 4, seed=3, guidance=1.5, solver="ancestral")
    given = Known(source(*SHAPE), mask("some"))
    undisturbed = paint(net, painter, recipe, constraint=given).array
    seen: list[int] = []

    def killed(step: int, cells: int) -> None:
        seen.append(step)
        if seen.count(2) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        paint(net, painter, recipe, tmp_path, killed, given)
    resumed = paint(net, painter, recipe, tmp_path, constraint=given).array
    np.testing.assert_array_equal(resumed, undisturbed)
    kept = np.broadcast_to(mask("some").array > 0, SHAPE)
    expected = normal(*SHAPE, seed=3).numpy().astype(np.float32)
    np.testing.assert_array_equal(resumed[kept], expected[kept])
    assert np.abs(paint(net, painter, recipe).array - resumed).max() > 0.05


def test_what_cannot_be_edited_is_a_sentence() -> None:
    low = AreaMeans(source(2, 8, 12), 3)
    with pytest.raises(ValueError, match="multiples of 8"):
        painted(GaussianPainter(12), low, DDIM(), steps=1)
    with pytest.raises(ValueError, match="down is 0"):
        AreaMeans(source(2, 64, 96), 0)
    with pytest.raises(ValueError, match="does not fit values"):
        Known(source(*SHAPE), source(1, 64, 95))
    sigma = SparseConfig(channels=2, token_dim=6, coarse_level=3, width=8, heads=2, **UNET)
    octaves = sigma.octaves(fields.OCTAVES.signal, (), 0.0)
    net = make_denoiser(sigma, octaves)
    recipe = Recipe(64, 96, 2, seed=3, guidance=1.5, solver="ddim")
    with pytest.raises(ValueError, match="mollified by 1 px"):
        paint(net, GaussianPainter(32), recipe, constraint=low)
