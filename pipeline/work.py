"""The tasks of an ingest. Each owns whole shards, runs anywhere, and may run twice with the same
result.

A small image is one task from template to mask; several small ones share a task. A large image has
a task for each shard of level 0, and one at its end for the coarse levels, the tissue mask and the
coverage.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt, UInt16

from pipeline.ome import OmeImage
from pipeline.places import place_attributes
from pipeline.plan import ImageJob
from pipeline.readers import TileError
from pipeline.regions import CELL_PX
from pipeline.resample import Resampled
from pipeline.store import UNITS, Store
from pipeline.tissue import tissue_mask

TISSUE_LEVEL = 4
COVERAGE_ROWS_PX = 1024
_HOST = socket.gethostname()


@dataclass(frozen=True)
class Outcome:
    """How a task ended for one image, and on which machine: `ok` may still be without an end,
    which `state` has once there is one.
    """

    image_id: str
    state: Literal["working", "ok", "empty", "failed"]
    reason: str
    seconds: float
    node: str = field(default_factory=lambda: os.environ.get("SLURMD_NODENAME", _HOST))


def open_template(store_path: Path, job: ImageJob) -> OmeImage:
    """The image of `job` in the store, laid out if it was not."""
    store = Store.open(store_path)
    source = job.source
    with source.open() as reader:
        scale = Resampled(reader, job.spacing).scale
        kind, attributes = reader.mask_kind, place_attributes(reader.attributes, scale)
    provenance = {
        "source": str(source.path),
        "native_spacing": job.native_spacing,
        "spacing_source": job.spacing_source,
        "patient": source.patient,
    }
    image = OmeImage.create(
        store.image_path(job.image_id),
        job.shape,
        store.spec.dtype,
        job.spacing,
        UNITS[store.spec.unit],
        store.spec.bands,
        {**attributes, "gigabrush": provenance},
    )
    store.create_label(image, kind, 1 if kind == "valid" else CELL_PX)
    return image


def ingest_images(store_path: Path, jobs: list[ImageJob]) -> list[Outcome]:
    """Bring small images in, each from template to end; one that fails stops no other."""
    outcomes = []
    for job in jobs:
        started = time.monotonic()
        state: Literal["ok", "empty", "failed"]
        try:
            image = open_template(store_path, job)
            keys = [key for key in image.shard_keys() if not image.has_shard(key)]
            _write_shards(Store.open(store_path), job, image, keys)
            state, reason = _finish(Store.open(store_path), job, image)
        except Exception as error:
            state, reason = "failed", _reason(job, error)
        outcomes.append(Outcome(job.image_id, state, reason, time.monotonic() - started))
    return outcomes


def ingest_shard(store_path: Path, job: ImageJob, key: tuple[int, int]) -> list[Outcome]:
    """Write one shard of a large image, and the same part of its mask."""
    started = time.monotonic()
    store = Store.open(store_path)
    state: Literal["working", "failed"] = "working"
    reason = ""
    try:
        _write_shards(store, job, store.image(job.image_id), [key])
    except Exception as error:
        state, reason = "failed", _reason(job, error)
    return [Outcome(job.image_id, state, reason, time.monotonic() - started)]


def _reason(job: ImageJob, error: Exception) -> str:
    """What befell an image: the sentence of an error that has one, else its kind as well."""
    if isinstance(error, (TileError, ValueError, OSError)):
        return str(error)
    return f"{job.source.path} cannot be ingested ({type(error).__name__}: {error})"


def finish_image(store_path: Path, job: ImageJob) -> list[Outcome]:
    """End a large image whose shards are all written."""
    started = time.monotonic()
    store = Store.open(store_path)
    state, reason = _finish(store, job, store.image(job.image_id))
    return [Outcome(job.image_id, state, reason, time.monotonic() - started)]


def _write_shards(
    store: Store, job: ImageJob, image: OmeImage, keys: list[tuple[int, int]]
) -> None:
    with job.source.open() as reader:
        target = Resampled(reader, job.spacing)
        label = store.label(job.image_id)
        for key in keys:
            box = image.shard_box(key)
            if reader.mask_kind == "valid":
                label.write_shard(key, target.read_valid(*box)[None].astype(np.uint8))
            image.write_shard(key, target.read(*box))


def _finish(store: Store, job: ImageJob, image: OmeImage) -> tuple[Literal["ok", "empty"], str]:
    """Complete the pyramids and find where the content is."""
    image.finish()
    label = store.label(job.image_id)
    if store.mask_kind(job.image_id) == "tissue":
        mask = tissue_mask(_picture(image))
        for key in label.shard_keys():
            y, x, height, width = label.shard_box(key)
            part = mask[None, y : y + height, x : x + width]
            label.write_shard(key, part.astype(np.uint8))
        counts = _pixels_in_cells(mask, image.shape[1], image.shape[2])
        nothing = "no tissue was found"
    else:
        counts = _count_valid(label)
        nothing = "no valid data"
    label.finish()
    store.write_coverage(job.image_id, counts)
    if counts.any():
        return "ok", ""
    shutil.rmtree(image.path)
    return "empty", nothing


def _picture(image: OmeImage) -> UInt[np.ndarray, "3 h w"]:
    """The red, green and blue of `image`, one pixel per cell of 16 px."""
    level = min(TISSUE_LEVEL, image.num_levels - 1)
    _, height, width = image.level_shape(level)
    picture = image.read(0, 0, height, width, level)[:3]
    return _box_means(picture, 1 << (TISSUE_LEVEL - level))


def _box_means(picture: UInt[np.ndarray, "3 h w"], side: int) -> UInt[np.ndarray, "3 h2 w2"]:
    """Means over squares of `side` px, those at the far edges over what is there of them."""
    if side == 1:
        return picture
    ys, xs = (np.arange(0, n, side) for n in picture.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(picture, ys, axis=1, dtype=np.int64), xs, axis=2)
    height, width = (
        np.diff(np.append(edges, n)) for edges, n in zip((ys, xs), picture.shape[1:], strict=True)
    )
    return (sums / (height[:, None] * width) + 0.5).astype(picture.dtype)


def _pixels_in_cells(
    mask: Bool[np.ndarray, "gy gx"], height: int, width: int
) -> UInt16[np.ndarray, "gy gx"]:
    """How many pixels of an image of height × width lie in each cell of `mask` that is set."""
    ys, xs = (np.minimum(CELL_PX, n - np.arange(0, n, CELL_PX)) for n in (height, width))
    return (mask * (ys[:, None] * xs)).astype(np.uint16)


def _count_valid(label: OmeImage) -> UInt16[np.ndarray, "gy gx"]:
    """How many valid pixels each cell of 16 px has, from a mask at full resolution."""
    _, height, width = label.shape
    columns = np.arange(0, width, CELL_PX)
    bands = []
    for top in range(0, height, COVERAGE_ROWS_PX):
        rows = label.read(top, 0, min(COVERAGE_ROWS_PX, height - top), width)[0]
        sums = np.add.reduceat(rows, np.arange(0, len(rows), CELL_PX), axis=0, dtype=np.uint16)
        bands.append(np.add.reduceat(sums, columns, axis=1, dtype=np.uint16))
    return np.concatenate(bands)
