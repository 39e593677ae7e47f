"""The latent diffusion model: vectors that stand for images, drawn out of nothing.

A diffusion autoencoder (`sparse.encoder`) makes a vector z of every image. Their law is learned by
a small diffusion model of its own (Preechakul et al., 2022, section 4), so that an image can be
painted without any condition: a z is drawn, then the image after it. The parts are those of
images: a schedule, a target, a solver (`schedule`, `targets`, `solver`). The noise is white: on
z in units of the deviation that was measured, number by number, its law is N(0, I).

The published network is a multilayer perceptron each of whose layers sees the noisy z again beside
the features of the layer before, modulated by the noise level. Published hyperparameters: 10 or 20
layers of width 2048 for a z of 512, epsilon with the L1 norm, a constant beta of 0.008 in 1000
steps. Here the squared error is used, under which the estimate is the mean that a solver needs
(an absolute error learns medians), and by default v and the cosine schedule, as for images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import LevelEmbedding, zero_linear
from model.philox import MASK, normals, philox_4x32
from model.schedule import draw_log_snr, levels, make_schedule
from model.solver import DDIM, steps_through
from model.targets import make_target

LOW, HIGH = -9.0, 9.0
"""From drowned to clean: a signal of unit variance is 1/8000 of the noise, or the reverse."""
SAMPLE_STREAM = 0x1A7E57


@dataclass(frozen=True)
class LatentConfig:
    """Sizes and choices of a `LatentDenoiser`.

    dim: of z. width, layers: of the perceptron. schedule, target: see `schedule` and `targets`.
    """

    dim: int
    width: int = 2048
    layers: int = 10
    embedding_width: int = 64
    schedule: str = "cosine"
    target: str = "v"

    def __post_init__(self) -> None:
        for name in ("dim", "width", "layers", "embedding_width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"a latent model needs a positive {name}, but got {getattr(self, name)}"
                )


class SkipLayer(nn.Module):
    """h' = silu( norm(W [h, z_t]) (1 + scale) + shift ), scale and shift by the noise level."""

    def __init__(self, inputs: int, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width)
        self.film = zero_linear(embedding_width, 2 * width)

    def forward(
        self, inputs: Float[Tensor, "b i"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b w"]:
        scale, shift = self.film(embedding).chunk(2, dim=-1)
        return F.silu(self.norm(self.linear(inputs)) * (1 + scale) + shift)


class LatentDenoiser(nn.Module):
    """What `config.target` asks for of a noisy z, in units of the measured mean and deviation.

    mean, std: of every number of z over what it is trained on; see `measure`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = make_schedule(config.schedule)
        self.target = make_target(config.target, signal=1.0)
        self.embedding = LevelEmbedding(config.embedding_width)
        inputs = [config.dim] + [config.width + config.dim] * (config.layers - 1)
        self.layers = nn.ModuleList(
            SkipLayer(i, config.width, config.embedding_width) for i in inputs
        )
        self.head = zero_linear(config.width + config.dim, config.dim)
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("std", torch.ones(config.dim))

    @torch.no_grad()
    def measure(self, z: Float[Tensor, "n d"]) -> None:
        """Take mean and deviation from the vectors that will be trained on."""
        self.mean.copy_(z.double().mean(dim=0))
        self.std.copy_(z.double().std(dim=0, correction=0).clamp_min(1e-3))

    def forward(
        self, observed: Float[Tensor, "b d"], log_snr: Float[Tensor, " b"]
    ) -> Float[Tensor, "b d"]:
        """The network's output from y = z_t / sqrt(abar)."""
        noisy = observed * self.target.input_scale(log_snr)[:, None]
        embedding = self.embedding(log_snr)
        h = noisy.new_empty(len(noisy), 0)
        for layer in self.layers:
            h = layer(torch.cat([h, noisy], dim=-1), embedding)
        return self.head(torch.cat([h, noisy], dim=-1))

    def loss(
        self,
        z: Float[Tensor, "b d"],
        noise: Float[Tensor, "b d"],
        uniform: Float[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the target; `uniform` in [0, 1) is the noise level's place."""
        clean = (z - self.mean) / self.std
        log_snr = draw_log_snr(self.schedule, uniform, LOW, HIGH)
        observed = clean + torch.exp(-log_snr / 2)[:, None] * noise
        error = self(observed, log_snr) - self.target.of(clean, noise, log_snr)
        return error.square().mean()

    def estimate(self, z_t: Float[Tensor, "b d"], log_snr: float) -> Float[Tensor, "b d"]:
        """z0_hat, standardised as z_t is."""
        at = torch.full((len(z_t),), log_snr, dtype=z_t.dtype, device=z_t.device)
        observed = z_t / torch.sigmoid(at).sqrt()[:, None]
        return self.target.to_estimate(self(observed, at), observed, at)

    @torch.no_grad()
    def sample(self, n: int, seed: int, steps: int = 100) -> Float[Tensor, "n d"]:
        """`n` vectors by DDIM; the i-th is a function of (seed, i)."""
        log_snrs = levels(self.schedule, LOW, HIGH, steps)
        noise = latent_noise(n, self.config.dim, seed).to(self.mean)
        return self.mean + self.std * solve(self.estimate, noise, log_snrs)


def solve(
    estimate: Callable[[Float[Tensor, "n d"], float], Float[Tensor, "n d"]],
    noise: Float[Tensor, "n d"],
    log_snrs: list[float],
) -> Float[Tensor, "n d"]:
    """z0_hat at the end of DDIM's way through the log-SNRs, from noise in place of z at the
    first.
    """
    solver, z = DDIM(), noise
    for step in steps_through(log_snrs):
        z = solver(z, estimate(z, step.now), None, step)
    return estimate(z, log_snrs[-1])


def latent_noise(n: int, dim: int, seed: int) -> Float[Tensor, "n d"]:
    """Standard normals (float64), each a function of (seed, row, column)."""
    row = torch.arange(n)[:, None]
    four = torch.arange(-(-dim // 4))[None]
    row, four = torch.broadcast_tensors(row, four)
    zero = torch.zeros_like(row)
    key = (zero + (seed & MASK), zero + ((seed >> 32) & MASK))
    counter = (four, row, zero, torch.full_like(row, SAMPLE_STREAM))
    return normals(philox_4x32(counter, key)).flatten(1)[:, :dim]
