"""diffusers' U-Net of the sizes of a configuration, for lattices of points and for patches."""

from typing import Any

from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from model.config import PatchConfig, SparseConfig

TIME_ORIGIN, TIME_SCALE = 16.0, 30.0


def make_unet(
    config: PatchConfig | SparseConfig,
    in_channels: int,
    out_channels: int,
    modulated: int | None = None,
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
