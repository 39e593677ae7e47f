"""What an image is painted after: a region's tokens, or a vector drawn by the latent model.

A subject names its image, says what it follows from and gives the condition. Two leaves:
`RegionSubject` for `jobs.sample --condition`, `DrawnSubject` for `--unconditional`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from conditioning.layout import Fill, condition_of, in_words, lay_out
from conditioning.tokens import fit, from_store, to_condition, with_labels
from jobs.latent_model import latents_record, load_latents
from jobs.run import Run, RunConfig
from model.attention import Condition
from model.latent import LatentDenoiser
from model.sparse.config import SparseConfig
from model.sparse.encoder import normalised
from pipeline.embeddings import TokenLattice
from pipeline.store import Region, Store

LATENT_STEPS = 100


@runtime_checkable
class Subject(Protocol):
    """What one image is painted after."""

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the image at the resolution of training."""
        ...

    @property
    def name(self) -> str:
        """Of the image, without a suffix."""
        ...

    @property
    def seed(self) -> int:
        """Of the image's noise."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the image follows from, beside the run and the recipe."""
        ...

    def condition(self) -> Condition:
        """As a batch of one."""
        ...

    def place(self, scale: float) -> dict[str, Any]:
        """Where the image lies on the ground, if its pixels are `scale` times as large."""
        ...

    def in_words(self) -> str:
        """What people should know of it; empty where there is nothing."""
        ...


@dataclass(frozen=True)
class RegionSubject:
    """A region of a store, continued or with others beside it (see `conditioning.layout`).

    label: class that is asked for, in place of the region's own.
    """

    store: Store
    config: RunConfig
    region: Region
    seed: int
    size_px: tuple[int, int]
    fill: Fill
    label: str | None

    @property
    def name(self) -> str:
        return f"{self.region.image}_region{self.region.index}_seed{self.seed}"

    @cached_property
    def layout(self) -> list[list[Region]]:
        return lay_out(self.store.regions(), self.region, self.size_px, self.fill, self.seed)

    @cached_property
    def painted_label(self) -> str | None:
        """The class that the image is painted as; None where the run knows none for it."""
        label = self.label or self.store.classes().get(self.region.image)
        return label if label in self.config.packs.classes else None

    def identity(self) -> dict[str, Any]:
        return {
            "store_fingerprint": self.store.fingerprint(),
            "region": asdict(self.region),
            "label": self.painted_label,
            "layout": [[r.index for r in row] for row in self.layout],
        }

    def condition(self) -> Condition:
        tokens_of = partial(from_store, self.store, self.config.packs)
        lattices = condition_of(tokens_of, self.layout, self.size_px)
        condition = to_condition([lattices], self.config.token_scale(), [True])
        return with_labels(condition, self.config.packs.classes, [self.painted_label], [True])

    def place(self, scale: float) -> dict[str, Any]:
        attributes = self.store.image(self.region.image).attributes
        if "spatial:transform" not in attributes:
            return {}
        a, b, c, d, e, f = attributes["spatial:transform"]
        y, x = self.region.y, self.region.x
        corner = (c + a * x + b * y, f + d * x + e * y)
        transform = [a * scale, b * scale, corner[0], d * scale, e * scale, corner[1]]
        kept: dict[str, Any] = {
            key: attributes[key] for key in ("proj:code", "proj:wkt2") if key in attributes
        }
        return {**kept, "spatial:transform": transform}

    def in_words(self) -> str:
        continued = in_words(self.layout, self.size_px)
        return f"region {self.region.index}: {continued}" if continued else ""


@dataclass(frozen=True)
class DrawnSubject:
    """A vector that the latent model draws; tokens are dropped.

    made_from: what the latent model follows from. label: class that is asked for, if any.
    """

    config: RunConfig
    latents: LatentDenoiser
    made_from: dict[str, Any]
    seed: int
    size_px: tuple[int, int]
    label: str | None

    @property
    def name(self) -> str:
        return f"unconditional_seed{self.seed}"

    def identity(self) -> dict[str, Any]:
        return {
            "latents": {**self.made_from, "sampling_steps": LATENT_STEPS},
            "label": self.label,
        }

    def condition(self) -> Condition:
        """Dropped tokens at the places that those of a region would have, and z, normalised as an
        encoded one is.
        """
        packs, dim = self.config.packs, len(self.config.statistics.token_mean)
        lattices = fit(_nothing(packs.lattices, dim), *self.size_px)
        condition = to_condition([lattices], self.config.token_scale(), [False])
        condition = with_labels(condition, packs.classes, [self.label], [True])
        z = normalised(self.latents.sample(1, self.seed, LATENT_STEPS))
        return replace(condition, vector=z, keep_vector=torch.tensor([True]))

    def place(self, scale: float) -> dict[str, Any]:
        return {}

    def in_words(self) -> str:
        return ""


def regions_for(store: Store, config: RunConfig, numbers: Sequence[int]) -> list[Region]:
    """The regions of these numbers, or the first that was not trained on; a `ValueError` where the
    run cannot paint after them.
    """
    if isinstance(config.denoiser, SparseConfig) and config.denoiser.tokens == "none":
        raise ValueError(
            f"the run was trained with preset {config.preset}, which reads no condition; leave "
            "--condition out and ask for --unconditional N images"
        )
    spec = store.spec
    if (spec.unit, spec.spacing, spec.bands) != (
        config.packs.unit,
        config.packs.spacing,
        config.packs.bands,
    ):
        raise ValueError(
            f"{store.path} holds {','.join(spec.bands)} at {spec.spacing:g} {spec.unit}, "
            f"the run was trained on {','.join(config.packs.bands)} at "
            f"{config.packs.spacing:g} {config.packs.unit}; ingest again to match"
        )
    regions = store.regions()
    unknown = [k for k in numbers if not 0 <= k < len(regions)]
    if unknown:
        raise ValueError(
            f"--region {unknown[0]} does not exist; {store.path} has regions 0 to "
            f"{len(regions) - 1}"
        )
    first = min(regions, key=lambda region: (region.split == "train", region.index))
    return [regions[k] for k in numbers] or [first]


def subjects_without_condition(
    run: Run,
    config: RunConfig,
    number: int,
    first_seed: int,
    size_px: tuple[int, int],
    label: str | None,
) -> list[DrawnSubject]:
    """So many images without a condition, each of a seed of its own, which depend on no other."""
    if number < 1:
        raise ValueError(f"--unconditional takes a positive number, not {number}")
    made_from = latents_record(run)["made_from"]
    latents = load_latents(run)
    return [
        DrawnSubject(config, latents, made_from, seed, size_px, label)
        for seed in range(first_seed, first_seed + number)
    ]


def _nothing(lattices: Sequence[tuple[int, int, int]], dim: int) -> list[TokenLattice]:
    """Empty tokens over a region."""
    return [
        TokenLattice(np.zeros((gy, gx, dim), np.float16), footprint, footprint / 2, footprint / 2)
        for footprint, gy, gx in lattices
    ]
