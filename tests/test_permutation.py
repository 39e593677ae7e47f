"""Laws of the keyed permutation: a bijection, uniform over keys, and random where it is huge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.design.permutation import Permutation


def within(counts: np.ndarray, expected: float) -> bool:
    """Whether chi^2 lies within five deviations of its mean."""
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return bool(abs(chi2 - (counts.size - 1)) < 5 * np.sqrt(2 * counts.size))


@settings(max_examples=200)
@given(st.integers(1, 700), st.lists(st.integers(0, 2**62), min_size=1, max_size=3))
def test_it_is_a_bijection(size: int, key: list[int]) -> None:
    images = Permutation(size, tuple(key)).at(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


@given(st.data(), st.sampled_from([97, 10**9, 2**40, 2**62]))
def test_an_image_does_not_depend_on_what_else_is_asked(data: st.DataObject, size: int) -> None:
    permutation = Permutation(size, (1, 2))
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    alone = [int(permutation.at(np.array([i]))[0]) for i in index]
    assert permutation.at(np.array(index)).tolist() == alone
    assert all(0 <= image < size for image in alone)


def test_every_ordered_pair_is_equally_likely_over_keys() -> None:
    size, keys = 13, 4_000
    counts = np.zeros((size, size))
    for key in range(keys):
        first, second = Permutation(size, (0, key)).at(np.array([4, 5]))
        counts[first, second] += 1
    pairs = counts[~np.eye(size, dtype=bool)]
    assert pairs.sum() == keys
    assert within(pairs, keys / pairs.size)


@pytest.mark.parametrize("size", [4096 * 4096, 31_623 * 31_627, 2**40, 2**61 + 1])
def test_a_slice_of_a_huge_one_is_an_independent_sample(size: int) -> None:
    """No repeats, uniform values, uniform residues, and neighbours that know nothing of each
    other.
    """
    number = 65_536
    images = Permutation(size, (7, size % 1000)).at(np.arange(3 * number, 4 * number))
    assert len(np.unique(images)) == number
    place = np.sort(images / size)
    # The Kolmogorov-Smirnov distance, at a level of 1e-4.
    assert abs(place - (np.arange(number) + 0.5) / number).max() < 2.23 / np.sqrt(number)
    assert within(np.bincount(images % 61, minlength=61), number / 61)
    cell = (images / size * 16).astype(int)
    pairs = np.bincount(cell[:-1] * 16 + cell[1:], minlength=256)
    assert within(pairs, (number - 1) / 256)


def test_a_size_of_none_is_refused() -> None:
    for size in (0, 2**62 + 1):
        with pytest.raises(ValueError, match="1 to 2\\^62 things"):
            Permutation(size, (0,))
