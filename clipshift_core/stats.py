"""Intervals, paired tests, rankings, linkage and densities over images: thin over numpy and scipy.

Images are the unit that is drawn again everywhere. Intervals are percentile bootstrap intervals. One image says
nothing about spread, so with n = 1 every interval is NaN (unknown), never a point that looks certain.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

CUT = 0.7
"""Share of the largest merge at which the dendrogram is cut into clusters (the paper's, and scipy's default)."""


class Interval(NamedTuple):
    """A statistic with the interval that a bootstrap over images gives it."""

    mean: float
    low: float
    """NaN where one image alone leaves the interval unknown."""
    high: float


class Paired(NamedTuple):
    """Does A exceed B on the same images?"""

    mean: float
    """Mean of A - B over images."""
    low: float
    high: float
    p: float
    """Two-sided p of the sign-flip test of a mean difference of zero; its floor is 1 / (n_resamples + 1)."""
    share: float
    """Share of the images on which A > B; a tie does not count."""
    n: int


def bootstrap_mean(values: ArrayLike, *, n_resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Mean over images and its percentile interval. The order of the values does not matter."""
    values = np.sort(_checked(values, ndim=1))
    means = np.concatenate([values[i].mean(axis=1) for i in _resamples(len(values), n_resamples, seed)])
    return Interval(float(values.mean()), *_percentiles(means, len(values), level))


def bootstrap_table(
    table: pd.DataFrame,
    value: str,
    *,
    by: str = "augmentation",
    n_resamples: int,
    seed: int,
    level: float = 0.95,
) -> pd.DataFrame:
    """Columns `by`, mean, std, low, high, n: one row per group of a tidy table, in the order of first appearance.

    std is the sample standard deviation over images (NaN for one image); low and high bound the mean.
    """
    rows = []
    for name, group in table.groupby(by, sort=False, observed=True)[value]:
        mean, low, high = bootstrap_mean(group, n_resamples=n_resamples, seed=seed, level=level)
        rows.append({by: name, "mean": mean, "std": group.std(), "low": low, "high": high, "n": len(group)})
    return pd.DataFrame(rows, columns=[by, "mean", "std", "low", "high", "n"])


def paired_difference(a: ArrayLike, b: ArrayLike, *, n_resamples: int, seed: int, level: float = 0.95) -> Paired:
    """A against B on the same images: mean of A - B, its bootstrap interval, and a sign-flip permutation test.

    Under the null hypothesis the sign of each image's difference is a coin. All 2^n sign patterns are
    counted where they are no more than `n_resamples` (an exact test: p = 1 for one image, at least 1/4 for three),
    else n_resamples random ones with p = (1 + hits) / (1 + n_resamples) (Phipson and Smyth 2010).
    """
    a, b = _checked(a, ndim=1), _checked(b, ndim=1)
    if a.shape != b.shape:
        raise ValueError(f"a and b must be paired by image, got {len(a)} and {len(b)} values")
    difference = np.sort(a - b)
    interval = bootstrap_mean(difference, n_resamples=n_resamples, seed=seed, level=level)
    p = _sign_flip_p(difference, n_resamples, seed)
    return Paired(*interval, p, float((a > b).mean()), len(a))


def ranking(
    table: pd.DataFrame,
    value: str,
    *,
    n_resamples: int,
    seed: int,
    level: float = 0.95,
    largest_first: bool = True,
    by: str = "augmentation",
) -> pd.DataFrame:
    """Augmentations by mean `value` (largest first, or smallest), each tested against the next one in the list.

    Columns: rank, augmentation, mean, std, low, high, n, next, difference, difference_low, difference_high, share
    (of images on which this one exceeds the next, in the direction of the ranking), p, p_holm, separated. p_holm
    corrects for all neighbours tested (Holm 1979); separated is p_holm < 1 - level, and <NA> in the last row.
    Raises ValueError where an image lacks one of the augmentations, since the test is paired.
    """
    wide = table.pivot(index="image_id", columns=by, values=value)
    if wide.isna().any(axis=None):
        image, name = wide.isna().stack().idxmax()
        raise ValueError(f"image {image!r} has no {value!r} for {by} {name!r}; a paired test needs every one")
    settings = {"n_resamples": n_resamples, "seed": seed, "level": level}
    result = bootstrap_table(table, value, by=by, **settings)
    result = result.sort_values("mean", ascending=not largest_first, kind="stable", ignore_index=True)
    result.insert(0, "rank", np.arange(1, len(result) + 1))
    names, sign = list(result[by]), 1 if largest_first else -1
    tests = [
        paired_difference(sign * wide[first], sign * wide[second], **settings)
        for first, second in zip(names, names[1:], strict=False)
    ]
    last = [np.nan]
    result["next"] = pd.Series([*names[1:], None], dtype=object)
    result["difference"] = [t.mean for t in tests] + last
    result["difference_low"] = [t.low for t in tests] + last
    result["difference_high"] = [t.high for t in tests] + last
    result["share"] = [t.share for t in tests] + last
    result["p"] = [t.p for t in tests] + last
    result["p_holm"] = [*holm([t.p for t in tests]), np.nan]
    result["separated"] = (result["p_holm"] < 1 - level).astype("boolean").mask(result["p_holm"].isna())
    return result


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given: the k-th smallest times (m - k + 1), made monotone."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.asarray(p, float)[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0).tolist()


def rank_agreement(
    a: ArrayLike,
    b: ArrayLike,
    *,
    n_resamples: int,
    seed: int,
    level: float = 0.95,
    method: str = "kendall",
) -> Interval:
    """Do two (image, item) arrays order the items alike by their means over images? -1 to 1.

    Kendall's tau-b or Spearman's rho between the two vectors of means, with an interval from drawing the images
    again, the same images for both. NaN where one side does not order the items at all (all means equal).
    """
    statistic = {"kendall": _kendall, "spearman": _spearman}.get(method)
    if statistic is None:
        raise ValueError(f"method must be 'kendall' or 'spearman', got {method!r}")
    a, b = _checked(a, ndim=2), _checked(b, ndim=2)
    if a.shape != b.shape:
        raise ValueError(f"a and b must hold the same images and items, got shapes {a.shape} and {b.shape}")
    draws = [
        statistic(counts @ a, counts @ b)
        for i in _resamples(len(a), n_resamples, seed)
        for counts in [_counts(i) / len(a)]
    ]
    whole = statistic(a.mean(axis=0)[None], b.mean(axis=0)[None])[0]
    return Interval(float(whole), *_percentiles(np.concatenate(draws), len(a), level))


def ward(distance: ArrayLike) -> NDArray:
    """Ward linkage (scipy's (n - 1, 4) merges) of a symmetric (n, n) distance matrix with a zero diagonal."""
    distance = np.asarray(distance, dtype=float)
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or len(distance) < 2:
        raise ValueError(f"expected a square matrix of at least 2 x 2 distances, got shape {distance.shape}")
    if not np.allclose(distance, distance.T, atol=1e-6) or np.abs(np.diag(distance)).max() > 1e-6:
        raise ValueError("a matrix of distances must be symmetric (to 1e-6) with a zero diagonal")
    return hierarchy.linkage(squareform((distance + distance.T) / 2, checks=False), method="ward")


def cut_height(linkage: NDArray, share: float = CUT) -> float:
    """Height of the cut: `share` of the largest merge."""
    return share * float(linkage[:, 2].max())


def clusters(linkage: NDArray, share: float = CUT) -> NDArray[np.int64]:
    """Cluster 1, 2, ... of each leaf, in the leaves' own order, from the cut at `share` of the largest merge."""
    return hierarchy.fcluster(linkage, cut_height(linkage, share), criterion="distance").astype(np.int64)


def density(values: ArrayLike, grid: ArrayLike) -> NDArray[np.float64]:
    """Gaussian kernel density of the values on an even grid, in 1 / (units of the values); Scott's bandwidth.

    The bandwidth is never below one step of the grid, so that equal values, or a single one, give a narrow bell of
    area 1 at that value instead of an infinite spike. Equals scipy.stats.gaussian_kde wherever Scott's is wider.
    """
    values, grid = _checked(values, ndim=1), np.asarray(grid, dtype=float)
    n = len(values)
    scott = values.std(ddof=1) * n**-0.2 if n > 1 else 0.0
    bandwidth = max(scott, float(grid[1] - grid[0]))
    result = np.zeros(len(grid))
    for part in np.array_split(values, -(-n // 4096)):
        result += np.exp(-0.5 * ((grid[:, None] - part) / bandwidth) ** 2).sum(axis=1)
    return result / (n * bandwidth * np.sqrt(2 * np.pi))


def _checked(values: ArrayLike, *, ndim: int) -> NDArray[np.float64]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != ndim or len(values) == 0:
        raise ValueError(f"expected {ndim}-dimensional values of at least one image, got shape {values.shape}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{bad} of {values.size} values are NaN or infinite; set those images aside first")
    return values


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """A stream for (seed, purpose) alone, so that a test never shares its draws with an interval."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def _resamples(n: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """(batch, n) indices of images drawn with replacement, n_resamples rows in all, some 8 MB at a time."""
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    rng, rows = _generator(seed, "bootstrap"), max(1, 1_000_000 // n)
    for start in range(0, n_resamples, rows):
        yield rng.integers(n, size=(min(rows, n_resamples - start), n))


def _counts(index: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each image was drawn, (batch, n): a weighted mean as one matrix product."""
    batch, n = index.shape
    flat = (index + n * np.arange(batch)[:, None]).ravel()
    return np.bincount(flat, minlength=batch * n).reshape(batch, n).astype(np.float64)


def _percentiles(draws: NDArray, n: int, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95, got {level}")
    draws = draws[np.isfinite(draws)]
    if n == 1 or len(draws) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sign_flip_p(difference: NDArray, n_resamples: int, seed: int) -> float:
    n, total = len(difference), difference.sum()
    # sums that equal the observed one up to rounding count as equal
    bound = abs(total) - 1e-12 * np.abs(difference).sum()
    if n <= 30 and 2**n <= n_resamples:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs(2 * (bits @ difference) - total) >= bound).mean())
    rng, rows, hits = _generator(seed, "sign flip"), max(1, 1_000_000 // n), 0
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        raw = rng.integers(256, size=(size, -(-n // 8)), dtype=np.uint8)
        bits = np.unpackbits(raw, axis=1, count=n)
        hits += int((np.abs(2 * (bits @ difference) - total) >= bound).sum())
    return (1 + hits) / (1 + n_resamples)


def _kendall(a: NDArray, b: NDArray) -> NDArray:
    """Kendall's tau-b of each row of two (batch, item) arrays: concordant pairs, corrected for ties."""
    i, j = np.triu_indices(a.shape[1], k=1)
    return _product(np.sign(a[:, i] - a[:, j]), np.sign(b[:, i] - b[:, j]))


def _spearman(a: NDArray, b: NDArray) -> NDArray:
    ranks = [rankdata(x, axis=1) for x in (a, b)]
    return _product(*(r - r.mean(axis=1, keepdims=True) for r in ranks))


def _product(a: NDArray, b: NDArray) -> NDArray:
    """sum ab / sqrt(sum aa sum bb) by rows; NaN where a row is all zero."""
    norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.full(len(a), np.nan), where=norm > 0)
