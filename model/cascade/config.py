"""Every choice of a cascade as one field, and its presets.

A cascade is a *top block*, which generates area means over large cells from the condition alone,
and blocks below it, each of which generates a few octaves of details under the values of its
parents. The blocks of the presets are named T (256 px and coarser), A (256 to 64 px), B (64 to
16 px), C (16 to 4 px) and D (4 px to the pixel).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from model.design import CascadeDesign, Design, WindowsBelow
from model.process import Octaves
from model.spectrum import NoiseSpectrum

TopAttention = Literal["operator", "softmax", "none"]

NETWORK = 2
"""The form of `network`: 2 since features are normalised by layer norms. Weights of another form
would load, and generate something else.
"""


def _check_use(block: str, share: float, evaluations: int, autoguidance: float) -> None:
    """A `ValueError` where a block would not be trained, or not be generated with."""
    if share <= 0:
        raise ValueError(f"block {block} needs a positive share of the training, not {share:g}")
    if evaluations < 1:
        raise ValueError(f"block {block} needs one evaluation or more, not {evaluations}")
    if autoguidance < 1:
        raise ValueError(
            f"block {block} takes autoguidance of 1 (none) or more, not {autoguidance}"
        )


@dataclass(frozen=True)
class TopConfig:
    """The top block: all cells of one level of an image at once.

    level: of its cells. training_side: most cells a side that are trained on at once; of a larger
    image a window is. width, depth: features and residual blocks of its network. attention: how
    cells attend to all tokens: by the papers' cross-attention operator, by softmax attention, or
    not; heads: of either. lookup: whether each cell also looks up the tokens at its place. turned:
    whether samples are turned and mirrored in training. share: part of the training time.
    evaluations: of the network when an image is generated. autoguidance: how far estimates are
    taken from those of the same block early in its training (`painter`); 1 leaves them alone.
    """

    name: str = "T"
    level: int = 8
    training_side: int = 16
    width: int = 64
    depth: int = 3
    heads: int = 4
    attention: TopAttention = "operator"
    lookup: bool = True
    turned: bool = True
    share: float = 0.04
    evaluations: int = 10
    autoguidance: float = 1.0

    def __post_init__(self) -> None:
        if self.attention not in get_args(TopAttention):
            raise ValueError(
                f"attention {self.attention!r} does not exist; choose "
                f"{', '.join(get_args(TopAttention))}"
            )
        if self.training_side < 1:
            raise ValueError(
                f"a top block is trained on windows of one cell or more, not {self.training_side}"
            )
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")
        _check_use(self.name, self.share, self.evaluations, self.autoguidance)


@dataclass(frozen=True)
class BlockConfig:
    """A block of octaves below the top.

    parents, fine: levels of the cells that are given and of those that are generated. place: side
    in fine cells of what the network takes as one place. widths, depths: features and residual
    blocks of its resolutions, fine to coarse; a place of the coarsest is one parent cell. context:
    features of the network that reads the parents. tokens: whether they are looked up, at
    lookups x lookups places in every parent cell. window: side of a training window in parent
    cells. turned, share, evaluations, autoguidance: as in `TopConfig`; what has a direction of its
    own loses it where windows are turned and tokens know of no direction.
    """

    name: str
    parents: int
    fine: int
    place: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    context: int = 64
    tokens: bool = True
    lookups: int = 1
    window: int = 8
    turned: bool = True
    share: float = 0.3
    evaluations: int = 10
    autoguidance: float = 1.0

    def __post_init__(self) -> None:
        if self.parents <= self.fine or self.fine < 0:
            raise ValueError(
                f"block {self.name} goes from level {self.parents} to {self.fine}, but a block "
                "goes from coarse cells to finer ones"
            )
        if self.lookups < 1:
            raise ValueError(
                f"block {self.name} looks tokens up at {self.lookups} x {self.lookups} places in "
                "a parent cell; 1 or more is possible"
            )
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError(
                f"block {self.name} has {len(self.widths)} widths and {len(self.depths)} depths; "
                "give one of each for every resolution"
            )
        coarsest, parent = self.place << (len(self.widths) - 1), 1 << self.octaves
        if coarsest != parent:
            raise ValueError(
                f"block {self.name} has places of {self.place} cells and {len(self.widths)} "
                f"resolutions, the coarsest of {coarsest} cells, but a parent has {parent}; "
                "make them equal"
            )
        _check_use(self.name, self.share, self.evaluations, self.autoguidance)

    @property
    def octaves(self) -> int:
        """How many are generated."""
        return self.parents - self.fine

    @property
    def stem_side(self) -> int:
        """Of the first convolution, in places; large places hold their neighbourhood already."""
        return 3 if self.place < 4 else 1

    @property
    def halo(self) -> int:
        """Parent cells at the rim of a tile whose estimate may lack neighbours."""
        # Two convolutions a residual block, one at the head, and one at the stem of small places.
        reach = self.place * (self.stem_side // 2)
        for i, depth in enumerate(self.depths[:-1]):
            reach += 2 * depth * (self.place << i)
            coarser = self.place << (i + 1)
            reach = -(-reach // coarser) * coarser
        reach += 2 * self.depths[-1] << self.octaves
        for i, depth in enumerate(self.depths[:-1]):
            reach += 2 * depth * (self.place << i)
        return -(-(reach + self.place) // (1 << self.octaves))


A = BlockConfig("A", 8, 6, 2, (48, 64), (1, 2), lookups=2, share=0.07)
B = BlockConfig("B", 6, 4, 2, (64, 96), (1, 2), share=0.18, autoguidance=1.5)
C = BlockConfig("C", 4, 2, 2, (64, 128), (1, 2), window=16, share=0.45, autoguidance=1.75)
D = BlockConfig(
    *("D", 2, 0, 4, (64,), (3,)),
    context=32,
    tokens=False,
    window=32,
    share=0.26,
    autoguidance=1.3,
)


@dataclass(frozen=True)
class CascadeConfig:
    """Sizes and choices of a `denoiser.CascadeDenoiser`.

    channels: bands of the image. token_dim: width of the condition's embeddings. classes: how many
    labels an image may have. vector_dim: width of a global vector that conditions, 0 for none.
    top, blocks: coarse to fine; each block's parents are what the one before it generates.
    margin: parents around a window or tile that its network sees. token_width, embedding_width: of
    encoded tokens and of a noise level. parents_noise: largest deviation of the noise that is
    added to parents in training, so that generated ones are no shock. log_snr_deviation: of the
    noise levels that are drawn, around the middle of a block's range. network: which form of
    `network` the weights are of.
    """

    channels: int
    token_dim: int
    classes: int = 0
    vector_dim: int = 0
    top: TopConfig = TopConfig()
    blocks: tuple[BlockConfig, ...] = (A, B, C, D)
    margin: int = 3
    token_width: int = 64
    embedding_width: int = 64
    parents_noise: float = 0.08
    log_snr_deviation: float = 2.2
    network: int = NETWORK

    def __post_init__(self) -> None:
        level = self.top.level
        for block in self.blocks:
            if block.parents != level:
                raise ValueError(
                    f"block {block.name} takes parents of level {block.parents}, but the block "
                    f"before it generates level {level}"
                )
            level = block.fine
        if level != 0:
            raise ValueError(
                f"the last block generates level {level}; the last of a cascade ends at 0"
            )
        if len({*self.names}) < len(self.names):
            raise ValueError(f"blocks need different names, not {', '.join(self.names)}")

    @property
    def sequence(self) -> tuple[TopConfig | BlockConfig, ...]:
        """All blocks, coarse to fine."""
        return self.top, *self.blocks

    @property
    def names(self) -> tuple[str, ...]:
        """Of all blocks, coarse to fine."""
        return tuple(block.name for block in self.sequence)

    @property
    def shares(self) -> dict[str, float]:
        """Parts of the training time, which add up to 1."""
        total = sum(block.share for block in self.sequence)
        return {block.name: block.share / total for block in self.sequence}

    @property
    def is_autoguided(self) -> bool:
        """Whether any block is, unless a command says otherwise."""
        return any(block.autoguidance != 1.0 for block in self.sequence)

    @property
    def cell_px(self) -> int:
        """Images are generated in multiples of this many pixels: the top block's cell."""
        return 1 << self.top.level

    def tile_px(self, on_gpu: bool) -> int:
        """Side of a tile that suits a device."""
        return 2048 if on_gpu else 1024

    def check_painting(
        self, asked: float | None, height_px: int, width_px: int, level: int
    ) -> None:
        """A `ValueError` where an overlap is asked for, which only patch diffusion has, or a
        resolution that was not trained on.
        """
        if level < 0:
            raise ValueError(
                "the cascade was trained down to the pixel and knows nothing finer; leave --scale "
                "at 1 or below, or train sparse operators with mollified noise (--preset paper)"
            )
        if asked is not None:
            raise ValueError(
                f"an overlap of {asked:g} was asked for, but only patch diffusion paints in "
                "windows that overlap; leave --overlap out"
            )

    def check_design(self, design: Design, mollifier_sigma_px: float = 0.0) -> None:
        """A `ValueError` when the draws of `design` cannot train this denoiser."""
        if mollifier_sigma_px:
            raise ValueError(
                f"this preset needs packs made with --mollifier 0, but these were made with "
                f"{mollifier_sigma_px:g}; pack again"
            )
        wanted = tuple(WindowsBelow(b.fine, b.parents, b.window) for b in self.blocks)
        if not isinstance(design, CascadeDesign) or (
            (design.coarse_level, design.blocks, design.margin)
            != (self.top.level, wanted, self.margin)
        ):
            blocks = " ".join(f"{b.parents}:{b.fine}:{b.window}" for b in self.blocks)
            raise ValueError(
                "this preset needs --design cascade with windows "
                f"{', '.join(map(str, wanted))} and a margin of {self.margin}, the packs were "
                f"drawn by {design}; pack again (--blocks {blocks})"
            )

    def octaves(self, signal: tuple[float, ...], residual: tuple[float, ...]) -> Octaves:
        """The process in every octave of a region, from the variances measured on it."""
        return Octaves(signal, residual, NoiseSpectrum(len(signal) - 1))


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "top": TopConfig(width=128, depth=4),
        "blocks": (
            replace(A, widths=(128, 192), depths=(2, 2), context=128),
            replace(B, widths=(208, 304), depths=(2, 3), context=128),
            replace(C, widths=(224, 384), depths=(2, 3), context=128),
            replace(D, widths=(160,), depths=(5,), context=64),
        ),
        "token_width": 256,
        "embedding_width": 128,
    },
    "brush": {
        "top": TopConfig(width=384, depth=8, heads=8),
        "blocks": (
            replace(A, widths=(384, 640), depths=(3, 4), context=256),
            replace(B, widths=(640, 1008), depths=(3, 5), context=256),
            replace(C, widths=(640, 1088), depths=(3, 5), context=256),
            replace(D, widths=(384,), depths=(6,), context=128),
        ),
        "token_width": 768,
        "embedding_width": 512,
    },
}
"""`tiny` (3.1 million parameters with tokens of 1,024 numbers) trains on two CPU cores, `small`
has 33, `brush` 440, as the published model within 5 %. The widths of the larger two follow from it
and are not tried out.
"""
