"""The papers' denoiser: operators on sparse points around a U-Net on the coarse lattice.

∞-Brush has two levels. At the *sparse level*, blocks of a depthwise operator over the points
present, a cross-attention operator that reads the condition and a self-attention operator by which
points read each other; at the *grid level*, a U-Net on a lattice of coarse cells. Features of
points are brought to the lattice, and what the U-Net makes of them is looked up at the points; a
second stack of blocks, with skips from the first, gives what the target asks for. With a latent,
a vector that an encoder makes of the clean image comes to all of them with the noise level.

Two couplings reach beyond a neighbourhood: self-attention, which is a sum over points, and the
lattice. So the forward is a coroutine: it yields how to find what its own points contribute, and
is sent what that comes to over the whole image. For a draw the two are one thing; over an image in
tiles they are added up first, and not asked for again. Training and painting run the same lines,
and a tiling changes nothing.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.attention import Condition, GlobalVector, TokenEncoder, Tokens
from model.blocks import LevelEmbedding, zero_linear
from model.draw import PointDraw
from model.mollify import MollifiedNoise
from model.noise import Noise, NoiseTree
from model.operator_attention import AttentionSums
from model.operators.contract import Backend
from model.points import Points
from model.process import Octaves
from model.resample import Splat, interpolate, lattice_shape
from model.schedule import make_schedule
from model.sparse.blocks import Ask, LatticeNet, PointBlock
from model.sparse.config import SparseConfig
from model.sparse.encoder import LatentEncoder
from model.sparse.support import PointSupport, Support
from model.targets import Target, make_target
from model.wiener import wiener

Part = AttentionSums | Splat
Forward = Generator[Ask[Any], Any, Float[Tensor, "n c"]]


@dataclass(frozen=True)
class Means:
    """Exact area means of y = u_t / sqrt(abar) on the coarse lattice, zero where absent."""

    observed: Float[Tensor, "b hl wl c"]
    present: Float[Tensor, "b hl wl 1"]


@dataclass(frozen=True)
class Evaluation:
    """What all points of a batch of images share at one noise level.

    keep_features: the images whose lattice is given the features of points; None for all. seeds:
    of the images, by which the U-Net drops features in training; None drops nothing.
    """

    log_snr: Float[Tensor, " b"]
    embedding: Float[Tensor, "b e"]
    tokens: Tokens
    means: Means | None
    keep_features: Bool[Tensor, " b"] | None = None
    seeds: Int64[Tensor, " b"] | None = None


class SparseOperatorDenoiser(nn.Module):
    """What `config.target` asks for at points, from y = u_t / sqrt(abar) there, a condition and
    the log-SNR.

    backend: of the depthwise operators (see `operators.contract`); no parameter depends on it.
    """

    def __init__(
        self, config: SparseConfig, octaves: Octaves, backend: Backend = "reference"
    ) -> None:
        super().__init__()
        self.config, self.octaves, self.backend = config, octaves, backend
        side_px = 1 << octaves.noise.top_level
        self.schedule = make_schedule(config.schedule, side_px=side_px, octaves=octaves)
        self.noise = make_noise(config, octaves)
        self.tokens = TokenEncoder(
            config.token_dim, config.token_width, config.classes, config.vector_dim
        )
        self.embedding = LevelEmbedding(config.embedding_width)
        self.encoder: LatentEncoder | None = None
        self.latent: GlobalVector | None = None
        if config.latent_dim:
            self.encoder = LatentEncoder(config)
            self.latent = GlobalVector(config.latent_dim, config.embedding_width)
        self.observe = nn.Linear(config.channels, config.width)
        self.scale = nn.Embedding(config.coarse_level + 1, config.width)
        self.down = nn.ModuleList(PointBlock(config) for _ in range(config.blocks))
        self.lattice = LatticeNet(config, _lattice_inputs(config))
        self.up = nn.ModuleList(PointBlock(config) for _ in range(config.blocks))
        self.merge = nn.ModuleList(
            nn.Linear(2 * config.width, config.width) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = zero_linear(config.width, config.channels)

    @property
    def num_sums(self) -> int:
        """How often `run` yields."""
        return 1 + 2 * self.config.blocks * self.config.self_attention

    def support(self, points: Points) -> PointSupport:
        """Points as what `run` is given; to be kept while the same points are evaluated."""
        return PointSupport(points, self.config, self.backend)

    @torch.no_grad()
    def encode(self, draw: PointDraw) -> Float[Tensor, "b latent"]:
        """z of every image of a draw of u_0."""
        if self.encoder is None:
            raise ValueError("this denoiser has no encoder; give its configuration a latent_dim")
        points, truth = draw.points()
        return self.encoder(truth, self.support(points))

    def prepare(
        self,
        condition: Condition,
        log_snr: Float[Tensor, " b"],
        means: Means | None = None,
        keep_features: Bool[Tensor, " b"] | None = None,
        seeds: Int64[Tensor, " b"] | None = None,
    ) -> Evaluation:
        """A condition and a noise level, encoded once for all points."""
        if self.config.means and means is None:
            raise ValueError("this denoiser reads the area means of u_t; give them")
        if not self.config.means and means is not None:
            raise ValueError(
                "area means of u_t were given to a denoiser that reads none; leave them out, or "
                "train with means=True"
            )
        if len(condition.values) != len(log_snr):
            raise ValueError(
                f"a condition of {len(condition.values)} images was given the noise levels of "
                f"{len(log_snr)}; give one of each an image"
            )
        if self.config.tokens == "none":
            condition = condition.without("tokens")
        if self.config.tokens != "lattice":
            condition = pooled(condition)
        embedding = self.embedding(log_snr)
        if self.latent is not None:
            z, keep = condition.vector, condition.keep_vector
            embedding = embedding + self.latent(z, keep, len(condition.values))
            condition = replace(condition, vector=None, keep_vector=None)
        attended, lattice = self.tokens(condition)
        tokens = Tokens(attended, lattice, condition)
        return Evaluation(log_snr, embedding, tokens, means, keep_features, seeds)

    def forward(
        self, observed: Float[Tensor, "n c"], support: Support, evaluation: Evaluation
    ) -> Float[Tensor, "n c"]:
        """The network's output at the points of a draw, which are all that there is."""
        return self.over_all(observed, support, evaluation)[0]

    def over_all(
        self, observed: Float[Tensor, "n c"], support: Support, evaluation: Evaluation
    ) -> tuple[Float[Tensor, "n c"], list[Any]]:
        """The same, and what each sum over the points came to."""
        run = self.run(observed, support, evaluation)
        ask, sums = next(run), []
        while True:
            sums.append(self.complete(ask(), evaluation))
            try:
                ask = run.send(sums[-1])
            except StopIteration as end:
                return end.value, sums

    def run(
        self, observed: Float[Tensor, "n c"], support: Support, evaluation: Evaluation
    ) -> Forward:
        """The forward over some points of an image, as a coroutine (see the module)."""
        points = support.points
        self._check(observed, points, evaluation)
        scale = self.target_at(points).input_scale(evaluation.log_snr[points.image])
        level = self.config.coarse_level
        encoded = evaluation.embedding, evaluation.tokens
        x = self.observe(observed * scale[:, None]) + self.scale(points.level)
        skips = []
        for block in self.down:
            x = yield from block(x, support, *encoded)
            skips.append(x)
        lattice = yield partial(support.to_lattice, x)
        x = interpolate(lattice, points, level)
        for block, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([x, skips.pop()], dim=-1))
            x = yield from block(x, support, *encoded)
        return self.head(self.norm(x))

    def wanted(
        self,
        truth: Float[Tensor, "n c"],
        noise: Float[Tensor, "n c"],
        points: Points,
        log_snr: Float[Tensor, " b"],
    ) -> Float[Tensor, "n c"]:
        """What the network should give at points."""
        return self.target_at(points).of(truth, noise, log_snr[points.image])

    def estimate(
        self,
        out: Float[Tensor, "n c"],
        observed: Float[Tensor, "n c"],
        points: Points,
        log_snr: Float[Tensor, " b"],
    ) -> Float[Tensor, "n c"]:
        """x0_hat from what the network gave."""
        return self.target_at(points).to_estimate(out, observed, log_snr[points.image])

    def target_at(self, points: Points) -> Target:
        """What is asked for at points, whose cells may be of several sizes."""
        variances = [
            self.octaves.variances(level) for level in range(self.config.coarse_level + 1)
        ]
        table = torch.tensor(variances, device=points.level.device).to(self.norm.weight.dtype)
        signal, noise = table[points.level].unbind(dim=-1)
        return make_target(self.config.target, signal, noise)

    def complete(self, total: Part, evaluation: Evaluation) -> Any:
        """What the sum of all contributions comes to: what `run` is sent."""
        if isinstance(total, AttentionSums):
            return total
        inputs = total.apply()
        if evaluation.keep_features is not None:
            inputs = inputs * evaluation.keep_features[:, None, None, None]
        if evaluation.means is not None:
            inputs = torch.cat([inputs, *self._mean_inputs(evaluation)], dim=-1)
        tokens = evaluation.tokens
        if self.config.tokens == "lattice":
            inputs = torch.cat([inputs, self._token_inputs(inputs, tokens)], dim=-1)
        modulation = None if self.latent is None else evaluation.embedding
        return self.lattice(
            inputs, evaluation.log_snr, tokens.attended, modulation, evaluation.seeds
        )

    def _check(
        self, observed: Float[Tensor, "_ c"], points: Points, evaluation: Evaluation
    ) -> None:
        """A `ValueError` where values, points, condition and means are not of one batch."""
        if len(observed) != len(points):
            raise ValueError(f"{len(observed)} values do not fit {len(points)} points")
        if len(evaluation.log_snr) != points.batch:
            raise ValueError(
                f"points of {points.batch} images were given the condition and noise levels of "
                f"{len(evaluation.log_snr)}; give one of each an image"
            )
        if evaluation.means is None:
            return
        wanted = (points.batch, *lattice_shape(points, self.config.coarse_level))
        given = tuple(evaluation.means.observed.shape[:3])
        if given != wanted:
            raise ValueError(
                f"area means on {given[0]} lattices of {given[1]}x{given[2]} cells do not fit "
                f"points of {wanted[0]} images with {wanted[1]}x{wanted[2]} cells of "
                f"{self.config.cell_px} px"
            )

    def _mean_inputs(self, evaluation: Evaluation) -> list[Float[Tensor, "b hl wl _"]]:
        """The means in units of their deviation, their linear estimate, and which are there."""
        assert evaluation.means is not None
        observed, present = evaluation.means.observed, evaluation.means.present
        level = self.config.coarse_level
        known = wiener(self.octaves, level, observed, evaluation.log_snr) * present
        signal, noise = self.octaves.variances(level)
        deviation = (signal + noise * torch.exp(-evaluation.log_snr)).sqrt()
        return [observed / deviation[:, None, None, None], known * signal**-0.5, present]

    def _token_inputs(self, like: Float[Tensor, "b hl wl _"], tokens: Tokens) -> Tensor:
        """The token at every cell's centre."""
        b, h, w, _ = like.shape
        ys, xs = (
            (torch.arange(extent, device=like.device) + 0.5) * self.config.cell_px
            for extent in (h, w)
        )
        index = torch.arange(b, device=like.device)
        return tokens.at(index, ys.expand(b, -1), xs.expand(b, -1))


def make_noise(config: SparseConfig, octaves: Octaves) -> Noise:
    """The process's noise: of the octaves' spectrum, smoothed where data are."""
    leaves = NoiseTree(replace(octaves.noise, mollifier_sigma_px=0.0), config.channels)
    sigma_px = octaves.noise.mollifier_sigma_px
    return MollifiedNoise(leaves, sigma_px) if sigma_px else leaves


def pooled(condition: Condition) -> Condition:
    """The finest lattice as one token: its mean, at its middle."""
    gy, gx = condition.grid
    finest = slice(0, gy * gx)
    return replace(
        condition,
        values=condition.values[:, finest].mean(dim=1, keepdim=True),
        centres_px=condition.centres_px[:, finest].mean(dim=1, keepdim=True),
        footprints_px=condition.footprints_px[:, :1] * max(gy, gx),
        grid=(1, 1),
    )


def _lattice_inputs(config: SparseConfig) -> int:
    means = 2 * config.channels + 1 if config.means else 0
    return config.width + 1 + means + (config.token_width if config.tokens == "lattice" else 0)
