"""Every choice of a denoiser as one field of one frozen dataclass, and the presets.

An ablation is one field. What a run resolved to is saved beside its weights as JSON and read back
with `config_from_dict`, which refuses keys it does not know.
"""

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class PyramidConfig:
    """Sizes of a `denoiser.PyramidDenoiser`.

    channels: bands of the image. token_dim: width of the condition's embeddings. coarse_level:
    level of the lattice; 5 is cells of 32 px. widths, blocks: feature widths and numbers of local
    blocks of levels coarse_level - 1 ... 0 (coarse to fine). kernel: side of the depthwise
    kernels, odd. lookup_level: finest level at which tokens are looked up; finer levels inherit
    them from their parents. lattice_width: features that the U-Net hands down. lattice_patch:
    cells a side that it takes as one. unet_widths: channels at its resolutions. unet_attention:
    how many of them, from the coarsest, attend to the tokens. unet_layers, unet_head_dim,
    unet_groups: layers a resolution, width of a head, groups of GroupNorm.
    """

    channels: int
    token_dim: int
    coarse_level: int = 5
    widths: tuple[int, ...] = (64, 48, 32, 32, 16)
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    kernel: int = 7
    lookup_level: int = 3
    token_width: int = 64
    embedding_width: int = 64
    lattice_width: int = 64
    lattice_patch: int = 4
    unet_widths: tuple[int, ...] = (64, 96, 128)
    unet_attention: int = 2
    unet_layers: int = 1
    unet_head_dim: int = 32
    unet_groups: int = 16

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.blocks) == self.coarse_level:
            raise ValueError(
                f"a coarse level of {self.coarse_level} needs as many widths and blocks, "
                f"but got {len(self.widths)} and {len(self.blocks)}"
            )

    @property
    def halo(self) -> int:
        """Cells at a window's rim, at any level, whose estimate may lack neighbours."""
        return max(self.blocks) * (self.kernel // 2)

    @property
    def coarse_px(self) -> int:
        """Side of a coarse cell in pixels."""
        return 1 << self.coarse_level


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "widths": (128, 96, 64, 48, 32),
        "token_width": 256,
        "embedding_width": 128,
        "lattice_width": 128,
        "lattice_patch": 2,
        "unet_widths": (128, 192, 256),
        "unet_layers": 2,
        "unet_head_dim": 64,
        "unet_groups": 32,
    },
    "brush": {
        "widths": (256, 192, 128, 96, 64),
        "token_width": 768,
        "embedding_width": 512,
        "lattice_width": 256,
        "lattice_patch": 1,
        "unet_widths": (128, 256, 512, 832, 832),
        "unet_layers": 2,
        "unet_head_dim": 64,
        "unet_groups": 32,
    },
}
"""What a preset changes: `tiny` trains on two CPU cores, `brush` has the published size of 450M
parameters.
"""


def preset(name: str, *, channels: int, token_dim: int) -> PyramidConfig:
    """The configuration called `name` for images and tokens of these sizes."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; choose one of {', '.join(PRESETS)}")
    return replace(PyramidConfig(channels=channels, token_dim=token_dim), **PRESETS[name])


def config_from_dict(values: dict[str, Any]) -> PyramidConfig:
    """The inverse of `dataclasses.asdict` followed by JSON."""
    unknown = sorted(set(values) - {field.name for field in fields(PyramidConfig)})
    if unknown:
        raise ValueError(f"the denoiser's configuration has unknown keys {unknown}")
    resolved: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
    }
    return PyramidConfig(**resolved)
