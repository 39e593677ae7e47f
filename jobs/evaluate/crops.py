"""Which 256 px crops stand for the painted images and which for the real ones.

Painted crops tile every painted image from its corner; real crops tile the regions of the store
that were held out, without overlap. Crops of a slide are taken as they come, glass included: a
region passed the store's least tissue as a whole, and so did the condition of a painted image.
Real crops of aerial images must be wholly valid data; painted pixels are never missing, so a
painted crop only has to lie where 99 % of what conditioned it is valid: its region and, beyond it,
the region's reflection or the regions beside it.
Where there are more crops than wanted, which are kept is keyed by the seed.

Crops that lie side by side are alike, so intervals and floors are drawn over *groups*: whole
images where there are enough, else square blocks of images, as large as leaves enough of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from conditioning.layout import recorded_layout
from jobs.evaluate.spectrum import CROP_PX
from pipeline.ome import OmeImage
from pipeline.regions import CELL_PX
from pipeline.store import Region, Store

MIN_REAL_CROPS = 4
"""Two for a distance, twice for its floor."""
MIN_VALID = 0.99
MIN_GROUPS, MAX_GROUPS = 16, 32
MAX_BLOCK_PX = 16_384
CANDIDATES_PER_CROP = 16


@dataclass(frozen=True, order=True)
class Crop:
    """256 px square of an image with its corner at (y, x); `bordered` where one more row and
    column may be read to see the step to the next crop.
    """

    image: str
    y: int
    x: int
    bordered: bool


@dataclass(frozen=True)
class Painted:
    """A painted image and the region that conditioned it. `in_store`: that region as the store's
    table has it now, if it does. `layout`: the regions of all squares of the image, its own alone
    where it was reflected (`conditioning.layout`).
    """

    name: str
    image: OmeImage
    region: Region
    in_store: Region | None
    layout: tuple[tuple[Region, ...], ...]
    run: Path


def find_painted(folder: Path, store: Store) -> tuple[list[Painted], dict[str, str]]:
    """The images that `jobs.sample` recorded in `folder`; the names of those that cannot be
    compared with the store, and why.
    """
    table = {(r.image, r.y, r.x, r.side): r for r in store.regions()}
    painted, failures = [], {}
    for file in sorted(folder.glob("*.json")):
        record = _record(file)
        if record is None:
            continue
        if "region" not in record["identity"]:
            failures[file.stem] = "it was painted without a condition, so after no region"
            continue
        region = Region(**record["identity"]["region"])
        try:
            image = OmeImage.open(folder / record["image"])
            _check_comparable(image, store)
            layout = recorded_layout(record["identity"], store, region)
        except ValueError as mistake:
            failures[file.stem] = str(mistake)
            continue
        in_store = table.get((region.image, region.y, region.x, region.side))
        run = Path(record["identity"]["run"])
        painted.append(Painted(file.stem, image, region, in_store, layout, run))
    if not painted:
        why = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise ValueError(
            f"{folder} holds no painted image to compare with {store.path}"
            f"{f' ({why})' if why else ''}; paint some with python -m jobs.sample --out {folder}"
        )
    return painted, failures


def _record(file: Path) -> dict[str, Any] | None:
    """What `jobs.sample` wrote beside an image; None for any other JSON file."""
    try:
        record = json.loads(file.read_text())
        return record if "run" in record["identity"] and record["image"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _check_comparable(image: OmeImage, store: Store) -> None:
    spec = store.spec
    if (image.bands, image.dtype) != (spec.bands, spec.dtype):
        raise ValueError(
            f"it has the bands {','.join(image.bands)} as {image.dtype} and the store "
            f"{','.join(spec.bands)} as {spec.dtype}"
        )
    if not np.isclose(image.spacing, spec.spacing):
        raise ValueError(
            f"its pixels are {image.spacing:g} {spec.unit} and the store's {spec.spacing:g}; "
            "paint it with --scale 1"
        )
    if min(image.shape[1:]) < CROP_PX:
        raise ValueError(
            f"it is {image.shape[1]}x{image.shape[2]} px, less than a {CROP_PX} px crop"
        )
    if not image.is_complete():
        raise ValueError("parts of it are missing; run the command that paints it again")


def painted_crops(painted: Sequence[Painted], store: Store, limit: int, seed: int) -> list[Crop]:
    """Crops of painted images, in the order of images and rows."""
    crops = []
    for item in painted:
        _, height, width = item.image.shape
        valid = _valid_data(item, store)
        for y in range(0, height - CROP_PX + 1, CROP_PX):
            for x in range(0, width - CROP_PX + 1, CROP_PX):
                if valid is None or crop_is_valid(valid, y, x):
                    bordered = y + CROP_PX < height and x + CROP_PX < width
                    crops.append(Crop(item.name, y, x, bordered))
    return sorted(keyed(crops, seed)[:limit])


Valid = list[list[Bool[np.ndarray, "side side"]]]


def _valid_data(item: Painted, store: Store) -> Valid | None:
    """Where the regions of a painted image are valid data; None where that is no question."""
    present = store.image_ids()
    for region in {region for row in item.layout for region in row}:
        if region.image not in present or store.mask_kind(region.image) == "tissue":
            return None
    return [[store.mask(r.image, r.y, r.x, r.side, r.side) for r in row] for row in item.layout]


def crop_is_valid(valid: Valid, y: int, x: int) -> bool:
    """Whether a crop lies on valid data: of the regions side by side, or of the only one,
    reflected.
    """
    side = len(valid[0][0])
    rows, columns = (start + np.arange(CROP_PX) for start in (y, x))
    if len(valid) == len(valid[0]) == 1:
        rows, columns = (
            np.minimum(i % (2 * side), -(i + 1) % (2 * side)) for i in (rows, columns)
        )
    covered = sum(
        valid[i][j][
            np.ix_(rows[rows // side == i] % side, columns[columns // side == j] % side)
        ].sum()
        for i in np.unique(rows // side)
        for j in np.unique(columns // side)
    )
    return bool(covered >= MIN_VALID * CROP_PX**2)


def real_crops(store: Store, limit: int, seed: int) -> tuple[list[Crop], str]:
    """Crops of real regions, in the order of images and rows, and the splits they are from."""
    regions = store.regions()
    held_out = [region for region in regions if region.split != "train"]
    crops = _crops_of(store, held_out, limit, seed)
    if len(crops) >= MIN_REAL_CROPS:
        return crops, "+".join(sorted({region.split for region in held_out})) + " (held out)"
    few = f"the held-out regions have {len(crops)} crops" if held_out else "none is held out"
    crops = _crops_of(store, regions, limit, seed)
    if len(crops) < MIN_REAL_CROPS:
        raise ValueError(
            f"{store.path} has {len(crops)} real crops of {CROP_PX} px in its {len(regions)} "
            f"regions and a distance with its floor needs at least {MIN_REAL_CROPS}; ingest more, "
            f"or with --region {CROP_PX} or more"
        )
    return crops, f"all, training included ({few})"


def _crops_of(store: Store, regions: Sequence[Region], limit: int, seed: int) -> list[Crop]:
    # Of very many regions only as many are looked at as leave a wide choice.
    wanted, chosen = CANDIDATES_PER_CROP * limit, []
    for region in keyed(list(regions), seed):
        if wanted <= 0:
            break
        chosen.append(region)
        wanted -= (region.side // CROP_PX) ** 2
    taken: dict[str, Bool[np.ndarray, "gy gx"]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    candidates, span = [], CROP_PX // CELL_PX
    for r in sorted(chosen, key=lambda r: (r.image, r.y, r.x)):
        if r.image not in taken:
            _, height, width = store.image(r.image).shape
            shapes[r.image] = height, width
            taken[r.image] = np.zeros((-(-height // CELL_PX), -(-width // CELL_PX)), bool)
        height, width = shapes[r.image]
        for y in range(r.y, r.y + r.side - CROP_PX + 1, CROP_PX):
            for x in range(r.x, r.x + r.side - CROP_PX + 1, CROP_PX):
                row, column = y // CELL_PX, x // CELL_PX
                cells = taken[r.image][row : row + span, column : column + span]
                if not cells.any():
                    cells[:] = True
                    bordered = y + CROP_PX < height and x + CROP_PX < width
                    candidates.append(Crop(r.image, y, x, bordered))
    kinds = {name: store.mask_kind(name) for name in shapes}
    crops: list[Crop] = []
    for crop in keyed(candidates, seed):
        if len(crops) == limit:
            break
        if kinds[crop.image] == "tissue":
            crops.append(crop)
            continue
        side = CROP_PX + crop.bordered
        valid = store.mask(crop.image, crop.y, crop.x, side, side)
        if valid[:CROP_PX, :CROP_PX].all():
            crops.append(Crop(crop.image, crop.y, crop.x, crop.bordered and bool(valid.all())))
    return sorted(crops)


def keyed(items: list[Any], seed: int) -> list[Any]:
    """The items in an order that the seed decides."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


@dataclass(frozen=True)
class Groups:
    """A partition of crops by their numbers, and how it was made."""

    members: list[Int64[np.ndarray, " _"]]
    how: str


def group(crops: Sequence[Crop]) -> Groups:
    """Partition crops into at least 16 groups, where there are as many crops."""
    images = {crop.image for crop in crops}
    if len(images) >= MIN_GROUPS:
        return _partition([(crop.image,) for crop in crops], "whole images")
    among = f" of {len(images)} image{'s' * (len(images) > 1)}"
    block_px = MAX_BLOCK_PX
    while block_px > CROP_PX:
        places = [(c.image, c.y // block_px, c.x // block_px) for c in crops]
        if len(set(places)) >= MIN_GROUPS:
            return _partition(places, f"blocks of {block_px} px{among}")
        block_px //= 2
    return _partition([(c.image, c.y, c.x) for c in crops], f"single crops{among}")


def _partition(keys: Sequence[tuple[Any, ...]], what: str) -> Groups:
    number = {key: i % MAX_GROUPS for i, key in enumerate(sorted(set(keys)))}
    groups: list[list[int]] = [[] for _ in range(min(len(number), MAX_GROUPS))]
    for i, key in enumerate(keys):
        groups[number[key]].append(i)
    return Groups(
        [np.array(members, np.int64) for members in groups], f"{len(groups)} groups of {what}"
    )


def disjoint_draws(
    groups: Groups, size: int, seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]:
    """Two draws of the crops that share no group: one of at most `size`, and what is left.

    The first has the size asked for unless groups are so large that the second would be smaller.
    """
    total = sum(len(indices) for indices in groups.members)
    first: list[int] = []
    second: list[int] = []
    for indices in keyed(groups.members, seed):
        fits = len(first) < size and len(first) + len(indices) <= max(total - size, 1)
        (first if fits else second).extend(indices.tolist())
    return np.array(first[:size], np.int64), np.array(second, np.int64)
