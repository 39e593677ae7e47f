"""A small picture of what a run would paint now, beside the region that conditions it.

The left half is the real region as its packs know it (its lattice, cells of 32 px), the right half
is painted by the averaged weights: ours paints the coarse level of the full image (cells of 8 px),
patch diffusion, which knows one resolution only, its corner. A diffusion autoencoder paints the
region after the vector that it makes of a draw.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from conditioning.tokens import fit, to_condition, with_labels
from jobs.data import Batches
from jobs.painting import Recipe, paint
from jobs.run import Run, RunConfig
from model.draw import PointDraw
from model.family import make_painter
from model.sparse.denoiser import SparseOperatorDenoiser
from pipeline.packfile import PackSet

STEPS = 12
SIDE_PX = 512


def write_preview(run: Run, packs: PackSet, step: int, device: torch.device) -> None:
    """Write run/samples/step-N.png, conditioned on the first region that is not trained on, if
    any.
    """
    config = run.config()
    entry = min(packs.regions, key=lambda e: (e.split == "train", e.key))
    level = config.denoiser.preview_level
    side = min(config.packs.side_px >> level, SIDE_PX)
    side_px = side << level
    tokens = fit(packs.tokens(entry), side_px, side_px)
    condition = to_condition([tokens], config.token_scale(), [True])
    condition = with_labels(condition, config.packs.classes, [entry.label], [True]).to(device)
    denoiser = run.load_denoiser(device=device)
    if isinstance(denoiser, SparseOperatorDenoiser) and denoiser.encoder is not None:
        draw = Batches(packs, batch=1, seed=0, split=entry.split).draw([packs.draw(entry, 0)])
        assert isinstance(draw, PointDraw)
        kept = torch.ones(1, dtype=torch.bool, device=device)
        condition = replace(condition, vector=denoiser.encode(draw.to(device)), keep_vector=kept)
    recipe = Recipe(side, side, STEPS, seed=0, guidance=1.0, solver="dpm++2m", level=level)
    painter = make_painter(
        denoiser,
        condition,
        guidance=1.0,
        tile=side,
        level=level,
        sampling=config.packs.sampling(),
    )
    painted = config.statistics.to_pixels(
        paint(denoiser, painter, recipe).array.transpose(1, 2, 0)
    )
    scale = config.packs.value_scale
    cells = side_px >> config.packs.coarse_level
    lattice = packs.lattice(entry)[:cells, :cells]
    real = to_uint8(lattice.astype(np.float32) / scale, config)
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    halves = [_square(real), _square(to_uint8(painted, config))]
    Image.fromarray(np.concatenate(halves, axis=1)).save(folder / f"step-{step:08d}.png")


def to_uint8(pixels: Float[np.ndarray, "h w c"], config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
    """Something to look at: the first three bands (one band thrice), 16-bit data by its range."""
    if config.packs.dtype == "uint16":
        deviation = np.linalg.norm(np.array(config.statistics.colour), axis=1)
        high = np.array(config.statistics.mean) + 3 * deviation
        pixels = pixels * (255.0 / high)
    bands = pixels[..., [0, 1, 2] if pixels.shape[-1] >= 3 else [0, 0, 0]]
    return np.clip(np.rint(bands), 0, 255).astype(np.uint8)


def _square(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    return np.asarray(Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST))
