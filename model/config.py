"""Every choice of a denoiser as one field of one frozen dataclass, and the presets.

An ablation is one field. Three kinds: ours (`CascadeConfig`), the papers' (`SparseConfig`) and the
opponent, patch diffusion (`PatchConfig`). A configuration also says which draws its denoiser
learns from, in which octaves it sees the process and what it can paint. What a run resolved to is
saved beside its weights as JSON and read back with `config_from_dict`, which tells the kinds apart
by their keys and refuses keys it does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.cascade.config import NETWORK, BlockConfig, CascadeConfig, TopConfig
from model.cascade.config import PRESETS as CASCADES
from model.design import Design, PatchDesign
from model.process import Octaves
from model.sparse.config import PRESETS as SPARSE
from model.sparse.config import SparseConfig, check_mollifier
from model.spectrum import NoiseSpectrum

PUBLISHED_OVERLAP = 0.75


@dataclass(frozen=True)
class PatchConfig:
    """Sizes of a `baselines.PatchDenoiser`.

    channels: bands of the image. token_dim: width of the condition's embeddings. patch_px: side of
    a patch, and of the tile whose embedding conditions it. unshuffle: pixels a side that the U-Net
    takes as one place. octave_gains: whether every octave of a patch is preconditioned at its own
    log-SNR, or the patch as a whole. The others as in `SparseConfig`.
    """

    channels: int
    token_dim: int
    patch_px: int = 256
    unshuffle: int = 4
    octave_gains: bool = True
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

    def tile_px(self, on_gpu: bool) -> int:
        """Width of a strip, within which no window is evaluated twice."""
        return 4096

    def check_painting(
        self, asked: float | None, height_px: int, width_px: int, level: int
    ) -> float:
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

    def octaves(self, signal: tuple[float, ...], residual: tuple[float, ...]) -> Octaves:
        """The process in the octaves of one patch, under white noise: what is coarser than a patch
        counts as its mean.

        The lattice of this process is the mean; without gains for each octave it is the pixel
        itself (coarse level 0).
        """
        top = self.patch_px.bit_length() - 1
        details, mean = signal[:top], sum(signal[top:])
        return Octaves((*details, mean), details if self.octave_gains else (), NoiseSpectrum(top))


DenoiserConfig = CascadeConfig | SparseConfig | PatchConfig

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
cores, `brush`, `patch-brush` and `paper` have the published size of 450M parameters within 5 %,
`infinity-diff` is what the papers' ancestor published.
"""


def preset(name: str, *, channels: int, token_dim: int) -> DenoiserConfig:
    """The configuration called `name` for images and tokens of these sizes."""
    if name in CASCADES:
        return replace(CascadeConfig(channels=channels, token_dim=token_dim), **CASCADES[name])
    if name in SPARSE:
        return replace(SparseConfig(channels=channels, token_dim=token_dim), **SPARSE[name])
    if name in PATCHES:
        return replace(PatchConfig(channels=channels, token_dim=token_dim), **PATCHES[name])
    names = ", ".join((*CASCADES, *SPARSE, *PATCHES))
    raise ValueError(f"preset {name!r} does not exist; choose one of {names}")


FIXED = (
    "channels",
    "token_dim",
    "classes",
    "name",
    "parents",
    "fine",
    "level",
    "window",
    "margin",
    "network",
)
"""What follows from the packs and their design, or from the code."""


def changed(config: DenoiserConfig, changes: Sequence[str]) -> DenoiserConfig:
    """The configuration with fields changed by name=value, as on a command line; sizes are comma
    separated, and a field of a block of a cascade is BLOCK.NAME.
    """
    values: dict[str, dict[str, Any]] = {}
    for change in changes:
        path, _, text = change.partition("=")
        block, dot, name = path.rpartition(".")
        target: Any = config
        if dot:
            known = config.sequence if isinstance(config, CascadeConfig) else ()
            target = next((each for each in known if each.name == block), None)
            if target is None:
                names = ", ".join(each.name for each in known) or "none"
                raise ValueError(
                    f"{change!r} names a block of this preset, whose blocks are: {names}"
                )
        values.setdefault(block, {})[name] = _value(target, name, text, change)
    # All at once: two fields may suit each other, and neither the other's old value.
    if isinstance(config, CascadeConfig):
        config = replace(
            config,
            top=replace(config.top, **values.pop(config.top.name, {})),
            blocks=tuple(replace(b, **values.pop(b.name, {})) for b in config.blocks),
        )
    return replace(config, **values.pop("", {}))


def _value(config: Any, name: str, text: str, change: str) -> Any:
    """What a field of a configuration is changed to."""
    known: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    offered = [n for n, value in known.items() if n not in FIXED and _is_plain(value)]
    if "=" not in change or name not in offered:
        raise ValueError(
            f"{change!r} changes no field of this preset; write NAME=VALUE (of a block "
            f"BLOCK.NAME=VALUE) with one of {', '.join(offered)}"
        )
    kinds = get_type_hints(type(config))
    choices = get_args(kinds[name]) if get_origin(kinds[name]) is Literal else None
    if choices is not None and text not in choices:
        raise ValueError(f"{name} {text!r} does not exist; choose one of {', '.join(choices)}")
    try:
        return _parsed(text, known[name])
    except ValueError as error:
        raise ValueError(
            f"{name} is {known[name]!r} in this preset, so it takes a value of that kind, not "
            f"{text!r}"
        ) from error


def _is_plain(value: Any) -> bool:
    """Whether a value can be written on a command line."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, bool | int | float | str) for part in parts)


def _parsed(text: str, like: Any) -> Any:
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(","))
    if isinstance(like, bool):
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return type(like)(text)


def config_from_dict(values: dict[str, Any]) -> DenoiserConfig:
    """The inverse of `dataclasses.asdict` followed by JSON; only patch diffusion has patches, only
    sparse operators are normalised, and only a cascade has blocks of octaves.
    """
    if "lattice_patch" in values:
        raise ValueError(
            "this run is a joint pyramid's, which the cascade of octave blocks has replaced; pack "
            "and train again"
        )
    kind: type[DenoiserConfig] = CascadeConfig
    if "patch_px" in values:
        # Older runs have one gain for all of a patch.
        kind, values = PatchConfig, {"octave_gains": False, **values}
    elif "normalisation" in values:
        kind = SparseConfig
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"the denoiser's configuration has unknown keys {unknown}")
    resolved: dict[str, Any] = {k: _tuples(v) for k, v in values.items()}
    if kind is CascadeConfig:
        form = values.get("network", 1)
        if form != NETWORK:
            raise ValueError(
                f"this run's network is of form {form} and this version has form {NETWORK} (layer "
                "norms since then); train again, and pack again if its blocks differ"
            )
        resolved["top"] = TopConfig(**resolved["top"])
        resolved["blocks"] = tuple(BlockConfig(**block) for block in resolved["blocks"])
    return kind(**resolved)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return value
