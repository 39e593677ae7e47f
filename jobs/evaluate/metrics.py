"""Numbers that say how good painted images are.

Features. A set of feature vectors is reduced to its *moments* (count, mean, scatter in float64),
which merge exactly in any partition. The Fréchet distance of two Gaussians,

    |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2),

needs no matrix root: with any F F^T = S_b the last trace is the sum of the roots of the
eigenvalues of F^T S_a F. It is biased upward in small samples. KID, the squared maximum mean
discrepancy with the kernel (x.y / d + 1)^3, is unbiased: its mean is 0 for equal distributions.

Intervals. Resampling with replacement repeats vectors, which biases both numbers, so the spread
comes from leaving out: the delete-m_j jackknife (Busing, Meijer and van der Leeden, 1999) over
groups of unequal size, on either side, with Student's t at the Welch-Satterthwaite degrees of
freedom. The interval is of the value *at these numbers of crops* (its mean over such draws), not
of the distance between infinite sets; what a perfect model would score there is the floor. It is
near nominal where the sets differ, and too wide, by up to the root of 2, where they hardly do or
where there are fewer vectors than dimensions: the jackknife counts second-order terms twice.

Layout. An image and the regions of a store are reduced to thumbnails, where only the layout is
left, and compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from scipy.special import stdtrit
from skimage.transform import resize

from pipeline.ome import OmeImage
from pipeline.store import Region, Store

THUMBNAIL_PX = 64
CONFIDENCE = 0.95
KERNEL_ROWS = 1024

Features = Float[np.ndarray, "_ d"]


@dataclass(frozen=True)
class Moments:
    """Count, mean, and sum of the outer products of the deviations from the mean."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Features) -> "Moments":
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def __sub__(self, part: "Moments") -> "Moments":
        """Moments of the set without a part of it: what `+ part` would undo."""
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        apart = part.mean - mean
        between = np.outer(apart, apart) * (count * part.count / self.count)
        return Moments(count, mean, self.scatter - part.scatter - between)

    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Unbiased; needs a count of at least 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, not {self.count}")
        return self.scatter / (self.count - 1)

    @cached_property
    def factor(self) -> Float64[np.ndarray, "d r"]:
        """F with F F^T = the covariance and as many columns as its rank."""
        values, vectors = np.linalg.eigh(self.covariance())
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance; quick for many `a` and one `b`."""
    covariance = a.covariance()
    product = np.linalg.eigvalsh(b.factor.T @ covariance @ b.factor)
    roots = np.sqrt(np.maximum(product, 0.0)).sum()
    traces = np.trace(covariance) + np.square(b.factor).sum()
    return max(float(np.square(a.mean - b.mean).sum() + traces - 2 * roots), 0.0)


def frechet_between(a: Features, b: Features) -> float:
    """The squared Fréchet distance of the Gaussians fitted to two sets of vectors."""
    (a,), (b,) = _within_span([a], [b])
    return frechet_distance(Moments.of(a), Moments.of(b))


def _within_span(
    a: Sequence[Features], b: Sequence[Features]
) -> tuple[Sequence[Float[np.ndarray, "_ r"]], Sequence[Float[np.ndarray, "_ r"]]]:
    """The groups of two sets, turned into the space that their few vectors span.

    It has no more dimensions than there are vectors; a rotation changes no distance, and the
    covariances become small.
    """
    stacked = np.concatenate([*a, *b]).astype(np.float64)
    if len(stacked) >= stacked.shape[1]:
        return a, b
    basis, _ = np.linalg.qr((stacked - stacked.mean(axis=0)).T)
    turned = np.split(stacked @ basis, np.cumsum([len(x) for x in (*a, *b)])[:-1])
    return turned[: len(a)], turned[len(a) :]


@dataclass(frozen=True)
class KernelSums:
    """Sums of the kernel over all pairs of vectors of two groups, of set a and of set b.

    The pairs of a vector with itself are left out. From these follow KID and KID without any
    group.
    """

    aa: Float64[np.ndarray, "ga ga"]
    bb: Float64[np.ndarray, "gb gb"]
    ab: Float64[np.ndarray, "ga gb"]
    count_a: Int64[np.ndarray, " ga"]
    count_b: Int64[np.ndarray, " gb"]

    @classmethod
    def of(cls, a: Sequence[Features], b: Sequence[Features]) -> "KernelSums":
        """From the groups of either set."""
        return cls(
            _within(a),
            _within(b),
            np.array([[_kernel_sum(x, y) for y in b] for x in a]),
            np.array([len(x) for x in a]),
            np.array([len(y) for y in b]),
        )

    def kid(
        self,
        keep_a: Bool[np.ndarray, " ga"] | None = None,
        keep_b: Bool[np.ndarray, " gb"] | None = None,
    ) -> float:
        """The unbiased estimate, from all groups or those kept."""
        a = np.ones(len(self.aa)) if keep_a is None else keep_a.astype(np.float64)
        b = np.ones(len(self.bb)) if keep_b is None else keep_b.astype(np.float64)
        n, m = float(a @ self.count_a), float(b @ self.count_b)
        within = a @ self.aa @ a / (n * (n - 1)) + b @ self.bb @ b / (m * (m - 1))
        return float(within - 2 * (a @ self.ab @ b) / (n * m))


def _within(groups: Sequence[Features]) -> Float64[np.ndarray, "g g"]:
    sums = np.zeros((len(groups), len(groups)))
    for i, x in enumerate(groups):
        for j in range(i):
            sums[i, j] = sums[j, i] = _kernel_sum(x, groups[j])
        own = np.square(x.astype(np.float64)).sum(axis=1) / x.shape[1] + 1
        sums[i, i] = _kernel_sum(x, x) - (own**3).sum()
    return sums


def _kernel_sum(x: Features, y: Features) -> float:
    right, total = y.astype(np.float64).T, 0.0
    for row in range(0, len(x), KERNEL_ROWS):
        products = x[row : row + KERNEL_ROWS].astype(np.float64) @ right
        total += float(((products / x.shape[1] + 1) ** 3).sum())
    return total


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, None where there are too few groups to tell."""

    value: float
    interval: tuple[float, float] | None


def crop_fid(generated: Sequence[Features], real: Sequence[Features]) -> Estimate:
    """The Fréchet distance of two sets of features, given by their groups."""
    generated, real = _within_span(generated, real)
    a, b = (Moments.of(np.concatenate(groups)) for groups in (generated, real))
    without_a = [a - Moments.of(group) for group in generated] if len(generated) > 1 else []
    without_b = [b - Moments.of(group) for group in real] if len(real) > 1 else []
    if min((m.count for m in (*without_a, *without_b)), default=0) < 2:
        return Estimate(frechet_distance(a, b), None)
    sides = [
        Side([frechet_distance(m, b) for m in without_a], [len(g) for g in generated]),
        Side([frechet_distance(m, a) for m in without_b], [len(g) for g in real]),
    ]
    value = frechet_distance(a, b)
    low, high = jackknife_interval(value, sides)
    return Estimate(value, (max(low, 0.0), high))


def kid(generated: Sequence[Features], real: Sequence[Features]) -> Estimate:
    """KID of two sets of features, given by their groups."""
    sums = KernelSums.of(generated, real)
    value = sums.kid()
    everything = [(sums.count_a, len(generated)), (sums.count_b, len(real))]
    if any(groups < 2 or counts.sum() - counts.max() < 2 for counts, groups in everything):
        return Estimate(value, None)
    sides = [
        Side(
            [sums.kid(keep_a=keep) for keep in ~np.eye(len(generated), dtype=bool)],
            sums.count_a.tolist(),
        ),
        Side(
            [sums.kid(keep_b=keep) for keep in ~np.eye(len(real), dtype=bool)],
            sums.count_b.tolist(),
        ),
    ]
    return Estimate(value, jackknife_interval(value, sides))


@dataclass(frozen=True)
class Side:
    """A statistic recomputed without each group of one of its samples, and the groups' sizes."""

    without: Sequence[float]
    sizes: Sequence[int]

    def variance(self, value: float) -> float:
        """The delete-m_j jackknife's estimate of the statistic's variance."""
        without, share = np.array(self.without), np.array(self.sizes) / sum(self.sizes)
        pseudo = (value - (1 - share) * without) / share
        estimate = len(without) * value - float(((1 - share) * without).sum())
        return float((np.square(pseudo - estimate) * share / (1 - share)).mean())


def jackknife_interval(value: float, sides: Sequence[Side]) -> tuple[float, float]:
    """The 95 % interval of a statistic of one or more independent samples."""
    variances = np.array([side.variance(value) for side in sides])
    freedom = np.array([len(side.without) - 1 for side in sides])
    if not variances.any():
        return value, value
    degrees = variances.sum() ** 2 / (np.square(variances) / freedom).sum()
    reach = float(stdtrit(degrees, (1 + CONFIDENCE) / 2) * np.sqrt(variances.sum()))
    return value - reach, value + reach


@dataclass(frozen=True)
class LayoutMatch:
    """Root mean square distances, in pixel values, between thumbnails.

    own: to the region that conditioned the image. nearest_other: the least to any other region,
    and that region's number.
    """

    own: float
    nearest_other: float
    nearest_other_region: int

    @property
    def follows(self) -> bool:
        """Whether the image is nearer to its own region than to every other."""
        return self.own < self.nearest_other

    @classmethod
    def of(cls, distances: Mapping[int, float], own: int) -> "LayoutMatch":
        """From the distance to every region by its number."""
        others = {k: d for k, d in distances.items() if k != own} or {own: float("inf")}
        nearest = min(others, key=lambda k: others[k])
        return cls(distances[own], others[nearest], nearest)


Thumbnail = Float[np.ndarray, "c 64 64"]


def thumbnail(image: OmeImage, y: int, x: int, side: int) -> Thumbnail:
    """A square of an image reduced to 64 x 64 area means, from the nearest finer level."""
    level = 0
    while level + 1 < image.num_levels and side >> (level + 1) >= 4 * THUMBNAIL_PX:
        level += 1
    _, height, width = image.level_shape(level)
    top, left = min(y >> level, height - 1), min(x >> level, width - 1)
    rows, columns = min(side >> level, height - top), min(side >> level, width - left)
    pixels = image.read(top, left, rows, columns, level).astype(np.float64)
    return np.stack(
        [
            resize(band, (THUMBNAIL_PX, THUMBNAIL_PX), order=1, anti_aliasing=True)
            for band in pixels
        ]
    )


def region_thumbnails(store: Store, regions: Sequence[Region], side: int) -> dict[int, Thumbnail]:
    """The upper left square of every region by its number."""
    images = {name: store.image(name) for name in {region.image for region in regions}}
    return {r.index: thumbnail(images[r.image], r.y, r.x, side) for r in regions}


def layout_distances(
    painted: OmeImage, real: Mapping[int, Thumbnail], side: int
) -> dict[int, float]:
    """Root mean square distances from an image's upper left square to thumbnails of that side."""
    generated = thumbnail(painted, 0, 0, side)
    return {k: float(np.sqrt(np.square(generated - shown).mean())) for k, shown in real.items()}
