"""Laws of the diffusion autoencoder and of the latent model."""

import dataclasses
import math

import pytest
import torch
from sparse_points import alone, normal, points_of, shuffled
from torch import Tensor

from model.attention import Condition
from model.config import config_from_dict, preset
from model.draw import PointDraw
from model.latent import HIGH, LOW, LatentConfig, LatentDenoiser, latent_noise, solve
from model.points import Points
from model.process import Octaves
from model.schedule import levels, make_schedule
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.encoder import LatentEncoder
from model.sparse.objective import SparseObjective
from model.sparse.support import PointSupport
from model.spectrum import NoiseSpectrum

CONFIG = SparseConfig(
    channels=2,
    token_dim=6,
    latent_dim=8,
    coarse_level=3,
    width=8,
    blocks=1,
    heads=2,
    tokens="none",
    cross_attention="none",
    mollifier_sigma_px=0.0,
    token_width=8,
    embedding_width=16,
    unet_widths=(8, 16),
    unet_attention=1,
    unet_layers=1,
    unet_head_dim=8,
    unet_groups=4,
)
OCTAVES = Octaves(signal=(0.1,) * 7, residual=(), noise=NoiseSpectrum(6))


@pytest.fixture(scope="module")
def encoder() -> LatentEncoder:
    """A float64 encoder whose zero-initialised layers have been given weights."""
    torch.manual_seed(0)
    net = LatentEncoder(CONFIG).double()
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def encoded(encoder: LatentEncoder, points: Points, values: Tensor) -> Tensor:
    return encoder(values, PointSupport(points, CONFIG))


def test_z_depends_on_neither_the_order_of_points_nor_the_rest_of_the_batch(
    encoder: LatentEncoder,
) -> None:
    # One lattice of 8 x 6 cells for all, as a batch has it.
    points = points_of((150, 90, 200), ((64, 48), (60, 41), (57, 48)), levels=2)
    values = normal(len(points), 2)
    z = encoded(encoder, points, values)
    order = shuffled(len(points))
    torch.testing.assert_close(encoded(encoder, points.take(order), values[order]), z)
    for image in range(points.batch):
        own = encoded(encoder, alone(points, image), values[points.image == image])
        torch.testing.assert_close(own[0], z[image])
    moved = encoded(encoder, points, values + (points.image == 1)[:, None])
    assert (moved - z).abs()[1].max() > 1e-2
    torch.testing.assert_close(moved[[0, 2]], z[[0, 2]])
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(z.square().mean(dim=1), torch.ones(3).double(), atol=0.1, rtol=0)


def colours(seeds: Tensor) -> tuple[PointDraw, Condition]:
    """Images of 32 px of one of four colours each, seen at 48 pixels."""
    b = len(seeds)
    of = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[seeds % 4]
    points = points_of((48,) * b, ((32, 32),) * b, seed=int(seeds[0]))
    cells = torch.stack([points.level, points.y, points.x], dim=-1).view(b, 48, 3)
    values = of[:, None].expand(b, 48, 2)
    lattice = of[:, None, None].expand(b, 4, 4, 2)
    there = torch.ones(b, 4, 4, 1, dtype=torch.bool)
    draw = PointDraw(
        lattice, there, values, torch.ones(b, 48, 1, dtype=torch.bool), cells, (32, 32)
    )
    middle = torch.full((b, 1, 2), 16.0)
    none = torch.zeros(b, dtype=torch.bool)
    return draw, Condition(torch.zeros(b, 1, 6), middle, torch.full((b, 1), 32.0), (1, 1), none)


def error(denoiser: SparseOperatorDenoiser, log_snr: float, keep: bool) -> float:
    """Mean squared error of x0_hat with z given, or dropped."""
    draw, condition = colours(torch.arange(100, 108))
    points, truth = draw.points()
    support = denoiser.support(points)
    kept = torch.full((8,), keep)
    assert denoiser.encoder is not None
    z = denoiser.encoder(truth, support)
    at = torch.full((8,), log_snr)
    observed = truth + math.exp(-log_snr / 2) * denoiser.noise.at(torch.arange(8), points)
    given = dataclasses.replace(condition, vector=z, keep_vector=kept)
    evaluation = denoiser.prepare(given, at)
    out = denoiser(observed, support, evaluation)
    return float((denoiser.estimate(out, observed, points, at) - truth).square().mean())


def test_what_noise_hides_is_known_from_z() -> None:
    """Four colours drowned in noise: without z the best estimate is their mean, of error 1."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, target="x0", latent_dropout=0.25, width=16, self_attention=False
    )
    denoiser = SparseOperatorDenoiser(config, OCTAVES)
    objective = SparseObjective(denoiser)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-3)
    for step in range(64):
        seeds = torch.arange(8 * step, 8 * step + 8)
        # In another order each time, or the noise level would tell the colour.
        uniform = torch.linspace(0.0, 0.2, 8)[shuffled(8, step)]
        optimizer.zero_grad()
        objective(*colours(seeds), seeds, uniform).sum().backward()
        optimizer.step()
    assert denoiser.encoder is not None
    for name, parameter in denoiser.encoder.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert denoiser.encoder.observe.weight.grad.abs().max() > 0  # type: ignore[union-attr]
    with torch.no_grad():
        known, unknown = (error(denoiser, -5.0, keep) for keep in (True, False))
    assert known < 0.15
    assert unknown > 0.7


MIXTURE = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 1.0, 0.0]]).double()
ROOT = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.4, 0.0], [0.0, -0.1, 0.2]]).double()


def mixture(n: int, seed: int) -> Tensor:
    """Two Gaussians of one covariance, the first drawn in 3 of 10 cases."""
    which = (torch.arange(n) % 10 >= 3).long()
    return MIXTURE[which] + latent_noise(n, 3, seed) @ ROOT.T


def test_the_latent_model_recovers_the_mean_and_covariance_of_a_mixture() -> None:
    torch.manual_seed(0)
    net = LatentDenoiser(LatentConfig(dim=3, width=64, layers=4, embedding_width=32))
    data = mixture(4096, 1).float()
    net.measure(data)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    steps = 700
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        z = data[torch.arange(step * 256, step * 256 + 256) % 4096]
        noise = latent_noise(256, 3, 1000 + step).float()
        uniform = (shuffled(256, step) + 0.5) / 256
        optimizer.zero_grad()
        net.loss(z, noise, uniform).backward()
        optimizer.step()
    drawn = net.sample(4000, seed=5, steps=50).double()
    torch.testing.assert_close(drawn.mean(dim=0), data.double().mean(dim=0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(data.double().T), atol=0.12, rtol=0)
    # Two clusters, not one Gaussian of that covariance.
    first = drawn[:, 0] > 0.5
    assert abs(float(first.double().mean()) - 0.3) < 0.04
    torch.testing.assert_close(drawn[first].mean(dim=0), MIXTURE[0], atol=0.1, rtol=0)


def test_a_draw_is_a_function_of_its_seed_and_number() -> None:
    torch.manual_seed(0)
    net = LatentDenoiser(LatentConfig(dim=5, width=16, layers=2)).double()
    torch.nn.init.normal_(net.head.weight)
    five = net.sample(5, seed=3, steps=4)
    torch.testing.assert_close(net.sample(2, seed=3, steps=4), five[:2])
    assert (net.sample(5, seed=4, steps=4) - five).abs().min() > 0
    assert (net.sample(5, seed=3 + 2**32, steps=4) - five).abs().min() > 0


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_with_the_exact_denoiser_the_solver_draws_the_gaussian_itself(name: str) -> None:
    """mu + A n for every noise n: in closed form, for DDIM is a linear map of it."""
    mean = torch.tensor([1.0, -2.0]).double()
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]]).double()
    covariance = root @ root.T

    def exact(z: Tensor, log_snr: float) -> Tensor:
        alpha, variance = 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
        gain = (
            alpha
            * covariance
            @ torch.linalg.inv(alpha**2 * covariance + variance * torch.eye(2).double())
        )
        return mean + (z - alpha * mean) @ gain.T

    probes = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    log_snrs = levels(make_schedule(name), LOW, HIGH, 400)
    origin, *images = solve(exact, probes, log_snrs)
    linear = torch.stack(images, dim=1) - origin[:, None]
    torch.testing.assert_close(origin, mean, atol=0.05, rtol=0)
    torch.testing.assert_close(linear @ linear.T, covariance, atol=0.03, rtol=0)


def test_noise_is_standard_normal() -> None:
    noise = latent_noise(50_000, 3, 9)
    torch.testing.assert_close(noise.mean(0), torch.zeros(3).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(noise.T), torch.eye(3).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "millions"), [("infinity-diff", (438.7, 163.4)), ("infinity-diff-tiny", (2.16, 0.75))]
)
def test_presets_have_the_size_they_claim(name: str, millions: tuple[float, float]) -> None:
    """Of the denoiser and of its encoder; with the published 1024 numbers, 64.6M of the latent
    model.
    """
    config = preset(name, channels=3, token_dim=1024)
    assert isinstance(config, SparseConfig)
    octaves = config.octaves((0.1,) * 13, ())
    with torch.device("meta"):
        denoiser = SparseOperatorDenoiser(config, octaves)
        latents = LatentDenoiser(LatentConfig(dim=1024))
    assert denoiser.encoder is not None
    total, encoder, latent = (
        sum(p.numel() for p in net.parameters()) / 1e6
        for net in (denoiser, denoiser.encoder, latents)
    )
    assert total - encoder == pytest.approx(millions[0], rel=0.01)
    assert encoder == pytest.approx(millions[1], rel=0.01)
    assert latent == pytest.approx(64.6, rel=0.01)


def test_configurations_survive_json_and_contradictions_are_sentences() -> None:
    config = preset("infinity-diff", channels=3, token_dim=8)
    assert isinstance(config, SparseConfig)
    assert config.latent_dim == 1024
    assert config_from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="set vector_dim or latent_dim to 0"):
        dataclasses.replace(config, vector_dim=4)
    with pytest.raises(ValueError, match="needs a positive layers, but got 0"):
        LatentConfig(dim=4, layers=0)
