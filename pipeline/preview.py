"""A picture of an image: its thumbnail, the outline of its tissue or valid data, its regions
coloured by split.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt, UInt8
from PIL import Image, ImageDraw, PngImagePlugin

from pipeline.console import write_bytes_atomic
from pipeline.ome import OmeImage
from pipeline.regions import Region
from pipeline.store import Store

MAX_SIDE_PX, MIN_SIDE_PX = 1024, 384
COLOURS = {"train": (0, 140, 60), "val": (30, 90, 230), "test": (235, 120, 0)}
OUTLINE = (255, 230, 0)
BRIGHT_PERCENTILE = 99.5


def draw_previews(store_path: Path, images: Sequence[tuple[str, list[Region]]]) -> None:
    """Draw the preview of every image that has none for exactly these regions."""
    store = Store.open(store_path)
    for image_id, regions in images:
        target = store.preview_path(image_id)
        stamp = _stamp(regions)
        if target.is_file():
            with Image.open(target) as old:
                if old.info.get("regions") == stamp:
                    continue
        picture = _draw(store.image(image_id), store.label(image_id), regions)
        notes = PngImagePlugin.PngInfo()
        notes.add_text("regions", stamp)
        payload = io.BytesIO()
        picture.save(payload, "png", pnginfo=notes)
        write_bytes_atomic(target, payload.getvalue())


def _draw(image: OmeImage, label: OmeImage, regions: Sequence[Region]) -> Image.Image:
    level = next(
        k for k in range(image.num_levels) if max(image.level_shape(k)[1:]) <= MAX_SIDE_PX
    )
    _, height, width = image.level_shape(level)
    picture = _eight_bits(image.read(0, 0, height, width, level)[:3])
    cell = int(label.attributes["cell_px"])
    coarse = max(0, level - cell.bit_length() + 1)
    mask = label.read(0, 0, *label.level_shape(coarse)[1:], coarse)[0] > 0
    side = cell * 2**coarse / 2**level
    rows, columns = ((np.arange(n) / side).astype(int) for n in (height, width))
    edge = _outline(
        mask[np.minimum(rows, len(mask) - 1)[:, None], np.minimum(columns, mask.shape[1] - 1)]
    )
    picture[:, edge] = np.array(OUTLINE, np.uint8)[:, None]
    canvas = Image.fromarray(np.moveaxis(picture, 0, 2))
    zoom = max(1, -(-MIN_SIDE_PX // max(height, width)))
    canvas = canvas.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    scale = zoom / 2**level
    for r in sorted(regions, key=lambda r: r.split != "train"):
        box = (r.x * scale, r.y * scale, (r.x + r.side) * scale - 1, (r.y + r.side) * scale - 1)
        pen.rectangle(box, outline=COLOURS[r.split], width=2)
    return canvas


def _outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Set pixels that have an unset neighbour."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _eight_bits(picture: UInt[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "3 h w"]:
    """`picture` for the eye; 16 bits are scaled to their brightest percentile."""
    if picture.dtype == np.uint8:
        return picture.astype(np.uint8)
    bright = max(1.0, float(np.percentile(picture, BRIGHT_PERCENTILE)))
    return (picture / bright * 255).clip(0, 255).astype(np.uint8)


def _stamp(regions: Sequence[Region]) -> str:
    content = [(r.y, r.x, r.side, r.split) for r in regions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
