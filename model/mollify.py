"""The papers' noise: A xi, white noise mollified by a Gaussian (∞-Diff, section 4.1).

A is `mollifier`'s truncated Gaussian over the leaves of a white tree, so that

    Cov(A xi)(d) = r^2 (k * k)(d_y) (k * k)(d_x),    k = the taps for sigma = r sigma_px pixels.

It is not renormalised: its standard deviation is r sum(k^2), about 1 / (2 sqrt(pi) sigma_px) =
0.282 for one pixel. r is the resolution of the field over that of the training, and so that
covariances at a distance on the ground stay as they were, sigma and amplitude are r times as large
there. That is what the same A makes of the tree's cells of level -log2(r), whose means have the
variance r^2: one field, refined. (It holds while r sigma is a pixel or more; a narrower Gaussian
falls between the pixels of a coarser field.)

A field is evaluated where it is needed, at sparse points too, whose neighbourhoods share the
ancestors of their pixels. Sums are taken tap by tap, rows before columns, in one order: a window
equals the crop of the whole, and points the pixels of a box, bit for bit. What a box of another
level holds are values of A xi at its resolution, not area means of those at the pixel, which are
not known without all pixels; so sparse points are of the pixel's level only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.cells import Cells
from model.lattice import Box, tiles
from model.mollifier import gaussian_taps
from model.noise import NoiseTree
from model.points import Points

_VALUES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class MollifiedNoise:
    """A xi as `noise.Noise`.

    tree: of the white leaves. sigma_px: of A, in pixels of the training resolution.
    """

    tree: NoiseTree
    sigma_px: float

    def __post_init__(self) -> None:
        gaussian_taps(self.sigma_px)

    @property
    def channels(self) -> int:
        return self.tree.channels

    def radius(self, level: int = 0) -> int:
        """Cells of a level beyond a place whose white noise enters there."""
        return len(self._taps(level)) // 2

    def _taps(self, level: int) -> list[float]:
        return gaussian_taps(self.sigma_px * 2.0**-level).tolist()

    def covariance(self, lags: int, level: int = 0) -> Float[Tensor, "lags lags"]:
        """Cov(A xi) at distances (d_y, d_x) of 0 ... lags - 1 cells of a level."""
        taps = torch.tensor(self._taps(level), dtype=torch.float64)
        padded = torch.cat([taps, taps.new_zeros(lags)])
        one = torch.stack([(taps * padded[d : d + len(taps)]).sum() for d in range(lags)])
        return 4.0**-level * one[:, None] * one

    def on_stream(self, stream: int) -> "MollifiedNoise":
        return replace(self, tree=self.tree.on_stream(stream))

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """All cells of a box, float32."""
        return self.boxes(torch.tensor([seed], dtype=torch.int64, device=device), box)[0]

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed; float32, tile by tile."""
        taps, radius = self._taps(box.level), self.radius(box.level)
        values = torch.empty(len(seeds), self.channels, *box.shape, device=seeds.device)
        side = 512
        for tile in tiles(box.height, box.width, side):
            there = Box(box.level, box.y + tile.y, box.x + tile.x, *tile.shape)
            ys, xs = tile.slices_in(Box(0, 0, 0, *box.shape))
            leaves = self.tree.means(seeds, there.grow(radius))
            rows = weigh(taps, leaves.unfold(2, len(taps), 1).movedim(-1, 0))
            columns = weigh(taps, rows.unfold(3, len(taps), 1).movedim(-1, 0))
            values[:, :, ys, xs] = columns.float()
        return values

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Sparse pixels, float32; image i of the points is the field of seeds[i]."""
        if len(seeds) != points.batch:
            raise ValueError(
                f"{len(seeds)} seeds do not fit points of {points.batch} images; give one a field"
            )
        if bool(points.level.any()):
            raise ValueError(
                f"mollified noise is known at pixels, but points of levels "
                f"{points.level.unique().tolist()} were asked for; use white noise for area means"
            )
        values = torch.empty(len(points), self.channels, device=seeds.device)
        level = -points.resolution
        radius = self.radius(level)
        odd = 2 * ((points.y - radius) & 1) + ((points.x - radius) & 1)
        most = max(_VALUES_AT_ONCE // (self.channels * (2 * radius + 2) ** 2), 1)
        for parity in range(4):
            for part in torch.nonzero(odd == parity)[:, 0].split(most):
                first = divmod(parity, 2)
                values[part] = self._neighbourhoods(seeds, points.take(part), level, *first)
        return values

    def _neighbourhoods(
        self, seeds: Int64[Tensor, " b"], points: Points, level: int, first_y: int, first_x: int
    ) -> Float[Tensor, "n c"]:
        """Points whose neighbourhoods begin at a parent's first (0) or second (1) child."""
        n, radius, taps = len(points), self.radius(level), self._taps(level)
        side = radius + 1
        step = torch.arange(side, device=seeds.device)
        y = (((points.y - radius) >> 1)[:, None, None] + step[:, None]).expand(-1, -1, side)
        x = (((points.x - radius) >> 1)[:, None, None] + step).expand(-1, side, -1)
        image = points.image[:, None, None].expand(-1, side, side)
        parents, place = Cells(image.flatten(), y.flatten(), x.flatten()).distinct()
        four = self.tree.families(seeds, level, parents)[place]
        four = four.view(n, side, side, self.channels, 2, 2).permute(1, 4, 2, 5, 0, 3)
        leaves = four.reshape(2 * side, 2 * side, n, self.channels)
        k = len(taps)
        rows = weigh(taps, leaves[first_y : first_y + k, first_x : first_x + k])
        return weigh(taps, rows).float()


def weigh(taps: Sequence[float], values: Float[Tensor, "k *shape"]) -> Float[Tensor, "*shape"]:
    """Sum of the values times the taps, one after another: the same for any shape."""
    total = taps[0] * values[0]
    for tap, value in zip(taps[1:], values[1:], strict=True):
        total = total + tap * value
    return total
