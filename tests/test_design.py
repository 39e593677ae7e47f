"""Laws of the draws: their size, their nesting, and that every pixel is drawn equally often."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.design import Extent, PatchDesign, ZoomDesign, make_design

SMALL = ZoomDesign(points=4_000, coarse_level=3, window=16, halo=2)


@settings(max_examples=40)
@given(st.sampled_from([512, 1024, 4096]), st.integers(0, 2**62), st.integers(0, 999))
def test_children_lie_in_the_interior_of_their_parents(side: int, seed: int, pack: int) -> None:
    design = ZoomDesign()
    origins = design.draw(Extent(side, side), (seed, 3, pack))
    assert origins.shape == (*design.shape(Extent(side, side)), 2)
    assert (origins % 2 == 0).all()
    child, parent = origins[:, :-1] // 2, origins[:, 1:]
    assert (child - 1 >= parent + design.halo).all()
    last = child + design.window // 2
    assert (last + 1 <= parent + design.window - design.halo).all()
    assert np.array_equal(origins, design.draw(Extent(side, side), (seed, 3, pack)))


@given(st.integers(20_000, 200_000), st.sampled_from([256, 1024, 4096]))
def test_a_draw_never_exceeds_its_budget(points: int, side: int) -> None:
    design = ZoomDesign(points=points)
    lattice = (side // 32) ** 2
    if points - lattice < 5 * 48**2:
        with pytest.raises(ValueError, match="ask for --points"):
            design.num_values(Extent(side, side))
    else:
        assert points - 5 * 48**2 < design.num_values(Extent(side, side)) <= points


def test_the_published_budget_of_4096() -> None:
    assert ZoomDesign().num_values(Extent(4096, 4096)) == 128**2 + 4 * 5 * 48**2 <= 65_536


@pytest.mark.parametrize(("low", "high"), [(0, 16), (2, 14)])
def test_every_pixel_is_drawn_and_scored_equally_often(low: int, high: int) -> None:
    """Counts over many draws are binomial, with one probability for all pixels."""
    side, draws = 32, 6_000
    counts = np.zeros((side, side))
    chains, _ = SMALL.shape(Extent(side, side))
    for number in range(draws):
        for y, x in SMALL.draw(Extent(side, side), (0, number))[:, 0]:
            ys, xs = np.arange(y + low, y + high), np.arange(x + low, x + high)
            counts[np.ix_(ys[(ys >= 0) & (ys < side)], xs[(xs >= 0) & (xs < side)])] += 1
    positions = side // 2 + SMALL.window // 2 - 1
    expected = draws * chains * ((high - low) / 2 / positions) ** 2
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_draws_differ_by_key() -> None:
    first = SMALL.draw(Extent(64, 64), (0, 0))
    assert not np.array_equal(first, SMALL.draw(Extent(64, 64), (0, 1)))
    assert not np.array_equal(first, SMALL.draw(Extent(64, 64), (1, 0)))


def test_a_window_too_small_for_its_child_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold its child"):
        ZoomDesign(window=24, halo=6)


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
    drawn = [
        tuple(design.draw(image, (seed, 3, pack))[0, 0].tolist()) for pack in range(3 * number)
    ]
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


def test_designs_of_other_names_and_sizes_are_refused() -> None:
    options = {"points": 65_536, "coarse_level": 5}
    with pytest.raises(ValueError, match="choose one of zoom, uniform, mixed, sobol, patch"):
        make_design("sobol", window=None, halo=None, **options)
    patch = make_design("patch", window=None, halo=6, **options)
    assert (patch.window, patch.halo, patch.num_values(Extent(512, 512))) == (256, 0, 65_536)
    with pytest.raises(ValueError, match="hold no patch of 256 px; ingest with --region 256"):
        patch.shape(Extent(224, 512))
    with pytest.raises(ValueError, match="whole coarse cells of 32 px"):
        make_design("patch", window=200, halo=None, **options)
