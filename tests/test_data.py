"""Batches are a function of (seed, step): of nothing else, however many ranks share them."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain
from test_pack import check_window, means_of

from conditioning.tokens import TokenScale, dihedral, fit, to_condition
from jobs.data import MOST_FOR_ONE, Batches, Sample, turn
from model.attention import Condition, look_up
from model.design import CascadeDesign, Extent, WindowsBelow, rarity
from model.draw import BlockDraw, PointDraw, TopDraw
from model.points import window_lattice
from pipeline.draws import CascadeLevels, RegionLevels, filled
from pipeline.embeddings import TokenLattice
from pipeline.packfile import (
    ABSENT,
    PART_SCALE,
    DrawnPoints,
    DrawnTop,
    DrawnWindow,
    PackSet,
    RegionEntry,
)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


SIDE, BLOCKS = 160, (WindowsBelow(3, 5, 2), WindowsBelow(1, 3, 3), WindowsBelow(0, 1, 5))
DESIGN = CascadeDesign(points=2_500, coarse_level=5, blocks=BLOCKS)
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Region:
    """What was packed: filled pixels, and which are valid."""

    pixels: np.ndarray
    valid: np.ndarray


@pytest.fixture(scope="module")
def regions() -> list[Region]:
    random = np.random.default_rng(6)
    found = []
    for _ in range(3):
        pixels = random.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
        valid = random.random((SIDE, SIDE)) < 0.9
        valid[:70, 100:] = False
        found.append(Region(filled(pixels, valid, 5), valid))
    return found


@pytest.fixture(scope="module")
def packs(
    chain: Chain, regions: list[Region], tmp_path_factory: pytest.TempPathFactory
) -> PackSet:
    """The chain's packs, but of regions and blocks so small that a draw holds several windows of
    each, and with two token lattices whose first centres are not their pixels' middle.
    """
    path, like = tmp_path_factory.mktemp("packed"), PackSet.open(chain.packs)
    random, entries, payload = np.random.default_rng(7), [], b""
    for number, region in enumerate(regions):
        levels, extent = CascadeLevels.of(region.pixels, region.valid, 5), Extent(SIDE, SIDE)
        tokens = random.normal(size=(5 * 4 + 2, len(like.statistics.token_mean)))
        members = [npy(tokens.astype(np.float16)), npy(levels.lattice(256))]
        keys = [(like.settings.seed, number, draw) for draw in range(DRAWS)]
        members += [levels.payload(DESIGN, extent, key, 256) for key in keys]
        ends = np.cumsum([len(payload), *map(len, members)]).tolist()
        spans = tuple(zip(ends, map(len, members), strict=False))
        split, first = "train" if number else "val", ((24.0, 16.0), (50.0, 90.0))
        entries.append(RegionEntry(number, "image", 0, 0, split, "shard", first, spans))
        payload += b"".join(members)
    (path / "shard").write_bytes(payload)
    settings = dataclasses.replace(
        like.settings, side_px=SIDE, lattices=((32, 5, 4), (64, 1, 2)), packs_per_region=DRAWS
    )
    found = PackSet(path, settings, like.statistics, entries)
    found.design = DESIGN
    return found


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["T", "A", "B", "C", "uniform", "mixed"])
def test_ranks_share_the_global_batch(
    packs: PackSet, point_packs: dict[str, Path], name: str
) -> None:
    part = None if name in point_packs else "TABCD".index(name)
    given = PackSet.open(point_packs[name]) if part is None else packs
    batches = Batches(given, batch=4, seed=5, part=part)
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


# Regions of 256 px have 1 cell of 16 x 16 of T, 1 parent of 8 x 8 of A, 4 x 4 of 8 x 8 of B,
# 16 x 16 of 16 x 16 of C, and 64 x 64 of D, whose windows have 32 x 32.
@pytest.mark.parametrize(("part", "in_place_of_one"), [(0, 256), (1, 64), (2, 4), (3, 1), (4, 1)])
@pytest.mark.parametrize("most", [MOST_FOR_ONE, 1000])
def test_a_batch_of_small_samples_holds_as_many_cells_as_one_of_windows(
    chain: Chain, part: int, in_place_of_one: int, most: int
) -> None:
    """A step costs the same whatever the size of the image, as far as `most` goes."""
    given = PackSet.open(chain.packs)
    batches = Batches(given, batch=2, seed=0, part=part, top_window=16, most_for_one=most)
    assert batches.size == 2 * min(in_place_of_one, most)
    if most > MOST_FOR_ONE:
        return
    batch = batches.at(0)
    assert len(batch.draw.values) == len(batch.seeds) == batches.size
    places = (batch.uniform * batches.size).floor()
    assert places.tolist() == list(range(batches.size))
    halves = [batches.at(0, rank, 2) for rank in range(2)]
    assert equal(batch.seeds, torch.cat([half.seeds for half in halves]))


def test_a_window_of_the_top_lattice_is_a_part_of_it_with_the_tokens_at_its_place(
    packs: PackSet,
) -> None:
    """It says where it lies, and what tokens say there is what they say in the whole image."""
    side, cells = 2, SIDE >> 5
    batches = Batches(packs, batch=4, seed=0, augment=False, part=0, top_window=side)
    scale = TokenScale(
        np.array(packs.statistics.token_mean, np.float32),
        np.array(packs.statistics.token_std, np.float32),
    )
    known = {}
    for entry in packs.regions[1:]:
        condition = to_condition([packs.tokens(entry)], scale, [True])
        known[entry.key] = (packs.lattice(entry), lookups(condition, [0], [0], cells)[0])
    for step in range(200):
        batch = batches.at(step)
        assert isinstance(batch.draw, TopDraw)
        values = batch.draw.values.permute(0, 2, 3, 1).numpy()
        fixed = np.rint(packs.statistics.to_pixels(values) * 256).astype(np.uint16)
        fixed[~batch.draw.present[:, 0].numpy().astype(bool)] = ABSENT
        rows, columns = batch.draw.origin.unbind(1)
        told = lookups(batch.condition, rows, columns, side)
        for sample, (y, x) in enumerate(batch.draw.origin.tolist()):
            here = slice(y, y + side), slice(x, x + side)
            if (fixed[sample] == ABSENT).all():
                continue
            (wanted,) = (
                lookup[here]
                for lattice, lookup in known.values()
                if np.array_equal(lattice[here], fixed[sample])
            )
            if batch.condition.keep[sample]:
                torch.testing.assert_close(told[sample], wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_all_cells_of_a_top_lattice_count_alike_in_its_windows(packs: PackSet, side: int) -> None:
    """Windows lie inside the lattice, so that some cells are drawn more often; weights make up for
    that, and are zero where a cell is absent.
    """
    cells, present = SIDE >> 5, np.ones((side, side, 3), np.uint16)
    batches = Batches(packs, 64, 0, augment=False, part=0, top_window=side, most_for_one=1)
    drawn, counted = np.zeros((2, cells, cells))
    for step in range(40):
        draw = batches.at(step).draw
        assert isinstance(draw, TopDraw)
        whole = batches.draw([DrawnTop(present, (y, x)) for y, x in draw.origin.tolist()])
        assert isinstance(whole, TopDraw)
        assert equal(draw.weight, whole.weight * draw.present)
        for (y, x), weight in zip(draw.origin.tolist(), whole.weight[:, 0].numpy(), strict=True):
            here = slice(y, y + side), slice(x, x + side)
            drawn[here] += 1
            counted[here] += weight
    np.testing.assert_allclose(counted, drawn.mean(), rtol=0.2)
    assert side == cells or drawn.max() > 1.4 * drawn.min()


def lookups(
    condition: Condition, rows: Sequence[int], columns: Sequence[int], cells: int
) -> torch.Tensor:
    """The finest tokens looked up at squares of cells of level 5 that begin at these."""
    gy, gx = condition.grid
    finest = condition.values[:, : gy * gx].unflatten(1, (gy, gx)).permute(0, 3, 1, 2)
    y_px, x_px = (
        (torch.as_tensor(first)[:, None] + torch.arange(cells) + 0.5) * 32.0
        for first in (rows, columns)
    )
    first, pitch = condition.centres_px[:, 0], condition.footprints_px[:, 0]
    return look_up(finest, first, pitch, y_px, x_px)


def test_a_shard_that_was_cut_off_is_said(packs: PackSet, tmp_path: Path) -> None:
    whole, entry = (packs.path / "shard").read_bytes(), packs.regions[0]
    cut = PackSet(tmp_path, packs.settings, packs.statistics, packs.regions)
    cut.design = packs.design
    for member, read in ((0, cut.tokens), (1, cut.lattice)):
        start, length = entry.offsets[member]
        (tmp_path / "shard").write_bytes(whole[: start + length - 1])
        with pytest.raises(ValueError, match=rf"ends before byte {start + length}; delete"):
            read(entry)


def test_cells_of_windows_have_their_places_in_the_image() -> None:
    points = window_lattice((2, 3), torch.tensor([[0, 0], [4, 1]]), 5)
    assert points.y.tolist() == [0, 0, 0, 1, 1, 1, 4, 4, 4, 5, 5, 5]
    assert points.x.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 3, 1, 2, 3]
    assert points.sizes_px.tolist() == [[64, 96], [192, 128]]


@pytest.mark.parametrize("block", range(3))
def test_an_epoch_uses_every_window_once(packs: PackSet, block: int) -> None:
    """Of every training region and draw; the next epoch in another order."""
    batches = Batches(packs, batch=1, seed=0, augment=False, part=1 + block)
    each = packs.windows(block).number
    held = [
        packs.window(entry, draw, block, number).fine.tobytes()
        for entry in packs.regions[1:]
        for draw in range(DRAWS)
        for number in range(each)
    ]

    def window(step: int) -> bytes:
        values = batches.at(step).draw.values[0].permute(1, 2, 0).numpy()
        fixed = np.rint(packs.statistics.to_pixels(values) * packs.settings.value_scale)
        return fixed.astype(np.uint16).tobytes()

    assert each > 1 and len(held) == 2 * DRAWS * each
    seen = [window(step) for step in range(2 * len(held))]
    assert sorted(seen[: len(held)]) == sorted(seen[len(held) :]) == sorted(held)
    assert seen[: len(held)] != seen[len(held) :]


def test_parts_see_other_noise_and_the_top_block_each_region_once(packs: PackSet) -> None:
    seeds = [Batches(packs, batch=4, seed=0, part=part).at(2).seeds for part in range(4)]
    assert len(torch.cat(seeds).unique()) == 16
    top = Batches(packs, batch=2, seed=0, augment=False, part=0)
    lattices = {tuple(packs.lattice(entry).ravel()[:9]) for entry in packs.regions[1:]}
    for step in range(3):
        draw = top.at(step).draw
        assert isinstance(draw, TopDraw)
        pixels = packs.statistics.to_pixels(draw.values.permute(0, 2, 3, 1).numpy())
        fixed = np.rint(pixels * 256).astype(np.uint16)
        fixed[~draw.present[:, 0].numpy().astype(bool)] = ABSENT
        assert {tuple(one.ravel()[:9]) for one in fixed} == lattices
    assert draw.present.mean() < 1


def turned_image(values: np.ndarray, element: int) -> np.ndarray:
    """The definition, of (..., y, x)."""
    values = values.swapaxes(-2, -1) if element & 4 else values
    values = values[..., ::-1, :] if element & 1 else values
    return values[..., ::-1] if element & 2 else values


@pytest.mark.parametrize("element", range(8))
def test_a_turned_sample_is_the_sample_of_the_turned_region(
    packs: PackSet, regions: list[Region], element: int
) -> None:
    """Values, parents with their continued border, weights and place of windows of every block;
    and the top lattice.
    """
    entry, region = packs.regions[1], regions[1]
    tokens, scale = packs.tokens(entry), packs.settings.value_scale
    pixels, valid = (turned_image(part, element) for part in (region.pixels, region.valid))
    top = turn(Sample(DrawnTop(packs.lattice(entry)), tokens), element, SIDE).drawn
    assert isinstance(top, DrawnTop)
    np.testing.assert_array_equal(top.lattice, CascadeLevels.of(pixels, valid, 5).lattice(scale))
    means, outside = means_of(pixels, 5), 0
    for block in range(3):
        for draw in range(DRAWS):
            for number in range(packs.windows(block).number):
                drawn = packs.window(entry, draw, block, number)
                turned = turn(Sample(drawn, tokens), element, SIDE).drawn
                assert isinstance(turned, DrawnWindow)
                check_window(turned, means, valid, scale, DESIGN.margin)
                outside += int((drawn.weight == 0).any())
    assert outside > 3


@pytest.mark.parametrize("element", range(8))
def test_tokens_turn_with_the_pixels(packs: PackSet, element: int) -> None:
    """A token's place maps to where the same tile went, and what a window looks up at its parents'
    centres turns with the window.
    """
    entry = packs.regions[2]
    tokens = packs.tokens(entry)
    turned_tokens = dihedral(tokens, element, SIDE)
    for before, after in zip(tokens, turned_tokens, strict=True):
        marks = {}
        for (i, j), value in np.ndenumerate(before.values[..., 0]):
            y = before.y_px + i * before.footprint_px
            x = before.x_px + j * before.footprint_px
            y, x = (x, y) if element & 4 else (y, x)
            y = SIDE - y if element & 1 else y
            x = SIDE - x if element & 2 else x
            marks[(y, x)] = value
        for (i, j), value in np.ndenumerate(after.values[..., 0]):
            place = (after.y_px + i * after.footprint_px, after.x_px + j * after.footprint_px)
            assert marks[place] == value
    batches = Batches(packs, batch=1, seed=0)

    def looked_up(sample: Sample) -> np.ndarray:
        draw = batches.draw([sample.drawn])
        assert isinstance(draw, BlockDraw)
        finest = sample.tokens[0]
        lattice = torch.from_numpy(finest.values.astype(np.float32).transpose(2, 0, 1).copy())
        first = torch.tensor([[finest.y_px, finest.x_px]])
        pitch = torch.tensor([float(finest.footprint_px)])
        return look_up(lattice[None], first, pitch, draw.y_px, draw.x_px)[0, ..., 0].numpy()

    for block in range(3):
        sample = Sample(packs.window(entry, 0, block, 0), tokens)
        expected = turned_image(looked_up(sample), element)
        np.testing.assert_allclose(looked_up(turn(sample, element, SIDE)), expected, atol=1e-5)


@pytest.mark.parametrize("block", range(3))
def test_a_batch_of_windows_holds_what_was_packed(packs: PackSet, block: int) -> None:
    """Standardised; which parents exist, the weight of each, and their centres in pixels."""
    batches = Batches(packs, batch=2, seed=1)
    windows = [
        packs.window(packs.regions[0], draw, block, number)
        for draw in range(DRAWS)
        for number in range(packs.windows(block).number)
    ]
    draw = batches.draw(windows)
    assert isinstance(draw, BlockDraw)
    kind, margin, seen = BLOCKS[block], DESIGN.margin, 0
    extent = SIDE >> kind.parents
    for i, window in enumerate(windows):
        for values, fixed in ((draw.values, window.fine), (draw.parents, window.parents)):
            pixels = packs.statistics.to_pixels(values[i].permute(1, 2, 0).numpy())
            np.testing.assert_allclose(pixels * 256, fixed, atol=0.1)
        y, x = (
            rarity(side, extent)[first : first + side]
            for first, side in zip(window.origin, window.weight.shape, strict=True)
        )
        weight = window.weight / PART_SCALE * np.outer(y, x)
        np.testing.assert_allclose(draw.weight[i, 0], weight, atol=1e-6)
        y, x = (
            first + np.arange(-margin, side + margin)
            for first, side in zip(window.origin, window.weight.shape, strict=True)
        )
        there = [(at >= 0) & (at < extent) for at in (y, x)]
        np.testing.assert_array_equal(draw.parents_present[i, 0], np.outer(*there))
        for centres, at in ((draw.y_px, y), (draw.x_px, x)):
            expected = (at[margin:-margin] + 0.5) * 2**kind.parents
            np.testing.assert_array_equal(centres[i], expected)
        seen += int(not there[0].all())
    assert seen


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
