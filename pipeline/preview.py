"""Pictures to look at: of an image its thumbnail, the outline of its tissue or valid data, its
regions coloured by split; of all images one sheet of these, with name and state.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pipeline.console import write_bytes_atomic
from pipeline.ome import OmeImage
from pipeline.regions import Region
from pipeline.store import Store

MAX_SIDE_PX, MIN_SIDE_PX = 1024, 384
COLOURS = {"train": (0, 140, 60), "val": (30, 90, 230), "test": (235, 120, 0)}
OUTLINE = (255, 230, 0)
BRIGHT_PERCENTILE = 99.5
TILE_PX, MIN_TILE_PX, CAPTION_PX, MAX_CAPTION = 256, 64, 34, 120
MAX_SHEET_PX, MAX_SHEET_IMAGES, SHEET_ASPECT = 8000, 10_000, 1.3
BAD = (190, 20, 20)


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


def draw_contact_sheet(store: Store) -> Path:
    """Draw all images of the store, those that failed too, on one sheet.

    Thumbnails shrink as images grow in number, so that no side is much beyond `MAX_SHEET_PX`; of
    more than `MAX_SHEET_IMAGES` only the first are shown.
    """
    states = dict(list(store.image_states().items())[:MAX_SHEET_IMAGES])
    columns = max(1, math.ceil(math.sqrt(SHEET_ASPECT * len(states))))
    rows = -(-len(states) // columns)
    tile = max(MIN_TILE_PX, min(TILE_PX, MAX_SHEET_PX // max(columns, rows) - CAPTION_PX))
    sheet = Image.new("RGB", (columns * tile, max(1, rows) * (tile + CAPTION_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(CAPTION_PX // 2 - 3)
    for number, (name, state) in enumerate(states.items()):
        row, column = divmod(number, columns)
        left, top = column * tile, row * (tile + CAPTION_PX)
        preview = store.preview_path(name)
        if preview.is_file():
            with Image.open(preview) as picture:
                picture.thumbnail((tile - 4, tile - 4))
                sheet.paste(picture, (left + 2, top + 2))
        lines = (Path(state["source"]).name, state["state"])
        if state["state"] != "ok":
            pen.rectangle((left, top, left + tile - 1, top + tile - 1), outline=BAD, width=2)
            lines = (lines[0], f"{state['state']}: {state['reason']}")
        for line, text in enumerate(lines):
            place = (left + 3, top + tile + line * CAPTION_PX // 2)
            colour = (0, 0, 0) if state["state"] == "ok" or line == 0 else BAD
            pen.text(place, _fitting(pen, text, tile - 6, font), fill=colour, font=font)
    payload = io.BytesIO()
    sheet.save(payload, "jpeg", quality=88)
    write_bytes_atomic(store.contact_sheet_path, payload.getvalue())
    return store.contact_sheet_path


def _fitting(pen: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    """`text` in one line of at most `width` px, its end cut off if need be."""
    text = " ".join(text.split())[:MAX_CAPTION]
    length = pen.textlength(text, font)
    if length <= width:
        return text
    text = text[: math.ceil(len(text) * width / length)]
    while text and pen.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"


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
