"""The attention operator of sparse points: to sources of tokens and to each other, in linear time.

GNOT (Hao et al., 2023), the cross-attention neural operator of the papers: queries and keys are
softmaxed over the features of a head, q~ and k~, so that attention to L sources of tokens is

    z_i = q~_i + sum_l  q~_i (K~_l^T V_l) / (q~_i . sum_j k~_lj)

(a factor 1/L is in GNOT's text, not in its code). All that the tokens contribute are two sums, so
that points may attend to a million points as cheaply as to one, and sums over disjoint parts of
them add up: `accumulate` makes the sums, `apply` reads them, and tiles change nothing.

What it cannot do: with one token in a source its term is v whatever the query, a bias; and at
initialisation its weights are several times flatter than those of softmax attention
(`point_attention` has other ways to read the same tokens).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import fourier
from model.blocks import zero_linear
from model.points import Points

POSITION_WIDTH, POSITION_PERIOD_PX = 16, 16_384.0
LEVEL_WIDTH, LEVEL_PERIOD = 4, 32.0
PLACE_WIDTH = 2 * POSITION_WIDTH + LEVEL_WIDTH


@dataclass(frozen=True)
class AttentionSums:
    """K~^T V and the sum of k~ over a set of tokens; sums of disjoint sets add up to their
    union's.
    """

    keys_values: Float[Tensor, "b heads d d"]
    keys: Float[Tensor, "b heads d"]

    def __add__(self, other: "AttentionSums") -> "AttentionSums":
        return AttentionSums(self.keys_values + other.keys_values, self.keys + other.keys)


def accumulate(
    keys: Float[Tensor, "n heads d"],
    values: Float[Tensor, "n heads d"],
    image: Int64[Tensor, " n"],
    batch: int,
    weights: Float[Tensor, " n"] | None = None,
) -> AttentionSums:
    """The sums over tokens of a batch in one flat list; `image` says whose each one is.

    weights: of tokens that stand for an integral (`resample.quadrature_weights`). Sums are float32
    at least, so that those of many tiles lose nothing.
    """
    keys, values = _at_least_float32(keys).softmax(dim=-1), _at_least_float32(values)
    weighted = keys if weights is None else keys * weights.to(keys)[:, None, None]
    table = ByImage(image, batch)
    return _sums(table.rows(weighted), table.rows(values))


def _sums(
    keys: Float[Tensor, "b n heads d"], values: Float[Tensor, "b n heads d"]
) -> AttentionSums:
    """Of a table of tokens, whose keys are softmaxed and weighted; zeros add nothing."""
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    with torch.autocast(keys.device.type, enabled=False):
        return AttentionSums(keys.mT @ values, keys.sum(dim=2))


def apply(
    queries: Float[Tensor, "n heads d"], sums: Sequence[AttentionSums], image: Int64[Tensor, " n"]
) -> Float[Tensor, "n heads d"]:
    """z at points that attend to one or more sources; a source without tokens adds nothing."""
    table = ByImage(image, len(sums[0].keys))
    q = table.rows(_at_least_float32(queries).softmax(dim=-1)).transpose(1, 2)
    z = q
    with torch.autocast(q.device.type, enabled=False):
        for source in sums:
            total = q @ source.keys[..., None]
            total = torch.where(total > 0, total, torch.ones_like(total))
            z = z + q @ source.keys_values / total
    return table.flat(z.transpose(1, 2)).to(queries.dtype)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


class ByImage:
    """A flat list of the points of a batch as a table with a row for every image, each as long as
    that of the image with the most points, filled up with zeros.
    """

    def __init__(self, image: Int64[Tensor, " n"], batch: int) -> None:
        counts = torch.bincount(image, minlength=batch)
        self.shape = batch, int(counts.max())
        order = image.argsort(stable=True)
        number = torch.arange(len(image), device=image.device)
        first, rank = counts.cumsum(0) - counts, torch.empty_like(image)
        rank[order] = number - first[image[order]]
        place = image * self.shape[1] + rank
        is_table = len(image) == math.prod(self.shape) and bool((place == number).all())
        self.place = None if is_table else place

    def rows(self, values: Float[Tensor, "n *shape"]) -> Float[Tensor, "b m *shape"]:
        """The table of a list."""
        if self.place is not None:
            blank = values.new_zeros(math.prod(self.shape), *values.shape[1:])
            values = blank.index_copy(0, self.place, values)
        return values.unflatten(0, self.shape)

    def flat(self, table: Float[Tensor, "b m *shape"]) -> Float[Tensor, "n *shape"]:
        """The list of a table."""
        values = table.flatten(0, 1)
        return values if self.place is None else values[self.place]


def places(points: Points, like: Tensor) -> Float[Tensor, "n p"]:
    """Fourier features of the cells' centres in pixels and of their size, log2 of the side."""
    return square_places(points.centres_px(), points.level, like)


def square_places(
    centres_px: Float[Tensor, "*n 2"], log2_sides: Tensor, like: Tensor
) -> Float[Tensor, "*n p"]:
    """The same of any squares, in the precision of `like` or float32."""
    precise = _at_least_float32(like).dtype
    centres = fourier(centres_px.to(precise), POSITION_WIDTH, POSITION_PERIOD_PX).flatten(-2)
    sizes = fourier(log2_sides.to(precise), LEVEL_WIDTH, LEVEL_PERIOD)
    return torch.cat([centres, sizes], dim=-1).to(like)


class Queries(nn.Module):
    """Points -> queries of every head, from their features and places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"features of width {width} do not divide among {heads} heads; choose a number of "
                "heads that divides the width"
            )
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.content = nn.Linear(width, width)
        self.place = nn.Linear(PLACE_WIDTH, width, bias=False)

    def forward(
        self, features: Float[Tensor, "n w"], points: Points
    ) -> Float[Tensor, "n heads d"]:
        query = self.content(self.norm(features)) + self.place(places(points, features))
        return query.unflatten(-1, (self.heads, -1))


class CrossAttentionOperator(nn.Module):
    """x + W_o z: points that attend to L sources of tokens, by GNOT's operator.

    sources: the width of each source's tokens. Each has keys and values of its own.
    """

    def __init__(self, width: int, heads: int, sources: Sequence[int]) -> None:
        super().__init__()
        self.queries = Queries(width, heads)
        self.keys_values = nn.ModuleList(nn.Linear(source, 2 * width) for source in sources)
        self.out = zero_linear(width, width)

    def accumulate(self, sources: Sequence[Float[Tensor, "b _ _"]]) -> list[AttentionSums]:
        """The sums of every source, once for all points and tiles."""
        if len(sources) != len(self.keys_values):
            raise ValueError(
                f"the operator attends to {len(self.keys_values)} sources, but got {len(sources)}"
            )
        found = []
        for tokens, net in zip(sources, self.keys_values, strict=True):
            keys, values = (
                _at_least_float32(part.unflatten(-1, (self.queries.heads, -1)))
                for part in net(tokens).chunk(2, dim=-1)
            )
            found.append(_sums(keys.softmax(dim=-1), values))
        return found

    def attend(
        self, features: Float[Tensor, "n w"], points: Points, sums: Sequence[AttentionSums]
    ) -> Float[Tensor, "n w"]:
        z = apply(self.queries(features, points), sums, points.image)
        return features + self.out(z.flatten(-2))

    def forward(
        self,
        features: Float[Tensor, "n w"],
        points: Points,
        sources: Sequence[Float[Tensor, "b _ _"]],
    ) -> Float[Tensor, "n w"]:
        return self.attend(features, points, self.accumulate(sources))


class SelfAttentionOperator(nn.Module):
    """x + W_o z with the points as their own tokens.

    In tiles: add up the sums of all of them, then `attend` in each.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.queries = Queries(width, heads)
        self.keys_values = nn.Linear(width + PLACE_WIDTH, 2 * width)
        self.out = zero_linear(width, width)

    def accumulate(
        self,
        features: Float[Tensor, "n w"],
        points: Points,
        weights: Float[Tensor, " n"] | None = None,
    ) -> AttentionSums:
        """The sums over these points; weights: those of a quadrature over the image."""
        tokens = torch.cat([self.queries.norm(features), places(points, features)], dim=-1)
        keys, values = self.keys_values(tokens).chunk(2, dim=-1)
        heads = (self.queries.heads, -1)
        return accumulate(
            keys.unflatten(-1, heads),
            values.unflatten(-1, heads),
            points.image,
            points.batch,
            weights,
        )

    def attend(
        self, features: Float[Tensor, "n w"], points: Points, sums: AttentionSums
    ) -> Float[Tensor, "n w"]:
        z = apply(self.queries(features, points), [sums], points.image)
        return features + self.out(z.flatten(-2))

    def forward(
        self,
        features: Float[Tensor, "n w"],
        points: Points,
        weights: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n w"]:
        return self.attend(features, points, self.accumulate(features, points, weights))
