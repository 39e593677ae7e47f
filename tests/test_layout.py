"""Laws of the condition of an image larger than a region."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from chain import Chain
from hypothesis import given
from hypothesis import strategies as st

from conditioning.layout import condition_of, in_words, lay_out
from conditioning.tokens import fit, from_store
from pipeline.packfile import PackSet
from pipeline.regions import Region
from pipeline.store import Store


def regions_of(splits: list[str]) -> list[Region]:
    return [Region(i, f"image {i}", 0, 0, 256, 1.0, split) for i, split in enumerate(splits)]


@given(
    st.lists(st.sampled_from(["train", "val", "test"]), min_size=1, max_size=9),
    st.integers(1, 1500),
    st.integers(1, 1500),
    st.integers(0, 5),
)
def test_squares_are_covered_by_the_own_region_first_and_no_trained_one_beside_a_held_out(
    splits: list[str], height: int, width: int, seed: int
) -> None:
    regions = regions_of(splits)
    for own in regions:
        layout = lay_out(regions, own, (height, width), "regions", seed)
        assert (len(layout), len(layout[0])) == (-(-height // 256), -(-width // 256))
        flat = [region for row in layout for region in row]
        assert flat[0] == own
        allowed = [r for r in regions if r != own and (own.split == "train" or r.split != "train")]
        assert set(flat[1:]) <= set(allowed or [own])
        counts = Counter({r.index: 0 for r in allowed}) + Counter(r.index for r in flat[1:])
        if allowed and len(flat) > 1:
            times = [counts[r.index] for r in allowed]
            assert max(times) - min(times) <= 1
        assert layout == lay_out(regions, own, (height, width), "regions", seed)
        mirrored = lay_out(regions, own, (height, width), "reflect", seed)
        assert {region for row in mirrored for region in row} == {own}


def test_every_square_has_the_tokens_of_its_region_at_its_place(chain: Chain) -> None:
    store, settings = Store.open(chain.store), PackSet.open(chain.packs).settings
    regions = store.regions()
    size, side = (640, 900), settings.side_px
    layout = lay_out(regions, regions[2], size, "regions", 3)
    assert len({region.index for row in layout for region in row}) > 4
    joined = condition_of(partial(from_store, store, settings), layout, size)
    for k, (footprint, rows, columns) in enumerate(settings.lattices):
        values = joined[k].values
        first = from_store(store, settings, regions[2])[k]
        assert (joined[k].y_px, joined[k].x_px) == (first.y_px, first.x_px)
        assert values.shape[0] == len(range(0, int(size[0] - first.y_px - 1e-9) + 1, footprint))
        for r, row in enumerate(layout):
            for c, region in enumerate(row):
                theirs = from_store(store, settings, region)[k].values
                mine = values[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
                assert np.array_equal(mine, theirs[: mine.shape[0], : mine.shape[1]])
    assert f"{len(layout)} by {len(layout[0])} times" in in_words(layout, size)
    assert in_words([[regions[0]]], (side, side)) == ""


def test_one_region_alone_is_reflected(chain: Chain) -> None:
    store, settings = Store.open(chain.store), PackSet.open(chain.packs).settings
    own = store.regions()[1]
    size = (700, 1100)
    layout = lay_out(store.regions(), own, size, "reflect", 0)
    lattices = from_store(store, settings, own)
    for ours, theirs in zip(
        condition_of(partial(from_store, store, settings), layout, size),
        fit(lattices, *size),
        strict=True,
    ):
        assert np.array_equal(ours.values, theirs.values)
    finest = condition_of(partial(from_store, store, settings), layout, size)[0].values
    rows = lattices[0].values.shape[0]
    assert np.array_equal(finest[rows : 2 * rows], finest[:rows][::-1])
    assert "mirrored" in in_words(layout, size)


def test_tokens_that_do_not_fill_a_region_cannot_lie_side_by_side(chain: Chain) -> None:
    store, settings = Store.open(chain.store), PackSet.open(chain.packs).settings
    wider = [replace(region, side=320) for region in store.regions()]
    layout = lay_out(wider, wider[0], (600, 600), "regions", 0)
    with pytest.raises(ValueError, match="use --fill reflect"):
        condition_of(lambda _: from_store(store, settings, store.regions()[0]), layout, (600, 600))
