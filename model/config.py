"""Every choice of a denoiser as one field of one frozen dataclass, and the presets.

An ablation is one field. Three kinds: ours (`PyramidConfig`), the papers' (`SparseConfig`) and the
opponent, patch diffusion (`PatchConfig`). A configuration also says which draws its denoiser
learns from, in which octaves it sees the process and what it can paint. What a run resolved to is
saved beside its weights as JSON and read back with `config_from_dict`, which tells the kinds apart
by their keys and refuses keys it does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.design import Design, PatchDesign, ZoomDesign
from model.process import Octaves
from model.sparse.config import PRESETS as SPARSE
from model.sparse.config import SparseConfig, check_mollifier
from model.spectrum import NoiseSpectrum

PUBLISHED_OVERLAP = 0.75


@dataclass(frozen=True)
class PyramidConfig:
    """Sizes of a `denoiser.PyramidDenoiser`.

    channels: bands of the image. token_dim: width of the condition's embeddings. coarse_level:
    level of the lattice; 5 is cells of 32 px. widths, blocks: feature widths and numbers of local
    blocks of levels coarse_level - 1 ... 0 (coarse to fine). kernel: side of the depthwise
    kernels, odd. lookup_level: finest level at which tokens are looked up; finer levels inherit
    them from their parents. lattice_width: features that the U-Net hands down. lattice_patch:
    cells a side that it takes as one. unet_widths: channels at its resolutions. unet_attention:
    how many of them, from the coarsest, attend to the tokens (to themselves, with
    unet_self_attention). unet_layers, unet_head_dim, unet_groups: layers a resolution, width of a
    head, groups of GroupNorm. classes: how many labels an image may have.
    schedule: see `model.schedule`; of training's noise levels and of sampling's steps.
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
    unet_self_attention: bool = False
    classes: int = 0
    schedule: str = "uniform"

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
    def cell_px(self) -> int:
        """Fields are painted in multiples of this many pixels: the coarse cell."""
        return 1 << self.coarse_level

    @property
    def preview_level(self) -> int:
        """Level at which a whole image can be painted cheaply."""
        return min(3, self.coarse_level)

    def tile_px(self, on_gpu: bool) -> int:
        """Side of a tile that suits a device: on a CPU it stays in the cache."""
        return 1024 if on_gpu else 256

    def overlap(self, asked: float | None, height_px: int, width_px: int, level: int) -> None:
        """Ours has no windows to overlap; a `ValueError` where an overlap is asked for, or a
        resolution that was not trained on.
        """
        if level < 0:
            raise ValueError(
                "the pyramid was trained down to the pixel and knows nothing finer; leave --scale "
                "at 1 or below, or train sparse operators with mollified noise (--preset paper)"
            )
        if asked is not None:
            raise ValueError(
                f"an overlap of {asked:g} was asked for, but only patch diffusion paints in "
                "windows that overlap; leave --overlap out"
            )

    def check_design(self, design: Design, mollifier_sigma_px: float = 0.0) -> None:
        """A `ValueError` when the draws of `design` cannot train this denoiser."""
        check_mollifier(mollifier_sigma_px, 0.0)
        if not isinstance(design, ZoomDesign) or (
            design.coarse_level != self.coarse_level or design.halo < self.halo
        ):
            raise ValueError(
                f"this preset needs --design zoom --coarse-level {self.coarse_level} --halo "
                f"{self.halo} or more, the packs were drawn by {design}; pack again"
            )

    def octaves(
        self, signal: tuple[float, ...], residual: tuple[float, ...], noise_floor: float
    ) -> Octaves:
        """The process in every octave of a region, from the variances measured on it."""
        noise = NoiseSpectrum(len(signal) - 1, self.coarse_level, noise_floor)
        return Octaves(signal, residual, noise)


@dataclass(frozen=True)
class PatchConfig:
    """Sizes of a `baselines.PatchDenoiser`.

    channels: bands of the image. token_dim: width of the condition's embeddings. patch_px: side of
    a patch, and of the tile whose embedding conditions it. unshuffle: pixels a side that the U-Net
    takes as one place. The others as in `PyramidConfig`.
    """

    channels: int
    token_dim: int
    patch_px: int = 256
    unshuffle: int = 4
    token_width: int = 64
    unet_widths: tuple[int, ...] = (48, 64, 96, 128)
    unet_attention: int = 2
    unet_layers: int = 1
    unet_head_dim: int = 32
    unet_groups: int = 16
    unet_self_attention: bool = False

    def __post_init__(self) -> None:
        multiple = self.unshuffle << (len(self.unet_widths) - 1)
        if self.patch_px % multiple or self.patch_px & (self.patch_px - 1):
            raise ValueError(
                f"a patch of {self.patch_px} px must be a power of two and a multiple of "
                f"{multiple} px, the coarsest place of its U-Net"
            )

    @property
    def classes(self) -> int:
        """Patches know no labels."""
        return 0

    @property
    def cell_px(self) -> int:
        """Fields of any size are painted, from one patch on."""
        return 1

    @property
    def preview_level(self) -> int:
        """Patches are known at the level of pixels only."""
        return 0

    def tile_px(self, on_gpu: bool) -> int:
        """Width of a strip, within which no window is evaluated twice."""
        return 4096

    def overlap(self, asked: float | None, height_px: int, width_px: int, level: int) -> float:
        """The overlap of windows, 0.75 unless asked otherwise; a `ValueError` where this image
        cannot be painted.
        """
        if min(height_px, width_px) < self.patch_px:
            raise ValueError(
                f"patch diffusion paints windows of {self.patch_px} px, which an image of "
                f"{height_px}x{width_px} px cannot hold; ask for --size {self.patch_px} or more"
            )
        if level:
            raise ValueError(
                "patch diffusion knows its patches at one resolution only; leave --scale at 1"
            )
        overlap = PUBLISHED_OVERLAP if asked is None else asked
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"--overlap takes a part of a window in [0, 1), not {overlap:g}")
        return overlap

    def check_design(self, design: Design, mollifier_sigma_px: float = 0.0) -> None:
        """A `ValueError` when the draws of `design` cannot train this denoiser."""
        check_mollifier(mollifier_sigma_px, 0.0)
        if not isinstance(design, PatchDesign) or design.window != self.patch_px:
            raise ValueError(
                f"this preset needs --design patch --window {self.patch_px}, the packs were drawn "
                f"by {design}; pack again"
            )

    def octaves(
        self, signal: tuple[float, ...], residual: tuple[float, ...], noise_floor: float
    ) -> Octaves:
        """The process in the octaves of one patch, under white noise: what is coarser than a patch
        counts as its mean.

        The lattice of this process is the pixel itself (coarse level 0), so that there is one
        preconditioning for all of a patch.
        """
        top = self.patch_px.bit_length() - 1
        inside = (*signal[:top], sum(signal[top:]))
        return Octaves(inside, (), NoiseSpectrum(top, 0, 0.0))


DenoiserConfig = PyramidConfig | SparseConfig | PatchConfig

PYRAMIDS: dict[str, dict[str, Any]] = {
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
PATCHES: dict[str, dict[str, Any]] = {
    "patch": {},
    "patch-brush": {
        "token_width": 768,
        "unet_widths": (256, 448, 704, 960),
        "unet_attention": 3,
        "unet_layers": 2,
        "unet_head_dim": 64,
        "unet_groups": 32,
    },
}
"""What a preset changes: `tiny`, `patch`, `paper-tiny` and `infinity-diff-tiny` train on two CPU
cores, `brush`, `patch-brush` and `paper` have the published size of 450M parameters,
`infinity-diff` is what the papers' ancestor published.
"""


def preset(name: str, *, channels: int, token_dim: int) -> DenoiserConfig:
    """The configuration called `name` for images and tokens of these sizes."""
    if name in PYRAMIDS:
        return replace(PyramidConfig(channels=channels, token_dim=token_dim), **PYRAMIDS[name])
    if name in SPARSE:
        return replace(SparseConfig(channels=channels, token_dim=token_dim), **SPARSE[name])
    if name in PATCHES:
        return replace(PatchConfig(channels=channels, token_dim=token_dim), **PATCHES[name])
    names = ", ".join((*PYRAMIDS, *SPARSE, *PATCHES))
    raise ValueError(f"preset {name!r} does not exist; choose one of {names}")


GIVEN = ("channels", "token_dim", "classes")
"""What follows from the packs."""


def changed(config: DenoiserConfig, changes: Sequence[str]) -> DenoiserConfig:
    """The configuration with fields changed by name=value, as on a command line; sizes are comma
    separated.
    """
    known: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    kinds = get_type_hints(type(config))
    given: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known or name in GIVEN:
            raise ValueError(
                f"{change!r} changes no field of this preset; write NAME=VALUE with one of "
                f"{', '.join(name for name in known if name not in GIVEN)}"
            )
        choices = get_args(kinds[name]) if get_origin(kinds[name]) is Literal else None
        if choices is not None and text not in choices:
            raise ValueError(f"{name} {text!r} does not exist; choose one of {', '.join(choices)}")
        try:
            given[name] = _parsed(text, known[name])
        except ValueError as error:
            raise ValueError(
                f"{name} is {known[name]!r} in this preset, so it takes a value of that kind, not "
                f"{text!r}"
            ) from error
    return replace(config, **given)


def _parsed(text: str, like: Any) -> Any:
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(","))
    if isinstance(like, bool):
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return type(like)(text)


def config_from_dict(values: dict[str, Any]) -> DenoiserConfig:
    """The inverse of `dataclasses.asdict` followed by JSON; only patch diffusion has patches, and
    only sparse operators are normalised.
    """
    kind: type[DenoiserConfig] = PyramidConfig
    if "patch_px" in values:
        kind = PatchConfig
    elif "normalisation" in values:
        kind = SparseConfig
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"the denoiser's configuration has unknown keys {unknown}")
    resolved: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
    }
    return kind(**resolved)
