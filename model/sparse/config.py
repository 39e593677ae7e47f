"""Every choice of a `SparseOperatorDenoiser` as one field, and its presets."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.design import Design, MixedDesign, PointDesign
from model.operators.normalisation import Normalisation
from model.operators.resize import resized_side
from model.process import Octaves
from model.schedule import SCHEDULES
from model.spectrum import NoiseSpectrum
from model.targets import TARGETS, WEIGHTS

CrossAttention = Literal["operator", "softmax", "lookup", "none"]
Resampling = Literal["knn", "splat"]
Tokens = Literal["one", "lattice", "none"]
Sums = Literal["all", "subset"]
CHOICES: dict[str, tuple[str, ...]] = {
    "normalisation": get_args(Normalisation),
    "cross_attention": get_args(CrossAttention),
    "resampling": get_args(Resampling),
    "tokens": get_args(Tokens),
    "sums": get_args(Sums),
    "schedule": SCHEDULES,
    "target": TARGETS,
    "weight": WEIGHTS,
}


@dataclass(frozen=True)
class SparseConfig:
    """Sizes and choices of a `denoiser.SparseOperatorDenoiser`. The defaults are the papers'.

    channels: bands of the image. token_dim: width of the condition's embeddings. classes: number
    of class labels, 0 for none. vector_dim: width of a global vector that conditions, 0 for none.
    latent_dim: width of the vector z that an encoder of the model's own makes of u_0 (see
    `encoder`), 0 for none. latent_dropout: how often z is dropped in training.
    coarse_level: level of the lattice; 5 is cells of 32 px, 128^2 of them in 4096^2.
    width, blocks: features of a point, and blocks before and after the lattice. kernel,
    normalisation: of the depthwise operators (see `operators.contract`). cross_attention: how
    points read the tokens. self_attention: whether they read each other. tokens: `one` is the mean
    of the finest lattice, a single vector for an image, `none` reads none at all. resampling: how
    features come to the lattice. sums: whether an image that is painted is summed over all its
    pixels, or over a keyed draw like those that were trained on (see `painter`). means: whether
    the exact area means of u_t come with them, which needs unmollified noise. feature_dropout: how
    often the features of points are left out of the lattice in training, so that the means alone
    suffice.
    mollifier_sigma_px: deviation of the Gaussian that smooths data and noise; 0 for none.
    schedule, target, weight: see `model.schedule` and `model.targets`.
    unet_*: sizes of diffusers' U-Net (`coarse.make_unet`); unet_self_attention: its coarsest
    resolutions attend to themselves, and only its middle to the tokens; unet_dropout: rate at the
    resolutions that attend (∞-Diff says where, not how much; 0.1 is Nichol and Dhariwal's).
    """

    channels: int
    token_dim: int
    classes: int = 0
    vector_dim: int = 0
    latent_dim: int = 0
    latent_dropout: float = 0.1
    coarse_level: int = 5
    width: int = 64
    blocks: int = 3
    kernel: int = 7
    normalisation: Normalisation = "ratio"
    cross_attention: CrossAttention = "operator"
    self_attention: bool = True
    heads: int = 4
    tokens: Tokens = "one"
    resampling: Resampling = "knn"
    sums: Sums = "all"
    means: bool = False
    feature_dropout: float = 0.0
    mollifier_sigma_px: float = 1.0
    schedule: str = "cosine"
    target: str = "epsilon"
    weight: str = "simple"
    token_width: int = 768
    embedding_width: int = 256
    unet_widths: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    unet_attention: int = 2
    unet_layers: int = 2
    unet_head_dim: int = 32
    unet_groups: int = 32
    unet_self_attention: bool = True
    unet_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} does not exist; choose {', '.join(choices)}"
                )
        for name in ("channels", "width", "heads", "kernel", "unet_head_dim", "unet_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number above 0, not {getattr(self, name)}")
        if not 0.0 <= self.unet_dropout < 1.0:
            raise ValueError(
                f"unet_dropout is a part of at least 0 and below 1, not {self.unet_dropout:g}"
            )
        if not 0.0 <= self.feature_dropout <= 1.0:
            raise ValueError(
                f"feature_dropout is a part between 0 and 1, not {self.feature_dropout:g}"
            )
        if self.kernel % 2 == 0 or self.blocks < 1:
            raise ValueError(
                f"a sparse denoiser needs an odd kernel and at least one block, but got "
                f"{self.kernel} and {self.blocks}"
            )
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")
        attending = self.unet_widths[len(self.unet_widths) - self.unet_attention :]
        if self.unet_self_attention and any(w % self.unet_head_dim for w in attending):
            raise ValueError(
                f"the U-Net's widths {attending} do not divide into heads of "
                f"{self.unet_head_dim}; choose other unet_widths or another unet_head_dim"
            )
        if self.means and self.mollifier_sigma_px:
            raise ValueError(
                "the exact area means of mollified noise are not known without all its pixels; "
                "set mollifier_sigma_px to 0, or means to False"
            )
        if self.latent_dim and self.vector_dim:
            raise ValueError(
                f"a condition has one global vector: either one that is given, of "
                f"{self.vector_dim} numbers, or the encoder's, of {self.latent_dim}; set "
                "vector_dim or latent_dim to 0"
            )

    def kernel_side(self, resolution: int = 0) -> int:
        """Taps a side of the operators in images of 2^resolution times the training's."""
        return resized_side(self.kernel, 2.0**resolution)

    def halo(self, resolution: int = 0) -> int:
        """Pixels at the rim of a tile whose features lack neighbours after all blocks."""
        return 2 * self.blocks * (self.kernel_side(resolution) // 2)

    @property
    def cell_px(self) -> int:
        """Fields are painted in multiples of this many pixels: the coarse cell."""
        return 1 << self.coarse_level

    def tile_px(self, on_gpu: bool) -> int:
        """Side of a tile that suits a device: on a CPU it stays in the cache."""
        return max(1024 if on_gpu else 256, self.cell_px)

    def check_painting(
        self, asked: float | None, height_px: int, width_px: int, level: int
    ) -> None:
        """Nothing overlaps here; a `ValueError` where that, or another resolution, is asked
        for.
        """
        if asked is not None:
            raise ValueError(
                f"an overlap of {asked:g} was asked for, but only patch diffusion paints in "
                "windows that overlap; leave --overlap out"
            )
        if level and not self.mollifier_sigma_px:
            raise ValueError(
                "this run's noise is not mollified: at another resolution its values have another "
                "variance than those that were trained on; leave --scale at 1, or train with "
                "--set mollifier_sigma_px=1 on packs made with --mollifier 1"
            )
        if level > 0 and self.mollifier_sigma_px * 2.0**-level < 1.0:
            raise ValueError(
                f"noise mollified by {self.mollifier_sigma_px:g} px is lost between pixels "
                f"{1 << level} times as large; leave --scale at 1 or above, and reduce the image"
            )

    def check_design(self, design: Design, mollifier_sigma_px: float = 0.0) -> None:
        """A `ValueError` when the draws of `design` cannot train this denoiser."""
        check_mollifier(mollifier_sigma_px, self.mollifier_sigma_px)
        if not isinstance(design, PointDesign):
            raise ValueError(
                f"this preset needs --design uniform, mixed or sobol, the packs were drawn by "
                f"{design}; pack again"
            )
        if self.means and not design.lattice:
            raise ValueError(
                "this preset reads the coarse lattice, which the packs' draws do not hold; pack "
                "again with --lattice"
            )
        if self.mollifier_sigma_px and isinstance(design, MixedDesign):
            raise ValueError(
                "mollified noise is known at pixels, not at the coarser windows of --design "
                "mixed; pack again with --design uniform or sobol, or train with --set "
                "mollifier_sigma_px=0"
            )
        if design.coarse_level != self.coarse_level:
            raise ValueError(
                f"this preset needs --coarse-level {self.coarse_level}, the packs have "
                f"{design.coarse_level}; pack again"
            )

    def octaves(self, signal: tuple[float, ...], residual: tuple[float, ...]) -> Octaves:
        """The process in every octave of a region, from the variances measured on it."""
        noise = NoiseSpectrum(len(signal) - 1, self.mollifier_sigma_px)
        return Octaves(signal, (), noise)


def check_mollifier(packed_px: float, wanted_px: float) -> None:
    """A `ValueError` when packs were smoothed otherwise than the noise will be."""
    if packed_px != wanted_px:
        raise ValueError(
            f"this preset needs packs made with --mollifier {wanted_px:g}, but these were made "
            f"with {packed_px:g}: data and noise must be smoothed alike; pack again"
        )


_TINY: dict[str, Any] = {
    "width": 32,
    "blocks": 2,
    "heads": 2,
    "token_width": 64,
    "embedding_width": 64,
    "unet_widths": (32, 64, 96),
    "unet_layers": 1,
    "unet_groups": 16,
    "unet_dropout": 0.0,
}
_INFINITY_DIFF: dict[str, Any] = {
    "tokens": "none",
    "cross_attention": "none",
    "self_attention": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-tiny": _TINY,
    "infinity-diff": {**_INFINITY_DIFF, "latent_dim": 1024},
    "infinity-diff-tiny": {**_TINY, **_INFINITY_DIFF, "latent_dim": 32},
}
"""`paper` is what ∞-Brush published (450M parameters), `infinity-diff` the diffusion autoencoder
of its ancestor ∞-Diff, which no tokens condition; `-tiny` the same for two CPU cores.
"""
