"""A small picture of what a run would paint now, beside the region that conditions it.

Both are the coarse levels of the full images (cells of 8 px): the left half is the real region as
its packs know it (its lattice, cells of 32 px), the right half is painted by the averaged weights.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from conditioning.tokens import to_condition
from jobs.painting import Recipe, paint
from jobs.run import Run, RunConfig
from model.generate import Painter
from pipeline.packfile import PackSet

LEVEL = 3
STEPS = 12
SIDE_PX = 512


def write_preview(run: Run, packs: PackSet, step: int, device: torch.device) -> None:
    """Write run/samples/step-N.png, conditioned on the first region that is not trained on, if
    any.
    """
    config = run.config()
    entry = min(packs.regions, key=lambda e: (e.split == "train", e.key))
    condition = to_condition([packs.tokens(entry)], config.token_scale(), [True]).to(device)
    denoiser = run.load_denoiser(device=device)
    side = config.packs.side_px >> LEVEL
    recipe = Recipe(side, side, STEPS, seed=0, guidance=1.0, solver="dpm++2m", level=LEVEL)
    painter = Painter(denoiser, condition, base_level=LEVEL, held_level=LEVEL, tile=side)
    painted = config.statistics.to_pixels(paint(painter, recipe).array.transpose(1, 2, 0))
    scale = config.packs.value_scale
    real = to_uint8(packs.lattice(entry).astype(np.float32) / scale, config)
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
