"""Painted against real, as the numbers of a metrics.json: each distance with its floor.

The floor of a distance is what real crops score against other real crops: a draw of as many as
were painted (at most half of the real ones) against all that is left, with no group in both, the
mean over a few such draws. A perfect model would score about that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jobs.evaluate.crops import Groups, Painted, disjoint_draws, keyed
from jobs.evaluate.measure import Measured
from jobs.evaluate.metrics import (
    Estimate,
    Features,
    KernelSums,
    LayoutMatch,
    crop_fid,
    frechet_between,
    kid,
    layout_distances,
    region_thumbnails,
)
from jobs.evaluate.spectrum import PERIODS_PX, SEAM_PX
from pipeline.store import Store

FLOOR_DRAWS = 8
MAX_THUMBNAILS = 2000


def distances(
    painted: Features,
    painted_groups: Groups,
    real: Features,
    real_groups: Groups,
    columns: Mapping[str, slice],
    seed: int,
) -> dict[str, Any]:
    """`crop_fid` and `kid`, those that have columns, each in its columns of the features."""
    size = min(len(painted), len(real) // 2)
    draws = [disjoint_draws(real_groups, size, seed + i) for i in range(FLOOR_DRAWS)]
    measures = {"crop_fid": (crop_fid, frechet_between), "kid": (kid, _kid)}
    found = {}
    for name, own in columns.items():
        estimate, distance = measures[name]
        a, b = painted[:, own], real[:, own]
        pairs = [(b[first], b[second]) for first, second in draws]
        groups_a = [a[members] for members in painted_groups.members]
        groups_b = [b[members] for members in real_groups.members]
        found[name] = _with_floor(estimate(groups_a, groups_b), distance, pairs)
    return found


def _kid(a: Features, b: Features) -> float:
    return KernelSums.of([a], [b]).kid()


def _with_floor(
    estimate: Estimate,
    distance: Callable[[Features, Features], float],
    pairs: Sequence[tuple[Features, Features]],
) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "interval": estimate.interval and list(estimate.interval),
        "floor": float(np.mean([distance(first, second) for first, second in pairs])),
        "floor_n": min(len(first) for first, _ in pairs),
        "floor_n_reference": min(len(second) for _, second in pairs),
    }


def octaves(real: Measured, generated: Measured) -> list[dict[str, Any]]:
    """The spectrum of both, the finest octave first; no ratio where either has no power."""
    rows = []
    for level, (a, b) in enumerate(
        zip(real.spectrum.variances(), generated.spectrum.variances(), strict=True)
    ):
        ratio = float(np.log2(b / a)) if a > 0 and b > 0 else None
        cells = [2**level, 2 ** (level + 1)]
        rows.append(
            {
                "level": level,
                "cells_px": cells,
                "real": float(a),
                "generated": float(b),
                "log2_ratio": ratio,
            }
        )
    return rows


def seams(real: Measured, generated: Measured) -> dict[str, Any]:
    """Contrast at the borders of coarse cells, and below `periods` at others too."""
    periods = [
        {
            "period_px": period,
            "real": real.seams.contrast(period),
            "generated": generated.seams.contrast(period),
        }
        for period in PERIODS_PX
    ]
    return {**periods[PERIODS_PX.index(SEAM_PX)], "periods": periods}


def layouts(painted: Sequence[Painted], store: Store, seed: int) -> dict[str, dict[str, Any]]:
    """`layout` and `nearest_train`: thumbnails of the images against those of the regions.

    An image whose region is no longer in the table has no layout. Of more than 2,000 regions, so
    many are drawn; an image's own is always among them, and never its nearest training region.
    """
    regions = store.regions()
    own = {item.in_store.index for item in painted if item.in_store}
    if len(regions) > MAX_THUMBNAILS:
        chosen = keyed(regions, seed)[:MAX_THUMBNAILS]
        regions = [*chosen, *(regions[k] for k in sorted(own - {r.index for r in chosen}))]
    train = {region.index for region in regions if region.split == "train"}
    sides = [min(item.region.side, *item.image.shape[1:]) for item in painted]
    layout: dict[str, Any] = {}
    nearest_train: dict[str, Any] = {}
    for side in sorted(set(sides)):
        thumbnails = region_thumbnails(store, regions, side)
        for item in (item for item, s in zip(painted, sides, strict=True) if s == side):
            far = layout_distances(item.image, thumbnails, side)
            number = item.in_store.index if item.in_store else None
            if number is not None:
                match = LayoutMatch.of(far, number)
                alone = {"nearest_other": None} if len(far) == 1 else {}
                layout[item.name] = {**asdict(match), **alone}
            seen = {k: far[k] for k in train - {number}}
            if seen:
                nearest = min(seen, key=lambda k: seen[k])
                nearest_train[item.name] = {"region": nearest, "distance": seen[nearest]}
    return {"layout": layout, "nearest_train": nearest_train}
