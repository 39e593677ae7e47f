"""One pass over crops: their features, and the sums of their spectrum and their seams.

The pass over the real crops is kept beside the output under a name that follows from everything
that decides it, so that other images are compared with the same store without repeating it.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from conditioning.tiles import read_ahead
from jobs.evaluate.crops import Crop
from jobs.evaluate.features import FeatureSpace
from jobs.evaluate.spectrum import CROP_PX, Seams, Spectrum
from pipeline import console
from pipeline.ome import OmeImage

BATCH = 32


@dataclass(frozen=True)
class Measured:
    """What was measured on crops; `features` has a row for each, none where no space was given."""

    features: Float32[np.ndarray, "n d"]
    spectrum: Spectrum
    seams: Seams

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez(
            stream,
            features=self.features,
            crops=self.spectrum.crops,
            power=self.spectrum.power,
            seam_total=self.seams.total,
            seam_count=self.seams.count,
        )
        return stream.getvalue()

    @classmethod
    def read(cls, file: Path) -> "Measured":
        with np.load(file, allow_pickle=False) as kept:
            return cls(
                kept["features"],
                Spectrum(int(kept["crops"]), kept["power"]),
                Seams(kept["seam_total"], kept["seam_count"]),
            )


def measure(
    crops: Sequence[Crop], images: Mapping[str, OmeImage], space: FeatureSpace | None, desc: str
) -> Measured:
    """Read every crop once."""
    features, spectrum, seams = [], Spectrum.zero(), Seams.zero()
    batches = read_ahead(_batches(crops, images))
    total = -(-len(crops) // BATCH)
    for batch in console.progress(batches, total=total, desc=f"evaluate: {desc} crops"):
        for pixels in batch:
            spectrum += Spectrum.of(pixels[:, :CROP_PX, :CROP_PX])
            seams += Seams.of(pixels)
        if space is not None:
            tiles = np.stack([pixels[:, :CROP_PX, :CROP_PX] for pixels in batch])
            features.append(space.features(tiles))
    empty = np.empty((len(crops), 0), np.float32)
    return Measured(np.concatenate(features) if features else empty, spectrum, seams)


def _batches(crops: Sequence[Crop], images: Mapping[str, OmeImage]) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(crops), BATCH):
        batch = crops[start : start + BATCH]
        sides = [CROP_PX + crop.bordered for crop in batch]
        yield [
            images[crop.image].read(crop.y, crop.x, side, side)
            for crop, side in zip(batch, sides, strict=True)
        ]


def cache_file(
    out: Path, fingerprint: str, crops: Sequence[Crop], space: FeatureSpace | None
) -> Path:
    """Where the pass over the real crops of a store is kept, beside `out`."""
    decisive: list[Any] = [fingerprint, space and space.key, [asdict(crop) for crop in crops]]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    return out.parent / f".real-{digest}.npz"
