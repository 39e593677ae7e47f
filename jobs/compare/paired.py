"""Whether one contestant is nearer to the real images than another, with a paired interval.

Contestants generate after the same regions and are compared with the same real crops, so what is
odd about a region moves both distances alike. The interval is of their difference,

    mean over seeds s of D(A_s, real) - D(B_s, real),

by the delete-a-group jackknife (`jobs.evaluate.metrics`): a region is left out of the images of
both contestants, of all seeds, and of the real crops, all at once. Real crops in no such region
are a sample of their own, left out block by block. The interval is over tissue at these numbers of
crops, not over trainings; the values of the seeds stand beside it for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64

from jobs.evaluate.crops import group
from jobs.evaluate.kept import CropFeatures
from jobs.evaluate.metrics import (
    Features,
    KernelSums,
    Moments,
    Side,
    frechet_distance,
    jackknife_interval,
)
from jobs.evaluate.spectrum import CROP_PX

Members = list[Int64[np.ndarray, " _"]]


@dataclass(frozen=True)
class Difference:
    """By how much the first contestant is nearer to the real crops (below zero) or farther.

    interval: None where there are too few regions to tell.
    """

    value: float
    interval: tuple[float, float] | None

    def in_words(self) -> str:
        """Whether zero is inside the interval."""
        if self.interval is None:
            return "interval not known"
        low, high = self.interval
        if low <= 0 <= high:
            return "zero is inside"
        return f"zero is outside: {'smaller' if high < 0 else 'larger'}"


@dataclass(frozen=True)
class Blocks:
    """The crops of regions, by their numbers: painted ones of every region and the real ones that
    lie in it; then real crops of no region, in groups of their own.
    """

    painted: Members
    real: Members
    others: Members

    @classmethod
    def of(cls, kept: CropFeatures) -> "Blocks":
        owner = np.full(len(kept.crops), -1, np.int64)
        for i, crop in enumerate(kept.crops):
            y, x = crop.y + CROP_PX // 2, crop.x + CROP_PX // 2
            for number, r in enumerate(kept.regions):
                inside = r.y <= y < r.y + r.side and r.x <= x < r.x + r.side
                if inside and r.image == crop.image:
                    owner[i] = number
        (left,) = np.nonzero(owner < 0)
        # A single crop is no sample.
        others = group([kept.crops[i] for i in left]).members if len(left) > 1 else []
        return cls(
            [np.flatnonzero(kept.owner == number) for number in range(len(kept.regions))],
            [np.flatnonzero(owner == number) for number in range(len(kept.regions))],
            [left[members] for members in others],
        )

    def groups_of_real(self) -> Members:
        """A partition of the real crops: those of each region, then the groups of the others."""
        return [*self.real, *self.others]


def paired(ours: Sequence[CropFeatures], theirs: Sequence[CropFeatures]) -> dict[str, Difference]:
    """The difference of each distance that the features are for, of two contestants by seeds."""
    first = ours[0]
    for kept in (*ours, *theirs):
        same = (kept.regions, kept.crops, kept.space, kept.store)
        if same != (first.regions, first.crops, first.space, first.store):
            raise ValueError(
                "contestants were not generated after the same regions, or were compared with "
                "other real crops or in other features; evaluate them again"
            )
    distances = {"crop_fid": _crop_fids, "kid": _kids}
    found = {}
    for name, columns in first.columns.items():
        blocks = Blocks.of(first)
        real = first.real[:, columns]
        values = [
            np.mean([distances[name](kept.painted[:, columns], real, blocks) for kept in side], 0)
            for side in (ours, theirs)
        ]
        found[name] = _difference(values[0] - values[1], blocks)
    return found


def _difference(values: Float64[np.ndarray, " _"], blocks: Blocks) -> Difference:
    """From the difference of everything, and those without each group."""
    value, without = float(values[0]), values[1:]
    regions = len(blocks.painted)
    if regions < 2 or not np.isfinite(values).all():
        return Difference(value, None)
    sides = [Side(without[:regions].tolist(), [len(m) for m in blocks.painted])]
    if len(blocks.others) > 1:
        sides.append(Side(without[regions:].tolist(), [len(m) for m in blocks.others]))
    return Difference(value, jackknife_interval(value, sides))


def _crop_fids(painted: Features, real: Features, blocks: Blocks) -> Float64[np.ndarray, " _"]:
    """Crop FID of all crops, then without each region on both sides, then without each group of
    the other real crops; not a number where too few are left.
    """
    a, b = Moments.of(painted), Moments.of(real)
    pairs = [(a, b)]
    for own, its in zip(blocks.painted, blocks.real, strict=True):
        pairs.append((_without(a, painted[own]), _without(b, real[its])))
    pairs += [(a, _without(b, real[members])) for members in blocks.others]
    return np.array(
        [frechet_distance(x, y) if min(x.count, y.count) > 1 else np.nan for x, y in pairs]
    )


def _without(all_of: Moments, part: Features) -> Moments:
    if len(part) == all_of.count:
        return replace(all_of, count=0)
    return all_of - Moments.of(part) if len(part) else all_of


def _kids(painted: Features, real: Features, blocks: Blocks) -> Float64[np.ndarray, " _"]:
    """The same of KID."""
    groups = blocks.groups_of_real()
    sums = KernelSums.of([painted[m] for m in blocks.painted], [real[m] for m in groups])
    regions = len(blocks.painted)

    def kid(left_out: int | None) -> float:
        keep_a, keep_b = np.ones(regions, bool), np.ones(len(groups), bool)
        if left_out is not None:
            keep_a[left_out : left_out + 1] = False
            keep_b[left_out] = False
        if min(sums.count_a[keep_a].sum(), sums.count_b[keep_b].sum()) < 2:
            return np.nan
        return sums.kid(keep_a, keep_b)

    return np.array([kid(left_out) for left_out in (None, *range(len(groups)))])
