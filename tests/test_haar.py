"""Laws of the octaves of the Haar basis and of what parents predict of their children."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.haar import (
    INTERPOLATION_MARGIN,
    composed,
    details,
    means,
    predicted,
    pyramid,
    up,
    zero_mean,
)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_details_are_orthogonal_octaves_that_rebuild_the_values(n: int, h: int, w: int) -> None:
    values = normal(2, 3, h << n, w << n)
    octaves = details(values, n)
    assert len(octaves) == n
    torch.testing.assert_close(sum(octaves, up(means(values, n), n)), values)
    torch.testing.assert_close(sum(octaves, torch.zeros(1)), zero_mean(values, n))
    for i, octave in enumerate(octaves):
        # Constant over cells of its own level, without a mean over their parents.
        level = n - 1 - i
        torch.testing.assert_close(up(means(octave, level), level), octave)
        assert means(octave, level + 1).abs().max() < 1e-14
        for other in octaves[:i]:
            assert abs((octave * other).sum()) < 1e-10


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_pyramid_holds_the_details_on_their_own_cells_and_rebuilds_the_values(
    n: int, h: int, w: int
) -> None:
    values = normal(2, 3, h << n, w << n)
    *octaves, mean = pyramid(values, n)
    torch.testing.assert_close(composed([*octaves, mean]), values)
    torch.testing.assert_close(mean, means(values, n))
    for level, (octave, whole) in enumerate(zip(octaves, details(values, n)[::-1], strict=True)):
        torch.testing.assert_close(up(octave, level), whole)


def test_octaves_go_from_coarse_to_fine() -> None:
    """An octave's details are its own: those of a sum are the sum of those, each in its place."""
    cells = [normal(1, 1, 2 << j, 2 << j) for j in (1, 2, 3)]
    parts = [up(zero_mean(values, 1), 2 - i) for i, values in enumerate(cells)]
    for found, expected in zip(details(sum(parts, torch.zeros(1)), 3), parts, strict=True):
        torch.testing.assert_close(found, expected)


def cubic_rows(parents: int, n: int, margin: int) -> Tensor:
    """Weights (descendants of inner parents, parents) of cubic convolution along one axis (Keys,
    1981), with the free parameter a = -1/2, which alone is exact on linear images.
    """
    a = -0.5
    centres = (torch.arange(margin << n, (parents - margin) << n).double() + 0.5) / (1 << n) - 0.5
    s = (centres[:, None] - torch.arange(parents)).abs()
    near = (a + 2) * s**3 - (a + 3) * s**2 + 1
    far = a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a
    return torch.where(s < 1, near, torch.where(s < 2, far, torch.zeros_like(s)))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("margin", [INTERPOLATION_MARGIN, 3])
def test_what_is_predicted_is_cubic_convolution(n: int, margin: int) -> None:
    parents = normal(2, 3, 9, 11)
    rows, columns = (cubic_rows(side, n, margin) for side in parents.shape[2:])
    expected = zero_mean(rows @ parents @ columns.T, n)
    torch.testing.assert_close(predicted(parents, n, margin), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_of_a_linear_image_nothing_is_left(n: int) -> None:
    y, x = torch.meshgrid(torch.arange(9 << n), torch.arange(11 << n), indexing="ij")
    image = torch.stack([3 * y - x, 0.5 * x + 2 * y + 1]).double()[None]
    inner = slice(2 << n, -(2 << n))
    truth = zero_mean(image, n)[..., inner, inner]
    left = truth - predicted(means(image, n), n, INTERPOLATION_MARGIN)
    assert left.abs().max() < 1e-12 * truth.abs().max()


@pytest.mark.parametrize("n", [1, 3])
def test_a_prediction_is_local_and_has_no_mean_in_any_parent(n: int) -> None:
    """Two parents away on each side, not one less; a rectangle's are the crop of the whole's."""
    parents = normal(1, 2, 12, 14)
    whole = predicted(parents, n, INTERPOLATION_MARGIN)
    assert means(whole, n).abs().max() < 1e-14
    part = predicted(parents[..., 2:11, 3:12], n, 3)
    torch.testing.assert_close(
        part, whole[..., 3 << n : 6 << n, 4 << n : 7 << n], atol=1e-12, rtol=0
    )
    moved = parents.clone()
    moved[..., 6, 7] += 1.0
    touched = means((predicted(moved, n, INTERPOLATION_MARGIN) - whole).abs(), n)[0, 0] > 1e-12
    rows, columns = touched.any(dim=1).nonzero()[:, 0], touched.any(dim=0).nonzero()[:, 0]
    # The inner parents begin at 2.
    assert rows.tolist() == [2, 3, 4, 5, 6] and columns.tolist() == [3, 4, 5, 6, 7]


def test_turning_and_mirroring_commute_with_everything() -> None:
    """No side of a cell is preferred, so that training may turn its windows."""
    values = normal(1, 2, 16, 16)
    for change in (lambda v: v.flip(2), lambda v: v.flip(3), lambda v: v.transpose(2, 3)):
        for found, octave in zip(details(change(values), 3), details(values, 3), strict=True):
            torch.testing.assert_close(found, change(octave))
        turned = predicted(change(values), 2, 2)
        torch.testing.assert_close(turned, change(predicted(values, 2, 2)), atol=1e-12, rtol=0)
