"""The condition of an image larger than a region: one region continued, or several side by side.

Packs know regions of one side, and an image may be of any size. Its field is covered by squares of
that side from the upper left corner on, the first of which is the region asked for. `reflect`
mirrors that region's tokens at every border, so that the layout goes on without a break; `regions`
lays other regions beside it, in an order that follows from the seed, so that a large image after
small regions is no kaleidoscope. Regions that were not trained on have only such beside them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from conditioning.tokens import fit
from pipeline.embeddings import TokenLattice
from pipeline.store import Region, Store

Fill = Literal["reflect", "regions"]


def squares(region: Region, size_px: tuple[int, int]) -> tuple[int, int]:
    """How many squares of the region's side it takes down and across an image."""
    return math.ceil(size_px[0] / region.side), math.ceil(size_px[1] / region.side)


def lay_out(
    regions: Sequence[Region], own: Region, size_px: tuple[int, int], fill: Fill, seed: int
) -> list[list[Region]]:
    """The region of every square of an image, row by row; for `reflect` always its own."""
    rows, columns = squares(own, size_px)
    beside = [own] * (rows * columns)
    if fill == "regions":
        held_out = own.split != "train"
        others = [r for r in regions if r != own and (r.split != "train" or not held_out)]
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, own.index))))
        order = [own]
        while len(order) < rows * columns:
            order += [others[i] for i in random.permutation(len(others))] or [own]
        beside = order[: rows * columns]
    return [beside[row * columns : (row + 1) * columns] for row in range(rows)]


def recorded_layout(
    identity: Mapping[str, Any], store: Store, own: Region
) -> tuple[tuple[Region, ...], ...]:
    """The regions side by side that conditioned a painted image, or its own alone, from what
    jobs.sample recorded: numbers in the store's table of regions as it was then.
    """
    numbers = identity.get("layout", [])
    if len({number for row in numbers for number in row}) < 2:
        return ((own,),)
    if identity.get("store_fingerprint") != store.fingerprint():
        raise ValueError(
            "it was conditioned by several regions of another table of regions; ingest as before "
            "or paint it again"
        )
    regions = store.regions()
    return tuple(tuple(regions[number] for number in row) for row in numbers)


def condition_of(
    tokens_of: Callable[[Region], list[TokenLattice]],
    layout: Sequence[Sequence[Region]],
    size_px: tuple[int, int],
) -> list[TokenLattice]:
    """The token lattices of a whole image, from those of the regions of its squares."""
    numbers = {region.index: region for row in layout for region in row}
    known = {k: tokens_of(region) for k, region in numbers.items()}
    own = layout[0][0]
    first = known[own.index]
    if len(numbers) == 1:
        return fit(first, *size_px)
    for lattice in first:
        if lattice.values.shape[0] * lattice.footprint_px != own.side:
            raise ValueError(
                f"tokens of {lattice.footprint_px} px do not fill regions of {own.side} px, "
                "which so cannot lie side by side; use --fill reflect"
            )
    joined = []
    for k, lattice in enumerate(first):
        rows = [
            np.concatenate([known[region.index][k].values for region in row], axis=1)
            for row in layout
        ]
        joined.append(replace(lattice, values=np.concatenate(rows, axis=0)))
    return fit(joined, *size_px)


def in_words(layout: Sequence[Sequence[Region]], size_px: tuple[int, int]) -> str:
    """What an image larger than its region is conditioned on, for people; empty for others."""
    own = layout[0][0]
    if max(size_px) <= own.side:
        return ""
    distinct = len({region.index for row in layout for region in row})
    how = (
        "its tokens are mirrored at every border"
        if distinct == 1
        else f"the tokens of {distinct} regions lie side by side"
    )
    return (
        f"{size_px[0]}x{size_px[1]} px is {len(layout)} by {len(layout[0])} times the region's "
        f"{own.side} px: {how}"
    )
