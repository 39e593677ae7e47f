"""Paired differences of contestants against oracles: nothing, a known change, known Gaussians."""

import numpy as np
import pytest

from jobs.compare.paired import Blocks, Difference, paired
from jobs.evaluate.crops import Crop
from jobs.evaluate.kept import CropFeatures
from jobs.evaluate.metrics import crop_fid
from pipeline.store import Region

SIDE_PX, REGIONS, CROPS = 1024, 16, 8
COLUMNS = {"crop_fid": slice(2), "kid": slice(2, None)}
FID_DIM, DIM = 2, 3


def kept(painted: np.ndarray, real: np.ndarray) -> CropFeatures:
    """From features (region, crop, number): regions side by side, their crops in rows of four."""
    regions = tuple(
        Region(i, "a", 0, i * SIDE_PX, SIDE_PX, 1.0, "test") for i in range(len(painted))
    )
    crops = tuple(
        Crop("a", j // 4 * 256, i * SIDE_PX + j % 4 * 256, False)
        for i in range(len(real))
        for j in range(real.shape[1])
    )
    owner = np.repeat(np.arange(len(painted)), painted.shape[1])
    flat = [x.reshape(-1, x.shape[2]).astype(np.float32) for x in (painted, real)]
    return CropFeatures(flat[0], owner, regions, flat[1], crops, COLUMNS, "space", "store")


def drawn(rng: np.random.Generator, regions: int = REGIONS) -> np.ndarray:
    return rng.normal(size=(regions, CROPS, DIM))


def test_a_contestant_is_no_nearer_than_itself() -> None:
    rng = np.random.default_rng(0)
    real = drawn(rng)
    seeds = [kept(drawn(rng), real) for _ in range(2)]
    for difference in paired(seeds, seeds).values():
        assert difference == Difference(0.0, (0.0, 0.0))
        assert difference.in_words() == "zero is inside"
    # Nor is it if its seeds come in another order.
    for difference in paired(seeds, seeds[::-1]).values():
        assert difference.value == pytest.approx(0, abs=1e-12)


def noisier(regions: int, tissue: float, noise: float) -> tuple[np.ndarray, ...]:
    """Real features, others of the same tissue, and these with noise."""
    rng = np.random.default_rng(1)
    places = tissue * rng.normal(size=(regions, 1, DIM))
    real, clean = (places + drawn(rng, regions) for _ in range(2))
    return real, clean, clean + noise * drawn(rng, regions)


def test_known_noise_is_told_from_none() -> None:
    real, clean, noisy = noisier(96, tissue=0.3, noise=1.0)
    ours, theirs = [kept(noisy, real)], [kept(clean, real)]
    for difference in paired(ours, theirs).values():
        assert difference.interval is not None
        assert 0 < difference.interval[0] < difference.value < difference.interval[1]
        assert difference.in_words() == "zero is outside: larger"
    assert paired(theirs, ours)["kid"].in_words() == "zero is outside: smaller"


def test_pairing_tells_what_two_intervals_do_not() -> None:
    """Regions differ as much as the noise, alike on all sides: the intervals of the two distances
    overlap, that of their difference is without zero.
    """
    real, clean, noisy = noisier(REGIONS, tissue=2.0, noise=2.0)
    alone = [crop_fid([*x[..., :FID_DIM]], [*real[..., :FID_DIM]]) for x in (noisy, clean)]
    assert alone[0].interval is not None and alone[1].interval is not None
    assert alone[0].interval[0] < alone[1].interval[1]
    difference = paired([kept(noisy, real)], [kept(clean, real)])["crop_fid"]
    assert difference.value == pytest.approx(alone[0].value - alone[1].value)
    assert difference.in_words() == "zero is outside: larger"


def test_the_interval_covers_the_true_difference() -> None:
    """Gaussians of one covariance: Crop FIDs differ by the squares of their shifts, and KID in one
    dimension is a sum over raw moments. Regions have an effect of their own, in all alike.
    """
    within, between, shifts = 1.0, 0.5, (0.8, 0.5)
    variance = within**2 + between**2

    def raw(shift: float) -> np.ndarray:
        return np.array([shift, variance + shift**2, shift**3 + 3 * shift * variance])

    def true_kid(shift: float) -> float:
        return float((np.array([3, 3, 1]) * np.square(raw(shift) - raw(0.0))).sum())

    truth = {
        "crop_fid": FID_DIM * (shifts[0] ** 2 - shifts[1] ** 2),
        "kid": true_kid(shifts[0]) - true_kid(shifts[1]),
    }
    repetitions, covered = 60, dict.fromkeys(truth, 0)
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        tissue = between * rng.normal(size=(REGIONS, 1, DIM))
        real = tissue + within * drawn(rng)
        sides = [[kept(tissue + within * drawn(rng) + s, real) for _ in range(2)] for s in shifts]
        for name, difference in paired(*sides).items():
            assert difference.interval is not None
            low, high = difference.interval
            covered[name] += low <= truth[name] <= high
    # Of 60 intervals at 95 % fewer than 52 cover in one of 100 test runs.
    assert min(covered.values()) >= 52, covered


def test_every_crop_is_left_out_with_its_region_or_in_a_group_of_its_own() -> None:
    rng = np.random.default_rng(2)
    features = kept(drawn(rng, 4), drawn(rng, 7))
    blocks = Blocks.of(features)
    for members, size in (
        (blocks.painted, 4 * CROPS),
        ([*blocks.real, *blocks.others], 7 * CROPS),
    ):
        assert sorted(np.concatenate(members).tolist()) == list(range(size))
    for number, members in enumerate(blocks.real):
        assert {features.crops[i].x // SIDE_PX for i in members} == {number}
    for difference in paired([features], [kept(drawn(rng, 4), drawn(rng, 7))]).values():
        assert difference.interval is None or np.isfinite(difference.interval).all()


def test_what_is_not_paired_is_refused() -> None:
    rng = np.random.default_rng(3)
    one, real = drawn(rng), drawn(rng)
    with pytest.raises(ValueError, match="not generated after the same regions"):
        paired([kept(one, real)], [kept(one[:-1], real)])
    single = kept(one[:1], real[:1])
    assert paired([single], [single])["crop_fid"] == Difference(0.0, None)
    assert Difference(0.0, None).in_words() == "interval not known"
