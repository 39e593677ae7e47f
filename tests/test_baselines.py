"""Laws of patch diffusion: its interpolation, its fusion, its objective and its process."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from fields import OCTAVES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.attention import Condition
from model.baselines import (
    PatchDenoiser,
    PatchObjective,
    PatchPainter,
    Seen,
    between_tiles,
    slerp,
    window_starts,
)
from model.cascade.objective import NOISE_STREAM, keyed_normals
from model.config import PatchConfig, config_from_dict, preset
from model.draw import PatchDraw
from model.family import make_denoiser, make_passes
from model.generate import ArrayField, Trajectory, advance, finish, start
from model.haar import composed, details, means, pyramid, up
from model.lattice import Box
from model.noise import NoiseTree
from model.solver import DDIM, uniform_steps
from model.spectrum import NoiseSpectrum

CONFIG = PatchConfig(
    channels=2,
    token_dim=6,
    patch_px=16,
    unshuffle=2,
    token_width=8,
    unet_widths=(8, 16),
    unet_attention=1,
    unet_head_dim=8,
    unet_groups=4,
)


def denoiser(seed: int = 0, *, octave_gains: bool = True) -> PatchDenoiser:
    """A float64 denoiser whose zero-initialised layers have been given weights."""
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, octave_gains=octave_gains)
    net = PatchDenoiser(config, config.octaves(OCTAVES.signal, OCTAVES.residual)).double()
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def condition(grid: tuple[int, int], batch: int = 1) -> Condition:
    """One token a patch, on a lattice."""
    gy, gx = grid
    values = torch.randn(batch, gy * gx, 6, generator=torch.Generator().manual_seed(1)).double()
    places = torch.cartesian_prod(torch.arange(gy), torch.arange(gx)).double()
    centres = (places.reshape(-1, 2) + 0.5) * CONFIG.patch_px
    return Condition(
        values,
        centres.expand(batch, -1, -1),
        torch.full((batch, gy * gx), float(CONFIG.patch_px), dtype=torch.float64),
        grid,
        torch.ones(batch, dtype=torch.bool),
    )


def field_of(height: int, width: int) -> ArrayField:
    random = np.random.default_rng(3)
    return ArrayField(random.normal(size=(2, height, width)))


def whole(painter: PatchPainter, field: ArrayField, log_snr: float) -> Tensor:
    """x0_hat of a field, put together from boxes that cover it once."""
    out = torch.full(field.shape, torch.nan, dtype=torch.float64)
    for box, u, x0 in painter.estimate(field, log_snr):
        ys, xs = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        assert out[:, ys, xs].isnan().all()
        torch.testing.assert_close(u, field.read(box))
        out[:, ys, xs] = x0
    assert not out.isnan().any()
    return out


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_slerp_turns_at_constant_speed_along_the_great_circle() -> None:
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in vectors(2, 7, 5))
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = torch.stack([slerp(a, b, step.expand(7)) for step in t])
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(9, 7).double())
    angle = torch.arccos((a * b).sum(-1))
    between = torch.arccos((path[1:] * path[:-1]).sum(-1))
    torch.testing.assert_close(between, (angle / 8).expand(8, -1))
    # In the plane of a and b: a great circle.
    basis = torch.linalg.qr(torch.stack([a, b], dim=-1)).Q
    inside = (basis @ (basis.mT @ path[..., None]))[..., 0]
    torch.testing.assert_close(inside, path)


def test_slerp_is_exact_at_its_ends_symmetric_and_joins_lengths_linearly() -> None:
    a, b = vectors(2, 7, 5)
    t = torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(slerp(a, b, torch.zeros(7).double()), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(7).double()), b)
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t))
    expected = (1 - t) * a.norm(dim=-1) + t * b.norm(dim=-1)
    torch.testing.assert_close(slerp(a, b, t).norm(dim=-1), expected)
    # Nearly parallel directions: the formula's limit, without a jump.
    for gap in (0.0, 1e-9, 1e-7, 1e-5):
        c = a + gap * b
        torch.testing.assert_close(slerp(a, c, t), torch.lerp(a, c, t[:, None]), atol=1e-9, rtol=0)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_embeddings_between_tiles_are_exact_on_them_and_continuous(
    gy: int, gx: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lattice = torch.randn(gy, gx, 6, generator=generator, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(gy), torch.arange(gx)).double().reshape(-1, 2)
    exact = between_tiles(lattice, places[:, 0], places[:, 1])
    torch.testing.assert_close(exact, lattice.flatten(0, 1))
    beyond = between_tiles(
        lattice, torch.tensor([-3.0, gy + 2.0]).double(), torch.zeros(2).double()
    )
    torch.testing.assert_close(beyond, torch.stack([lattice[0, 0], lattice[-1, 0]]))
    spots = torch.rand(20, 2, generator=generator, dtype=torch.float64) * torch.tensor([gy, gx])
    here = between_tiles(lattice, spots[:, 0], spots[:, 1])
    near = between_tiles(lattice, spots[:, 0] + 1e-7, spots[:, 1] - 1e-7)
    assert (here - near).norm(dim=-1).max() < 1e-4
    # Halfway between two neighbours of a row lies their slerp, and nothing else.
    if gx > 1:
        half = torch.tensor([0.5]).double()
        middle = between_tiles(lattice, torch.zeros(1).double(), half)
        torch.testing.assert_close(middle, slerp(lattice[:1, 0], lattice[:1, 1], half))


@given(st.integers(16, 90), st.integers(1, 16))
def test_windows_cover_every_pixel_from_border_to_border(extent: int, stride: int) -> None:
    starts = window_starts(extent, 16, stride)
    assert starts[0] == 0
    assert starts[-1] == extent - 16
    steps = np.diff(starts)
    assert ((steps > 0) & (steps <= stride)).all()
    assert (steps[:-1] == stride).all()


class Oracle(PatchDenoiser):
    """Knows u_0: returns its crops, in the order in which the windows come."""

    def __init__(self, truth: Tensor, crops: list[tuple[int, int]]) -> None:
        super().__init__(CONFIG, CONFIG.octaves(OCTAVES.signal, OCTAVES.residual))
        self.double()
        self.truth, self.crops = truth, list(crops)

    def forward(self, observed: Tensor, log_snr: Tensor, tokens: Tensor) -> Tensor:
        taken, self.crops = self.crops[: len(observed)], self.crops[len(observed) :]
        return torch.stack([self.truth[:, y : y + 16, x : x + 16] for y, x in taken])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (37, 61), (64, 16)])
@pytest.mark.parametrize("overlap", [0.75, 0.5, 0.3, 0.0])
def test_fusion_of_true_patches_is_the_truth(height: int, width: int, overlap: float) -> None:
    """Averages with weights that sum to one at every pixel give back what all windows agree on."""
    truth = torch.from_numpy(field_of(height, width).array)
    stride = max(round(16 * (1 - overlap)), 1)
    rows, columns = (window_starts(extent, 16, stride) for extent in (height, width))
    oracle = Oracle(truth, [(y, x) for y in rows for x in columns])
    painter = PatchPainter(oracle, condition((2, 2)), tile=width, overlap=overlap, batch=3)
    painted = whole(painter, field_of(height, width), 0.0)
    torch.testing.assert_close(painted, truth, atol=1e-12, rtol=0)
    assert not oracle.crops


@pytest.mark.parametrize("log_snr", [-6.0, 0.0, 5.0])
def test_any_tiling_gives_the_same_image(log_snr: float) -> None:
    net, field = denoiser(), field_of(40, 70)
    given_ = condition((3, 5))
    painter = PatchPainter(net, given_, guidance=2.0, tile=70, overlap=0.75)
    expected = whole(painter, field, log_snr)
    assert expected.std() > 0.1
    for tile, batch in ((7, 1), (32, 4), (69, 64)):
        other = dataclasses.replace(painter, tile=tile, batch=batch)
        torch.testing.assert_close(whole(other, field, log_snr), expected, atol=1e-10, rtol=0)


def test_without_overlap_patches_are_independent() -> None:
    net, field, given_ = denoiser(), field_of(32, 48), condition((2, 3))
    painted = whole(PatchPainter(net, given_, overlap=0.0), field, 1.0)
    scale = math.sqrt(1 + math.exp(-1.0))
    for i, (y, x) in enumerate((y, x) for y in (0, 16) for x in (0, 16, 32)):
        patch = torch.from_numpy(field.array[:, y : y + 16, x : x + 16])[None] * scale
        tokens = net.encode(given_.values[:, i], given_.keep)
        alone = net(patch, torch.ones(1).double(), tokens)[0]
        torch.testing.assert_close(painted[:, y : y + 16, x : x + 16], alone, atol=1e-10, rtol=0)


def test_a_dropped_condition_does_not_reach_the_image_and_a_kept_one_does() -> None:
    net, field = denoiser(), field_of(32, 32)
    one, other = condition((2, 2)), condition((2, 2))
    other = dataclasses.replace(other, values=other.values.flip(1))

    def paint(given_: Condition, guidance: float) -> Tensor:
        return whole(PatchPainter(net, given_, guidance=guidance), field, 0.0)

    null = paint(one.dropped(), 1.0)
    assert torch.equal(null, paint(other.dropped(), 1.0))
    full = paint(one, 1.0)
    assert (full - paint(other, 1.0)).abs().max() > 1e-3
    torch.testing.assert_close(paint(one, 3.0), null + 3.0 * (full - null))


def test_what_cannot_be_painted_is_a_sentence() -> None:
    net = denoiser()
    with pytest.raises(ValueError, match="windows of 16 px, which an image of 15x40 px"):
        whole(PatchPainter(net, condition((1, 2))), field_of(15, 40), 0.0)
    with pytest.raises(ValueError, match="leave --scale at 1"):
        CONFIG.check_painting(None, 64, 64, level=1)
    with pytest.raises(ValueError, match="in \\[0, 1\\), not 1"):
        CONFIG.check_painting(1.0, 64, 64, level=0)
    assert CONFIG.check_painting(None, 64, 64, level=0) == 0.75
    with pytest.raises(ValueError, match="leave --overlap out"):
        preset("tiny", channels=2, token_dim=6).check_painting(0.5, 64, 64, level=0)


def draw(batch: int) -> PatchDraw:
    values = vectors(batch, 2, 16, 16)
    return PatchDraw(values, torch.ones_like(values[:, :1], dtype=torch.bool))


def part(whole_draw: PatchDraw, i: int) -> PatchDraw:
    return PatchDraw(whole_draw.values[i : i + 1], whole_draw.present[i : i + 1])


def test_the_process_covers_every_octave_of_a_patch_from_drowned_to_clean() -> None:
    octaves = denoiser().octaves
    assert sum(octaves.signal) == pytest.approx(sum(OCTAVES.signal))
    low, high = octaves.log_snr_range()
    offsets = [
        math.log(s / n)
        for s, n in zip(octaves.signal, (0.75, 0.1875, 0.046875, 0.01171875, 4.0**-4), strict=True)
    ]
    assert low + max(offsets) == pytest.approx(-6.0)
    assert high + min(offsets) == pytest.approx(6.0)
    assert octaves.variances(0) == (pytest.approx(OCTAVES.signal[0]), 0.75)
    assert octaves.variances(4) == (pytest.approx(sum(OCTAVES.signal[4:])), 4.0**-4)
    one = dataclasses.replace(CONFIG, octave_gains=False).octaves(OCTAVES.signal, ())
    assert one.variances(0) == (pytest.approx(sum(OCTAVES.signal)), 1.0)
    assert one.log_snr_range() == (low, high)


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts() -> None:
    objective, given_ = PatchObjective(denoiser()), condition((1, 1), batch=3)
    seeds, uniform = torch.tensor([5, 6, 7]), torch.tensor([0.1, 0.5, 0.9]).double()
    together = objective(draw(3), given_, seeds, uniform)
    alone = []
    for i in range(3):
        one = dataclasses.replace(condition((1, 1)), values=given_.values[i : i + 1])
        alone.append(objective(part(draw(3), i), one, seeds[i : i + 1], uniform[i : i + 1]))
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0))


VARIANCES = (0.02, 0.03, 0.05, 0.2, 0.7)


def with_variances(batch: int, variances: Sequence[float]) -> PatchDraw:
    """Patches whose octaves, fine to coarse, and whose means have these variances."""
    white = NoiseSpectrum(4)
    noise = [white.detail_variance(level) for level in range(4)] + [white.mean_variance(4)]
    octaves = pyramid(vectors(batch, 2, 16, 16), 4)
    parts = zip(octaves, variances, noise, strict=True)
    values = composed([octave * (signal / n) ** 0.5 for octave, signal, n in parts])
    return PatchDraw(values, torch.ones_like(values[:, :1], dtype=torch.bool))


@pytest.mark.parametrize("log_snr", [-9.0, -2.0, 3.0])
def test_an_untrained_network_is_the_wiener_estimate_of_every_octave_and_its_losses_one(
    log_snr: float,
) -> None:
    """F = 0 at first; whatever the octaves, what it should have been has variance one in each."""
    octaves = CONFIG.octaves(VARIANCES, ())
    net, given_ = PatchDenoiser(CONFIG, octaves).double(), condition((1, 1), batch=512)
    patches, level = with_variances(512, VARIANCES), torch.full((512,), log_snr).double()
    losses = PatchObjective(net).losses(patches, given_, torch.arange(512), level)
    observed = patches.values
    assert losses.mean().item() == pytest.approx(1.0, abs=0.05)
    octaves_seen = pyramid(observed, 4)
    for loss, octave in zip(losses.tolist(), octaves_seen, strict=True):
        # Of so many normal values, of which details keep three in four.
        assert loss == pytest.approx(1.0, abs=3.5 * math.sqrt(2 / (0.75 * octave.numel())))
    ratios = [s / (s + math.exp(-log_snr) * 0.75 * 4.0**-i) for i, s in enumerate(VARIANCES[:4])]
    ratios.append(VARIANCES[4] / (VARIANCES[4] + math.exp(-log_snr) * 4.0**-4))
    parts = [*details(observed, 4)[::-1], up(means(observed, 4), 4)]
    expected = torch.stack([g * part for g, part in zip(ratios, parts, strict=True)]).sum(dim=0)
    tokens = net.encode(given_.values[:, 0], given_.keep)
    torch.testing.assert_close(net(observed, level, tokens), expected)


def test_what_the_network_sees_has_variance_one_in_every_octave() -> None:
    octaves = CONFIG.octaves(VARIANCES, ())
    for log_snr in (-12.0, 0.0, 8.0):
        total = [
            s + math.exp(-log_snr) * octaves.variances(level)[1]
            for level, s in enumerate(VARIANCES)
        ]
        observed = with_variances(128, total).values
        seen = Seen(octaves, observed, torch.full((128,), log_snr).double())
        for octave in pyramid(seen.scaled, 4):
            assert octave.square().mean().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("octave_gains", [True, False])
def test_preconditioning_changes_the_units_of_an_error_and_nothing_else(
    octave_gains: bool,
) -> None:
    """The loss in an octave is the error of x0_hat there over S N / (S + N), whatever F is; with
    one gain for all of a patch there is one such octave, the pixels.
    """
    net = denoiser(octave_gains=octave_gains)
    objective, given_, level = PatchObjective(net), condition((1, 1)), torch.zeros(1).double()
    losses = objective.losses(draw(1), given_, torch.tensor([5]), level)
    noise = keyed_normals(torch.tensor([5]), NOISE_STREAM, (2, 16, 16)).double()
    tokens = net.encode(given_.values[:, 0], given_.keep)
    error = net(draw(1).values + noise, level, tokens) - draw(1).values
    n = net.octaves.coarse_level
    assert n == (4 if octave_gains else 0)
    assert objective.levels == tuple(range(n + 1))
    for i, (loss, own) in enumerate(zip(losses, pyramid(error, n), strict=True)):
        signal, white = net.octaves.variances(i)
        expected = own.square().mean() * (signal + white) / (signal * white)
        torch.testing.assert_close(loss, expected)


def test_what_is_absent_is_neither_seen_nor_scored() -> None:
    objective, given_ = PatchObjective(denoiser()), condition((1, 1))
    here = draw(1).present.clone()
    here[:, :, 3:9, 2:11] = False
    losses = []
    for filling in (0.0, 1e6):
        one = PatchDraw(torch.where(here, draw(1).values, filling), here)
        losses.append(objective(one, given_, torch.tensor([5]), torch.tensor([0.5]).double()))
    torch.testing.assert_close(losses[0], losses[1])
    full = objective(draw(1), given_, torch.tensor([5]), torch.tensor([0.5]).double())
    assert (losses[0] - full).abs().min() > 1e-4
    assert (losses[0].mean() - full.mean()).abs() > 1e-3


def test_every_parameter_learns() -> None:
    net = denoiser().requires_grad_(True)
    given_ = dataclasses.replace(condition((1, 1), batch=2), keep=torch.tensor([True, False]))
    PatchObjective(net)(
        draw(2), given_, torch.tensor([1, 2]), torch.tensor([0.3, 0.7]).double()
    ).sum().backward()
    named = dict(net.named_parameters())
    still = {name for name, p in named.items() if p.grad is None or p.grad.abs().max() < 1e-12}
    # Softmax over the only token is one, whatever its query and key.
    idle = (".attn2.to_q.", ".attn2.to_k.", "transformer_blocks.0.norm2.")
    assert still == {name for name in named if any(part in name for part in idle)}


def test_a_trajectory_is_painted_by_the_same_loop_whatever_the_tiles() -> None:
    net, given_ = denoiser(), condition((2, 3))
    low, high = net.octaves.log_snr_range()
    steps = uniform_steps(low, high, 3)
    painted = []
    for tile in (48, 20):
        fields = [ArrayField(np.zeros((2, 32, 48))) for _ in range(2)]
        start(fields[0], NoiseTree(net.octaves.noise, 2), 7, low, tile=tile)
        noise = NoiseTree(net.octaves.noise, 2).box(7, Box(0, 0, 0, 32, 48))
        np.testing.assert_allclose(
            fields[0].array, noise.numpy() / math.sqrt(1 + math.exp(low)), rtol=1e-6
        )
        (only,) = make_passes(net, given_, guidance=1.5, tile=tile, level=0, steps=4, overlap=0.5)
        painter, constraint = only.prepare(None)
        assert constraint is None and only.log_snrs == (low, high)
        for i, step in enumerate(steps):
            advance(painter, DDIM(), step, Trajectory(fields[i % 2], fields[(i + 1) % 2]))
        finish(painter, high, Trajectory(fields[1], fields[0]))
        painted.append(fields[0].array)
    np.testing.assert_allclose(painted[0], painted[1], atol=1e-10)


@pytest.mark.parametrize(("name", "millions"), [("patch", 5.7), ("patch-brush", 450)])
def test_presets_have_the_size_they_claim(name: str, millions: float) -> None:
    with torch.device("meta"):
        config = preset(name, channels=3, token_dim=1024)
        net = make_denoiser(config, config.octaves((0.1,) * 13, (0.1,) * 5))
    assert isinstance(net, PatchDenoiser)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(count / millions - 1) < 0.05, count


def test_configurations_survive_json_and_unknown_keys_are_errors() -> None:
    import json

    stored = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert config_from_dict(stored) == CONFIG
    older = {name: value for name, value in stored.items() if name != "octave_gains"}
    assert config_from_dict(older) == dataclasses.replace(CONFIG, octave_gains=False)
    with pytest.raises(ValueError, match="unknown keys \\['coarse_level'\\]"):
        config_from_dict({**stored, "coarse_level": 5})
    with pytest.raises(ValueError, match="power of two"):
        dataclasses.replace(CONFIG, patch_px=24)
