"""Tokens at rest: what an encoder said about an image, on a lattice over it.

    embeddings/<encoder-key>/<footprint>/<image-id>      float16 (gy, gx, d), gy = h // footprint

Token (i, j) saw the level-0 rows [i·f, (i + 1)·f) and the columns [j·f, (j + 1)·f) of its image, f
its footprint. An encoder's key is a slug and a hash of its weights; a user may ask for it by
either, or by a registered name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16
from zarr.codecs import ZstdCodec

from pipeline.console import write_json_atomic
from pipeline.regions import Region

TOKEN_CHUNK = 32


@dataclass(frozen=True)
class TokenLattice:
    """The tokens of one footprint whose centres lie in a region.

    Token (i, j) has its centre at (y_px + i · footprint_px, x_px + j · footprint_px), in level-0
    px from the region's corner (the corner of its first pixel, whose centre is at 0.5).
    """

    values: Float16[np.ndarray, "gy gx d"]
    footprint_px: int
    y_px: float
    x_px: float


class Embeddings:
    """The embeddings of a store; a part of `pipeline.store.Store`."""

    path: Path

    def register_encoder(self, encoder_key: str, attributes: Mapping[str, Any]) -> None:
        """Describe an encoder; `attributes["names"]` are the strings under which a user may ask
        for it.
        """
        write_group(self.path / "embeddings" / encoder_key, dict(attributes))

    def encoder_attributes(self, encoder_key: str) -> dict[str, Any]:
        """What `register_encoder` was told."""
        item = self.path / "embeddings" / encoder_key / "zarr.json"
        return json.loads(item.read_text())["attributes"]

    def encoders(self) -> list[str]:
        """The keys of all registered encoders."""
        return sorted(p.parent.name for p in (self.path / "embeddings").glob("*/zarr.json"))

    def footprints(self, encoder_key: str) -> list[int]:
        """The footprints, in level-0 px, for which an encoder has embedded images."""
        folder = self.path / "embeddings" / encoder_key
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

    def resolve_encoder(self, name: str) -> str:
        """The key of the encoder that a user calls `name`: key, slug or registered name."""
        keys = self.encoders()
        matches = [k for k in keys if name == k] or [
            k
            for k in keys
            if name == k.rpartition("-")[0] or name in self.encoder_attributes(k).get("names", ())
        ]
        if len(matches) == 1:
            return matches[0]
        there = ", ".join(matches or keys) or "none"
        problem = "is ambiguous" if matches else "has not embedded"
        raise ValueError(
            f"encoder {name!r} {problem} {self.path}: {there} there; name one of these, or run "
            "python -m conditioning.embed with it first"
        )

    def write_embedding(
        self,
        encoder_key: str,
        footprint: int,
        image_id: str,
        values: Float16[np.ndarray, "gy gx d"],
        attributes: Mapping[str, Any],
    ) -> None:
        """Write the tokens of one image, in one step; token (i, j) covers rows [i·f, (i+1)·f),
        columns likewise.
        """
        folder = self.path / "embeddings" / encoder_key / str(footprint)
        if not (folder / "zarr.json").is_file():
            write_group(folder, {"footprint_px": footprint})
        temporary = folder / f".{image_id}.{os.getpid()}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        zarr.create_array(
            str(temporary),
            data=values,
            chunks=(TOKEN_CHUNK, TOKEN_CHUNK, values.shape[2]),
            fill_value=0,
            compressors=ZstdCodec(level=1),
            dimension_names=("y", "x", "d"),
            attributes=dict(attributes),
        )
        target = folder / image_id
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)

    def has_embedding(self, encoder_key: str, footprint: int, image_id: str) -> bool:
        """Whether the tokens of one image are there."""
        return (self._embedding_path(encoder_key, footprint, image_id) / "zarr.json").is_file()

    def embedding(
        self, encoder_key: str, footprint: int, image_id: str
    ) -> Float16[np.ndarray, "gy gx d"]:
        """The tokens of one image."""
        return np.asarray(self._tokens(encoder_key, footprint, image_id)[...])

    def region_tokens(self, encoder_key: str, region: Region) -> list[TokenLattice]:
        """The tokens whose centres lie in `region`: one lattice for each footprint."""
        lattices = []
        for footprint in self.footprints(encoder_key):
            if not self.has_embedding(encoder_key, footprint, region.image):
                continue
            tokens = self._tokens(encoder_key, footprint, region.image)
            top, bottom = _centres_within(region.y, region.side, footprint, tokens.shape[0])
            left, right = _centres_within(region.x, region.side, footprint, tokens.shape[1])
            if top < bottom and left < right:
                lattices.append(
                    TokenLattice(
                        values=np.asarray(tokens[top:bottom, left:right]),
                        footprint_px=footprint,
                        y_px=(top + 0.5) * footprint - region.y,
                        x_px=(left + 0.5) * footprint - region.x,
                    )
                )
        return lattices

    def _embedding_path(self, encoder_key: str, footprint: int, image_id: str) -> Path:
        return self.path / "embeddings" / encoder_key / str(footprint) / image_id

    def _tokens(self, encoder_key: str, footprint: int, image_id: str) -> zarr.Array:
        if not self.has_embedding(encoder_key, footprint, image_id):
            raise ValueError(
                f"{self.path} has no embedding of {image_id} by {encoder_key} at footprint "
                f"{footprint}; run python -m conditioning.embed"
            )
        return zarr.open_array(
            str(self._embedding_path(encoder_key, footprint, image_id)), mode="r"
        )


def _centres_within(start: int, side: int, footprint: int, count: int) -> tuple[int, int]:
    """The tokens first .. last + 1 of a row of `count` with start <= (i + 1/2) · footprint < start
    + side.
    """
    first = -(-(2 * start - footprint) // (2 * footprint))
    last = -(-(2 * (start + side) - footprint) // (2 * footprint))
    return max(first, 0), min(last, count)


def write_group(path: Path, attributes: dict[str, Any]) -> None:
    """Write the metadata of a zarr group, in one step."""
    write_json_atomic(
        path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    )
