"""Tokens with coordinates: what conditions a region, ready for a denoiser.

A region's condition is one lattice of embeddings for each footprint. They are standardised with
the training set's mean and deviation, listed one lattice after the other (the finest first) and
given their places; a batch holds regions whose lattices have the same sizes. Beyond a region its
lattices go on by reflection (`conditioning.layout`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32

from model.attention import Condition
from model.lattice import Box
from pipeline.embeddings import TokenLattice
from pipeline.packfile import PackSettings
from pipeline.store import Region, Store


@dataclass(frozen=True)
class TokenScale:
    """Mean and deviation of every embedding dimension over the training regions."""

    mean: Float32[np.ndarray, " d"]
    std: Float32[np.ndarray, " d"]


def from_store(store: Store, settings: PackSettings, region: Region) -> list[TokenLattice]:
    """The lattices of `region` that the packs of a run were made with, the finest first."""
    found = {t.footprint_px: t for t in store.region_tokens(settings.encoder_key, region)}
    missing = [footprint for footprint, _, _ in settings.lattices if footprint not in found]
    if missing:
        raise ValueError(
            f"{store.path} has no embedding of region {region.index} by {settings.encoder_key} at "
            f"{missing} px, which the run was trained with; run python -m conditioning.embed "
            f"with --footprint {' '.join(str(f) for f, _, _ in settings.lattices)}"
        )
    return [found[footprint] for footprint, _, _ in settings.lattices]


def fit(lattices: Sequence[TokenLattice], height_px: int, width_px: int) -> list[TokenLattice]:
    """The lattices cut or continued by reflection to an image of another size."""
    fitted = []
    for lattice in lattices:
        rows = _reflected(lattice.values.shape[0], lattice.y_px, lattice.footprint_px, height_px)
        columns = _reflected(lattice.values.shape[1], lattice.x_px, lattice.footprint_px, width_px)
        fitted.append(replace(lattice, values=lattice.values[rows][:, columns]))
    return fitted


def _reflected(count: int, first_px: float, footprint_px: int, extent_px: int) -> list[int]:
    """Indices of tokens along one axis whose centres lie in the image; at least one."""
    wanted = max(int(np.ceil((extent_px - first_px) / footprint_px)), 1)
    there_and_back = [*range(count), *reversed(range(count))]
    return [there_and_back[i % len(there_and_back)] for i in range(wanted)]


def around(lattice: TokenLattice, corner_px: tuple[int, int], side_px: int) -> TokenLattice:
    """The part of a lattice that bilinear lookups inside a square of pixels need, at its own
    place; of one size wherever the square lies, also outside.
    """
    pitch, wanted = lattice.footprint_px, math.ceil(side_px / lattice.footprint_px) + 2
    starts = []
    for count, first, corner in zip(
        lattice.values.shape[:2], (lattice.y_px, lattice.x_px), corner_px, strict=True
    ):
        before = math.floor((corner - first) / pitch)
        starts.append(min(max(before, 0), max(count - wanted, 0)))
    (i, j), values = starts, lattice.values
    part = values[i : i + wanted, j : j + wanted]
    return TokenLattice(part, pitch, lattice.y_px + i * pitch, lattice.x_px + j * pitch)


def within(lattices: Sequence[TokenLattice], view: Box) -> list[TokenLattice]:
    """The tokens whose centres lie in a box of pixels, their places counted from its corner."""
    cut = []
    for lattice in lattices:
        pitch = lattice.footprint_px
        rows, first_y = _inside(lattice.y_px, pitch, lattice.values.shape[0], view.y, view.height)
        columns, first_x = _inside(
            lattice.x_px, pitch, lattice.values.shape[1], view.x, view.width
        )
        cut.append(TokenLattice(lattice.values[rows, columns], pitch, first_y, first_x))
    return cut


def _inside(
    first_px: float, pitch: int, count: int, start: int, extent: int
) -> tuple[slice, float]:
    """Which tokens of a row have their centres in [start, start + extent), and the first's place
    from there.
    """
    low = max(math.ceil((start - first_px) / pitch), 0)
    high = min(math.ceil((start + extent - first_px) / pitch), count)
    return slice(low, max(high, low)), first_px + low * pitch - start


def dihedral(lattices: Sequence[TokenLattice], element: int, side_px: int) -> list[TokenLattice]:
    """The condition of the turned or mirrored region; see `jobs.data.turn` for the elements."""
    turned = []
    for t in lattices:
        values, y, x = t.values, t.y_px, t.x_px
        if element & 4:
            values, y, x = values.swapaxes(0, 1), x, y
        if element & 1:
            values, y = values[::-1], side_px - y - (values.shape[0] - 1) * t.footprint_px
        if element & 2:
            values, x = values[:, ::-1], side_px - x - (values.shape[1] - 1) * t.footprint_px
        turned.append(TokenLattice(values, t.footprint_px, y, x))
    return turned


def to_condition(
    batch: Sequence[Sequence[TokenLattice]], scale: TokenScale, keep: Sequence[bool]
) -> Condition:
    """Collate the conditions of a batch of images; where `keep` is False it is dropped."""
    values, centres, footprints = [], [], []
    for lattices in batch:
        flat = np.concatenate([t.values.reshape(-1, t.values.shape[2]) for t in lattices])
        values.append((flat.astype(np.float32) - scale.mean) / scale.std)
        centres.append(np.concatenate([_centres(t) for t in lattices]))
        footprints.append(
            np.concatenate(
                [np.full(t.values.shape[:2], t.footprint_px).reshape(-1) for t in lattices]
            )
        )
    gy, gx = batch[0][0].values.shape[:2]
    return Condition(
        torch.from_numpy(np.stack(values)),
        torch.from_numpy(np.stack(centres).astype(np.float32)),
        torch.from_numpy(np.stack(footprints).astype(np.float32)),
        (gy, gx),
        torch.tensor(list(keep)),
    )


def with_labels(
    condition: Condition,
    classes: Sequence[str],
    labels: Sequence[str | None],
    keep: Sequence[bool],
) -> Condition:
    """The condition with the class of each image, where a model has `classes`; dropped where
    `keep` is False, an image has none or one that was not trained.
    """
    if not classes:
        return condition
    numbers = {name: number for number, name in enumerate(classes)}
    kept = [label in numbers and kept for label, kept in zip(labels, keep, strict=True)]
    return replace(
        condition,
        labels=torch.tensor([numbers.get(label or "", 0) for label in labels]),
        keep_label=torch.tensor(kept),
    )


def _centres(lattice: TokenLattice) -> Float32[np.ndarray, "n 2"]:
    rows, columns = np.mgrid[0 : lattice.values.shape[0], 0 : lattice.values.shape[1]]
    y = lattice.y_px + rows * lattice.footprint_px
    x = lattice.x_px + columns * lattice.footprint_px
    return np.stack([y, x], axis=-1).reshape(-1, 2).astype(np.float32)
