"""Painted images against the regions that conditioned them, and matched floors.

    python tests/benchmarks/crop_fid.py --real dataset.zarr --generated images --out crop_fid.json

Crops, groups, draws, intervals and features (EfficientNet-lite0, `jobs.evaluate.lite0`) are those
of jobs.evaluate, which compares with held-out crops only and knows one floor.

Every folder is compared twice: with the real crops that jobs.evaluate takes (held out, where there
are enough), and with those of the very regions that conditioned its images, as far as the images
reach. Crop FID has two floors. That of jobs.evaluate, and of KID, is another part of the same
images, which is far where they vary. The matched one is what random halves of the same real crops
score; the value beside it is at its numbers of crops, and near 1 times it for a perfect painting
of the regions compared with. Blur of 0.7 px scores 2.5 times the matched floor and blur of 1.5 px
9.7 times on a phantom region of 4096 px (2.7 and 16.8 on H&E); one region of a varied store,
copied, scores many times the floor of the whole store.
"""

import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conditioning.encoders import choose_device
from jobs.evaluate.comparison import FLOOR_DRAWS, distances, octaves, seams
from jobs.evaluate.crops import (
    MIN_REAL_CROPS,
    Crop,
    _crops_of,
    find_painted,
    group,
    keyed,
    painted_crops,
    real_crops,
)
from jobs.evaluate.features import columns_of
from jobs.evaluate.lite0 import Lite0Space, load_lite0
from jobs.evaluate.measure import Measured, measure
from jobs.evaluate.metrics import frechet_between
from jobs.evaluate.spectrum import CROP_PX
from jobs.record import commit
from pipeline import console
from pipeline.store import Store


@dataclass(frozen=True)
class CropFid:
    """Compare painted images with real ones in the features of EfficientNet-lite0.

    python tests/benchmarks/crop_fid.py --real dataset.zarr --generated images more-images

    Each folder is compared with the store's real crops, and with the regions that conditioned it.
    """

    real: Path
    """The dataset store."""
    generated: tuple[Path, ...]
    """Folders of images that jobs.sample painted."""
    out: Path | None = None
    """The JSON file to write."""
    max_crops: int = 10_000
    """At most so many crops on either side."""
    white_level: float | None = None
    """For uint16 images: the count that is white."""
    seed: int = 0
    """Another seed draws other crops, where there are more than --max-crops, and other floors."""


Side = tuple[list[Crop], Measured]


def compare(painted: Side, real: Side, space: Lite0Space, seed: int) -> dict[str, Any]:
    """Every number of painted crops against real ones."""
    (crops_a, a), (crops_b, b) = painted, real
    of_a, of_b = group(crops_a), group(crops_b)
    columns = columns_of(space)
    mid_a, mid_b = (m.features[:, columns["crop_fid"]] for m in (a, b))
    size, scores, floors = min(len(crops_a), len(crops_b) // 2), [], []
    for i in range(FLOOR_DRAWS):
        first, rest = np.split(keyed([*range(len(crops_b))], seed + i), [size])
        floors.append(frechet_between(mid_b[first], mid_b[rest]))
        drawn = keyed([*range(len(crops_a))], seed + i)[:size]
        scores.append(frechet_between(mid_a[drawn], mid_b[rest]))
    value, floor = float(np.mean(scores)), float(np.mean(floors))
    matched = {"value": value, "floor": floor, "times": value / floor if floor else None}
    matched |= {"n": size, "n_reference": len(crops_b) - size}
    return {
        "n": {"real": len(crops_b), "generated": len(crops_a)},
        "groups": {"real": of_b.how, "generated": of_a.how},
        **distances(a.features, of_a, b.features, of_b, columns, seed),
        "matched_crop_fid": matched,
        "octaves": octaves(b, a),
        "seams": seams(b, a)["periods"],
    }


def in_words(name: str, found: dict[str, Any]) -> str:
    """The lines of one comparison."""
    fid, matched, kid = (found[key] for key in ("crop_fid", "matched_crop_fid", "kid"))
    n, steps = found["n"], found["seams"]
    periods = ", ".join(str(row["period_px"]) for row in steps)
    real, painted = (_numbers([row[side] for row in steps]) for side in ("real", "generated"))
    ratios = _numbers([row["log2_ratio"] for row in found["octaves"]], "+.2f")
    return f"""  {name}: n = {n["real"]} real, {n["generated"]} generated
    Crop FID {fid["value"]:.4g}, 95 % interval {_numbers(fid["interval"])}; \
floor {fid["floor"]:.4g} ({fid["floor_n"]} against {fid["floor_n_reference"]})
    matched Crop FID {matched["value"]:.4g}, floor {matched["floor"]:.4g} \
({matched["n"]} against {matched["n_reference"]}): {_numbers([matched["times"]])} times
    KID {kid["value"]:.4g}, 95 % interval {_numbers(kid["interval"])}; floor {kid["floor"]:.2g}
    log2 of power generated / real, finest octave first: {ratios}
    seams at {periods} px: real {real}; generated {painted}"""


def _numbers(values: Sequence[float | None] | None, form: str = ".4g") -> str:
    return " ".join("-" if value is None else f"{value:{form}}" for value in values or [None])


def crop_fid(options: CropFid) -> int:
    """Run the command; returns its exit code."""
    store, device, seed = Store.open(options.real), choose_device("auto"), options.seed
    limit, images = options.max_crops, {name: store.image(name) for name in store.image_ids()}
    space = load_lite0(store, options.white_level, device)
    found: dict[str, Any] = {
        "protocol": " ".join(str(__doc__).split()),
        "features": space.label,
        "store": {"path": str(options.real), "fingerprint": store.fingerprint()},
        "max_crops": limit,
        "seed": seed,
        "commit": commit(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {device}, torch {torch.__version__}",
        "folders": {},
    }
    folders = {folder: find_painted(folder, store) for folder in options.generated}
    crops_of = {f: painted_crops(items, store, limit, seed) for f, (items, _) in folders.items()}
    for folder, crops in crops_of.items():
        if len(crops) < 2:
            raise ValueError(f"{folder} gives {len(crops)} crops of {CROP_PX} px; 2 are needed")
    crops, split = real_crops(store, limit, seed)
    real = crops, measure(crops, images, space, "real")
    for folder, (items, failed) in folders.items():
        crops = crops_of[folder]
        of_items = {item.name: item.image for item in items}
        painted = crops, measure(crops, of_items, space, "painted")
        results = {f"real crops of {split}": compare(painted, real, space, seed)}
        regions = {
            replace(region, side=min(region.side, *item.image.shape[1:]))
            for item in items
            for region in itertools.chain(*item.layout)
            if region.image in images
        }
        own = _crops_of(store, sorted(regions, key=lambda r: r.index), limit, seed)
        if len(own) >= MIN_REAL_CROPS:
            side = own, measure(own, images, space, "conditioning")
            results["real crops of the regions that conditioned"] = compare(
                painted, side, space, seed
            )
        found["folders"][str(folder)] = {"images": [*of_items], "failed": failed, **results}
        console.say(f"{folder}: {', '.join(of_items)}")
        for name, result in results.items():
            console.say(in_words(name, result))
    if options.out is not None:
        console.write_json_atomic(options.out, found)
    any_failed = any(part["failed"] for part in found["folders"].values())
    return console.EXIT_PARTIAL if any_failed else console.EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(console.run(CropFid, crop_fid, prog="python tests/benchmarks/crop_fid.py"))
