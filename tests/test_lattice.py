"""Laws of cells and boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.lattice import Box, tiles

boxes = st.builds(
    Box,
    st.integers(0, 6),
    st.integers(-500, 500),
    st.integers(-500, 500),
    st.integers(1, 200),
    st.integers(1, 200),
)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 120))
def test_tiles_partition_the_image(height: int, width: int, tile: int) -> None:
    seen = np.zeros((height, width), int)
    for box in tiles(height, width, tile):
        seen[box.y : box.y + box.height, box.x : box.x + box.width] += 1
    assert (seen == 1).all()


@given(boxes, st.integers(0, 5))
def test_cover_is_the_smallest_box_that_contains(box: Box, up: int) -> None:
    cover = box.cover(box.level + up)
    box.slices_in(cover.refine(box.level))
    for shrunk in (
        (cover.y + 1, cover.x, cover.height - 1, cover.width),
        (cover.y, cover.x, cover.height, cover.width - 1),
    ):
        if min(shrunk[2:]) >= 1:
            with pytest.raises(ValueError, match="does not lie inside"):
                box.slices_in(Box(cover.level, *shrunk).refine(box.level))


@given(boxes, st.integers(0, 6))
def test_refine_then_cover_is_the_identity(box: Box, down: int) -> None:
    level = max(box.level - down, 0)
    assert box.refine(level).cover(box.level) == box


@given(boxes, st.integers(0, 50))
def test_growing_keeps_the_middle(box: Box, cells: int) -> None:
    ys, xs = box.slices_in(box.grow(cells))
    assert (ys.start, xs.start) == (cells, cells)
    assert (ys.stop - ys.start, xs.stop - xs.start) == box.shape


def test_bad_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        Box(0, 0, 0, 0, 3)
    with pytest.raises(ValueError, match="is finer than"):
        Box(3, 0, 0, 1, 1).cover(2)
    with pytest.raises(ValueError, match="is coarser than"):
        Box(3, 0, 0, 1, 1).refine(4)
