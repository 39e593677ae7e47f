"""How sparse points read a condition's tokens: three ways, one interface.

    forward(features (n, w), points, tokens, embedding (b, e)) -> features (n, w)

`operator` is the papers' attention operator (`operator_attention`). `softmax` is cross-attention
over all tokens with their places. `lookup` reads the token lattice bilinearly at each point and
modulates its features with what it finds (FiLM), at a cost that does not grow with the tokens. All
are residual and absent at initialisation; a point's row depends on its own features and place, the
tokens of its image and the embedding of its noise level, so that tiles change nothing.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.attention import Tokens
from model.blocks import zero_linear
from model.operator_attention import (
    PLACE_WIDTH,
    ByImage,
    CrossAttentionOperator,
    Queries,
    square_places,
)
from model.points import Points

PointAttentionName = Literal["operator", "softmax", "lookup"]


class OperatorAttention(nn.Module):
    """The papers' way to read a condition: the operator on the three sources tokens, noise level
    and the tokens' places.
    """

    def __init__(self, width: int, token_width: int, embedding_width: int, heads: int) -> None:
        super().__init__()
        sources = (token_width, embedding_width, PLACE_WIDTH)
        self.operator = CrossAttentionOperator(width, heads, sources)

    def forward(
        self,
        features: Float[Tensor, "n w"],
        points: Points,
        tokens: Tokens,
        embedding: Float[Tensor, "b e"],
    ) -> Float[Tensor, "n w"]:
        condition = tokens.condition
        sides = torch.log2(condition.footprints_px)
        token_places = square_places(condition.centres_px, sides, tokens.attended)
        sources = [tokens.attended, embedding[:, None], token_places]
        return self.operator(features, points, sources)


class SoftmaxAttention(nn.Module):
    """x + W_o softmax(q k^T / sqrt(d)) v over all tokens of the point's image, with the noise
    level as one more token; O(points x tokens).
    """

    def __init__(self, width: int, token_width: int, embedding_width: int, heads: int) -> None:
        super().__init__()
        self.queries = Queries(width, heads)
        self.keys_values = nn.Linear(token_width, 2 * width)
        self.level = nn.Linear(embedding_width, token_width)
        self.out = zero_linear(width, width)

    def forward(
        self,
        features: Float[Tensor, "n w"],
        points: Points,
        tokens: Tokens,
        embedding: Float[Tensor, "b e"],
    ) -> Float[Tensor, "n w"]:
        table = ByImage(points.image, points.batch)
        queries = table.rows(self.queries(features, points)).transpose(1, 2)
        attended = torch.cat([tokens.attended, self.level(embedding)[:, None]], dim=1)
        keys, values = (
            part.unflatten(-1, (self.queries.heads, -1)).transpose(1, 2)
            for part in self.keys_values(attended).chunk(2, dim=-1)
        )
        found = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
        return features + self.out(table.flat(found).flatten(-2))


class TokenLookup(nn.Module):
    """x + norm(x) scale + shift, both from the token lattice read bilinearly at each point, and
    the noise level; no point sees more than four tokens.
    """

    def __init__(self, width: int, token_width: int, embedding_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.token = nn.Linear(token_width, width)
        self.level = nn.Linear(embedding_width, width)
        self.film = zero_linear(width, 2 * width)

    def forward(
        self,
        features: Float[Tensor, "n w"],
        points: Points,
        tokens: Tokens,
        embedding: Float[Tensor, "b e"],
    ) -> Float[Tensor, "n w"]:
        hidden = self.token(tokens.at_points(points)) + self.level(embedding)[points.image]
        scale, shift = self.film(F.silu(hidden)).chunk(2, dim=-1)
        return features + self.norm(features) * scale + shift


PointAttention = OperatorAttention | SoftmaxAttention | TokenLookup


def make_point_attention(
    name: PointAttentionName, *, width: int, token_width: int, embedding_width: int, heads: int
) -> PointAttention:
    """One of the three ways to read tokens at points; a lookup has no heads."""
    if name == "operator":
        return OperatorAttention(width, token_width, embedding_width, heads)
    if name == "softmax":
        return SoftmaxAttention(width, token_width, embedding_width, heads)
    return TokenLookup(width, token_width, embedding_width)
