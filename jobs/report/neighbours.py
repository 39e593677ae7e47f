"""Which regions a painting resembles: its own, if it follows its condition, and the nearest one
that was trained on, which shows whether it was painted or remembered.

What jobs.evaluate measured is taken from it; what it did not, is measured here in one pass over
the regions, each read once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jobs.evaluate.metrics import LayoutMatch, thumbnail
from jobs.report.material import Material, Painting
from model.lattice import coarser
from pipeline import console
from pipeline.store import Region


@dataclass(frozen=True)
class Neighbourhood:
    """layout: how near a painting is to its own region and to others. nearest: the training region
    nearest to it, at a distance in the same unit; None where there is no other than its own.
    """

    layout: LayoutMatch | None
    nearest: Region | None
    distance: float


def find_neighbours(material: Material) -> dict[str, Neighbourhood]:
    """The neighbourhood of every painting, by its name."""
    regions = {region.index: region for region in material.regions}
    layouts = {
        name: LayoutMatch(own, other, int(number))
        for name, (own, other, number) in _measured(
            material, "layout", ("own", "nearest_other", "nearest_other_region")
        ).items()
    }
    known = {
        name: (int(number), distance)
        for name, (number, distance) in _measured(
            material, "nearest_train", ("region", "distance")
        ).items()
        if int(number) in regions
    }
    unknown = [p for p in material.paintings if p.name not in known or p.name not in layouts]
    distances = _distances(material, unknown)
    result = {}
    for painting in material.paintings:
        name, own = painting.name, painting.region
        layout = layouts.get(name)
        if layout is None:
            layout = _layout(distances[name], [r for r in regions.values() if is_same(r, own)])
        if name not in known:
            train = [r for r in regions.values() if r.split == "train" and not is_same(r, own)]
            known[name] = min(
                ((r.index, distances[name][r.index]) for r in train),
                key=lambda found: found[1],
                default=(-1, float("nan")),
            )
        index, distance = known[name]
        result[name] = Neighbourhood(layout, regions.get(index), distance)
    return result


def _measured(
    material: Material, group: str, names: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """What metrics.json says of each image, where it says all of it."""
    said = ((material.metrics or {}).get(group) or {}).items()
    rows: dict[str, tuple[Any, ...]] = {
        image: tuple((found or {}).get(name) for name in names) for image, found in said
    }
    return {
        image: tuple(float(value) for value in row)
        for image, row in rows.items()
        if all(isinstance(value, int | float) for value in row)
    }


def _distances(material: Material, paintings: Iterable[Painting]) -> dict[str, dict[int, float]]:
    """Root mean square differences of thumbnails, in pixel values, from every region.

    Over the square that a painting's region conditioned; of a smaller painting, over the same
    corner of every region.
    """
    squares = {p.name: min(p.conditioned) for p in paintings}
    painted = {p.name: thumbnail(p.image, 0, 0, squares[p.name]) for p in paintings}
    sides = {p.name: coarser(squares[p.name], -p.level) for p in paintings}
    result: dict[str, dict[int, float]] = {name: {} for name in painted}
    if not painted:
        return result
    total = len(material.regions)
    for region in console.progress(material.regions, total=total, desc="report: regions"):
        image = material.store.image(region.image)
        real = {side: thumbnail(image, region.y, region.x, side) for side in {*sides.values()}}
        for name, picture in painted.items():
            result[name][region.index] = _root_mean_square(picture - real[sides[name]])
    return result


def _root_mean_square(difference: Float[np.ndarray, "c h w"]) -> float:
    return float(np.sqrt(np.square(difference).mean()))


def _layout(distances: dict[int, float], own: list[Region]) -> LayoutMatch | None:
    others = distances.keys() - {region.index for region in own}
    if not own or not others:
        return None
    nearest = min(sorted(others), key=lambda k: distances[k])
    return LayoutMatch(distances[own[0].index], distances[nearest], nearest)


def is_same(a: Region, b: Region) -> bool:
    """Whether two regions are one place, whatever their numbers."""
    return (a.image, a.y, a.x, a.side) == (b.image, b.y, b.x, b.side)


def overlap(a: Region, b: Region) -> float:
    """The fraction of a region that another covers."""
    if a.image != b.image:
        return 0.0
    rows, columns = (max(a.side - abs(p - q), 0) for p, q in ((a.y, b.y), (a.x, b.x)))
    return rows * columns / a.side**2
