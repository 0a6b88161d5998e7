"""Unexpected reliance: latents that carry a class's similarity and do not mean the class; found, and scored.

A candidate is a pair of a class and a latent that is on in at least `AT_LEAST` of the class's images and whose relative
alignment, its semantic alignment with the class's text over the largest that any latent has with it, is below `LOW`.
Its score is its attribution: the mean, over all images of the class, of what it adds to the cosine with the text of
that class, 0 in an image where it is off. `discover` says which scores are large by a target-decoy threshold;
`score_table` and `ranks` compare that order, and those of other methods, with a truth that is known otherwise.

Units are as in `attribution`: (image, unit), the latent of each in `latents`. Nothing here knows a model or a world.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from clipshift_core.faithfulness import mean_intervals

LOW = 0.5
"""Relative alignment below which a reliance is unexpected."""
AT_LEAST = 3
"""Images of a class in which a latent is on before its mean is looked at."""
FALSE_DISCOVERY_RATE = 0.1
MEASURES = ("average precision", "precision", "recall", "recall of causal")
CHUNK_ENTRIES = 2**19
"""Scores, over resamples and candidates, that `score_table` holds at a time (4 MiB)."""


class Discovery(NamedTuple):
    """The candidates and which of them are found."""

    table: pd.DataFrame
    """A row a candidate, best first, equal ones by word and latent: word, latent, n (images of the class), n_on (those
    in which it is on), attribution, low, high (95 %), alignment, relative, fdr, found."""
    threshold: float
    """The attribution from which on candidates are found; infinite where none is."""
    decoys: Float[NDArray, " decoy"]
    """The decoys' scores above 0, those of all draws together."""


class Ranking(NamedTuple):
    """What one method says of the candidates, image by image, so that images can be drawn again."""

    candidates: pd.DataFrame
    """A row a candidate, by word and latent: word, latent, n, n_on, alignment, relative."""
    scores: csr_array
    """(image, candidate): 0 where the latent is off, and in images of other classes."""
    classes: Int[NDArray, " image"]

    @property
    def means(self) -> Float[NDArray, " candidate"]:
        """Mean over all images of each candidate's class."""
        return self.scores.sum(axis=0) / self.candidates["n"].to_numpy()

    def table(self, n_found: int) -> pd.DataFrame:
        """The candidates best first, with the columns attribution (the mean score) and found (the first `n_found`)."""
        table = _best_first(self.candidates.assign(attribution=self.means))
        return table.assign(found=np.arange(len(table)) < n_found)


def relative(alignment: Float[Tensor, "class latent"]) -> Float[Tensor, "class latent"]:
    """Alignment over the largest that any latent has with the class; NaN where unknown or where that one is not > 0."""
    most = torch.where(alignment.isnan(), -torch.inf, alignment).amax(1, keepdim=True)
    return torch.where(most > 0, alignment / most, torch.nan)


def discover(
    latents: Int[Tensor, "image unit"],
    values: Float[Tensor, "image unit"],
    decoys: Float[Tensor, "draw image unit"],
    classes: Int[Tensor, " image"],
    alignment: Float[Tensor, "class latent"],
    words: Sequence[str],
    *,
    n_resamples: int,
    seed: int,
    q: float = FALSE_DISCOVERY_RATE,
    on: Bool[Tensor, "image unit"] | None = None,
) -> Discovery:
    """Candidates whose attribution to their own class's text is larger than attribution to other texts explains.

    values: of each image to the text of its class; decoys: of the same units to texts of other classes. alignment: NaN
    for a latent without examples, which is no candidate; nor is any in a class with which no latent is aligned (largest
    alignment 0 or less). on: where a unit may be on with a value of exactly 0; else it is values != 0.

    A candidate's decoy score is the same mean, over the same images of the same latent, of a draw's attributions. Of
    the candidates with a score of t or more an estimated

        fdr(t) = (mean over draws of the number of decoy scores >= t) / (number of scores >= t)

    is false, all candidates being counted as possibly false, which is on the safe side (the estimate from permutations
    of Tusher et al. 2001; Storey and Tibshirani 2003). The threshold is the lowest positive score with fdr(t) <= q; the
    column fdr is the q-value, the lowest rate at which a candidate is found, 1 where its score is not positive.

    What is controlled is attribution that does not depend on which text is asked: a latent that pushes an embedding
    towards all texts alike is no finding. What is not: that the reliance is causal (that is what `score_table` asks),
    and that other images would show it (`low` and `high`, a percentile bootstrap over the class's images).

    The rate holds where, within a draw, all images of a class are asked for one other text, as they are for their own.
    Where each image draws a text of its own, the texts average out over the class, decoys vary less than single texts
    do, and more than q of what is found is false: a score need then only exceed that of the mean text, not those of
    other texts. A text that a latent means (`relative` of LOW or more) is no decoy for it and hides what is there; its
    value should be 0. Draws should number 1 / q or more; with few the rate is coarse.
    """
    if not 0 < q < 1:
        raise ValueError(f"a false-discovery rate of {q}: one between 0 and 1 is accepted")
    if decoys.ndim != 3 or decoys.shape[1:] != values.shape or not len(decoys):
        raise ValueError(
            f"decoys of shape {tuple(decoys.shape)}: (draw, {', '.join(map(str, values.shape))}) with 1 draw or more "
            "is accepted"
        )
    units = _units(latents, values, classes, alignment, words, on)
    drawn = decoys.cpu()[:, units.image, units.slot].double().numpy()
    if not np.isfinite(drawn).all():
        raise ValueError(f"{int((~np.isfinite(drawn)).sum())} decoys are NaN or infinite where a latent is on")
    ranking = units.ranking(values)
    scores, n = ranking.means, ranking.candidates["n"].to_numpy()
    m = len(units.candidate)
    of_candidate = csr_array((np.ones(m), units.candidate, np.arange(m + 1)), shape=(m, len(n)))
    decoy_scores = (drawn @ of_candidate) / n
    fdr = _q_values(scores, decoy_scores)
    low, high = _intervals(ranking, n_resamples=n_resamples, seed=seed)
    found = fdr <= q
    table = ranking.candidates[["word", "latent", "n", "n_on"]].assign(attribution=scores, low=low, high=high)
    table = table.join(ranking.candidates[["alignment", "relative"]]).assign(fdr=fdr, found=found)
    return Discovery(_best_first(table), float(scores[found].min(initial=np.inf)), decoy_scores[decoy_scores > 0])


def ranked(
    latents: Int[Tensor, "image unit"],
    scores: Float[Tensor, "image unit"],
    classes: Int[Tensor, " image"],
    alignment: Float[Tensor, "class latent"],
    words: Sequence[str],
    *,
    on: Bool[Tensor, "image unit"] | None = None,
) -> Ranking:
    """The candidates of `discover` with the scores of any method, one for each unit of each image.

    on: as in `discover`. To be compared, methods must have the same candidates, so give it where a score may be exactly
    0 though the unit is on, as the difference of two nearly equal cosines may be.
    """
    return _units(latents, scores, classes, alignment, words, on).ranking(scores)


# Scored against what is true ----------------------------------------------------------------------------------------


def score_table(
    rankings: Mapping[str, Ranking],
    truth: pd.DataFrame,
    planted: pd.DataFrame,
    *,
    n_found: int,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """How well each method's order puts first what is true: columns method, measure, value, low, high, n (images).

    truth: columns word, family, value, latent (and share): deleting the latent removes that share of the rise that
    adding the value alone causes in the word's similarity. planted: columns kind, word, family, cue (the value). A
    candidate is true if its word and latent are in truth, and it hits the rows that name them.

        average precision   over all candidates, of being true: the mean, over the true ones, of the precision among all
                            that score as high or higher; NaN where none is true
        precision           share of the `n_found` best that are true
        recall              share of the planted that one of the `n_found` best hits
        recall of causal    share of the distinct (word, family, value) of truth that one of the `n_found` best hits

    Equal scores are best in the order of word and latent. The recalls also count what no candidate could hit. Rows of
    the method "chance" give the share of the candidates that are true, which is the mean of the first two over random
    orders (of the first but for a term that vanishes with the number of candidates). Intervals are 95 % percentiles
    over resamples of the images, drawn within each class because a score is a class's mean, the same for all methods;
    truth, candidates and `n_found` are held fixed. A resample's means are noisier than the sample's, so that intervals
    reach lower than they would on new images. Raises ValueError where the methods' candidates differ.
    """
    if not rankings or n_found < 0:
        raise ValueError(f"{len(rankings)} rankings and n_found = {n_found}: 1 or more and 0 or more are accepted")
    first = next(iter(rankings.values()))
    keys, n_images = first.candidates[["word", "latent", "n"]], len(first.classes)
    for method, each in rankings.items():
        if not (each.candidates[list(keys)].equals(keys) and np.array_equal(each.classes, first.classes)):
            raise ValueError(
                f"{method!r} ranks {len(each.candidates)} candidates that are not the {len(keys)} of the first method, "
                "or other images; give `ranked` the same units, and `on` where a score may be 0"
            )
    goal, n = _goal(keys, truth, planted), keys["n"].to_numpy()[:, None]
    held = [each.scores.T.tocsr() for each in rankings.values()]

    def measures(counts: Float[NDArray, "draw image"]) -> Float[NDArray, "method measure draw"]:
        drawn = np.ascontiguousarray(counts.T)
        return np.stack([_measures(np.ascontiguousarray((each @ drawn / n).T), goal, n_found) for each in held])

    values = measures(np.ones((1, n_images)))[..., 0]
    low = high = np.full_like(values, np.nan)
    # a class of one image has no spread to show; with none of more the intervals are unknown
    if len(np.unique(first.classes)) < n_images:
        rows = max(1, CHUNK_ENTRIES // max(len(keys), n_images, 1))
        draws = [measures(counts) for counts in _within_classes(first.classes, n_resamples, rows, seed)]
        low, high = np.quantile(np.concatenate(draws, axis=2), [0.025, 0.975], axis=2)
    index = pd.MultiIndex.from_product([rankings, MEASURES], names=["method", "measure"])
    table = index.to_frame(index=False).assign(value=values.ravel(), low=low.ravel(), high=high.ravel())
    share = len(goal.true) / len(keys) if len(keys) else np.nan
    chance = pd.DataFrame({"method": "chance", "measure": MEASURES[:2], "value": share, "low": np.nan, "high": np.nan})
    return pd.concat([table, chance], ignore_index=True).assign(n=n_images)


def ranks(table: pd.DataFrame, truth: pd.DataFrame, planted: pd.DataFrame) -> pd.DataFrame:
    """Where each planted reliance stands: kind, word, cue, rank, latent, share, found; a row for each of `planted`.

    table: candidates best first with columns word, latent, found (`Discovery.table`, `Ranking.table`). rank is the
    place, from 1, of the first candidate that hits it, with that one's latent, share of truth and found; rank and
    latent are NA, share is NaN where no candidate does.
    """
    hits = _hits(truth, planted.rename(columns={"cue": "value"}))
    places = table[["word", "latent", "found"]].assign(rank=np.arange(1, len(table) + 1))
    best = hits.merge(places, on=["word", "latent"]).sort_values(["row", "rank"]).drop_duplicates("row")
    best = best.set_index("row")[["rank", "latent", "share", "found"]]
    result = planted[["kind", "word", "cue"]].reset_index(drop=True).join(best)
    result["found"] = result["found"].eq(True)  # also where nothing was joined
    return result.astype({"rank": "Int64", "latent": "Int64", "share": float})


# What they are made of ----------------------------------------------------------------------------------------------


class _Units(NamedTuple):
    """The units that are on and belong to a candidate."""

    candidates: pd.DataFrame
    image: Int[NDArray, " entry"]
    slot: Int[NDArray, " entry"]
    candidate: Int[NDArray, " entry"]
    classes: Int[NDArray, " image"]

    def ranking(self, scores: Float[Tensor, "image unit"]) -> Ranking:
        found = scores.cpu()[self.image, self.slot].double().numpy()
        if not np.isfinite(found).all():
            raise ValueError(f"{int((~np.isfinite(found)).sum())} scores are NaN or infinite where a latent is on")
        shape = (len(self.classes), len(self.candidates))
        return Ranking(self.candidates, csr_array((found, (self.image, self.candidate)), shape=shape), self.classes)


def _units(
    latents: Int[Tensor, "image unit"],
    values: Float[Tensor, "image unit"],
    classes: Int[Tensor, " image"],
    alignment: Float[Tensor, "class latent"],
    words: Sequence[str],
    on: Bool[Tensor, "image unit"] | None,
) -> _Units:
    on = values != 0 if on is None else on
    if values.ndim != 2 or not latents.shape == values.shape == on.shape or classes.shape != values.shape[:1]:
        raise ValueError(
            f"latents {tuple(latents.shape)}, values {tuple(values.shape)}, on {tuple(on.shape)} and classes "
            f"{tuple(classes.shape)}: (image, unit) three times and (image,) are accepted"
        )
    if alignment.ndim != 2 or len(words) != len(alignment) or len(set(words)) != len(words):
        raise ValueError(
            f"{len(words)} words, {len(set(words))} of them distinct, and alignment of shape "
            f"{tuple(alignment.shape)}: (class, latent) with a word of its own for each class is accepted"
        )
    latents, of_image, aligned = latents.cpu().numpy(), classes.cpu().numpy(), alignment.cpu().double().numpy()
    image, slot = np.nonzero(on.cpu().numpy())
    n_classes, n_latents = aligned.shape
    for name, index, n in (("classes", of_image, n_classes), ("latents", latents[image, slot], n_latents)):
        if index.size and not 0 <= index.min() <= index.max() < n:
            raise ValueError(f"{name} from {index.min()} to {index.max()}: 0 to {n - 1} are accepted, as in alignment")
    pairs, pair = np.unique(of_image[image] * n_latents + latents[image, slot], return_inverse=True)
    c, j = pairs // n_latents, pairs % n_latents
    # of images: a latent that an image holds in two slots is on once
    n_on = np.bincount(np.unique(pair * len(of_image) + image) // max(len(of_image), 1), minlength=len(pairs))
    of_most = relative(alignment).cpu().double().numpy()[c, j]
    place_of_word = np.argsort(np.argsort(np.asarray(words, dtype=object), kind="stable"), kind="stable")
    order = np.lexsort((j, place_of_word[c]))
    order = order[(n_on >= AT_LEAST)[order] & (of_most < LOW)[order]]
    place = np.full(len(pairs), -1)
    place[order] = np.arange(len(order))
    n = np.bincount(of_image, minlength=n_classes)
    candidates = pd.DataFrame(
        {
            "word": np.asarray(words, dtype=object)[c[order]],
            "latent": j[order],
            "n": n[c[order]],
            "n_on": n_on[order],
            "alignment": aligned[c, j][order],
            "relative": of_most[order],
        }
    )
    some = place[pair] >= 0
    return _Units(candidates, image[some], slot[some], place[pair][some], of_image)


def _best_first(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["attribution", "word", "latent"], ascending=[False, True, True], ignore_index=True)


def _q_values(
    scores: Float[NDArray, " candidate"], decoys: Float[NDArray, "draw candidate"]
) -> Float[NDArray, " candidate"]:
    """The lowest fdr(t) over the t up to each score, of the positive ones; at most 1."""
    order, n_draws = np.argsort(scores, kind="stable"), len(decoys)
    t, pooled = scores[order], np.sort(decoys, axis=None)
    n_scores, n_decoys = (len(x) - np.searchsorted(x, t) for x in (t, pooled))
    fdr = np.where(t > 0, n_decoys / (n_draws * n_scores), 1)
    q_values = np.empty(len(t))
    q_values[order] = np.minimum.accumulate(np.minimum(fdr, 1))
    return q_values


def _intervals(ranking: Ranking, *, n_resamples: int, seed: int) -> tuple[NDArray, NDArray]:
    """Percentile intervals of the means, each class's images drawn again."""
    low, high = np.full((2, len(ranking.candidates)), np.nan)
    columns = ranking.scores.tocsc()
    for places in ranking.candidates.groupby("word").indices.values():
        image = columns.indices[columns.indptr[places[0]]]  # one of the class's
        values = columns[:, places].toarray()[ranking.classes == ranking.classes[image]]
        table = mean_intervals(values.T, n_resamples=n_resamples, seed=seed, index=pd.Index(places, name="place"))
        low[places], high[places] = table["low"], table["high"]
    return low, high


class _Goal(NamedTuple):
    """What the best candidates should hit."""

    true: Int[NDArray, " true"]
    """Numbers of the candidates that are true."""
    planted: NDArray[np.float64]
    """(true, planted): 1 where the candidate hits it."""
    causal: NDArray[np.float64]
    """(true, cause), likewise."""


def _goal(candidates: pd.DataFrame, truth: pd.DataFrame, planted: pd.DataFrame) -> _Goal:
    numbered = candidates[["word", "latent"]].assign(candidate=np.arange(len(candidates)))
    causes = truth[["word", "family", "value"]].drop_duplicates()
    hits = [_hits(truth, rows).merge(numbered) for rows in (planted.rename(columns={"cue": "value"}), causes)]
    true = np.unique(hits[1]["candidate"].to_numpy(dtype=int))
    tables = [np.zeros((len(true), len(rows))) for rows in (planted, causes)]
    for table, hit in zip(tables, hits, strict=True):
        table[np.searchsorted(true, hit["candidate"].to_numpy(dtype=int)), hit["row"].to_numpy(dtype=int)] = 1
    return _Goal(true, *tables)


def _hits(truth: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The latents that truth names for each of the rows (word, family, value): row, its number, word, latent, share."""
    numbered = rows[["word", "family", "value"]].assign(row=np.arange(len(rows)))
    found = numbered.merge(truth.astype({"latent": int}), on=["word", "family", "value"])
    return found.reindex(columns=["row", "word", "latent", "share"])


def _measures(scores: Float[NDArray, "draw candidate"], goal: _Goal, k: int) -> Float[NDArray, "measure draw"]:
    """`MEASURES` of each draw."""
    found, (n_draws, n) = np.full((4, len(scores)), np.nan), scores.shape
    ordered, true = np.sort(scores, axis=1), scores[:, goal.true]
    if true.size:
        ordered_true = np.sort(true, axis=1)
        above, true_above = (
            x.shape[1] - np.stack([np.searchsorted(a, v) for a, v in zip(x, ordered_true, strict=True)])
            for x in (ordered, ordered_true)
        )
        found[0] = (true_above / above).mean(axis=1)
    k = min(k, n)
    first = np.zeros((n_draws, len(goal.true)), dtype=bool)
    if k:
        cut = ordered[:, n - k, None]
        room = k - (n - np.array([np.searchsorted(a, c, "right") for a, c in zip(ordered, cut[:, 0], strict=True)]))
        # of those that equal the last of the best, the first ones
        equal = scores == cut
        first = (true > cut) | (equal[:, goal.true] & (equal.cumsum(axis=1)[:, goal.true] <= room[:, None]))
        found[1] = first.sum(axis=1) / k
    for m, hits in ((2, goal.planted), (3, goal.causal)):
        if hits.shape[1]:
            found[m] = (first.astype(float) @ hits > 0).mean(axis=1)
    return found


def _within_classes(
    classes: Int[NDArray, " image"], n_resamples: int, rows: int, seed: int
) -> Iterator[Float[NDArray, "draw image"]]:
    """How often each image is drawn in resamples of each class's images, `rows` of them at a time."""
    members = [np.flatnonzero(classes == c) for c in np.unique(classes)]
    # a stream for each class, so that neither the others nor the chunks change what is drawn
    streams = [np.random.default_rng([seed, zlib.crc32(b"within a class"), int(classes[own[0]])]) for own in members]
    for start in range(0, n_resamples, rows):
        counts = np.zeros((min(rows, n_resamples - start), len(classes)))
        row = np.arange(len(counts))[:, None]
        for own, rng in zip(members, streams, strict=True):
            drawn = rng.integers(len(own), size=(len(counts), len(own)))
            flat = np.bincount((drawn + len(own) * row).ravel(), minlength=len(counts) * len(own))
            counts[:, own] = flat.reshape(len(counts), -1)
        yield counts
