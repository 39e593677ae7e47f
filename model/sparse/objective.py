"""The training objective of a sparse-operator denoiser: the error of what it is asked for.

At the cells of a draw, and only there, u_0 is known from the packs and the noise from its keyed
field. The loss of each level of cells is the mean over images of the mean squared error of the
target over the image's points, weighted by the noise level (`targets`); their sum is the
objective. With level-0 points alone and the simple weight that is ∞-Brush's loss. With a latent, z
of the same draw conditions it: a diffusion autoencoder, whose encoder learns from nothing but this
loss (see `encoder`).
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import Condition
from model.draw import PointDraw
from model.lattice import Box
from model.philox import MASK, philox_4x32
from model.schedule import draw_log_snr, log_snr_range
from model.sparse.denoiser import Means, SparseOperatorDenoiser
from model.targets import make_weight

KEEP_STREAM, LATENT_STREAM = 0xFEA7, 0x1A7E


class SparseObjective(nn.Module):
    """Losses of a batch at every level that it has points of, as a module that DeepSpeed can
    wrap.
    """

    def __init__(self, denoiser: SparseOperatorDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.low, self.high = log_snr_range(denoiser.schedule, denoiser.octaves)
        self.weight = make_weight(denoiser.config.weight, denoiser.schedule)

    def forward(
        self,
        draw: PointDraw,
        condition: Condition,
        seeds: Int64[Tensor, " b"],
        uniform: Float[Tensor, " b"],
    ) -> Float[Tensor, " levels"]:
        """`seeds` name the noise fields; `uniform` in [0, 1) is the noise level's place in the
        schedule, 0 at the noisy end.
        """
        denoiser = self.denoiser
        points, truth = draw.points()
        log_snr = draw_log_snr(denoiser.schedule, uniform, self.low, self.high)
        noise = denoiser.noise.at(seeds, points).to(truth)
        observed = truth + torch.exp(-log_snr[points.image, None] / 2) * noise
        means = self._means(draw, seeds, log_snr) if denoiser.config.means else None
        support = denoiser.support(points)
        if denoiser.encoder is not None:
            z = denoiser.encoder(truth, support)
            kept = _keyed(seeds, LATENT_STREAM) >= denoiser.config.latent_dropout
            condition = replace(condition, vector=z, keep_vector=kept)
        evaluation = denoiser.prepare(condition, log_snr, means, self._keep(seeds), seeds)
        out = denoiser(observed, support, evaluation)
        wanted = denoiser.wanted(truth, noise, points, log_snr)
        weight = self.weight(denoiser.target_at(points), log_snr[points.image])
        error = (out - wanted).square().mean(dim=-1) * weight
        # Over the points that each draw has, absent ones too: every image counts alike, and the
        # loss of a batch is the mean of those of its parts, however ranks share it.
        level = draw.cells[..., 0]
        batch, levels = len(level), int(level.max()) + 1
        image = torch.arange(batch, device=level.device)[:, None]
        most = torch.bincount((image * levels + level).flatten(), minlength=batch * levels)
        place = points.image * levels + points.level
        losses = error.new_zeros(batch * levels).index_add(0, place, error)
        return (losses / most.clamp_min(1)).view(batch, levels).mean(dim=0)

    def _means(
        self, draw: PointDraw, seeds: Int64[Tensor, " b"], log_snr: Float[Tensor, " b"]
    ) -> Means:
        """The draw's lattice with its noise."""
        lattice = draw.lattice
        box = Box(self.denoiser.config.coarse_level, 0, 0, *lattice.shape[1:3])
        noise = self.denoiser.noise.boxes(seeds, box).permute(0, 2, 3, 1)
        present = draw.lattice_present.to(lattice)
        sigma = torch.exp(-log_snr / 2)[:, None, None, None]
        return Means((lattice + sigma * noise.to(lattice)) * present, present)

    def _keep(self, seeds: Int64[Tensor, " b"]) -> Tensor | None:
        """Which images keep the features of points on their lattice: a function of the seed."""
        if self.denoiser.config.feature_dropout == 0.0:
            return None
        return _keyed(seeds, KEEP_STREAM) >= self.denoiser.config.feature_dropout


def _keyed(seeds: Int64[Tensor, " b"], stream: int) -> Float[Tensor, " b"]:
    """A uniform number of [0, 1) for each seed."""
    zero = torch.zeros_like(seeds)
    counter = (zero, zero, zero, torch.full_like(seeds, stream))
    word = philox_4x32(counter, (seeds & MASK, (seeds >> 32) & MASK))[0]
    return word.double() * 2.0**-32
