"""Whether what was painted says to the encoder what its condition said.

A painted image is embedded as `conditioning.embed` would: at the finest footprint of its
condition, or at another of the store's that was asked for, tile by tile, each tile under its
token, halved as often as the real one was in its image's pyramid. The cosine of the two vectors,
averaged over tokens, is 1 where the painting repeats its condition to the letter. Vectors of one
encoder may be alike for any two tiles, so the mean cosine of all pairs that do not belong together
is the floor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from conditioning.encoders import Encoder
from conditioning.layout import condition_of
from conditioning.tiles import Tiles, resize_tiles, tile_level
from jobs.evaluate.crops import Painted
from jobs.run import Run
from pipeline.embeddings import TokenLattice
from pipeline.ome import OmeImage, halve
from pipeline.store import Region, Store

BATCH = 64


@dataclass(frozen=True)
class Conditioning:
    """The encoder that conditioned images, and the least of its footprints that did, if known."""

    encoder_key: str
    footprint_px: int | None


def conditioning_of(painted: Sequence[Painted], store: Store) -> Conditioning | None:
    """As the images' run says, or the only encoder that embedded the store; None if unknown."""
    runs: set[Path] = {item.run for item in painted if (item.run / "config.json").is_file()}
    said = {
        Conditioning(packs.encoder_key, min(footprint for footprint, _, _ in packs.lattices))
        for packs in (Run(run).config().packs for run in sorted(runs))
    }
    if said:
        return said.pop() if len(said) == 1 else None
    keys = store.encoders()
    return Conditioning(keys[0], None) if len(keys) == 1 else None


@dataclass(frozen=True)
class Cosines:
    """Sums over tokens, which add up: of the cosines, and of both unit vectors, from which the
    mean over all pairs follows.
    """

    count: int
    own: float
    painted: Float64[np.ndarray, " d"]
    condition: Float64[np.ndarray, " d"]

    @classmethod
    def of(
        cls, painted: Float64[np.ndarray, "n d"], condition: Float64[np.ndarray, "n d"]
    ) -> "Cosines":
        a, b = (
            v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
            for v in (painted, condition)
        )
        return cls(len(a), float((a * b).sum()), a.sum(axis=0), b.sum(axis=0))

    def __add__(self, other: "Cosines") -> "Cosines":
        return Cosines(
            self.count + other.count,
            self.own + other.own,
            self.painted + other.painted,
            self.condition + other.condition,
        )

    def means(self) -> tuple[float, float | None]:
        """Mean cosine of the pairs that belong together, and of all others (None without any)."""
        others = self.count * (self.count - 1)
        every = float(self.painted @ self.condition)
        return self.own / self.count, (every - self.own) / others if others else None


def cosines(
    painted: Sequence[Painted], store: Store, encoder: Encoder, footprint_px: int | None
) -> tuple[Cosines | None, dict[str, str]]:
    """Over all images whose condition is in the store; the names of the others, and why."""
    total, failures = None, {}
    for item in painted:

        def tokens_of(region: Region) -> list[TokenLattice]:
            return _lattice_of(store, encoder.key, region, footprint_px)

        try:
            (fitted,) = condition_of(tokens_of, item.layout, item.image.shape[1:])
        except ValueError as mistake:
            failures[item.name] = str(mistake)
            continue
        level = tile_level(store.image(item.region.image), fitted.footprint_px, encoder.input_px)
        for pixels, values in _batches(item.image, fitted, level):
            pixels = resize_tiles(pixels, encoder.input_px)
            vectors = encoder.encode(pixels).numpy().astype(np.float64)
            part = Cosines.of(vectors, values)
            total = part if total is None else total + part
    return total, failures


def _lattice_of(
    store: Store, encoder_key: str, region: Region, footprint_px: int | None
) -> list[TokenLattice]:
    """The lattice of a region of the footprint that was asked for, or the finest."""
    tokens = []
    if region.image in store.image_ids():
        tokens = store.region_tokens(encoder_key, region)
    finest = footprint_px or min((t.footprint_px for t in tokens), default=0)
    found = [t for t in tokens if t.footprint_px == finest]
    if not found:
        raise ValueError(
            f"{store.path} no longer holds the tokens that conditioned it"
            + (f", or none of {footprint_px} px" if footprint_px else "")
        )
    return found


def _batches(
    image: OmeImage, lattice: TokenLattice, level: int
) -> Iterator[tuple[Tiles, Float64[np.ndarray, "n d"]]]:
    """Tiles of an image at a level and the tokens over them; only tiles wholly inside."""
    footprint, (_, height, width) = lattice.footprint_px, image.shape
    top, left = (round(first - footprint / 2) for first in (lattice.y_px, lattice.x_px))
    places = [
        (row, column)
        for row, column in np.ndindex(lattice.values.shape[:2])
        if 0 <= top + row * footprint <= height - footprint
        and 0 <= left + column * footprint <= width - footprint
    ]
    for start in range(0, len(places), BATCH):
        batch, tiles = places[start : start + BATCH], []
        for row, column in batch:
            tile = image.read(
                top + row * footprint, left + column * footprint, footprint, footprint
            )
            for _ in range(level):
                tile = halve(tile)
            tiles.append(tile)
        values = np.stack([lattice.values[place] for place in batch]).astype(np.float64)
        yield np.stack(tiles), values
