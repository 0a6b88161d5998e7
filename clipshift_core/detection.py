"""How well activations tell images that show something from images that do not: AUROC and F1, many units at a time.

Units are the columns of a sparse matrix (image, unit), and what is looked for are the columns of a boolean one (image,
factor). Zeros are never written out: all zeros of a unit are ties of one another.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.sparse import csc_array

ENTRIES = 2**23
"""Entries (activation, factor) that `best_f1` holds at a time."""


def auroc(units: csc_array, positive: Bool[NDArray, "image factor"]) -> Float[NDArray, "unit factor"]:
    """Area under the ROC curve of every unit for every factor value: the share of pairs of an image that shows it and
    one that does not which the unit ranks rightly, ties counting half. A unit that is never on has 0.5.

    From rank sums (Mann and Whitney 1947). Only the entries that are not zero are sorted; all zeros share one rank.
    """
    n_images, n_units = units.shape
    column, row, value = _entries(units)
    order = np.lexsort((value, column))
    column, row, value = column[order], row[order], value[order]
    starts = np.searchsorted(column, np.arange(n_units))
    n_zero = n_images - np.bincount(column, minlength=n_units)
    n_below = np.bincount(column, weights=value < 0, minlength=n_units)
    # the mean rank of equals, counted from 1 among the entries of a column; zeros lie between the signs
    group = np.cumsum(np.r_[True, (column[1:] != column[:-1]) | (value[1:] != value[:-1])]) - 1 if len(row) else row
    ends = np.searchsorted(group, np.arange(group[-1] + 1 if len(row) else 0), side="right")
    begins = np.r_[0, ends[:-1]] if len(ends) else ends
    rank = (0.5 * (begins + ends + 1))[group] - starts[column] + np.where(value > 0, n_zero[column], 0)
    zero_rank = n_below + 0.5 * (n_zero + 1)
    above_zero = csc_array((rank - zero_rank[column], (row, column)), shape=units.shape)
    n_positive = positive.sum(axis=0)
    sums = above_zero.T @ positive.astype(float) + zero_rank[:, None] * n_positive
    pairs = n_positive * (n_images - n_positive)
    return (sums - 0.5 * n_positive * (n_positive + 1)) / np.where(pairs > 0, pairs, np.nan)


def best_f1(units: csc_array, positive: Bool[NDArray, "image factor"]) -> Float[NDArray, "unit factor"]:
    """The largest F1 = 2 TP / (TP + FP + P) of every unit for every factor value, over all thresholds t of
    "activation >= t". The lowest calls every image positive."""
    (n_images, n_units), n_factors = units.shape, positive.shape[1]
    n_positive, found = positive.sum(axis=0), np.empty((n_units, n_factors))
    step = max(1, ENTRIES // (n_factors * (1 + units.nnz // max(1, n_units))))
    for start in range(0, n_units, step):
        part = units[:, start : start + step]
        column, row, value = _entries(part)
        every = np.arange(part.shape[1])
        # all zeros of a unit are one more entry, with as many images as there are zeros
        hits = np.zeros((len(row) + len(every), n_factors))
        hits[: len(row)] = positive[row]
        hits[len(row) :] = n_positive - csc_array((np.ones(len(row)), (column, row)), shape=part.shape[::-1]) @ positive
        called = np.r_[np.ones(len(row)), n_images - np.bincount(column, minlength=len(every))]
        column, value = np.r_[column, every], np.r_[value, np.zeros(len(every))]
        order = np.lexsort((-value, column))
        column, value = column[order], value[order]
        starts = np.searchsorted(column, every)
        hits, called = np.cumsum(hits[order], axis=0), np.cumsum(called[order])
        before = np.maximum(starts - 1, 0)
        hits -= np.where(starts > 0, hits[before].T, 0).T[column]
        called -= np.where(starts > 0, called[before], 0)[column]
        f1 = 2 * hits / np.maximum(called[:, None] + n_positive, 1)
        last_of_equals = np.r_[(column[1:] != column[:-1]) | (value[1:] != value[:-1]), True]
        found[start : start + step] = np.maximum.reduceat(np.where(last_of_equals[:, None], f1, 0), starts, axis=0)
    return found


def threshold(activation: Float[NDArray, " image"], positive: Bool[NDArray, " image"]) -> float:
    """The t for which "activation >= t" has the largest F1; the largest such t, and it is one of the activations."""
    order = np.argsort(-activation, kind="stable")
    value = activation[order]
    f1 = 2 * np.cumsum(positive[order]) / (np.arange(1, len(value) + 1) + positive.sum())
    last_of_equals = np.r_[value[1:] != value[:-1], True]
    return float(value[np.argmax(np.where(last_of_equals, f1, -1))])


def auroc_draws(
    activation: Float[NDArray, " image"],
    positive: Bool[NDArray, " image"],
    counts: Float[NDArray, "draw image"],
) -> Float[NDArray, " draw"]:
    """AUROC of one unit in resamples that hold each image `counts` times; NaN where one of the two sides is empty."""
    others = np.flatnonzero(~positive)
    others = others[np.argsort(activation[others], kind="stable")]
    lower = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts.take(others, axis=1), axis=1)], axis=1)
    below, up_to = (np.searchsorted(activation[others], activation[positive], side) for side in ("left", "right"))
    weight = counts[:, positive]
    beaten = (weight * (lower[:, below] + lower[:, up_to])).sum(axis=1) / 2
    pairs = weight.sum(axis=1) * lower[:, -1]
    return np.divide(beaten, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def _entries(units: csc_array) -> tuple[Int[NDArray, " entry"], Int[NDArray, " entry"], Float[NDArray, " entry"]]:
    """Column, row and value of the entries that are not zero."""
    held = units.tocoo()
    some = held.data != 0
    return held.col[some].astype(np.int64), held.row[some].astype(np.int64), held.data[some]
