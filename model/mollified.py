"""Noise as the papers have it: white noise smoothed by the mollifier, A xi.

xi is the white field of the tree, and a value of A xi is a weighted mean of the cells of xi around
a cell: for scattered points that costs O(N k^2), however large the image is, since the k x k cells
around each share their ancestors in the tree. Values are sums in one fixed order, so that a point,
a tile and the whole image have the same bits.

Nothing is renormalised: at sigma = 1 px the deviation is 1 / (2 sqrt(pi) sigma) = 0.28. At level
l, which is the image at the scale r = 2^-l, A is r sigma cells wide and xi, a mean over cells, has
the deviation r: the noise of a coarser image is the same in physical units.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.lattice import Box
from model.mollifier import gaussian_taps
from model.noise import NoiseTree
from model.points import Points

CHUNK = 8192
"""Points whose surroundings are held at once."""


@dataclass(frozen=True)
class MollifiedNoise:
    """A xi on the tree's cells; the methods are those of `NoiseTree`.

    tree: of white noise. sigma_px: deviation of the mollifier in pixels of level 0.
    """

    tree: NoiseTree
    sigma_px: float

    def __post_init__(self) -> None:
        if self.tree.spectrum.floor:
            raise ValueError(
                "the mollifier smooths white noise; floored noise is smooth in the large already: "
                "set noise_floor or the mollifier's sigma to 0"
            )

    @property
    def channels(self) -> int:
        return self.tree.channels

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """Values at all cells of a box, float32."""
        return self.boxes(torch.tensor([seed], dtype=torch.int64, device=device), box)[0]

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed; float32."""
        taps = self._taps(box.level)
        return self._sum(self.tree.exact(seeds, box.grow(len(taps) // 2)), taps).float()

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Values at sparse cells; float32. `seeds` name the field of each image of the batch."""
        out = torch.empty(len(points), self.channels, device=seeds.device)
        for level in points.level.unique().tolist():
            taps = self._taps(level)
            here = (points.level == level).nonzero()[:, 0]
            for some in here.split(CHUNK):
                corner = torch.stack([points.y[some], points.x[some]], dim=1) - len(taps) // 2
                around = self.tree.windows(seeds[points.image[some]], level, corner, len(taps))
                out[some] = self._sum(around, taps)[:, :, 0, 0].float()
        return out

    def _taps(self, level: int) -> list[float]:
        return gaussian_taps(self.sigma_px * 2.0**-level).tolist()

    def _sum(
        self, cells: Float[Tensor, "b c hk wk"], taps: list[float]
    ) -> Float[Tensor, "b c h w"]:
        """The weighted sum around every cell that has all its neighbours, rows first."""
        for axis in (2, 3):
            inner = cells.shape[axis] - len(taps) + 1
            total = taps[0] * cells.narrow(axis, 0, inner)
            for place, tap in enumerate(taps[1:], start=1):
                total = total + tap * cells.narrow(axis, place, inner)
            cells = total
        return cells
