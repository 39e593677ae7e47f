"""The features of both sides of an evaluation as one file, with where on the ground they are from.

Two sets of images painted after the same regions are compared region by region with it
(`jobs.compare.paired`), without reading a pixel again.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from jobs.evaluate.crops import Crop, Painted
from jobs.evaluate.features import FeatureSpace, columns_of
from pipeline import console
from pipeline.store import Region


@dataclass(frozen=True)
class CropFeatures:
    """Features of painted and real crops of one store in one space.

    regions: those that conditioned the images; owner: of each painted crop the number of its
    image's region among them. crops: the real ones. columns: which features a distance reads.
    space: key of the feature space, store: fingerprint of the store.
    """

    painted: Float32[np.ndarray, "n d"]
    owner: Int64[np.ndarray, " n"]
    regions: tuple[Region, ...]
    real: Float32[np.ndarray, "m d"]
    crops: tuple[Crop, ...]
    columns: Mapping[str, slice]
    space: str
    store: str

    @classmethod
    def of(
        cls,
        painted: tuple[Sequence[Crop], Float32[np.ndarray, "n d"]],
        images: Sequence[Painted],
        real: tuple[Sequence[Crop], Float32[np.ndarray, "m d"]],
        space: FeatureSpace,
        store: str,
    ) -> "CropFeatures":
        """From crops with their features, and the painted images."""
        by_name = {item.name: item.region for item in images}
        regions = tuple(dict.fromkeys(by_name.values()))
        owner = [regions.index(by_name[crop.image]) for crop in painted[0]]
        return cls(
            painted[1],
            np.array(owner, np.int64),
            regions,
            real[1],
            tuple(real[0]),
            columns_of(space),
            space.key,
            store,
        )

    def write(self, file: Path) -> None:
        facts: dict[str, Any] = {
            "regions": [asdict(region) for region in self.regions],
            "crops": [asdict(crop) for crop in self.crops],
            "columns": {name: [own.start, own.stop] for name, own in self.columns.items()},
            "space": self.space,
            "store": self.store,
        }
        stream = io.BytesIO()
        np.savez(
            stream,
            painted=self.painted,
            owner=self.owner,
            real=self.real,
            facts=np.array(json.dumps(facts)),
        )
        console.write_bytes_atomic(file, stream.getvalue())

    @classmethod
    def read(cls, file: Path) -> "CropFeatures":
        """A `ValueError` where there is no such file."""
        if not file.is_file():
            raise ValueError(f"{file} does not exist; python -m jobs.evaluate --keep makes it")
        with np.load(file, allow_pickle=False) as kept:
            facts = json.loads(str(kept["facts"]))
            return cls(
                kept["painted"],
                kept["owner"],
                tuple(Region(**region) for region in facts["regions"]),
                kept["real"],
                tuple(Crop(**crop) for crop in facts["crops"]),
                {name: slice(*bounds) for name, bounds in facts["columns"].items()},
                facts["space"],
                facts["store"],
            )
