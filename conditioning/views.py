"""Two views of one tile: what a self-trained encoder is taught to ignore.

VICReg (Bardes et al., ICLR 2022) pulls the vectors of two random views of a tile together and
keeps every dimension informative. Here the vectors will condition a generator, so stain,
brightness and scale are part of what they must say: a view is a crop of 60 to 100 % of the tile's
side in one of the eight orientations of a square, with a gain and an offset of a few per cent. No
greyscale, no solarisation, no hue. It works on whole batches of any number of bands, where
lightly's transforms take one PIL image of three.
"""

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn import functional

SMALLEST_CROP = 0.6
GAIN_STD = 0.05
OFFSET_STD = 0.05


def random_view(
    tiles: Float32[Tensor, "n c s s"], side_px: int, rng: np.random.Generator
) -> Float32[Tensor, "n c t t"]:
    """One view of every tile at `side_px`, drawn from `rng` alone. `tiles` are standardised (see
    `standardise`).
    """
    num_tiles, num_bands = tiles.shape[:2]
    scale = rng.uniform(SMALLEST_CROP, 1, num_tiles)
    centre = rng.uniform(-1, 1, (num_tiles, 2)) * (1 - scale)[:, None]
    signs = rng.choice([-1.0, 1.0], (num_tiles, 2)) * scale[:, None]
    transposed = rng.random(num_tiles) < 0.5
    affine = np.zeros((num_tiles, 2, 3), np.float32)
    affine[:, 0, 0], affine[:, 1, 1] = signs.T * ~transposed
    affine[:, 0, 1], affine[:, 1, 0] = signs.T * transposed
    affine[:, :, 2] = centre
    grid = functional.affine_grid(
        torch.from_numpy(affine).to(tiles.device),
        [num_tiles, num_bands, side_px, side_px],
        align_corners=False,
    )
    view = functional.grid_sample(tiles, grid, padding_mode="reflection", align_corners=False)
    jitter = rng.standard_normal((2, num_tiles, num_bands, 1, 1)).astype(np.float32)
    gain, offset = torch.from_numpy(jitter).to(tiles.device)
    return view * (1 + GAIN_STD * gain) + OFFSET_STD * offset
