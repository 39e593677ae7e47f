"""The kinds of denoiser behind one seam: ours, the papers', and their opponent, patch diffusion.

A kind is a configuration, a denoiser, objectives to train it and the passes that generate an image
with it. Training and sampling meet the kinds only here; everything else (batches, noise, engine,
solvers, fields) is one code for all.
"""

from model.attention import Condition
from model.baselines import PatchDenoiser, PatchObjective, PatchPainter
from model.cascade.config import CascadeConfig
from model.cascade.denoiser import CascadeDenoiser
from model.cascade.objective import BlockObjective
from model.cascade.painter import cascade_passes
from model.cascade.range import ValueRange
from model.config import PUBLISHED_OVERLAP, DenoiserConfig
from model.design import EVERY_PIXEL, Sampling
from model.generate import Pass
from model.noise import NoiseTree
from model.operators.contract import Backend
from model.process import Octaves
from model.schedule import log_snr_range
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.objective import SparseObjective
from model.sparse.painter import SparsePainter

Denoiser = CascadeDenoiser | SparseOperatorDenoiser | PatchDenoiser
Objective = BlockObjective | SparseObjective | PatchObjective

WHOLE = "all"
"""The one part of a denoiser that is not a cascade."""


def make_denoiser(
    config: DenoiserConfig, octaves: Octaves, backend: Backend = "reference"
) -> Denoiser:
    """The untrained denoiser of a configuration; `backend` is that of sparse operators."""
    if isinstance(config, CascadeConfig):
        return CascadeDenoiser(config, octaves)
    if isinstance(config, SparseConfig):
        return SparseOperatorDenoiser(config, octaves, backend)
    return PatchDenoiser(config, octaves)


def make_objectives(denoiser: Denoiser) -> dict[str, Objective]:
    """What trains a denoiser, part by part: losses of a batch, fine to coarse. Parts share no
    parameters and are trained independently.
    """
    if isinstance(denoiser, CascadeDenoiser):
        return {name: BlockObjective(denoiser, name) for name in denoiser.config.names}
    if isinstance(denoiser, SparseOperatorDenoiser):
        return {WHOLE: SparseObjective(denoiser)}
    return {WHOLE: PatchObjective(denoiser)}


def shares(config: DenoiserConfig) -> dict[str, float]:
    """The part of the training time that each part of a denoiser takes."""
    return config.shares if isinstance(config, CascadeConfig) else {WHOLE: 1.0}


def generated_level(config: DenoiserConfig, level: int) -> int:
    """The level whose cells are generated for an image of cells of `level`, which may be means of
    them.
    """
    if isinstance(config, CascadeConfig):
        return next(block.fine for block in config.blocks if block.fine <= level)
    return level


def mollifier_of(denoiser: Denoiser) -> float:
    """Deviation in pixels of what smooths the process's images and noise; 0 for nothing."""
    if isinstance(denoiser, SparseOperatorDenoiser):
        return denoiser.octaves.noise.mollifier_sigma_px
    return 0.0


def make_passes(
    denoiser: Denoiser,
    condition: Condition,
    *,
    guidance: float,
    tile: int,
    level: int,
    steps: int | None,
    overlap: float | None = None,
    sampling: Sampling = EVERY_PIXEL,
    values: ValueRange | None = None,
    early: Denoiser | None = None,
    autoguidance: float | None = None,
) -> list[Pass]:
    """The trajectories by which an image of cells of `level` is generated, one after the other.

    steps: evaluations of each; None for the denoiser's own numbers. overlap: of the windows of
    patch diffusion, where it is not the published one. sampling: of the images that sparse
    operators were trained on. values: that images can have, for cascades. early, autoguidance: a
    cascade early in its training, from which estimates are taken further away; None for each
    block's own weight.
    """
    if isinstance(denoiser, CascadeDenoiser):
        return cascade_passes(
            denoiser,
            condition,
            guidance=guidance,
            tile=tile,
            level=level,
            steps=steps,
            values=values,
            early=early if isinstance(early, CascadeDenoiser) else None,
            autoguidance=autoguidance,
        )
    evaluations = DEFAULT_STEPS if steps is None else steps
    if isinstance(denoiser, SparseOperatorDenoiser):
        # Steps are uniform in the log-SNR, whatever the schedule: uniform in the time of a cosine
        # schedule they lose up to 20 dB of the layout with the exact denoiser of a Gaussian field
        # (docs/experiments.md).
        bounds = log_snr_range(denoiser.schedule, denoiser.octaves)
        painter = SparsePainter(denoiser, condition, guidance, tile, sampling, level)
        return [Pass(WHOLE, level, evaluations, bounds, denoiser.noise, lambda _: (painter, None))]
    window = PUBLISHED_OVERLAP if overlap is None else overlap
    patches = PatchPainter(denoiser, condition, guidance, tile, window)
    bounds = denoiser.octaves.log_snr_range()
    noise = NoiseTree(denoiser.octaves.noise, denoiser.config.channels)
    return [Pass(WHOLE, level, evaluations, bounds, noise, lambda _: (patches, None))]


DEFAULT_STEPS = 20
