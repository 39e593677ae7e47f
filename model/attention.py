"""How conditions reach the image: tokens with coordinates, looked up or attended to.

A condition is a set of tokens, each an SSL embedding of a square of the image with a centre and a
side (its footprint). One token per image would only be a bias: softmax over one key is one. With
many, the layout can be told. They are read in three ways: by the papers' cross-attention operator
(block T of a cascade, sparse points), by a bilinear lookup of the finest token lattice at each
cell, whose cost does not grow with their number (T, A, B, C), and by softmax cross-attention
inside the U-Nets of diffusers (patches, the lattice of sparse denoisers).

Beside the lattices there may be a class label and a global vector of each image. Each becomes one
more token without a place: attended to, and added to the looked-up lattice.

A dropped source (for classifier-free guidance) is a learned null in its stead; each can be dropped
on its own, so that guidance may strengthen one of them.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.points import Points
from model.resample import bilinear

Source = Literal["tokens", "label", "vector"]


@dataclass(frozen=True)
class Condition:
    """Tokens of a batch of images; the first gy * gx are the finest lattice, row by row. Beside
    them, where there are any, a class and a vector of each image.

    values: standardised embeddings. centres_px: (y, x) relative to the image's corner.
    footprints_px: sides of the squares. grid: (gy, gx). labels: numbers of classes. keep,
    keep_label, keep_vector: where False, that source is replaced by its null.
    """

    values: Float[Tensor, "b n d"]
    centres_px: Float[Tensor, "b n 2"]
    footprints_px: Float[Tensor, "b n"]
    grid: tuple[int, int]
    keep: Bool[Tensor, " b"]
    labels: Int64[Tensor, " _"] | None = None
    keep_label: Bool[Tensor, " _"] | None = None
    vector: Float[Tensor, "_ v"] | None = None
    keep_vector: Bool[Tensor, " _"] | None = None

    def __post_init__(self) -> None:
        for name, given, keep in (
            ("labels", self.labels, self.keep_label),
            ("vector", self.vector, self.keep_vector),
        ):
            if (given is None) != (keep is None):
                raise ValueError(
                    f"a condition's {name} and which of them are kept are given together or not "
                    "at all"
                )
            if given is None or keep is None:
                continue
            if not len(given) == len(keep) == len(self.values):
                raise ValueError(
                    f"a condition of {len(self.values)} images has {len(given)} {name}, of which "
                    f"{len(keep)} say whether they are kept; give one for each image"
                )

    def without(self, *sources: Source) -> "Condition":
        """The same condition, some of whose sources are dropped; places stay."""
        changes: dict[str, Any] = {}
        for source, name in (
            ("tokens", "keep"),
            ("label", "keep_label"),
            ("vector", "keep_vector"),
        ):
            keep = getattr(self, name)
            if source in sources and keep is not None:
                changes[name] = torch.zeros_like(keep)
        return replace(self, **changes)

    def dropped(self) -> "Condition":
        """The same places without any content."""
        return self.without("tokens", "label", "vector")

    def to(self, device: torch.device) -> "Condition":
        tensors: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def fourier(
    values: Float[Tensor, "*shape"], width: int, period: float
) -> Float[Tensor, "*shape w"]:
    """Sines and cosines of `values` at width / 2 octaves, the longest with the given period."""
    octaves = 2.0 ** torch.arange(width // 2, device=values.device, dtype=values.dtype)
    angles = values[..., None] * octaves * (2 * math.pi / period)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TokenContent(nn.Module):
    """What conditions say, without the places of tokens; a source's null where it is dropped or
    not given.

    num_classes: how many labels there are; vector_dim: width of the global vector; 0 where there
    is no such source.
    """

    def __init__(
        self, token_dim: int, width: int, num_classes: int = 0, vector_dim: int = 0
    ) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width))
        self.content = nn.Linear(token_dim, width)
        # The last class is the null.
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.vector = GlobalVector(vector_dim, width) if vector_dim else None

    def features(
        self, condition: Condition, values: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n w"]:
        """Of tokens of the condition, or of what lies between some."""
        if values.shape[-1] != self.content.in_features:
            raise ValueError(
                f"tokens of {values.shape[-1]} numbers were given to a model that takes "
                f"{self.content.in_features}; embed with the encoder that it was trained with"
            )
        return torch.where(condition.keep[:, None, None], self.content(values), self.null)

    def placeless(self, condition: Condition) -> list[Float[Tensor, "b w"]]:
        """The label's and the vector's features, as far as the model has them."""
        found = []
        labels, vector, batch = condition.labels, condition.vector, len(condition.values)
        if self.label is None:
            _refuse(labels, "class labels", "pack with labels and train again, or leave them out")
        else:
            null = self.label.num_embeddings - 1
            numbers = torch.full((batch,), null, device=condition.values.device)
            if labels is not None and condition.keep_label is not None:
                if bool(((labels < 0) | (labels >= null)).any()):
                    raise ValueError(
                        f"class labels {sorted(set(labels.tolist()))} were given to a model of "
                        f"{null} classes, whose numbers are 0 to {null - 1}"
                    )
                numbers = torch.where(condition.keep_label, labels, numbers)
            found.append(self.label(numbers))
        if self.vector is None:
            _refuse(vector, "global vectors", "leave them out")
        else:
            found.append(self.vector(vector, condition.keep_vector, batch))
        return found


class TokenEncoder(TokenContent):
    """Tokens -> features with position and footprint."""

    POSITION_WIDTH = 16
    POSITION_PERIOD_PX = 16_384.0

    def __init__(
        self, token_dim: int, width: int, num_classes: int = 0, vector_dim: int = 0
    ) -> None:
        super().__init__(token_dim, width, num_classes, vector_dim)
        self.place = nn.Linear(2 * self.POSITION_WIDTH + 1, width)

    def forward(
        self, condition: Condition
    ) -> tuple[Float[Tensor, "b _ w"], Float[Tensor, "b w gy gx"]]:
        """Features of all tokens with their places, those without a place last, and of the finest
        lattice without (its place is its index).
        """
        content = self.features(condition, condition.values)
        places = fourier(condition.centres_px, self.POSITION_WIDTH, self.POSITION_PERIOD_PX)
        scale = torch.log2(condition.footprints_px / 256.0)[..., None]
        tokens = content + self.place(torch.cat([places.flatten(-2), scale], dim=-1))
        gy, gx = condition.grid
        lattice = content[:, : gy * gx].unflatten(1, (gy, gx)).permute(0, 3, 1, 2)
        for feature in self.placeless(condition):
            tokens = torch.cat([tokens, feature[:, None]], dim=1)
            lattice = lattice + feature[:, :, None, None]
        return tokens, lattice


class TokenLookup(TokenContent):
    """Features of the finest token lattice where it is looked up, and nowhere else: the cost does
    not grow with the number of tokens.
    """

    def forward(
        self, condition: Condition, y_px: Float[Tensor, "b h"], x_px: Float[Tensor, "b w"]
    ) -> Float[Tensor, "b t h w"]:
        """At cells with these centres; bilinear, constant beyond the lattice's rim."""
        gy, gx = condition.grid
        lattice = condition.values[:, : gy * gx].unflatten(1, (gy, gx)).permute(0, 3, 1, 2)
        first, pitch = condition.centres_px[:, 0], condition.footprints_px[:, 0]
        values = look_up(lattice, first, pitch, y_px, x_px)
        found = self.features(condition, values.flatten(1, 2)).unflatten(1, values.shape[1:3])
        for feature in self.placeless(condition):
            found = found + feature[:, None, None]
        return found.permute(0, 3, 1, 2)


class GlobalVector(nn.Module):
    """A vector of each image as a feature; a learned null where it is dropped or not given."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width))
        self.content = nn.Linear(dim, width)

    def forward(
        self,
        vector: Float[Tensor, "b v"] | None,
        keep: Bool[Tensor, " b"] | None,
        batch: int,
    ) -> Float[Tensor, "b w"]:
        if vector is None or keep is None:
            return self.null.expand(batch, -1)
        if vector.shape[1] != self.content.in_features:
            raise ValueError(
                f"a global vector of {vector.shape[1]} numbers was given to a model that takes "
                f"{self.content.in_features}"
            )
        return torch.where(keep[:, None], self.content(vector), self.null)


def _refuse(given: Tensor | None, what: str, remedy: str) -> None:
    if given is not None:
        raise ValueError(f"{what} were given to a model that was trained without; {remedy}")


@dataclass(frozen=True)
class Tokens:
    """A condition once encoded: all tokens to attend to, the finest lattice to look up."""

    attended: Float[Tensor, "b n t"]
    lattice: Float[Tensor, "b t gy gx"]
    condition: Condition

    def at(
        self, index: Int64[Tensor, " n"], y_px: Float[Tensor, "n h"], x_px: Float[Tensor, "n w"]
    ) -> Float[Tensor, "n h w t"]:
        """Tokens of the images `index` at cells with these centres."""
        first = self.condition.centres_px[index, 0]
        pitch = self.condition.footprints_px[index, 0]
        return look_up(self.lattice[index], first, pitch, y_px, x_px)

    def at_points(self, points: Points) -> Float[Tensor, "n t"]:
        """Tokens at sparse points, each of its own image; constant beyond the lattice's rim."""
        first = self.condition.centres_px[:, 0].double()[points.image]
        pitch = self.condition.footprints_px[:, 0].double()[points.image]
        place = (points.centres_px() - first) / pitch[:, None]
        return bilinear(self.lattice.permute(0, 2, 3, 1), points.image, place)


def look_up(
    lattice: Float[Tensor, "b t gy gx"],
    first_px: Float[Tensor, "b 2"],
    pitch_px: Float[Tensor, " b"],
    centres_y_px: Float[Tensor, "b h"],
    centres_x_px: Float[Tensor, "b w"],
) -> Float[Tensor, "b h w t"]:
    """Bilinear interpolation of a token lattice at cells; constant beyond its rim.

    The lattice's first token is centred at `first_px` (y, x), its neighbours `pitch_px` apart.
    `grid_sample` with align_corners=True wants -1 at the first token's centre and +1 at the last
    one's, in (x, y) order.
    """
    gy, gx = lattice.shape[-2:]
    y = (centres_y_px - first_px[:, :1]) / pitch_px[:, None] * (2.0 / max(gy - 1, 1)) - 1.0
    x = (centres_x_px - first_px[:, 1:]) / pitch_px[:, None] * (2.0 / max(gx - 1, 1)) - 1.0
    shape = (-1, y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    sampled = F.grid_sample(
        lattice, grid.to(lattice.dtype), mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled.permute(0, 2, 3, 1)
