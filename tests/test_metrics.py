"""Laws of moments, distances, intervals, spectra and seams, against closed forms."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluate.comparison import distances
from jobs.evaluate.condition import Cosines
from jobs.evaluate.crops import Crop, Groups, disjoint_draws, group
from jobs.evaluate.metrics import (
    Estimate,
    KernelSums,
    Moments,
    crop_fid,
    frechet_between,
    frechet_distance,
    kid,
)
from jobs.evaluate.spectrum import CROP_PX, OCTAVES, Seams, Spectrum


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated vectors in float32, as networks give them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d) + np.eye(d)
    return (rng.standard_normal((n, d)) @ mixing + shift).astype(np.float32)


def parts(values: np.ndarray, count: int) -> list[np.ndarray]:
    return np.array_split(values, count)


@given(
    cuts=st.lists(st.integers(1, 59), min_size=1, max_size=6, unique=True), seed=st.integers(0, 99)
)
def test_moments_merge_exactly_in_any_partition_and_order(cuts: list[int], seed: int) -> None:
    values = gaussian(60, 5, seed) + 1000  # far from zero: what plain sums of squares would lose
    whole = Moments.of(values)
    pieces = np.split(values[np.random.default_rng(seed).permutation(60)], sorted(cuts))
    merged = Moments.of(pieces[0])
    for piece in pieces[1:]:
        merged += Moments.of(piece)
    assert merged.count == 60
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-7)
    rest, expected = whole - Moments.of(pieces[0]), Moments.of(np.concatenate(pieces[1:]))
    np.testing.assert_allclose(rest.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(rest.scatter, expected.scatter, rtol=1e-8, atol=1e-6)


def test_the_distance_of_gaussians_is_its_closed_form() -> None:
    """Commuting covariances: the distance is that of the deviations along the common axes."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    deviations = rng.uniform(0.1, 3, (2, 6))
    means = rng.standard_normal((2, 6))
    a, b = (
        Moments(11, mean, 10 * (axes * deviation**2) @ axes.T)
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = np.square(means[0] - means[1]).sum() + np.square(np.diff(deviations, axis=0)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_the_distance_equals_the_one_by_a_matrix_root() -> None:
    """Also where covariances do not commute, are singular, and whichever side is factored."""
    import scipy.linalg

    for n in (40, 6):  # 6 vectors in 8 dimensions
        a, b = Moments.of(gaussian(n, 8, 1)), Moments.of(gaussian(50, 8, 2, shift=0.3) * 2)
        root = scipy.linalg.sqrtm(b.covariance())
        middle = scipy.linalg.sqrtm(root @ a.covariance() @ root + 1e-14 * np.eye(8)).real
        traces = np.trace(a.covariance()) + np.trace(b.covariance()) - 2 * np.trace(middle)
        expected = np.square(a.mean - b.mean).sum() + traces
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5)
    few, more = gaussian(5, 40, 1), gaussian(9, 40, 2, shift=0.3)  # through the span of 14 vectors
    expected = frechet_distance(Moments.of(few), Moments.of(more))
    assert frechet_between(few, more) == pytest.approx(expected, rel=1e-7)


def test_kid_is_its_definition_and_unbiased() -> None:
    a, b = gaussian(7, 4, 3).astype(float), gaussian(9, 4, 4, shift=0.5).astype(float)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    whole = KernelSums.of([a], [b]).kid()
    assert whole == pytest.approx(within_a + within_b - 2 * across, rel=1e-9)
    split = KernelSums.of(parts(a, 3), parts(b, 4))
    assert split.kid() == pytest.approx(whole, rel=1e-9)
    without = KernelSums.of(parts(a, 3)[1:], parts(b, 4)).kid()
    assert split.kid(keep_a=np.array([False, True, True])) == pytest.approx(without, rel=1e-9)
    # Equal distributions: the mean over many draws is 0 within its own error.
    draws = [kid([gaussian(20, 4, 2 * s)], [gaussian(30, 4, 2 * s + 1)]).value for s in range(400)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error
    same = np.mean([kernel(x, x) for x in gaussian(100, 4, 0).astype(float)])
    assert same / 20 > 10 * error  # so much the pairs of a vector with itself would add


def sizes(total: int, groups: int, seed: int) -> list[int]:
    """Uneven sizes of groups."""
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, groups)
    cuts = np.rint(np.cumsum(weights) / weights.sum() * total).astype(int)
    return np.diff([0, *cuts]).tolist()


@pytest.mark.parametrize("n, d, shift", [(120, 6, 0.4), (24, 30, 0.4), (60, 6, 0.0)])
@pytest.mark.parametrize("statistic", [crop_fid, kid])
def test_intervals_cover_the_mean_of_the_statistic(
    statistic: Callable[[list[np.ndarray], list[np.ndarray]], Estimate],
    n: int,
    d: int,
    shift: float,
) -> None:
    """Over repeated draws the 95 % interval holds the mean of the value about as often.

    Vectors of one group are alike, as neighbouring crops are. With more dimensions than vectors,
    or equal distributions, the jackknife is too wide by up to the root of 2, never too narrow.
    """
    draws = 100
    cuts_a, cuts_b = np.cumsum(sizes(n, 12, 1))[:-1], np.cumsum(sizes(2 * n, 10, 2))[:-1]
    found = []
    for seed in range(draws):
        common = np.random.default_rng(seed).standard_normal((22, d)).astype(np.float32) * 0.3
        a = np.split(gaussian(n, d, 10_000 + seed, shift), cuts_a)
        b = np.split(gaussian(2 * n, d, 20_000 + seed), cuts_b)
        a = [x + same for x, same in zip(a, common[:12], strict=True)]
        b = [x + same for x, same in zip(b, common[12:], strict=True)]
        found.append(statistic(a, b))
    values = np.array([estimate.value for estimate in found])
    low, high = np.array([estimate.interval for estimate in found]).T
    covered = np.mean((low <= values.mean()) & (values.mean() <= high))
    reach = np.maximum(values - low, high - values).mean() / (1.96 * values.std())
    assert covered >= 0.9
    assert 0.9 <= reach <= 1.7
    if (n, d) == (120, 6):
        assert covered <= 0.99
        assert reach <= 1.3


def test_estimates_do_not_depend_on_any_order() -> None:
    a, b = parts(gaussian(40, 5, 1), 5), parts(gaussian(60, 5, 2), 6)
    for statistic in (crop_fid, kid):
        one, two = statistic(a, b), statistic([x[::-1] for x in a[::-1]], b[::-1])
        assert one.value == pytest.approx(two.value, rel=1e-6)
        assert one.interval == pytest.approx(two.interval, rel=1e-6)


def test_floors_are_what_equal_distributions_score() -> None:
    """Real against real of another draw: the value lies near the floor, a shift far above."""
    real, same = gaussian(400, 6, 5), gaussian(200, 6, 6)
    groups_real = Groups([*np.arange(400).reshape(20, 20)], "")
    groups = Groups([*np.arange(200).reshape(20, 10)], "")
    for name in ("crop_fid", "kid"):
        columns = {name: slice(None)}
        found = distances(same, groups, real, groups_real, columns, 0)[name]
        apart = distances(same + 0.5, groups, real, groups_real, columns, 0)[name]
        width = found["interval"][1] - found["interval"][0]
        assert abs(found["value"] - found["floor"]) < width
        assert apart["interval"][0] > found["floor"]
        assert (found["floor_n"], found["floor_n_reference"]) == (200, 200)


@given(
    members=st.lists(st.integers(1, 9), min_size=1, max_size=30).filter(lambda s: sum(s) >= 4),
    share=st.floats(0.1, 0.5),
    seed=st.integers(0, 9),
)
def test_draws_share_no_group(members: list[int], share: float, seed: int) -> None:
    total = sum(members)
    size = max(int(share * total), 1)
    groups = Groups(np.split(np.arange(total), np.cumsum(members)[:-1]), "")
    first, second = disjoint_draws(groups, size, seed)
    owner = np.repeat(np.arange(len(members)), members)
    assert not {*owner[first.astype(int)]} & {*owner[second]}
    assert len(first) <= size <= len(second)
    if max(members) == 1:
        assert len(first) == size


def test_groups_are_blocks_of_few_images_and_whole_ones_of_many() -> None:
    one = [Crop("a", y, x, False) for y in range(0, 4096, 256) for x in range(0, 4096, 256)]
    blocks = group(one)
    assert (len(blocks.members), blocks.how) == (16, "16 groups of blocks of 1024 px of 1 image")
    for members in blocks.members:
        places = {(one[i].y // 1024, one[i].x // 1024) for i in members}
        assert len(places) == 1
    many = [Crop(f"{i:02}", y, 0, False) for i in range(40) for y in (0, 256)]
    images = group(many)
    assert len(images.members) == 32
    owner = {i: k for k, members in enumerate(images.members) for i in members}
    assert all(owner[i] == owner[i + 1] for i in range(0, 80, 2))
    assert sorted(owner) == list(range(80))


def white(seed: int, size: int = CROP_PX) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, size, size))


def mean_spectrum(crops: list[np.ndarray]) -> np.ndarray:
    total = Spectrum.zero()
    for crop in crops:
        total += Spectrum.of(crop)
    return total.variances()


def test_octaves_sum_to_the_variance() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (3, CROP_PX, CROP_PX), dtype=np.uint8)
    crop[:, 100:, 50:] //= 3
    expected = crop.reshape(3, -1).var(axis=1).mean()
    assert Spectrum.of(crop).power.sum() == pytest.approx(expected, rel=1e-12)
    assert Spectrum.of(np.full_like(crop, 77)).power.tolist() == [0] * OCTAVES


def test_white_noise_and_its_blur_have_their_closed_forms() -> None:
    """White: 3/4 4^-k. A periodic 2x2 mean: v(m)^2 - v(2m)^2, v(m) = (m - 1/2) / m^2."""
    crops = [white(seed) for seed in range(64)]
    side = 2.0 ** np.arange(OCTAVES)
    found = mean_spectrum(crops)
    # An octave of one crop is a mean of 3/4 4^-k CROP_PX^2 squares: five deviations are allowed.
    reach = 5 * np.sqrt(2 / (64 * 0.75 * (CROP_PX / side) ** 2))
    assert (abs(found / (0.75 / side**2) - 1) < reach).all()
    rolled = [(c + np.roll(c, -1, 1)) / 2 for c in crops]
    blurred = mean_spectrum([(c + np.roll(c, -1, 2)) / 2 for c in rolled])
    variance = [(m - 0.5) / m**2 for m in (*side, CROP_PX)]
    expected = np.array([a**2 - b**2 for a, b in itertools.pairwise(variance)])
    # At the coarsest octave the closed form's far neighbour is the crop's own other end.
    assert (abs(blurred / expected - 1) < reach)[:-1].all()
    ratio = np.log2(blurred / found)
    assert ratio[0] == pytest.approx(np.log2(7 / 48), abs=0.02)
    assert (np.diff(ratio[:5]) > 0).all()


def test_planted_seams_are_found_at_their_period_only() -> None:
    field = white(7, 513)[0].cumsum(0).cumsum(1) * 0.01 + white(8, 513)[0]

    def contrasts(picture: np.ndarray) -> tuple[float, float]:
        seams = Seams.zero()
        pixels = np.clip(100 + 10 * picture[None], 0, 255).astype(np.uint8)
        for y in (0, 256):
            for x in (0, 256):
                seams += Seams.of(pixels[:, y : y + 257, x : x + 257])
        small, large = seams.contrast(32), seams.contrast(256)
        assert small is not None and large is not None
        return small, large

    small, large = contrasts(field)
    assert small == pytest.approx(1, abs=0.03)
    assert large == pytest.approx(1, abs=0.1)
    steps = (np.arange(513) // 32) % 2
    small, large = contrasts(field + 2.0 * steps + 2.0 * steps[:, None])
    assert small > 1.4
    steps = (np.arange(513) // 256) % 2
    small, large = contrasts(field + 4.0 * steps + 4.0 * steps[:, None])
    assert large > 2
    assert small < 1.4
    assert Seams.of(np.full((1, 256, 256), 9, np.uint8)).contrast(32) is None


def test_the_cosine_of_others_is_the_mean_over_all_other_pairs() -> None:
    a, b = gaussian(9, 5, 1).astype(float), gaussian(9, 5, 2).astype(float)
    own, other = (Cosines.of(a[:4], b[:4]) + Cosines.of(a[4:], b[4:])).means()
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    every = unit[0] @ unit[1].T
    assert own == pytest.approx(np.diag(every).mean())
    assert other == pytest.approx(every[~np.eye(9, dtype=bool)].mean())
    assert Cosines.of(a[:1], b[:1]).means()[1] is None
