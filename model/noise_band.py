"""The noise of a block of octaves: the tree's details of its levels, without the means above.

A block refines an image whose means over the cells of a level P are known. Its noise is

    xi_f - up(xi_P) = sum of the details of the levels f ... P - 1,    f < P,

up being repetition. It is white inside the block, has no mean over any cell of level P and is
independent of xi_P. A detail of level l (a cell minus its parent) has the variance 3/4 4^-l. It is
the recursion of `noise` that starts from zeros at P, so that a cell costs O(P - f) calls however
large the image is.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.cells import Cells
from model.lattice import Box
from model.noise import NoiseTree, at_points
from model.points import Points


@dataclass(frozen=True)
class BandNoise:
    """xi_f - up(xi_parents) as `noise.Noise`, at levels f below `parents`.

    parents: level whose cells the block refines; at most the tree's top level.
    """

    tree: NoiseTree
    parents: int

    def __post_init__(self) -> None:
        if self.parents > self.tree.spectrum.top_level:
            raise ValueError(
                f"a block below level {self.parents} does not fit a tree of top level "
                f"{self.tree.spectrum.top_level}, which has no details up there"
            )

    @property
    def channels(self) -> int:
        return self.tree.channels

    def on_stream(self, stream: int) -> "BandNoise":
        return replace(self, tree=self.tree.on_stream(stream))

    def _check(self, level: int) -> None:
        if level >= self.parents:
            raise ValueError(
                f"cells of level {level} do not lie below level {self.parents}, over whose cells "
                "a block's noise has no mean"
            )

    def box(
        self, seed: int, box: Box, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "c h w"]:
        """All cells of a box, float32; O(cells) work, O(the block's levels) for a single cell."""
        return self.boxes(torch.tensor([seed], dtype=torch.int64, device=device), box)[0]

    def boxes(self, seeds: Int64[Tensor, " b"], box: Box) -> Float[Tensor, "b c h w"]:
        """The same box of several fields, one a seed; float32. It need not be aligned."""
        self._check(box.level)
        shape = (len(seeds), self.channels, *box.cover(self.parents).shape)
        zeros = torch.zeros(shape, dtype=torch.float64, device=seeds.device)
        return self.tree.descend(zeros, seeds, self.parents, box).float()

    def at(self, seeds: Int64[Tensor, " b"], points: Points) -> Float[Tensor, "n c"]:
        """Sparse cells of any levels below `parents`, float32; image i of the points is the field
        of seeds[i]. Equal to `boxes` bit for bit.
        """
        return at_points(self.cells, self.channels, seeds, points)

    def cells(self, seeds: Int64[Tensor, " b"], level: int, cells: Cells) -> Float[Tensor, "n c"]:
        """Cells of one level, anywhere on the lattice, float64 and at once: of `at` each chunk."""
        self._check(level)
        parents, place = cells.parents().distinct()
        if level + 1 == self.parents:
            above = torch.zeros(
                len(parents.y), self.channels, dtype=torch.float64, device=seeds.device
            )
        else:
            above = self.cells(seeds, level + 1, parents)
        four = self.tree.split(above, seeds, level, parents)
        return four[place, :, 2 * (cells.y & 1) + (cells.x & 1)]
