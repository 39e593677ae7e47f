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
from model.editing import (
    AreaMeans,
    Constraint,
    Edited,
    Known,
    KnownPixels,
    LowImage,
    Partly,
    Within,
    start_from,
)
from model.family import Denoiser, make_denoiser, make_passes
from model.generate import (
    ArrayField,
    Estimator,
    Field,
    Pass,
    Trajectory,
    advance,
    finish,
    fresh_noise,
    start,
)
from model.lattice import Box, tiles
from model.noise import NoiseTree
from model.solver import DDIM, DPMSolverPP2M, Solver
from model.sparse.config import SparseConfig

SEED = 7
LOW, HIGH = -9.0, 9.0
SHAPE = (2, 64, 96)
NOISE = NoiseTree(fields.OCTAVES.noise, 2)
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
    config = SPARSE if kind == "sparse" else PATCH
    octaves = config.octaves(fields.OCTAVES.signal, fields.OCTAVES.residual)
    return with_weights(make_denoiser(config, octaves))


def painter_of(net: Denoiser, tile: int) -> Estimator:
    given = fields.condition(1)
    (only,) = make_passes(net, given, guidance=1.5, tile=tile, level=0, steps=None, overlap=0.5)
    return only.prepare(None)[0]


def cascade() -> list[Pass]:
    return make_passes(
        fields.denoiser(), fields.condition(1), guidance=1.5, tile=32, level=0, steps=3
    )


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
    start(pair[0], NOISE, SEED, bounds[0], level=level)
    if constraint is not None:
        start_from(pair[0], constraint, bounds[0], level=level, tile=32)
        painter = Edited(painter, constraint)
    for i, step in enumerate(solver.steps(*bounds, steps)):
        a, b = i % 2, (i + 1) % 2
        state = Trajectory(pair[a], pair[b], memory[a], memory[b])
        advance(painter, solver, step, state, fresh=fresh_noise(NOISE, SEED, i))
    finish(painter, bounds[1], Trajectory(pair[steps % 2], pair[(steps + 1) % 2]))
    return pair[(steps + 1) % 2].array


def means(values: np.ndarray, down: int) -> np.ndarray:
    c, h, w = values.shape
    side = 1 << down
    return values.reshape(c, h // side, side, w // side, side).mean(axis=(2, 4))


def up(values: np.ndarray, down: int) -> np.ndarray:
    return values.repeat(1 << down, axis=1).repeat(1 << down, axis=2)


SOLVERS = pytest.mark.parametrize("solver", [DDIM(), DDIM(0.6), DPMSolverPP2M()], ids=str)


PAINTERS = pytest.mark.parametrize("kind", ["sparse", "patch"])
"""Of the cascade, which is held block by block: see test_cascade_painting."""


@PAINTERS
def test_area_means_are_those_given_and_tiles_change_nothing(kind: str) -> None:
    net, down = network(kind), 2
    given = AreaMeans(source(2, 16, 24), down)
    results = [
        painted(painter_of(net, tile), given, DPMSolverPP2M(), bounds=(-6.0, 5.0), steps=1)
        for tile in (96, 40)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-9, rtol=1e-9)
    low = normal(2, 16, 24, seed=3).numpy()
    np.testing.assert_allclose(means(results[0], down), low, atol=1e-12)
    assert np.abs(results[0] - up(low, down)).max() > 0.1


@PAINTERS
def test_known_pixels_are_kept_and_tiles_change_nothing(kind: str) -> None:
    net, known = network(kind), source(*SHAPE)
    given = Known(known, mask("some"))
    results = [
        painted(painter_of(net, tile), given, DDIM(0.6), bounds=(-6.0, 5.0), steps=1)
        for tile in (96, 40)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-9, rtol=1e-9)
    kept = np.broadcast_to(given.mask.read(Box(0, 0, 0, *SHAPE[1:])).numpy() > 0, SHAPE)
    np.testing.assert_array_equal(results[0][kept], known.array[kept])


@SOLVERS
def test_everything_known_is_the_image_and_nothing_known_the_plain_painting(
    solver: Solver,
) -> None:
    painter, known = painter_of(network("patch"), 96), source(*SHAPE)
    everything = painted(painter, Known(known, mask("all")), solver, steps=1)
    np.testing.assert_array_equal(everything, known.array)
    nothing = painted(painter, Known(known, mask("none")), solver, steps=1)
    np.testing.assert_array_equal(nothing, painted(painter, None, solver, steps=1))


@pytest.mark.parametrize("solver", ["dpm++2m", "ancestral"])
def test_everything_known_is_the_image_of_a_cascade_and_nothing_known_the_plain_one(
    solver: str,
) -> None:
    """Block by block: in each the known means, whose children the next block has to be."""
    recipe = Recipe(*SHAPE[1:], 3, seed=SEED, guidance=1.5, solver=solver)
    known = ArrayField(np.round(source(*SHAPE).array * 256) / 256)
    image = fields.paint64(cascade(), recipe, edit=KnownPixels(Known(known, mask("all")), 0))
    np.testing.assert_array_equal(image, known.array)
    nothing = fields.paint64(cascade(), recipe, edit=KnownPixels(Known(known, mask("none")), 0))
    plain = fields.paint64(cascade(), recipe)
    np.testing.assert_allclose(nothing, plain, atol=1e-10, rtol=0)


@SOLVERS
def test_the_known_part_is_read_with_the_noise_of_its_time(solver: Solver) -> None:
    """u_t = sqrt(abar) u_0 + sqrt(1 - abar) n, with n the one field of a plain trajectory: keyed
    at the start, and as the steps mix fresh noise into it.
    """
    steps, known = 6, source(*SHAPE)
    box = Box(0, 0, 0, *SHAPE[1:])
    recorder = Recorder(GaussianPainter(32))
    painted(recorder, Known(known, mask("some")), solver, steps=steps)
    noise = NOISE.box(SEED, box).double().numpy()
    kept = np.broadcast_to(mask("some").array > 0, SHAPE)
    for i, step in enumerate([*solver.steps(LOW, HIGH, steps), None]):
        log_snr, u = recorder.seen[i]
        alpha, sigma = 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))
        np.testing.assert_allclose(
            u[kept], (alpha * known.array + sigma * noise)[kept], atol=1e-6, rtol=1e-6
        )
        if step is not None:
            part = solver.noise_scale(step) * math.sqrt(1 + math.exp(step.after))
            fresh = fresh_noise(NOISE, SEED, i)(box, torch.device("cpu")).numpy()
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
    noise = NOISE.box(SEED, Box(down, 0, 0, 8, 12)).numpy()
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


def test_known_parts_of_cells_are_weighted_by_how_much_is_known() -> None:
    """P x0 = w known + (1 - w) x0 above the pixels; where all is known, its mean."""
    known, shown = source(*SHAPE), mask("some")
    edit = KnownPixels(Known(known, shown), 0)
    assert edit.constraint(0) is edit.known and edit.given(3, SHAPE) is None
    partly = edit.constraint(3)
    assert isinstance(partly, Partly)
    box, x0 = Box(3, 0, 0, 8, 12), normal(2, 8, 12, seed=8)
    part = means(shown.array, 3)
    expected = means(shown.array * known.array, 3) + (1 - part) * x0.numpy()
    np.testing.assert_allclose(partly.project(box, x0).numpy(), expected, atol=1e-6)
    assert 0 < part[(part > 0) & (part < 1)].size < part.size
    with pytest.raises(ValueError, match="known at level 2 and say nothing of level 1"):
        KnownPixels(Known(known, shown), 2).constraint(1)


def test_what_known_members_lack_of_a_familys_mean_goes_to_the_others() -> None:
    low, known, shown = source(2, 16, 24, seed=4), source(*SHAPE), mask("some")
    within = Within(Known(known, shown), AreaMeans(low, 2))
    found = within.project(Box(0, 0, 0, *SHAPE[1:]), normal(*SHAPE, seed=8)).numpy()
    kept = np.broadcast_to(shown.array > 0, SHAPE)
    np.testing.assert_array_equal(found[kept], known.array[kept])
    free = np.broadcast_to(means(shown.array, 2) < 1, low.shape)
    np.testing.assert_allclose(means(found, 2)[free], low.array[free], atol=1e-10)


@pytest.mark.parametrize("level", [2, 3])
def test_a_low_image_gives_all_coarser_levels_and_goes_on_beyond_its_end(level: int) -> None:
    low = ArrayField(np.round(source(2, 5, 7).array * 256) / 256)
    given = LowImage(low, 2).given(level, (2, 16 >> (level - 2), 16 >> (level - 2)))
    assert given is not None and LowImage(low, 2).given(1, (2, 32, 32)) is None
    rows, columns = (np.arange(16).clip(max=n - 1) for n in (5, 7))
    wide = low.array[:, rows][:, :, columns]
    found = given.read(Box(level, 0, 0, *given.shape[1:])).numpy()
    np.testing.assert_allclose(found, means(wide, level - 2), atol=1e-6)


class KilledError(Exception):
    pass


def test_an_edited_painting_killed_amid_a_step_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    recipe = Recipe(64, 96, 3, seed=3, guidance=1.5, solver="ancestral")
    given = KnownPixels(Known(source(*SHAPE), mask("some")), 0)
    undisturbed = paint(cascade(), recipe, channels=2, edit=given).array
    seen: list[int] = []

    def killed(before: int, amount: int) -> None:
        seen.append(before)
        if before and seen.count(before) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        paint(cascade(), recipe, channels=2, work=tmp_path, report=killed, edit=given)
    resumed = paint(cascade(), recipe, channels=2, work=tmp_path, edit=given).array
    np.testing.assert_array_equal(resumed, undisturbed)
    kept = np.broadcast_to(mask("some").array > 0, SHAPE)
    expected = normal(*SHAPE, seed=3).numpy().astype(np.float32)
    np.testing.assert_array_equal(resumed[kept], expected[kept])
    assert np.abs(paint(cascade(), recipe, channels=2).array - resumed).max() > 0.05


def test_what_cannot_be_edited_is_a_sentence() -> None:
    low = AreaMeans(source(2, 8, 12), 3)
    with pytest.raises(ValueError, match="multiples of 8"):
        painted(GaussianPainter(12), low, DDIM(), steps=1)
    with pytest.raises(ValueError, match="down is 0"):
        AreaMeans(source(2, 64, 96), 0)
    with pytest.raises(ValueError, match="does not fit values"):
        Known(source(*SHAPE), source(1, 64, 95))
    recipe = Recipe(64, 96, 2, seed=3, guidance=1.5, solver="ddim")
    edit = LowImage(source(2, 8, 12), 3)
    with pytest.raises(ValueError, match="mollified by 1 px"):
        paint(cascade(), recipe, channels=2, mollifier_sigma_px=1.0, edit=edit)
