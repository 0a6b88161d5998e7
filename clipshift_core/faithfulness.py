"""Does an order of latents by attribution hold when they are really taken away, or put in?

    deletion    all latents of an image are in; they are zeroed, the highest score first
    insertion   none is in; they are put in, the highest score first

y is the target that the scores claim to explain. The order is by the signed score, the most positive first, equal ones
in the order of the slots: a faithful order makes y fall early in deletion (small area) and rise early in insertion
(large area). Only latents that are on take part. (Paper B's public code ranks all latents of the dictionary by logit
lens, so that most of those it deletes were off and nothing happens: that measures sparsity, not the order.)

Codes are values (image, slot), 0 in a slot that is empty; tokens may share an image's slots. Nothing here knows a
model: `evaluate` maps values with some of them zeroed, (image, variant, slot), to y, (image, variant), from whatever is
cached. It is given the same images each time, in their order, and as many variants as `CHUNK_ENTRIES` allows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from clipshift_core import stats

CHUNK_ENTRIES = 2**21
"""Codes, over images, variants and slots, that `evaluate` is given at once; one variant at least."""
N_STEPS = 16
"""Equal steps from none to all of an image's latents."""
PUBLISHED_STEPS = (0, 1, 2, 3, 4, 5)
"""Latents deleted in paper B's public code."""
LEAST_SPAN = 0.25
"""An image whose latents together raise the target by less than this share of the median is not normalised."""
KINDS = ("deletion", "insertion")

Evaluate = Callable[[Float[Tensor, "image variant slot"]], Float[Tensor, "image variant"]]
Scores = Mapping[str, Float[Tensor, "image slot"]]


class Curves(NamedTuple):
    """The target as latents are deleted or inserted, for each method that orders them."""

    methods: tuple[str, ...]
    steps: Float[NDArray, " step"]
    """Share of the latents, 0 to 1, or their number, deleted or inserted so far."""
    none: Float[NDArray, " image"]
    """The target without any of the latents."""
    every: Float[NDArray, " image"]
    """The target with all of them."""
    deletion: Float[NDArray, "method image step"]
    insertion: Float[NDArray, "method image step"]
    n_left_out: int = 0
    """Images that `normalised` could not use."""

    @property
    def areas(self) -> dict[str, Float[NDArray, "method image"]]:
        """Mean height of each curve over its steps, by the trapezoidal rule; of a normalised one, its area."""
        width = self.steps[-1] - self.steps[0]
        return {kind: np.trapezoid(getattr(self, kind), self.steps, axis=-1) / width for kind in KINDS}


def curves(
    values: Float[Tensor, "image slot"], scores: Scores, evaluate: Evaluate, *, steps: int | Sequence[int] = N_STEPS
) -> Curves:
    """Each image's latents in the order of its own scores (local).

    steps: into how many equal parts an image's own number of latents is divided (rounded to whole latents), or the
    growing numbers of latents themselves, such as `PUBLISHED_STEPS`; an image that has fewer stays where it is.
    """
    on = _on(values, scores)
    ranks = [_rank(torch.where(on, score, -torch.inf)) for score in scores.values()]
    return _followed(values, torch.stack(ranks), on.sum(1), tuple(scores), evaluate, steps)


def class_curves(
    indices: Int[Tensor, "image slot"],
    values: Float[Tensor, "image slot"],
    scores: Scores,
    classes: Int[Tensor, " image"],
    evaluate: Evaluate,
    *,
    steps: int | Sequence[int] = N_STEPS,
) -> Curves:
    """The latents of a whole class in one order, by their mean score over the class's images (global).

    A latent counts as 0 in the mean for an image in which it is off. Steps are shares, or numbers, of the latents that
    are on anywhere in the class; deleting one that is off in an image leaves that image's y as it is. `indices` names
    the latent of each slot, `classes` the class of each image, with any number of classes at once. Where
    tokens give a latent several slots, an image that is a class of its own has it deleted at all of them together.
    """
    on = _on(values, scores)
    if indices.shape != values.shape or classes.shape != values.shape[:1]:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} and classes of shape {tuple(classes.shape)}: "
            f"{tuple(values.shape)} and {tuple(values.shape[:1])} are accepted, as in values"
        )
    # one number for each latent of each class; the latents of a class are neighbours in the order of these numbers
    pairs = torch.stack([classes[:, None].expand_as(indices)[on], indices[on]], dim=1)
    found, pair = pairs.unique(dim=0, return_inverse=True)
    names, of_class = found[:, 0].unique(return_inverse=True)
    n_images = (classes[:, None] == names).sum(0)
    n_latents = torch.bincount(of_class, minlength=len(names))
    first = n_latents.cumsum(0) - n_latents
    ranks = []
    for score in scores.values():
        total = torch.zeros(len(found), dtype=torch.float64, device=values.device)
        mean = total.index_add_(0, pair, score[on].double()) / n_images[of_class]
        order = np.lexsort((-mean.cpu().numpy(), of_class.cpu().numpy()))
        place = torch.empty_like(of_class)
        place[torch.from_numpy(order).to(place.device)] = torch.arange(len(found), device=place.device)
        rank = torch.zeros_like(indices)
        rank[on] = (place - first[of_class])[pair]
        ranks.append(rank)
    same = classes[:, None] == names
    n = (same * n_latents).sum(1)  # 0 where no image of a class has a latent on
    return _followed(values, torch.stack(ranks), n, tuple(scores), evaluate, steps)


def joined(parts: Iterable[Curves]) -> Curves:
    """The curves of several sets of images as one: what a run makes that holds a few images' caches at a time."""
    parts = list(parts)
    first = parts[0]
    for part in parts[1:]:
        if part.methods != first.methods or not np.array_equal(part.steps, first.steps):
            raise ValueError(f"curves of {part.methods} at other steps or methods than the first, {first.methods}")
    ends = (np.concatenate([getattr(part, name) for part in parts]) for name in ("none", "every"))
    each = (np.concatenate([getattr(part, kind) for part in parts], axis=1) for kind in KINDS)
    return Curves(first.methods, first.steps, *ends, *each, sum(part.n_left_out for part in parts))


def normalised(found: Curves) -> Curves:
    """(m - m_0) / (m_M - m_0) for each image: 0 without its latents, 1 with all of them.

    Where the latents together do not raise the target, m_M <= m_0 or nearly so, there is nothing that they explain and
    the quotient is noise or upside down. Such images are left out and counted: those whose span m_M - m_0 is below
    `LEAST_SPAN` of the median |span|. Differences of the areas of the curves as they are need no such choice. Areas may
    lie outside 0 to 1: latents that lower the target are the last in the order.
    ValueError where no image is left: see `left_out`.
    """
    if reason := left_out(found):
        raise ValueError(reason)
    good = _raised(found)
    base, span = found.none[good, None], (found.every - found.none)[good, None]
    return Curves(
        found.methods,
        found.steps,
        np.zeros(good.sum()),
        np.ones(good.sum()),
        (found.deletion[:, good] - base) / span,
        (found.insertion[:, good] - base) / span,
        found.n_left_out + int((~good).sum()),
    )


def left_out(found: Curves) -> str:
    """Why the curves cannot be normalised; empty where they can."""
    return "" if _raised(found).any() else "in no image do the latents together raise the target"


def _raised(found: Curves) -> Bool[np.ndarray, " image"]:
    """The images whose latents raise the target by enough."""
    span = found.every - found.none
    height = np.abs([found.every, found.none]).max(initial=0)
    return span > max(LEAST_SPAN * np.median(np.abs(span)) if len(span) else 0, 1e-6 * height)


# Tables: of curves as they are, in units of the target, or of normalised ones ------------------------------------


def curve_table(found: Curves, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Columns kind, method, step, mean, low, high, n: means over images with their 95 % intervals."""
    n = len(found.none)
    values = np.stack([found.deletion, found.insertion]).transpose(0, 1, 3, 2)
    keys = pd.MultiIndex.from_product([KINDS, found.methods, found.steps], names=["kind", "method", "step"])
    return mean_intervals(values.reshape(-1, n), n_resamples=n_resamples, seed=seed, index=keys).assign(n=n)


def area_table(found: Curves, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Columns kind, method, mean, low, high, n, n_left_out.

    Areas: a lower one is better in deletion, a higher one in insertion.
    """
    keys = pd.MultiIndex.from_product([KINDS, found.methods], names=["kind", "method"])
    values = np.concatenate(list(found.areas.values()))
    table = mean_intervals(values, n_resamples=n_resamples, seed=seed, index=keys)
    return table.assign(n=values.shape[1], n_left_out=found.n_left_out)


def difference_table(found: Curves, *, n_resamples: int, seed: int, reference: str | None = None) -> pd.DataFrame:
    """How much larger the area of one method is than that of another on the same images: `against` for each kind.

    Columns kind, method, reference, mean, low, high, p, share, n. The first method is the more faithful one where the
    interval lies below 0 in deletion, above 0 in insertion.
    """
    settings = {"n_resamples": n_resamples, "seed": seed, "reference": reference}
    tables = {
        kind: against(dict(zip(found.methods, areas, strict=True)), **settings) for kind, areas in found.areas.items()
    }
    return pd.concat(tables, names=["kind"]).reset_index("kind").reset_index(drop=True)


def against(
    values: Mapping[str, Float[NDArray, " image"]], *, n_resamples: int, seed: int, reference: str | None = None
) -> pd.DataFrame:
    """Every method minus the reference on the same images, or every pair of methods without one.

    Columns method, reference, mean, low, high, p, share, n, as `stats.paired_difference` defines them. An image on
    which one of the two is NaN is left out.
    """
    if reference is not None and reference not in values:
        raise ValueError(f"reference {reference!r} is unknown; accepted: {', '.join(values)}")
    pairs = combinations(values, 2) if reference is None else ((m, reference) for m in values if m != reference)
    rows = []
    for method, other in pairs:
        good = np.isfinite(values[method]) & np.isfinite(values[other])
        tested = stats.paired_difference(values[method][good], values[other][good], n_resamples=n_resamples, seed=seed)
        rows.append({"method": method, "reference": other, **tested._asdict()})
    return pd.DataFrame(rows, columns=["method", "reference", *stats.Paired._fields])


# Agreement with exact ablation ------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """How far each method's scores rank an image's latents as their exact effects do."""

    methods: tuple[str, ...]
    rho: Float[NDArray, "method image"]
    """Spearman's rho over the image's latents that are on, -1 to 1; NaN where one side does not order them."""
    overlap: Float[NDArray, "method image"]
    """Share of the k latents with the largest exact effects that are among the method's k; NaN where no more than k
    latents are on. k of n by chance: k / n."""
    k: int


def agreement(
    values: Float[Tensor, "image slot"], scores: Scores, exact: Float[Tensor, "image slot"], *, k: int = 5
) -> Agreement:
    """Scores against the exact effect y - y(latent zeroed) of each latent, image by image; signed, as orders are."""
    on = _on(values, {**scores, "exact": exact})
    enough = on.sum(1).cpu().numpy() > k
    ranks, best = [], []
    for score in (exact, *scores.values()):
        # what is off comes behind everything that is on, and its ranks are not looked at
        rank = rankdata(torch.where(on, score, torch.inf).cpu().double().numpy(), axis=1)
        ranks.append(np.where(on.cpu(), rank, np.nan))
        best.append((_rank(torch.where(on, score, -torch.inf)) < k).cpu().numpy())
    rho = np.stack([_correlation(ranks[0], rank) for rank in ranks[1:]])
    overlap = np.stack([np.where(enough, (best[0] & mine).sum(1) / k, np.nan) for mine in best[1:]])
    return Agreement(tuple(scores), rho, overlap, k)


def agreement_table(found: Agreement, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Columns measure (rho or overlap), method, mean, low, high, n: over the images on which it is known."""
    tables = []
    for measure in ("rho", "overlap"):
        for method, each in zip(found.methods, getattr(found, measure), strict=True):
            known = each[np.isfinite(each)]
            index = pd.MultiIndex.from_tuples([(measure, method)], names=["measure", "method"])
            table = mean_intervals(known[None], n_resamples=n_resamples, seed=seed, index=index)
            tables.append(table.assign(n=len(known)))
    return pd.concat(tables, ignore_index=True)


def mean_intervals(
    values: Float[NDArray, "row image"], *, n_resamples: int, seed: int, index: pd.Index
) -> pd.DataFrame:
    """Many means over the same images, drawn together: the columns of `index`, then mean, low, high.

    The percentile interval (95 %) of `stats.bootstrap_mean`, for all rows by one matrix product a batch of resamples.
    NaN where there is no image, and for the interval of one image.
    """
    n_rows, n = values.shape
    mean, low, high = np.full((3, n_rows), np.nan)
    if n:
        mean = values.mean(axis=1)
    if n > 1:
        draws = stats.bootstrap_draws(lambda counts: counts @ values.T / n, n, n_resamples=n_resamples, seed=seed)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    mean, low, high = stats.settled([mean, low, high])
    return index.to_frame(index=False).assign(mean=mean, low=low, high=high)


def _on(values: Float[Tensor, "image slot"], scores: Scores) -> Bool[Tensor, "image slot"]:
    """Where latents are on; ValueError for scores that do not fit them."""
    if values.ndim != 2 or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)}: finite ones, (image, slot), are accepted")
    on = values != 0
    for method, score in scores.items():
        if score.shape != values.shape:
            raise ValueError(f"scores of {method!r} have shape {tuple(score.shape)}, not {tuple(values.shape)}")
        if not score[on].isfinite().all():
            raise ValueError(f"some scores of {method!r} are NaN or infinite where a latent is on")
    return on


def _rank(score: Float[Tensor, "image slot"]) -> Int[Tensor, "image slot"]:
    """Place of each slot in the falling order of its image, from 0."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)


@torch.no_grad()
def _followed(
    values: Float[Tensor, "image slot"],
    ranks: Int[Tensor, "method image slot"],
    n: Int[Tensor, " image"],
    methods: tuple[str, ...],
    evaluate: Evaluate,
    steps: int | Sequence[int],
) -> Curves:
    """y when, at each step, the first of n ranks are gone, or alone there."""
    shown, cuts = _cuts(n, steps)
    # where no image has lost any latent yet, or all have lost all, a curve is at one of its ends
    full, empty = (cuts == 0).all(0), (cuts >= n[:, None]).all(0)
    between = ~(full | empty)
    between[0] |= not between.any()
    cuts, n_steps, n_methods = cuts[:, between], int(between.sum()), len(methods)
    # ends first, then each method's deletion and insertion: variants of which any run of neighbours can be made
    n_variants = 2 + 2 * n_methods * n_steps
    at_once = max(1, CHUNK_ENTRIES // max(1, values.numel()))
    parts = []
    for start in range(0, n_variants, at_once):
        variant = torch.arange(start, min(start + at_once, n_variants), device=values.device)
        way = (variant - 2).clamp_min(0)
        rank = ranks[way // (2 * n_steps)].transpose(0, 1)
        kept = rank >= cuts[:, way % n_steps, None]
        kept ^= (way // n_steps % 2 == 1)[:, None]
        kept = torch.where((variant < 2)[:, None], (variant == 1)[:, None], kept)
        y = evaluate(values[:, None] * kept)
        if y.shape != kept.shape[:2]:
            raise ValueError(
                f"evaluate returned shape {tuple(y.shape)}; (image, variant), {tuple(kept.shape[:2])}, is accepted"
            )
        parts.append(y.double().cpu())
    y = torch.cat(parts, dim=1).numpy()
    if not np.isfinite(y).all():
        raise ValueError(f"{int((~np.isfinite(y)).sum())} of {y.size} values of the target are NaN or infinite")
    none, every = y[:, 0], y[:, 1]
    each = np.empty((2, n_methods, len(y), len(shown)))
    each[..., between.cpu()] = y[:, 2:].reshape(len(y), n_methods, 2, n_steps).transpose(2, 1, 0, 3)
    for curve, first, last in zip(each, (every, none), (none, every), strict=True):
        curve[..., empty.cpu()], curve[..., full.cpu()] = last[:, None], first[:, None]
    return Curves(methods, shown, none, every, *each)


def _cuts(
    n: Int[Tensor, " image"], steps: int | Sequence[int]
) -> tuple[Float[NDArray, " step"], Int[Tensor, "image step"]]:
    """The steps as a curve shows them, and how many latents of each image they are."""
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps = {steps}: 1 or more is accepted")
        shown = np.arange(steps + 1) / steps
        number = torch.arange(steps + 1, device=n.device)
        return shown, (2 * n[:, None] * number + steps) // (2 * steps)  # rounded, halves upwards
    shown = np.asarray(steps)
    if len(shown) < 2 or shown[0] < 0 or (np.diff(shown) <= 0).any():
        raise ValueError(f"steps {tuple(steps)}: two or more numbers that grow from 0 or more are accepted")
    return shown.astype(float), torch.minimum(torch.as_tensor(shown, device=n.device), n[:, None])


def _correlation(a: Float[NDArray, "image slot"], b: Float[NDArray, "image slot"]) -> Float[NDArray, " image"]:
    """Pearson's r of each row over the entries that are not NaN in either; NaN where one side is constant."""
    n = np.maximum(np.isfinite(a).sum(axis=1, keepdims=True), 1)
    a, b = (np.nan_to_num(x - np.nansum(x, axis=1, keepdims=True) / n) for x in (a, b))
    spread = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), spread, out=np.full(len(a), np.nan), where=spread > 1e-9)
