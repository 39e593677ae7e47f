"""Batches are a function of (seed, step): of nothing else, however many ranks share them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain

from conditioning.tokens import TokenScale, fit, to_condition
from jobs.data import Batches, Sample, turn
from model.draw import PointDraw
from pipeline.draws import RegionLevels
from pipeline.embeddings import TokenLattice
from pipeline.packfile import ABSENT, DrawnPoints, PackSet
from pipeline.store import Store


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


@pytest.mark.parametrize("name", ["zoom", "uniform", "mixed"])
def test_ranks_share_the_global_batch(
    chain: Chain, point_packs: dict[str, Path], name: str
) -> None:
    packs = PackSet.open(chain.packs if name == "zoom" else point_packs[name])
    batches = Batches(packs, batch=4, seed=5)
    whole = batches.at(7)
    parts = [batches.at(7, rank, 2) for rank in range(2)]
    for field in dataclasses.fields(whole.draw):
        parts_of = [getattr(part.draw, field.name) for part in parts]
        joined = parts_of[0] if field.name == "size_px" else torch.cat(parts_of)
        assert equal(getattr(whole.draw, field.name), joined)
    for field in ("seeds", "uniform"):
        assert equal(getattr(whole, field), torch.cat([getattr(p, field) for p in parts]))
    assert equal(whole.condition.values, torch.cat([p.condition.values for p in parts]))
    stream = batches.iterate(6, 0, 1)
    next(stream)
    assert equal(next(stream), whole)
    stream.close()
    assert not equal(batches.at(8).seeds, whole.seeds)


def test_an_epoch_uses_every_pack_once(chain: Chain) -> None:
    packs = PackSet.open(chain.packs)
    batches = Batches(packs, batch=1, seed=0, augment=False)
    pairs = len([e for e in packs.regions if e.split == "train"]) * 2
    seen = [batches.at(step).draw.windows.numpy().tobytes() for step in range(2 * pairs)]
    assert len(set(seen[:pairs])) == pairs
    assert sorted(seen[:pairs]) == sorted(seen[pairs:])
    assert seen[:pairs] != seen[pairs:]


@pytest.mark.parametrize("element", range(8))
def test_a_turned_sample_is_the_sample_of_the_turned_region(chain: Chain, element: int) -> None:
    packs, store = PackSet.open(chain.packs), Store.open(chain.store)
    entry, settings = packs.regions[0], packs.settings
    pixels = store.image(entry.image).read(entry.y, entry.x, 256, 256)
    drawn = packs.draw(entry, 0)
    sample = Sample(drawn, packs.tokens(entry))
    turned = turn(sample, element, 256)
    image = pixels
    if element & 4:
        image = image.swapaxes(1, 2)
    if element & 1:
        image = image[:, ::-1]
    if element & 2:
        image = image[:, :, ::-1]
    levels = RegionLevels.of(image, np.ones((256, 256), bool), settings.coarse_level)
    np.testing.assert_array_equal(turned.drawn.lattice, levels.lattice(settings.value_scale))
    expected = levels.windows(turned.drawn.origins, settings.window, settings.value_scale)
    np.testing.assert_array_equal(turned.drawn.windows, expected)
    assert (turned.drawn.origins % 2 == 0).all()
    # Tokens turn with the pixels: a token's place maps to where the same tile went.
    for before, after in zip(sample.tokens, turned.tokens, strict=True):
        marks = {}
        for (i, j), value in np.ndenumerate(before.values[..., 0]):
            y = before.y_px + i * before.footprint_px
            x = before.x_px + j * before.footprint_px
            y, x = (x, y) if element & 4 else (y, x)
            y = 256 - y if element & 1 else y
            x = 256 - x if element & 2 else x
            marks[(y, x)] = value
        for (i, j), value in np.ndenumerate(after.values[..., 0]):
            place = (after.y_px + i * after.footprint_px, after.x_px + j * after.footprint_px)
            assert marks[place] == value


@pytest.mark.parametrize("element", range(8))
def test_turned_points_are_the_points_of_the_turned_region(
    point_packs: dict[str, Path], element: int
) -> None:
    """At every level, and of the lattice: what is read there is what came along."""
    packs = PackSet.open(point_packs["mixed"])
    entry, random = packs.regions[1], np.random.default_rng(0)
    drawn = packs.draw(entry, 1)
    assert isinstance(drawn, DrawnPoints)
    image = random.integers(0, 256, (3, 256, 256), dtype=np.uint8)
    valid = np.ones((256, 256), bool)
    before = RegionLevels.of(image, valid, 5)
    drawn = DrawnPoints(before.lattice(256), before.points(drawn.cells, 256), drawn.cells)
    turned = turn(Sample(drawn, packs.tokens(entry)), element, 256).drawn
    if element & 4:
        image = image.swapaxes(1, 2)
    for axis in (0, 1):
        image = np.flip(image, 1 + axis) if element & (1 << axis) else image
    after = RegionLevels.of(image, valid, 5)
    assert isinstance(turned, DrawnPoints)
    assert set(turned.cells[:, 0].tolist()) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(turned.values, after.points(turned.cells, 256))
    np.testing.assert_array_equal(turned.lattice, after.lattice(256))


def test_a_batch_of_points_holds_what_was_packed(point_packs: dict[str, Path]) -> None:
    """Standardised, with its cells; the batch's own order of packs, found by their values."""
    packs = PackSet.open(point_packs["uniform"])
    batches = Batches(packs, batch=4, seed=1, augment=False)
    scale, known = packs.settings.value_scale, {}
    for entry in packs.regions:
        for pack in range(packs.settings.packs_per_region):
            drawn = packs.draw(entry, pack)
            known[drawn.cells.tobytes()] = drawn.values
    draw = batches.at(0).draw
    assert isinstance(draw, PointDraw)
    assert draw.size_px == (256, 256)
    assert draw.present.all()
    for cells, values in zip(draw.cells, draw.values, strict=True):
        pixels = packs.statistics.to_pixels(values.numpy())
        np.testing.assert_allclose(pixels, known[cells.numpy().tobytes()] / scale, atol=1e-2)
    points, flat = draw.points()
    assert points.counts().tolist() == [draw.cells.shape[1]] * 4
    assert torch.equal(flat, draw.values.flatten(0, 1))


def test_absent_points_are_zero_and_leave_ragged_lists(point_packs: dict[str, Path]) -> None:
    packs = PackSet.open(point_packs["uniform"])
    batches, cells = Batches(packs, batch=2, seed=0), np.zeros((5, 3), np.int64)
    cells[:, 2] = [0, 1, 300, 3, -1]  # the third and the last lie outside
    values = np.full((2, 5, 3), 20_000, np.uint16)
    values[:, [2, 4]] = ABSENT
    values[1, 0] = ABSENT
    none = np.empty((0, 0, 3), np.uint16)
    draw = batches.draw([DrawnPoints(none, part, cells) for part in values])
    assert isinstance(draw, PointDraw)
    assert (draw.values[~draw.present[..., 0]] == 0).all()
    points, flat = draw.points()
    assert points.image.tolist() == [0, 0, 0, 1, 1]
    assert points.x.tolist() == [0, 1, 3, 1, 3]
    assert torch.equal(flat, draw.values[0, [0, 1, 3, 1, 3]])


def lattice(gy: int, gx: int, footprint: int = 32) -> TokenLattice:
    values = np.arange(gy * gx, dtype=np.float16).reshape(gy, gx, 1)
    return TokenLattice(values, footprint, footprint / 2, footprint / 2)


def test_a_larger_image_continues_its_condition_by_reflection() -> None:
    (wide,) = fit([lattice(2, 2)], 64, 160)
    assert wide.values[..., 0].tolist() == [[0, 1, 1, 0, 0], [2, 3, 3, 2, 2]]
    (same,) = fit([lattice(2, 3)], 64, 96)
    np.testing.assert_array_equal(same.values, lattice(2, 3).values)
    (small,) = fit([lattice(4, 4)], 33, 64)
    assert small.values.shape == (1, 2, 1)


def test_conditions_are_standardised_and_know_their_places() -> None:
    scale = TokenScale(np.array([2.0], np.float32), np.array([4.0], np.float32))
    condition = to_condition([[lattice(2, 3), lattice(1, 1, 64)]], scale, [True])
    assert condition.grid == (2, 3)
    np.testing.assert_allclose(
        condition.values[0, :, 0], (np.array([0, 1, 2, 3, 4, 5, 0]) - 2) / 4
    )
    assert condition.centres_px[0, 4].tolist() == [48.0, 48.0]
    assert condition.footprints_px[0].tolist() == [32.0] * 6 + [64.0]


def test_a_missing_split_is_a_sentence(chain: Chain) -> None:
    with pytest.raises(ValueError, match="no regions in split 'nowhere'"):
        Batches(PackSet.open(chain.packs), batch=1, seed=0, split="nowhere")
