"""Sparse points for the tests: ragged batches of images of several sizes, none of them square."""

import torch
from jaxtyping import Float
from torch import Tensor

from model.points import Points

SIZES_PX = ((72, 40), (37, 90), (64, 64))


def points_of(
    counts: tuple[int, ...],
    sizes_px: tuple[tuple[int, int], ...] = SIZES_PX,
    *,
    levels: int = 1,
    seed: int = 0,
) -> Points:
    """So many distinct random cells of each image, grouped by image, of `levels` levels from 0."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, (count, (height, width)) in enumerate(zip(counts, sizes_px, strict=True)):
        cells = []
        for level in range(levels):
            h, w = (height - 1 >> level) + 1, (width - 1 >> level) + 1
            place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
            cells.append(torch.cat([torch.full((h * w, 1), level), place], dim=1))
        every = torch.cat(cells)
        chosen = every[torch.randperm(len(every), generator=generator)[:count]]
        parts.append(torch.cat([torch.full((count, 1), number), chosen], dim=1))
    image, level, y, x = torch.cat(parts).unbind(dim=1)
    return Points(image, level, y, x, torch.tensor(sizes_px))


def alone(points: Points, number: int) -> Points:
    """The points of one image, as a batch of one."""
    mine = points.image == number
    return Points(
        torch.zeros(int(mine.sum()), dtype=torch.int64),
        points.level[mine],
        points.y[mine],
        points.x[mine],
        points.sizes_px[number : number + 1],
    )


def normal(*shape: int, seed: int = 0) -> Float[Tensor, "*shape"]:
    """Float64 standard normals."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def shuffled(count: int, seed: int = 9) -> Tensor:
    """A permutation."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
