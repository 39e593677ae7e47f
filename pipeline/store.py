"""The dataset store: what `dataset.zarr` holds and where. No other module knows its layout.

    zarr.json                               the specification and how the store was made
    images/<image-id>/                      one OME-Zarr image each (`pipeline.ome`)
    images/<image-id>/labels/tissue/        its mask: cells of 16 px for slides, pixels for aerial
    states/<image-id>.json                  how the image ended: ok, empty or failed, and why
    coverage/<image-id>.npy                 tissue or valid pixels per cell of 16 px
    previews/<image-id>.png                 a picture to look at
    outlines/<image-id>.geojson             the tissue of a slide, for QuPath
    contact-sheet.jpg, summary.md           all images at a glance; images.jsonl: one line each
    regions.parquet                         the region table, chosen from the coverages
    embeddings/<encoder-key>/<footprint>/<image-id>    tokens (gy, gx, d) on a lattice

An encoder's key is a slug and a hash of its weights. Everything that marks progress is replaced by
rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from jaxtyping import Bool, UInt16

from pipeline.console import write_json_atomic
from pipeline.embeddings import Embeddings, TokenLattice, write_group
from pipeline.ome import OmeImage, Unit
from pipeline.regions import Region

SCHEMA_VERSION = 1
UNITS: dict[str, Unit] = {"um": "micrometer", "m": "meter", "px": "pixel"}

MaskKind = Literal["tissue", "valid"]

__all__ = ["MaskKind", "Region", "Store", "StoreSpec", "TokenLattice"]


@dataclass(frozen=True)
class StoreSpec:
    """What all images of one store share; `region` is the side of its regions in px, 0 before they
    are chosen.
    """

    unit: Literal["um", "m", "px"]
    spacing: float
    bands: tuple[str, ...]
    dtype: Literal["uint8", "uint16"]
    region: int


class Store(Embeddings):
    """A dataset store on disk; made by `Store.create` or `Store.open`."""

    def __init__(self, path: Path) -> None:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]["gigabrush"]
        if attributes["schema"] != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {attributes['schema']} and this program reads version "
                f"{SCHEMA_VERSION}; ingest it again with this program"
            )
        self.path = path
        self.spec = StoreSpec(
            **{**attributes["spec"], "bands": tuple(attributes["spec"]["bands"])}
        )
        self.provenance: dict[str, Any] = attributes["provenance"]

    @classmethod
    def create(
        cls, path: Path, spec: StoreSpec, provenance: Mapping[str, Any] | None = None
    ) -> Store:
        """Make an empty store, or respecify the one at `path`; its images stay."""
        for group in ("images", "embeddings"):
            write_group(path / group, {})
        write_group(
            path,
            {
                "gigabrush": {
                    "schema": SCHEMA_VERSION,
                    "spec": {**asdict(spec), "bands": list(spec.bands)},
                    "provenance": dict(provenance or {}),
                }
            },
        )
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open the store at `path`; a `ValueError` when there is none."""
        if not (path / "zarr.json").is_file() or not (path / "images").is_dir():
            raise ValueError(
                f"{path} is not a dataset store; make one with python -m pipeline.ingest"
            )
        return cls(path)

    def image_path(self, image_id: str) -> Path:
        """Where an image lies."""
        return self.path / "images" / image_id

    def preview_path(self, image_id: str) -> Path:
        """Where an image's preview lies."""
        return self.path / "previews" / f"{image_id}.png"

    @property
    def contact_sheet_path(self) -> Path:
        """Where the sheet of all images lies."""
        return self.path / "contact-sheet.jpg"

    def outline_path(self, image_id: str) -> Path:
        """Where the outlines of a slide's tissue lie."""
        return self.path / "outlines" / f"{image_id}.geojson"

    def write_outlines(self, image_id: str, features: Iterator[dict[str, Any]]) -> None:
        """Keep a slide's outlines (`pipeline.outline`), one at a time in memory."""
        path = self.outline_path(image_id)
        with _replacing(path) as stream:
            stream.write(b'{"type": "FeatureCollection", "features": [')
            for number, feature in enumerate(features):
                stream.write(f"{',' if number else ''}\n{json.dumps(feature)}".encode())
            stream.write(b"\n]}\n")

    def image_ids(self) -> list[str]:
        """The images that are whole and have content, sorted."""
        return [i for i, state in self.image_states().items() if state["state"] == "ok"]

    def image_states(self) -> dict[str, dict[str, Any]]:
        """The recorded end of every image, sorted by image id."""
        found = sorted((self.path / "states").glob("[!.]*.json"))
        return {item.stem: json.loads(item.read_text()) for item in found}

    def image_state(self, image_id: str) -> dict[str, Any] | None:
        """The recorded end of one image: at least `state` (ok, empty, failed) and `reason`; None
        before its end.
        """
        item = self.path / "states" / f"{image_id}.json"
        return json.loads(item.read_text()) if item.is_file() else None

    def classes(self) -> dict[str, str]:
        """The class of every image that was given one (the column `label` of ingest's CSV)."""
        states = self.image_states()
        return {name: s["label"] for name, s in states.items() if s.get("label")}

    def write_image_state(self, image_id: str, state: Mapping[str, Any]) -> None:
        """Record how an image ended."""
        write_json_atomic(self.path / "states" / f"{image_id}.json", dict(state))

    def remove_image_state(self, image_id: str) -> None:
        """Forget how an image ended, so that it is tried again."""
        (self.path / "states" / f"{image_id}.json").unlink(missing_ok=True)

    def image(self, image_id: str) -> OmeImage:
        """The pixels of an image."""
        return OmeImage.open(self.image_path(image_id))

    def label(self, image_id: str) -> OmeImage:
        """The mask of an image as an image of its own, with values 0 and 1."""
        return OmeImage.open(self.image_path(image_id) / "labels" / "tissue")

    def create_label(
        self,
        image: OmeImage,
        kind: MaskKind,
        cell_px: int,
        attributes: Mapping[str, Any] | None = None,
    ) -> OmeImage:
        """Lay out the mask of `image`, one value per cell of `cell_px`."""
        _, height, width = image.shape
        write_group(image.path / "labels", {"ome": {"version": "0.5", "labels": ["tissue"]}})
        return OmeImage.create(
            image.path / "labels" / "tissue",
            (1, -(-height // cell_px), -(-width // cell_px)),
            "uint8",
            image.spacing * cell_px,
            image.unit,
            ("label",),
            {**(attributes or {}), "kind": kind, "cell_px": cell_px},
            label_of=image,
        )

    def mask(
        self, image_id: str, y: int, x: int, height: int, width: int
    ) -> Bool[np.ndarray, "h w"]:
        """Tissue or valid data at each level-0 pixel of a box."""
        label = self.label(image_id)
        cell = int(label.attributes["cell_px"])
        top, left = y // cell, x // cell
        bottom, right = -(-(y + height) // cell), -(-(x + width) // cell)
        cells = label.read(top, left, bottom - top, right - left)[0] > 0
        fine = cells.repeat(cell, axis=0).repeat(cell, axis=1)
        return fine[y - top * cell :, x - left * cell :][:height, :width]

    def mask_kind(self, image_id: str) -> MaskKind:
        """What the mask says: `tissue` (the rest is glass, still content) or `valid` (the rest is
        no data).
        """
        return cast(MaskKind, self.label(image_id).attributes["kind"])

    def write_coverage(self, image_id: str, counts: UInt16[np.ndarray, "gy gx"]) -> None:
        """Keep how many pixels of each cell of 16 px are tissue or valid."""
        with _replacing(self.path / "coverage" / f"{image_id}.npy") as stream:
            np.save(stream, counts)

    def coverage(self, image_id: str) -> UInt16[np.ndarray, "gy gx"]:
        """How many pixels of each cell of 16 px are tissue or valid."""
        return np.load(self.path / "coverage" / f"{image_id}.npy")

    def regions(self) -> list[Region]:
        """The region table, sorted by (image, y, x)."""
        table = self.path / "regions.parquet"
        if not table.is_file():
            raise ValueError(
                f"{self.path} has no region table yet; run python -m pipeline.ingest to its end"
            )
        import pandas as pd  # here, as no worker of an ingest needs it

        rows = pd.read_parquet(table).to_dict("records")
        return [
            Region(index=i, **{str(k): v for k, v in row.items()}) for i, row in enumerate(rows)
        ]

    def write_regions(self, regions: Sequence[Region]) -> None:
        """Replace the region table; regions are sorted and numbered anew."""
        import pandas as pd

        columns = ["image", "y", "x", "side", "tissue", "split"]
        rows = sorted((asdict(r) for r in regions), key=lambda r: (r["image"], r["y"], r["x"]))
        with _replacing(self.path / "regions.parquet") as stream:
            pd.DataFrame(rows, columns=columns).to_parquet(stream, index=False)

    def fingerprint(self) -> str:
        """A hash of the specification, the region table and the classes: what was made from a
        store names the store by it.
        """
        content: dict[str, Any] = {
            "spec": asdict(self.spec),
            "regions": [asdict(r) for r in self.regions()],
        }
        if classes := self.classes():
            content["classes"] = classes
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place at `path` when all of it is written, and leaves nothing
    otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
