"""The diffusion autoencoder's encoder: the downward half of the denoiser, on a clean image.

∞-Diff is a diffusion autoencoder (Preechakul et al., 2022). What is drawn of u_0 is encoded to one
vector z, and the denoiser that is trained on the same draw is told z, so that even where noise
hides everything it knows what image it is about. A small diffusion model of z (`model.latent`)
then makes an image out of nothing: first a z, then the image that it stands for.

The encoder is the left half of the denoiser's figure with parameters of its own: blocks of points
without a noise level, the way to the lattice, the U-Net's downward half and middle. Its mean over
the coarsest cells, normalised to mean 0 and mean square 1 over its numbers, is z. That sets its
scale without a prior: a KL term, which ∞-Diff's code computes and never adds, would be a second
way to do so. There is none; the moments that remain are measured when the latent model is fitted.
"""

from collections.abc import Generator
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder
from jaxtyping import Float
from torch import Tensor, nn

from model.operator_attention import AttentionSums
from model.sparse.blocks import Ask, PointBlock
from model.sparse.config import SparseConfig
from model.sparse.support import PointSupport


class LatentEncoder(nn.Module):
    """z of every image of a batch from u_0 at the points of a draw.

    Neither the order of the points nor the other images of the batch change an image's z.
    """

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.multiple = 1 << (len(config.unet_widths) - 1)
        alone = replace(config, cross_attention="none")
        self.observe = nn.Linear(config.channels, config.width)
        self.scale = nn.Embedding(config.coarse_level + 1, config.width)
        self.clean = nn.Parameter(torch.randn(1, config.embedding_width))
        self.blocks = nn.ModuleList(PointBlock(alone) for _ in range(config.blocks))
        attended = config.unet_attention
        self.lattice = Encoder(
            in_channels=config.width + 1,
            out_channels=config.latent_dim,
            down_block_types=("DownEncoderBlock2D",) * (len(config.unet_widths) - attended)
            + ("AttnDownEncoderBlock2D",) * attended,
            block_out_channels=config.unet_widths,
            layers_per_block=config.unet_layers,
            norm_num_groups=config.unet_groups,
            double_z=False,
        )

    def forward(
        self, truth: Float[Tensor, "n c"], support: PointSupport
    ) -> Float[Tensor, "b latent"]:
        x = self.observe(truth) + self.scale(support.points.level)
        clean = self.clean.expand(support.points.batch, -1)
        for block in self.blocks:
            x = _over_all(block(x, support, clean))
        lattice = support.to_lattice(x).apply().permute(0, 3, 1, 2)
        h, w = lattice.shape[2:]
        padded = F.pad(lattice, (0, -w % self.multiple, 0, -h % self.multiple))
        return normalised(self.lattice(padded).mean(dim=(2, 3)))


def normalised(z: Float[Tensor, "b latent"]) -> Float[Tensor, "b latent"]:
    """The vectors with mean 0 and mean square 1 over their numbers."""
    return F.layer_norm(z if z.dtype == torch.float64 else z.float(), z.shape[1:])


def _over_all(
    run: Generator[Ask[AttentionSums], AttentionSums, Float[Tensor, "n w"]],
) -> Float[Tensor, "n w"]:
    """A block over the points of a draw, which are all that there is: its sums are complete."""
    try:
        ask = next(run)
        while True:
            ask = run.send(ask())
    except StopIteration as end:
        return end.value
