"""The kinds of denoiser behind one seam: ours, the papers', and their opponent, patch diffusion.

A kind is a configuration, a denoiser, an objective to train it and a painter to evaluate it over
fields. Training and sampling meet them only here; everything else (batches, noise, engine,
solvers, fields) is one code for all.
"""

from model.attention import Condition
from model.baselines import PatchDenoiser, PatchObjective, PatchPainter
from model.config import PUBLISHED_OVERLAP, DenoiserConfig, PyramidConfig
from model.denoiser import PyramidDenoiser
from model.design import EVERY_PIXEL, Sampling
from model.generate import Painter
from model.noise import Noise, NoiseTree
from model.objective import PyramidObjective
from model.operators.contract import Backend
from model.process import Octaves
from model.schedule import log_snr_range
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from model.sparse.objective import SparseObjective
from model.sparse.painter import SparsePainter

Denoiser = PyramidDenoiser | SparseOperatorDenoiser | PatchDenoiser
Objective = PyramidObjective | SparseObjective | PatchObjective


def make_denoiser(
    config: DenoiserConfig, octaves: Octaves, backend: Backend = "reference"
) -> Denoiser:
    """The untrained denoiser of a configuration; `backend` is that of sparse operators."""
    if isinstance(config, PyramidConfig):
        return PyramidDenoiser(config, octaves)
    if isinstance(config, SparseConfig):
        return SparseOperatorDenoiser(config, octaves, backend)
    return PatchDenoiser(config, octaves)


def make_objective(denoiser: Denoiser) -> Objective:
    """What trains a denoiser: losses of a batch, fine to coarse."""
    if isinstance(denoiser, PyramidDenoiser):
        return PyramidObjective(denoiser)
    if isinstance(denoiser, SparseOperatorDenoiser):
        return SparseObjective(denoiser)
    return PatchObjective(denoiser)


def sampled_range(denoiser: Denoiser) -> tuple[float, float]:
    """The log-SNRs between which sampling steps uniformly: from drowned to clean in every octave,
    as far as the denoiser was trained. (Steps uniform in the time of a cosine schedule lose up to
    20 dB of the layout with the exact denoiser of a Gaussian field, see docs/experiments.md.)
    """
    if isinstance(denoiser, PatchDenoiser):
        return denoiser.octaves.log_snr_range()
    return log_snr_range(denoiser.schedule, denoiser.octaves)


def noise_of(denoiser: Denoiser) -> Noise:
    """The noise of a denoiser's process."""
    if isinstance(denoiser, SparseOperatorDenoiser):
        return denoiser.noise
    return NoiseTree(denoiser.octaves.noise, denoiser.config.channels)


def mollifier_of(denoiser: Denoiser) -> float:
    """Deviation in pixels of what smooths the process's images and noise; 0 for nothing."""
    if isinstance(denoiser, SparseOperatorDenoiser):
        return denoiser.config.mollifier_sigma_px
    return 0.0


def make_painter(
    denoiser: Denoiser,
    condition: Condition,
    *,
    guidance: float,
    tile: int,
    level: int,
    overlap: float | None = None,
    sampling: Sampling = EVERY_PIXEL,
) -> Painter | SparsePainter | PatchPainter:
    """A denoiser with a condition, ready to be evaluated over fields of `level`.

    overlap: of the windows of patch diffusion, where it is not the published one. sampling:
    of the images that sparse operators were trained on.
    """
    if isinstance(denoiser, PyramidDenoiser):
        return Painter(denoiser, condition, guidance, tile, level)
    if isinstance(denoiser, SparseOperatorDenoiser):
        return SparsePainter(denoiser, condition, guidance, tile, sampling, level)
    window = PUBLISHED_OVERLAP if overlap is None else overlap
    return PatchPainter(denoiser, condition, guidance, tile, window)
