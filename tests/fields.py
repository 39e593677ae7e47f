"""Small denoisers and images for the tests: trained by nobody, but every weight matters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jobs.painting import Recipe, paint
from model.attention import Condition
from model.cascade.config import BlockConfig, CascadeConfig, TopConfig
from model.cascade.denoiser import CascadeBlock, CascadeDenoiser
from model.design import CascadeDesign, WindowsBelow
from model.draw import BlockDraw, TopDraw
from model.generate import ArrayField, Pass
from model.haar import means
from model.process import Octaves
from model.spectrum import NoiseSpectrum

CONFIG = CascadeConfig(
    channels=2,
    token_dim=6,
    top=TopConfig(level=5, width=8, depth=1, heads=2),
    blocks=(
        BlockConfig("A", 5, 2, 2, (6, 8, 8), (1, 1, 1), context=6, lookups=2, window=3),
        BlockConfig("B", 2, 0, 4, (8,), (1,), context=6, tokens=False, window=8),
    ),
    token_width=8,
    embedding_width=8,
)
OCTAVES = Octaves(
    signal=(0.05, 0.1, 0.15, 0.1, 0.05, 0.03, 0.02, 0.02),
    residual=(0.04, 0.08, 0.12, 0.07, 0.04),
    noise=NoiseSpectrum(top_level=7),
)
DESIGN = CascadeDesign(
    points=4_000,
    coarse_level=5,
    blocks=(WindowsBelow(2, 5, 3), WindowsBelow(0, 2, 8)),
    parts=(0.5, 0.5),
)


def denoiser(seed: int = 0, config: CascadeConfig = CONFIG) -> CascadeDenoiser:
    """A float64 denoiser whose zero-initialised layers have been given weights."""
    torch.manual_seed(seed)
    net = CascadeDenoiser(config, OCTAVES).double()
    net.eval().requires_grad_(False)
    for parameter in net.parameters():
        # Wholly zero, or a kernel whose outer taps begin at zero.
        spread = 0.3 if parameter.abs().max() == 0 else 0.1
        parameter[parameter == 0] = spread * torch.randn(int((parameter == 0).sum())).double()
    return net


def block_of(net: CascadeDenoiser, name: str) -> CascadeBlock:
    block = net.blocks[name]
    assert isinstance(block, CascadeBlock)
    return block


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
    planes = image.permute(0, 3, 1, 2)
    return [means(planes, level).permute(0, 2, 3, 1) for level in range(coarse + 1)]


def top_draw(image: Float[Tensor, "b c h w"], level: int = CONFIG.top.level) -> TopDraw:
    """The top lattice of images whose every cell is valid."""
    values = means(image, level)
    origin = torch.zeros(len(values), 2, dtype=torch.int64)
    everywhere = torch.ones_like(values[:, :1])
    return TopDraw(values, everywhere, everywhere, origin)


def window_of(
    image: Float[Tensor, "b c h w"],
    block: BlockConfig,
    origin: tuple[int, int],
    shape: tuple[int, int],
    margin: int = CONFIG.margin,
) -> BlockDraw:
    """The window of `shape` parents whose first is `origin`, of images whose every cell is valid;
    cells outside hold the values of the nearest inside.
    """
    n, batch = block.octaves, len(image)
    fine, parents = (means(image, level) for level in (block.fine, block.parents))
    size = parents.shape[2:]

    def places(axis: int, more: int) -> Tensor:
        return torch.arange(origin[axis] - more, origin[axis] + shape[axis] + more)

    def nearest(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        h, w = values.shape[2:]
        return values[:, :, rows.clamp(0, h - 1)][..., columns.clamp(0, w - 1)]

    children = [
        torch.arange(first << n, (first + side) << n)
        for first, side in zip(origin, shape, strict=True)
    ]
    there = [(places(axis, margin) >= 0) & (places(axis, margin) < size[axis]) for axis in (0, 1)]
    present = (there[0][:, None] & there[1])[None, None].to(image).expand(batch, -1, -1, -1)
    inner = slice(margin, -margin)
    centres = [
        ((places(axis, 0) + 0.5) * 2.0**block.parents).to(image).expand(batch, -1)
        for axis in (0, 1)
    ]
    around = nearest(parents, places(0, margin), places(1, margin))
    weight = present[:, :, inner, inner]
    return BlockDraw(nearest(fine, *children), around, present, weight, *centres)


def paint64(passes: Sequence[Pass], recipe: Recipe, **options: Any) -> np.ndarray:
    """`jobs.painting.paint` of two channels with fields in float64."""

    def field(work: Path | None, name: str, shape: tuple[int, int, int]) -> ArrayField:
        return ArrayField(np.zeros(shape))

    with patch("jobs.painting._field", field):
        return paint(passes, recipe, channels=2, **options).array


def area_means(values: np.ndarray, down: int) -> np.ndarray:
    return means(torch.from_numpy(values)[None], down)[0].numpy()
