"""Laws of the draws: their size, their nesting, and that every pixel is drawn equally often."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.design import (
    CascadeDesign,
    Extent,
    MixedDesign,
    PatchDesign,
    PointDesign,
    SobolDesign,
    UniformDesign,
    WindowsBelow,
    make_design,
    rarity,
)

DESIGN = CascadeDesign(
    points=4_000,
    coarse_level=5,
    blocks=(WindowsBelow(2, 5, 3), WindowsBelow(0, 2, 8)),
    parts=(0.5, 0.5),
)
SPARSE = MixedDesign(points=350, coarse_level=3, window=6)


@given(st.integers(20_000, 200_000), st.integers(1, 40), st.integers(1, 40))
def test_a_cascade_draw_never_exceeds_its_budget(points: int, down: int, across: int) -> None:
    """And holds what it says: at least one window of each block, or the points it needs."""
    design, image = CascadeDesign(points=points), Extent(256 * down, 256 * across)
    lattice = down * across
    least = lattice + sum(block.cells(image, design.margin) for block in design.blocks)
    if points < least:
        with pytest.raises(ValueError, match=f"ask for --points {least} or more"):
            design.num_values(image)
        return
    origins, held = design.draw(image, (0, 1)), lattice
    for block, windows in zip(design.blocks, origins, strict=True):
        h, w = block.shape(image)
        fine, around = (h << block.octaves) * (w << block.octaves), (h + 6) * (w + 6)
        held += len(windows) * (fine + around)
        assert len(windows) >= 1
    assert tuple(len(windows) for windows in origins) == design.numbers(image)
    assert held == design.num_values(image) == lattice + design.num_cells(image) <= points


def test_the_published_budget_holds_regions_from_256_to_32768_px() -> None:
    """As many values whatever the region, and windows of every block."""
    found = {}
    for side in (256, 512, 1024, 4096, 8192, 32_768):
        image = Extent(side, side)
        found[side] = (CascadeDesign().num_values(image), CascadeDesign().numbers(image))
        assert found[side][0] <= 65_536
        fine = (CascadeDesign().num_values(image) - image.lattice_cells(8)) / 65_536
        assert side < 4096 or fine > 0.7
    # 16^2 of the top; 14^2 + 32^2 values a window of A and of B, 22^2 + 64^2 of C, 38^2 + 128^2
    # of D.
    a, b, c, d = found[4096][1]
    assert found[4096][0] == 256 + (a + b) * 1_220 + c * 4_580 + d * 17_828
    assert found[256][1][0] == 1


@pytest.mark.parametrize("size", [(128, 96), (32, 64)])
def test_every_pixel_counts_alike_in_the_windows_of_each_block(size: tuple[int, int]) -> None:
    """Windows lie inside; counts over many draws are binomial, and times the cells' weights they
    have one mean, those of the border too. A region with no more parents than a window is drawn
    whole.
    """
    image, draws = Extent(*size), 4_000
    drawn = [DESIGN.draw(image, (0, number)) for number in range(draws)]
    for number, block in enumerate(DESIGN.blocks):
        cells = [side >> block.parents for side in size]
        counts, shape = np.zeros(cells), block.shape(image)
        windows = draws * DESIGN.numbers(image)[number]
        for origins in drawn:
            for origin in origins[number]:
                last = origin + shape
                assert (origin >= 0).all() and (last <= cells).all()
                counts[origin[0] : last[0], origin[1] : last[1]] += 1
        weight = np.outer(*(rarity(side, n) for side, n in zip(shape, cells, strict=True)))
        part = np.prod(shape) / np.prod(cells)
        often = part / weight
        assert often.max() <= 1 + 1e-6
        error = 5 * np.sqrt(windows * often * (1 - often).clip(0)) + 1e-3
        assert (abs(counts - windows * often) <= error).all()


@given(st.integers(1, 40), st.integers(0, 60))
def test_weights_of_windows_leave_most_samples_effective(side: int, more: int) -> None:
    """1 on average over what is drawn; Kish's number is at least 0.88 of it, an axis."""
    weight = rarity(side, side + more).astype(float)
    often = 1 / weight / (1 / weight).sum()
    assert (often * weight).sum() == pytest.approx(1)
    assert 1 / (often * weight**2).sum() > 0.88
    assert np.array_equal(weight, weight[::-1]) and weight.max() < 2


def test_draws_differ_by_key_and_the_same_key_draws_the_same() -> None:
    image = Extent(256, 256)
    first, again = (DESIGN.draw(image, (0, 0)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    for key in ((0, 1), (1, 0)):
        for a, b in zip(first, DESIGN.draw(image, key), strict=True):
            assert not np.array_equal(a, b)


def test_windows_shrink_to_a_small_region_and_then_there_is_one() -> None:
    design, image = CascadeDesign(), Extent(256, 512)
    a, b, _, _ = design.blocks
    assert a.shape(image) == (1, 2) and b.shape(image) == (4, 8)
    assert design.numbers(image)[0] == 1
    assert design.draw(image, (4, 2))[0].tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="do not divide into the top cells of the cascade, 256"):
        design.num_values(Extent(256, 384))
    with pytest.raises(ValueError, match="level 8, but a lattice of level 5 was asked for"):
        CascadeDesign(coarse_level=5)


def test_a_window_too_small_for_its_child_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold its child"):
        MixedDesign(window=4)


@given(st.sampled_from([256, 300, 1024]), st.integers(0, 255), st.integers(0, 2**40))
def test_patches_are_walked_through_without_repeats(side: int, corner: int, seed: int) -> None:
    """Every walk draws every whole tile once; the next walk goes another way."""
    design, image = PatchDesign(), Extent(side, side, tiles_px=(corner, 0))
    rows = range(corner, side - 255, 256)
    wanted = {(y, x) for y in rows for x in range(0, side - 255, 256)}
    assert design.fits(image) == bool(wanted)
    if not wanted:
        return
    number = len(wanted)
    drawn = [tuple(design.draw(image, (seed, 3, pack)).tolist()) for pack in range(3 * number)]
    for walk in range(3):
        assert set(drawn[walk * number : (walk + 1) * number]) == wanted
    if number > 4:
        assert drawn[:number] != drawn[number : 2 * number]
    assert design.draws_to_cover(Extent(side, side)) == (side // 256) ** 2


def test_patches_mostly_absent_are_not_drawn() -> None:
    design = PatchDesign(coarse_level=5)
    present = np.zeros((32, 16), bool)  # an image of 1024 x 512: 4 x 2 patches of 8 x 8 cells
    present[0:8, 0:8] = True  # all of one
    present[8:12, 8:16] = True  # half of another
    present[16:19, 0:8] = True  # less than half of a third
    image = Extent(1024, 512, present)
    assert sorted(map(tuple, design.places(image).tolist())) == [(0, 0), (256, 256)]
    scarce = np.zeros_like(present)
    scarce[17, 3:5] = True
    scarce[30, 9] = True
    assert design.places(Extent(1024, 512, scarce)).tolist() == [[512, 0]]


@settings(max_examples=50)
@given(
    st.integers(9, 70), st.integers(9, 70), st.integers(0, 2**40), st.integers(0, 50), st.data()
)
def test_points_have_one_size_no_repeats_and_lie_inside(
    height: int, width: int, seed: int, pack: int, data: st.DataObject
) -> None:
    image = Extent(height, width)
    points = data.draw(st.integers(1, image.pixels))
    designs: list[PointDesign] = [UniformDesign(points, 3), SobolDesign(points, 3)]
    if points >= 216:
        designs.append(MixedDesign(points, 3, window=6))
    lattice = (height // 8) * (width // 8)
    if points > lattice:
        designs.append(UniformDesign(points, 3, lattice=True))
    for design in designs:
        cells = design.cells(image, (seed, 3, pack))
        assert len(cells) == design.num_cells(image) == points - design.lattice * lattice
        assert design.num_values(image) == points
        assert len(np.unique(cells, axis=0)) == len(cells)
        last = (np.array([height, width]) - 1) >> cells[:, :1]
        assert ((cells[:, 1:] >= 0) & (cells[:, 1:] <= last)).all()
        assert np.array_equal(cells, design.cells(image, (seed, 3, pack)))


@settings(max_examples=40)
@given(st.integers(3, 40), st.integers(3, 40), st.data())
def test_uniform_draws_of_a_region_are_disjoint_until_it_is_used_up(
    height: int, width: int, data: st.DataObject
) -> None:
    image = Extent(height, width)
    points = data.draw(st.integers(image.pixels // 6, image.pixels))
    design, whole = UniformDesign(points), image.pixels // points
    epochs = []
    for epoch in range(2):
        packs = [
            design.cells(image, (1, 2, pack)) for pack in range(epoch * whole, (epoch + 1) * whole)
        ]
        drawn = np.concatenate(packs)[:, 1:] @ (width, 1)
        assert len(np.unique(drawn)) == whole * points
        epochs.append(drawn)
    if points > 8:
        assert not np.array_equal(*epochs)


@pytest.mark.parametrize("design", [UniformDesign(30), SobolDesign(30)])
@pytest.mark.parametrize("size", [(8, 16), (11, 13)])
def test_every_pixel_is_drawn_equally_often_by_points(
    design: PointDesign, size: tuple[int, int]
) -> None:
    image, draws = Extent(*size), 2_000
    counts = np.zeros(size)
    for number in range(draws):
        _, y, x = design.cells(image, (number, 0, number % 4)).T
        counts[y, x] += 1
    part = 30 / image.pixels
    assert abs(counts - draws * part).max() < 5 * np.sqrt(draws * part * (1 - part))


def test_every_pixel_is_drawn_equally_often_by_mixed_draws() -> None:
    """By the windows alone; and outside of the windows by the pixels of the rest."""
    image, draws = Extent(23, 34), 1_500
    inside, beside, expected, variance = (np.zeros((23, 34)) for _ in range(4))
    for number in range(draws):
        key = (number, 0, number % 3)
        windows, cells = SPARSE.window_cells(image, key), SPARSE.cells(image, key)
        assert np.array_equal(cells[: len(windows)], windows)
        window, rest = np.zeros((23, 34), bool), np.zeros((23, 34), bool)
        window[tuple(windows[windows[:, 0] == 0, 1:].T)] = True
        rest[tuple(cells[len(windows) :, 1:].T)] = True
        part = rest.sum() / (~window).sum()
        inside += window
        beside += rest
        expected += part * ~window
        variance += part * (1 - part) * ~window
    part = inside.mean() / draws
    assert abs(inside - draws * part).max() < 5 * np.sqrt(draws * part * (1 - part))
    assert (abs(beside - expected) < 5 * np.sqrt(variance)).all()


def test_mixed_draws_are_half_pixels_and_half_nested_stacks() -> None:
    design, image = MixedDesign(), Extent(8192, 8192)
    windows = design.window_cells(image, (0, 0, 0))
    cells = design.cells(image, (0, 0, 0))
    assert 65_536 // 2 <= (cells[len(windows) :, 0] == 0).sum() < 65_536 // 2 + 5 * 32**2
    held = {tuple(cell) for cell in windows.tolist()}
    for level, y, x in windows.tolist():
        neighbours = [(level + 1, y // 2 + i, x // 2 + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        last = 8191 >> (level + 1)
        assert level == 4 or all(
            place in held or not 0 <= min(place[1:]) <= max(place[1:]) <= last
            for place in neighbours
        )


@pytest.mark.parametrize("size", [(31_623, 31_627), (2**20, 2**20)])
@pytest.mark.parametrize("design", [UniformDesign(), MixedDesign(), SobolDesign()])
def test_points_of_images_beyond_any_memory(design: PointDesign, size: tuple[int, int]) -> None:
    """10^9 and 2^40 pixels: exact size, distinct, and spread over all of the image."""
    cells = design.cells(Extent(*size), (0, 1, 2))
    pixels = cells[cells[:, 0] == 0, 1:][-30_000:]
    places = pixels[:, 0] * size[1] + pixels[:, 1]
    assert len(cells) == 65_536
    assert len(np.unique(places)) == 30_000
    y, x = (pixels * 8 // size).T
    counts = np.bincount(y * 8 + x, minlength=64)
    assert abs(counts - 30_000 / 64).max() < 5 * np.sqrt(30_000 / 64)


def test_sobol_points_are_spread_more_evenly_than_random_ones() -> None:
    """Counts over 64 squares: their variance is a small part of the binomial one."""
    image, spread = Extent(192, 320), {}
    for design in (SobolDesign(1024), UniformDesign(1024)):
        counts = []
        for seed in range(20):
            _, y, x = design.cells(image, (seed, 0, 0)).T
            counts.append(np.bincount(y // 24 * 8 + x // 40, minlength=64))
        spread[type(design)] = np.var(counts) / 16
    assert spread[SobolDesign] < 0.25 < 0.8 < spread[UniformDesign] < 1.1


def test_designs_of_other_names_and_sizes_are_refused() -> None:
    options = {"points": 65_536, "coarse_level": 5}
    with pytest.raises(ValueError, match="choose one of cascade, uniform, mixed, sobol, patch"):
        make_design("spiral", **options)
    patch = make_design("patch", **options)
    assert patch == PatchDesign()
    assert patch.num_values(Extent(512, 512)) == 65_536
    with pytest.raises(ValueError, match="hold no patch of 256 px; ingest with --region 256"):
        patch.num_cells(Extent(224, 512))
    with pytest.raises(ValueError, match="whole coarse cells of 32 px"):
        make_design("patch", window=200, **options)
    assert make_design("cascade", points=65_536) == CascadeDesign()
    for name, given_ in (("cascade", {"window": 6}), ("sobol", {"uniform_part": 0.5})):
        option = f"--{next(iter(given_)).replace('_', '-')}"
        with pytest.raises(ValueError, match=f"{name} do not depend on {option}; leave it out"):
            make_design(name, points=65_536, **given_)
    with pytest.raises(ValueError, match="between 0 and 1, not 1"):
        make_design("mixed", uniform_part=1.0, **options)
    with pytest.raises(ValueError, match="--points takes a positive number, not 0"):
        make_design("uniform", points=0, coarse_level=5)


def test_budgets_that_an_image_cannot_hold_are_refused() -> None:
    small = Extent(128, 128)
    for name in ("uniform", "sobol", "mixed"):
        design = make_design(name, points=65_536, coarse_level=5)
        with pytest.raises(ValueError, match="more than the 16384 pixels of a 128x128 region"):
            design.num_values(small)
    with pytest.raises(ValueError, match=r"hold the 16 lattice cells .* ask for --points 17"):
        UniformDesign(16, lattice=True).num_values(small)
    with pytest.raises(ValueError, match=r"cannot hold one stack .* ask for --points 10256 or"):
        MixedDesign(10_255, lattice=True).num_values(small)
    assert MixedDesign(10_256, lattice=True).num_values(small) == 10_256
