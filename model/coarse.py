"""The coarse lattice: diffusers' U-Net on the exact area means, steered by tokens.

Tokens enter twice: attended to at the coarse resolutions (softmax cross-attention over all tokens
with their places), and looked up at every cell of the input. The first can relate distant places,
the second says at once what is where.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from model.config import DenoiserConfig, PyramidConfig

TIME_ORIGIN, TIME_SCALE = 16.0, 30.0


def make_unet(
    config: DenoiserConfig, in_channels: int, out_channels: int, modulated: int | None = None
) -> Any:
    """diffusers' U-Net of the sizes of `config`, with tokens of `token_width`.

    Its coarsest resolutions and its middle attend to the tokens; with `unet_self_attention` the
    coarsest resolutions attend to themselves, as in the papers. modulated: width of a vector that
    modulates it beside the noise level, if there is one.
    """
    attended = config.unet_attention
    plain = len(config.unet_widths) - attended
    itself = config.unet_self_attention
    kind = "Attn" if itself else "CrossAttn"
    # diffusers takes this as the number of heads where tokens are attended to, whatever its name
    # says, and as the width of a head in the others.
    heads = tuple(max(width // config.unet_head_dim, 1) for width in config.unet_widths)
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=config.unet_widths,
        layers_per_block=config.unet_layers,
        down_block_types=("DownBlock2D",) * plain + (f"{kind}DownBlock2D",) * attended,
        up_block_types=(f"{kind}UpBlock2D",) * attended + ("UpBlock2D",) * plain,
        cross_attention_dim=config.token_width,
        attention_head_dim=config.unet_head_dim if itself else heads,
        norm_num_groups=config.unet_groups,
        time_cond_proj_dim=modulated,
    )


def unet_time(log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """A log-SNR on the scale of the 1000 time steps that the U-Net's embedding was made for."""
    return (log_snr.clamp(-TIME_ORIGIN, TIME_ORIGIN) + TIME_ORIGIN) * TIME_SCALE


class CoarseNet(nn.Module):
    """U-Net on a lattice of h x w cells; any h and w, padded inside with absent cells."""

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.patch = config.lattice_patch
        self.channels = config.channels
        self.multiple = self.patch << (len(config.unet_widths) - 1)
        cells = self.patch**2
        self.unet = make_unet(
            config,
            cells * (2 * config.channels + 1) + config.token_width,
            cells * (config.channels + config.lattice_width),
        )

    def forward(
        self,
        values: Float[Tensor, "b i h w"],
        present: Float[Tensor, "b 1 h w"],
        log_snr: Float[Tensor, " b"],
        tokens: Float[Tensor, "b n t"],
        looked_up: Float[Tensor, "b t hp wp"],
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b f h w"]]:
        """F and features at every cell.

        `values` are preconditioned observations and their linear estimate; `looked_up` are tokens
        at the patches of the padded lattice.
        """
        h, w = values.shape[-2:]
        x = F.pad(
            torch.cat([values, present], dim=1), (0, -w % self.multiple, 0, -h % self.multiple)
        )
        x = torch.cat([F.pixel_unshuffle(x, self.patch), looked_up], dim=1)
        time = unet_time(log_snr)
        out = F.pixel_shuffle(self.unet(x, time, encoder_hidden_states=tokens).sample, self.patch)
        out = out[:, :, :h, :w]
        return out[:, : self.channels], out[:, self.channels :]

    def patch_centres(self, cells: int, cell_px: int, device: torch.device) -> Float[Tensor, " p"]:
        """Centres in pixels of the patches along one side of a lattice of `cells` cells."""
        patches = -(-cells // self.multiple) * self.multiple // self.patch
        return (torch.arange(patches, device=device) + 0.5) * self.patch * cell_px
