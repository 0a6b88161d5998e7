"""Intervals, paired tests, rankings, linkage and densities over images: thin over numpy and scipy.

Images are the unit that is drawn again everywhere. Intervals are percentile bootstrap intervals. One image says
nothing about spread, so with n = 1 every interval is NaN (unknown), never a point that looks certain.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.cluster import hierarchy
from scipy.sparse import csr_array
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

CUT = 0.7
"""Share of the largest merge at which the dendrogram is cut into clusters (the paper's, and scipy's default)."""

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""How often each image was drawn, (batch, image), to the value of each resample, (batch,)."""


_PART = 2**17
"""Values that are ranked at once: what a processor's cache holds."""


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


def bootstrap_draws(statistic: Statistic, n: int, *, n_resamples: int, seed: int) -> NDArray[np.float64]:
    """A statistic of each resample of n images, (n_resamples,).

    It is given counts, not images, so that a mean over images is `counts @ values / n`: one matrix product for a
    whole batch of resamples.
    """
    return np.concatenate([statistic(_counts(index)) for index in _resamples(n, n_resamples, seed)])


def bootstrap(statistic: Statistic, n: int, *, n_resamples: int, seed: int, level: float = 0.95) -> Interval:
    """A statistic of the n images, each drawn once, and its percentile interval over their resamples.

    Resamples in which it is NaN, such as a correlation with something constant, are left out of the interval.
    """
    draws = bootstrap_draws(statistic, n, n_resamples=n_resamples, seed=seed)
    return Interval(float(statistic(np.ones((1, n)))[0]), *_percentiles(draws, n, level))


def settled(values: ArrayLike) -> NDArray:
    """Rounded to twelve decimals. What lies behind them is the order of a sum, another one on another processor; and in
    means of shares, such as 0.5875, it would decide the last digit that is shown, 0.587 or 0.588."""
    return np.round(values, 12)


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
    a, b = _paired(a, b)
    settings = {"n_resamples": n_resamples, "seed": seed, "level": level}
    return bootstrap(lambda counts: statistic(_means(counts, a), _means(counts, b)), len(a), **settings)


def correlation(
    a: ArrayLike,
    b: ArrayLike,
    *,
    over: Literal["pairs", "augmentations", "within"] = "pairs",
    method: Literal["spearman", "pearson"] = "spearman",
    n_resamples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Do two metrics of the same views go together? -1 to 1; a and b are (image, augmentation).

    over "pairs": one correlation over all pairs of an image and an augmentation.
    over "augmentations": between the two metrics' means over images, with one point for each augmentation.
    over "within": of each image on its own, across its augmentations, and then the mean over images. An image on
    which one of the two metrics is constant has no correlation and is left out.

    The interval draws the images again, the same for both. Every resample is ranked anew, ties sharing their mean
    rank. NaN where one side is constant throughout.
    """
    by_row = {"spearman": _spearman, "pearson": _pearson}.get(method)
    if by_row is None:
        raise ValueError(f"method must be 'spearman' or 'pearson', got {method!r}")
    a, b = _paired(a, b)
    n, settings = len(a), {"n_resamples": n_resamples, "seed": seed, "level": level}
    if over == "pairs":
        of_pairs = _spearman_of_pairs if method == "spearman" else _pearson_of_pairs
        return bootstrap(of_pairs(a, b), n, **settings)
    if over == "augmentations":
        return bootstrap(lambda counts: by_row(_means(counts, a), _means(counts, b)), n, **settings)
    if over == "within":
        each = by_row(a, b)
        each = each[np.isfinite(each)]
        return bootstrap_mean(each, **settings) if len(each) else Interval(float("nan"), float("nan"), float("nan"))
    raise ValueError(f"over must be 'pairs', 'augmentations' or 'within', got {over!r}")


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


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _checked(a, ndim=2), _checked(b, ndim=2)
    if a.shape != b.shape:
        raise ValueError(f"a and b must hold the same images and items, got shapes {a.shape} and {b.shape}")
    return a, b


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


def _means(counts: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of the (image, item) values over each resample, (batch, item).

    Not by BLAS, which may sum the last columns in another order than the first: equal items must tie to the last bit.
    """
    return np.einsum("bn,in->bi", counts, np.ascontiguousarray(values.T)) / len(values)


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


def _pearson(a: NDArray, b: NDArray) -> NDArray:
    # from each row's first value, so that a constant row is exactly zero and not a mean's rounding error
    rows = [x - x[:, :1] for x in (a, b)]
    return _product(*(x - x.mean(axis=1, keepdims=True) for x in rows))


def _spearman_of_pairs(a: NDArray, b: NDArray) -> Statistic:
    """Spearman's rho over the (image, item) pairs of each resample, ranked exactly and without sorting any of them.

    A resample holds the sample's distinct values in the sample's order; only the copies w_g of value g change. The
    mean rank of its copies is w_1 + ... + w_g - (w_g - 1) / 2, that of all N values is (N + 1) / 2, and the sum of
    their squared differences (N^3 - sum w_g^3) / 12 (Kendall 1948, the correction for ties).
    """
    (n, n_items), n_pairs = a.shape, a.size
    image = np.repeat(np.arange(n), n_items)
    groups = [np.unique(x, return_inverse=True)[1].ravel() for x in (a, b)]
    held = [csr_array((np.ones(n_pairs), (group, image))) for group in groups]

    def rho(counts: NDArray) -> NDArray:
        drawn, ranks, spread = np.ascontiguousarray(counts.T), [], []
        for group, by_image in zip(groups, held, strict=True):
            copies = by_image @ drawn  # (value, resample)
            ranks.append((copies.cumsum(axis=0) - 0.5 * (copies + n_pairs)).take(group, axis=0))
            spread.append(n_pairs**3 - np.einsum("vr,vr->r", copies * copies, copies))
        product = np.multiply(*ranks, out=ranks[0]).reshape(n, n_items, -1)
        return _quotient(12 * np.einsum("nir,nr->r", product, drawn), np.sqrt(spread[0] * spread[1]))

    def in_parts(counts: NDArray) -> NDArray:
        parts = np.array_split(counts, -(-len(counts) * n_pairs // _PART))
        return np.concatenate([rho(part) for part in parts if len(part)])

    return in_parts


def _pearson_of_pairs(a: NDArray, b: NDArray) -> Statistic:
    """Pearson's r over the (image, item) pairs of each resample, from each image's sums: one matrix product."""
    x, y = (values - values.mean() for values in (a, b))
    sums = np.stack([s.sum(axis=1) for s in (x, y, x * x, y * y, x * y)], axis=1)

    def r(counts: NDArray) -> NDArray:
        x, y, xx, yy, xy = (counts @ sums / a.size).T
        # a difference within rounding is no spread
        spread = [np.where(v > 1e-12 * s, v, 0) for v, s in ((xx - x * x, xx), (yy - y * y, yy))]
        return _quotient(xy - x * y, np.sqrt(spread[0] * spread[1]))

    return r


def _product(a: NDArray, b: NDArray) -> NDArray:
    """sum ab / sqrt(sum aa sum bb) by rows; NaN where a row is all zero."""
    return _quotient((a * b).sum(axis=1), np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))


def _quotient(a: NDArray, b: NDArray) -> NDArray:
    """a / b, NaN where b is zero: what does not vary has no correlation."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)
