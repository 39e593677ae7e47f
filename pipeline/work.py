"""The tasks of an ingest. Each owns whole shards, runs anywhere, and may run twice with the same
result.

A small image is one task from template to mask; several small ones share a task. A large image has
a task for each shard of level 0, and one at its end for the coarse levels, the tissue mask, the
coverage and the outlines. What a full disk does to a task is not its image's fault: the error
leaves the task, and the coordinator stops.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, UInt, UInt16

from pipeline.console import is_disk_full
from pipeline.memory import keep_freed_memory
from pipeline.ome import OmeImage
from pipeline.outline import tissue_features
from pipeline.plan import ImageJob
from pipeline.preview import draw_previews
from pipeline.readers import TileError, open_reader
from pipeline.regions import CELL_PX
from pipeline.resample import Resampled
from pipeline.store import UNITS, Store
from pipeline.tissue import find_tissue

COVERAGE_ROWS_PX = 1024
STRIP_PX = 512
_HOST = socket.gethostname()


@dataclass(frozen=True)
class Outcome:
    """How a task ended for one image, and on which machine; `working` is no end yet. `facts` is
    what was found out about the image.
    """

    image_id: str
    state: Literal["working", "ok", "empty", "failed"]
    reason: str
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    node: str = field(default_factory=lambda: os.environ.get("SLURMD_NODENAME", _HOST))


def open_template(store_path: Path, job: ImageJob) -> OmeImage:
    """The image of `job` in the store, laid out if it was not."""
    store = Store.open(store_path)
    source = job.source
    with open_reader(source.path, source_mpp=source.mpp, source_gsd=source.gsd) as reader:
        kind, attributes = reader.mask_kind, _georeference(reader.attributes, job)
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
        try:
            image = open_template(store_path, job)
            keys = [key for key in image.shard_keys() if not image.has_shard(key)]
            _write_shards(Store.open(store_path), job, image, keys)
            outcomes.append(_finish(Store.open(store_path), job, image, started))
        except Exception as error:
            outcomes.append(_failed(job, error, started))
    return outcomes


def ingest_shard(store_path: Path, job: ImageJob, key: tuple[int, int]) -> list[Outcome]:
    """Write one shard of a large image, and the same part of its mask."""
    started = time.monotonic()
    store = Store.open(store_path)
    try:
        _write_shards(store, job, store.image(job.image_id), [key])
    except Exception as error:
        return [_failed(job, error, started)]
    return [Outcome(job.image_id, "working", "", time.monotonic() - started)]


def _failed(job: ImageJob, error: Exception, started: float) -> Outcome:
    """What befell an image: the sentence of an error that has one, else its kind as well."""
    if is_disk_full(error):
        raise error
    reason = str(error)
    if not isinstance(error, (TileError, ValueError, OSError)):
        reason = f"{job.source.path} cannot be ingested ({type(error).__name__}: {error})"
    return Outcome(job.image_id, "failed", reason, time.monotonic() - started)


def finish_image(store_path: Path, job: ImageJob) -> list[Outcome]:
    """End a large image whose shards are all written."""
    started = time.monotonic()
    store = Store.open(store_path)
    return [_finish(store, job, store.image(job.image_id), started)]


def _write_shards(
    store: Store, job: ImageJob, image: OmeImage, keys: list[tuple[int, int]]
) -> None:
    source = job.source
    keep_freed_memory()
    with open_reader(source.path, source_mpp=source.mpp, source_gsd=source.gsd) as reader:
        target = Resampled(reader, job.spacing)
        label = store.label(job.image_id)
        for key in keys:
            box = image.shard_box(key)
            if reader.mask_kind == "valid":
                pixels, valid = _read_with_valid(target, *box)
                label.write_shard(key, valid.astype(np.uint8))
                image.write_shard(key, pixels)
            else:
                image.write_shard(key, target.read(*box))


def _read_with_valid(
    target: Resampled, y: int, x: int, height: int, width: int
) -> tuple[UInt[np.ndarray, "c h w"], Bool[np.ndarray, "1 h w"]]:
    """The pixels of a box and which of them are data, strip by strip, so that what a reader has
    decoded for the one is still in its cache for the other.
    """
    pixels = np.empty((target.shape[0], height, width), target.reader.dtype)
    valid = np.empty((1, height, width), bool)
    for top in range(0, height, STRIP_PX):
        box = (y + top, x, min(STRIP_PX, height - top), width)
        pixels[:, top : top + STRIP_PX] = target.read(*box)
        valid[0, top : top + STRIP_PX] = target.read_valid(*box)
    return pixels, valid


def _finish(store: Store, job: ImageJob, image: OmeImage, started: float) -> Outcome:
    """Complete the pyramids and find where the content is."""
    image.finish()
    label = store.label(job.image_id)
    facts: dict[str, Any] = {}
    if store.mask_kind(job.image_id) == "tissue":
        tissue = find_tissue(image)
        for key in label.shard_keys():
            y, x, height, width = label.shard_box(key)
            part = tissue.mask[None, y : y + height, x : x + width]
            label.write_shard(key, part.astype(np.uint8))
        counts = _pixels_in_cells(tissue.mask, image.shape[1], image.shape[2])
        nothing, facts = "no tissue was found", {"tissue": tissue.facts}
        features = tissue_features(tissue.mask, *image.shape[1:], _scale(job))
        store.write_outlines(job.image_id, features)
    else:
        counts = _count_valid(label)
        nothing = "no valid data"
    label.finish()
    store.write_coverage(job.image_id, counts)
    state: Literal["ok", "empty"] = "ok" if counts.any() else "empty"
    if state == "empty":
        draw_previews(store.path, [(job.image_id, [])])
        shutil.rmtree(image.path)
    reason = "" if state == "ok" else nothing
    return Outcome(job.image_id, state, reason, time.monotonic() - started, facts)


def _scale(job: ImageJob) -> float:
    """The side of a store pixel in pixels of the file, as they are read: spacings that hardly
    differ are one.
    """
    source = job.source
    with open_reader(source.path, source_mpp=source.mpp, source_gsd=source.gsd) as reader:
        target = Resampled(reader, job.spacing)
        return target.factor * reader.downsamples[target.level]


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


def _georeference(attributes: dict[str, Any], job: ImageJob) -> dict[str, Any]:
    """What the reader keeps, its transform scaled to the target's pixels."""
    transform = attributes.get("spatial:transform")
    if transform is None:
        return attributes
    scale = job.spacing / job.native_spacing
    a, b, c, d, e, f = transform
    return {
        **attributes,
        "spatial:transform": [a * scale, b * scale, c, d * scale, e * scale, f],
    }
