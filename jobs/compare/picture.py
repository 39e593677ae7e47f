"""The picture of a comparison: a real region and what each contestant painted after it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.pictures import liveliest, reduced
from jobs.run import Run
from pipeline.ome import OmeImage
from pipeline.store import Region, Store

PICTURE_PX = 512
CROP_PX = 512
GAP_PX = 8


def draw_picture(
    file: Path, store: Store, region: Region, contestants: Sequence[Path], size: int
) -> None:
    """The real region and what each contestant painted after it: whole, and a piece at full
    resolution below.
    """
    config = Run(contestants[0] / "run").config()
    side = min(region.side, size)
    crop = min(side, CROP_PX)
    real = store.image(region.image)
    dy, dx = liveliest(real, region.y, region.x, side, crop)
    columns = [(real, region.y, region.x)]
    for folder in contestants:
        records = (json.loads(path.read_text()) for path in (folder / "images").glob("*.json"))
        (own,) = (r for r in records if r["identity"]["region"]["index"] == region.index)
        columns.append((OmeImage.open(folder / "images" / own["image"]), 0, 0))
    rows = []
    for y, x, extent in ((0, 0, side), (dy, dx, crop)):
        shown = [
            reduced(image, y0 + y, x0 + x, extent, extent, config, PICTURE_PX)
            for image, y0, x0 in columns
        ]
        gap = np.full((shown[0].shape[0], GAP_PX, 3), 255, np.uint8)
        rows.append(np.concatenate([part for one in shown for part in (one, gap)][:-1], axis=1))
    between = np.full((GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    temporary = file.with_name(f".{file.name}.partial")
    Image.fromarray(np.concatenate([rows[0], between, rows[1]])).save(temporary, "png")
    temporary.replace(file)
