"""Small denoisers and images for the tests: trained by nobody, but every weight matters."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import Condition
from model.config import PyramidConfig
from model.denoiser import PyramidDenoiser, crop
from model.design import Extent, ZoomDesign
from model.draw import WindowDraw
from model.haar import parent_means
from model.process import Octaves
from model.spectrum import NoiseSpectrum

CONFIG = PyramidConfig(
    channels=2,
    token_dim=6,
    coarse_level=3,
    widths=(12, 8, 6),
    blocks=(1, 2, 1),
    kernel=3,
    lookup_level=1,
    token_width=8,
    embedding_width=8,
    lattice_width=8,
    lattice_patch=2,
    unet_widths=(8, 16),
    unet_attention=1,
    unet_layers=1,
    unet_head_dim=8,
    unet_groups=4,
)
OCTAVES = Octaves(
    signal=(0.05, 0.1, 0.15, 0.1, 0.05, 0.03, 0.02, 0.02),
    residual=(0.03, 0.08, 0.12),
    noise=NoiseSpectrum(top_level=7, coarse_level=3, floor=0.005),
)
DESIGN = ZoomDesign(points=4_000, coarse_level=3, window=16, halo=2)


def denoiser(seed: int = 0) -> PyramidDenoiser:
    """A float64 denoiser whose zero-initialised layers have been given weights."""
    torch.manual_seed(seed)
    net = PyramidDenoiser(CONFIG, OCTAVES).double()
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def condition(batch: int, grid: tuple[int, int] = (2, 3), pitch: float = 32.0) -> Condition:
    """A lattice of tokens and one more over the whole."""
    generator = torch.Generator().manual_seed(1)
    gy, gx = grid
    rows, columns = torch.meshgrid(torch.arange(gy), torch.arange(gx), indexing="ij")
    centres = (torch.stack([rows, columns], -1).reshape(-1, 2).double() + 0.5) * pitch
    centres = torch.cat([centres, torch.tensor([[gy, gx]]).double() * pitch / 2])
    footprints = torch.tensor([pitch] * (gy * gx) + [4 * pitch], dtype=torch.float64)
    values = torch.randn(batch, gy * gx + 1, 6, generator=generator, dtype=torch.float64)
    return Condition(
        values,
        centres.expand(batch, -1, -1),
        footprints.expand(batch, -1),
        grid,
        torch.ones(batch, dtype=torch.bool),
    )


def levels_of(image: Float[Tensor, "b h w c"], coarse: int) -> list[Float[Tensor, "b hl wl c"]]:
    """Area means of an image at every level."""
    levels = [image]
    for _ in range(coarse):
        levels.append(parent_means(levels[-1]))
    return levels


def draw_of(image: Float[Tensor, "b h w c"], design: ZoomDesign, seed: int = 0) -> WindowDraw:
    """The cells that `design` draws of images whose every cell is valid."""
    b, h, w, _ = image.shape
    levels = levels_of(image, design.coarse_level)
    origins = torch.from_numpy(np.stack([design.draw(Extent(h, w), (seed, i)) for i in range(b)]))
    index = torch.arange(b).repeat_interleave(origins.shape[1])
    side = (design.window, design.window)

    def windows(values: list[Tensor]) -> Tensor:
        parts = [
            crop(values[level], index, origins[:, :, level].flatten(0, 1), side)
            for level in range(design.coarse_level)
        ]
        return torch.stack(parts, dim=1).unflatten(0, origins.shape[:2])

    present = [torch.ones_like(level[..., :1]) for level in levels]
    return WindowDraw(
        levels[-1], present[-1].bool(), windows(levels), windows(present).bool(), origins
    )
