"""Do the units of a basis stand for the factors of the embedded world? Scored against what was drawn.

A *factor value* is something that an image shows or does not: kind=duck (in front or as companion), colour=red (of
either thing), background=snow, relation=left, cue=moon. A *basis* is a set of units, each with an activation for
every image: the latents of a dictionary, raw neurons, a random dictionary, principal components. Images are split in
two: on the first part units and thresholds are chosen, on the second they are scored. In this room:

- a unit *detects* a factor value if its AUROC is at least `DETECTS`; chance is 0.5, and a unit that is on in a share r
  of the images that show it and in no other has 0.5 + r / 2;
- the *best unit* of a factor value has the largest AUROC on the first part (the first of equals);
- a factor value has a unit *of its own* if its best unit detects it on the second part, and is not also the best unit
  of another factor value that it detects there;
- a unit *mixes* two factor values A and B if, on both parts, it detects A and B over all images, and still detects A
  among the images without B, and B among those without A. So a unit for ducks alone does not count as mixing ducks with
  the ripples that were planted beside them.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.sparse import csc_array, hstack, vstack
from torch import Tensor

from clipshift_core import scenes, stats
from clipshift_core.concepts import Pooled
from clipshift_core.detection import auroc, auroc_draws, best_f1, threshold

DETECTS = 0.9
"""Least AUROC of a unit that detects a factor value."""
AT_LEAST = 5
"""Images that must show a factor value, and as many that must not, in each part; others are left out."""
MEASURES = ("auroc", "f1", "own", "mixing")
"""Mean AUROC and mean F1 over the factor values; how many have a unit of their own; how many units mix."""


def factors(images: pd.DataFrame) -> pd.DataFrame:
    """Which factor values each scene shows: bool (image, value), columns (factor, value) in the world's order.

    images: with the columns of `scenes.table`, such as `manifest.images` of drawn scenes.
    """
    needed = ("kind", "colour", "background", "relation", "companion", "companion_colour", "cues")
    missing = [column for column in needed if column not in images]
    if missing:
        raise ValueError(f"the table of images has no {', '.join(missing)}: only drawn scenes have known factors")
    cues = images["cues"].str.split("; ")
    signs = [f"sign:{word}" for word in scenes.PLAIN_SIGNS]
    shown = {("kind", v): (images["kind"] == v) | (images["companion"] == v) for v in scenes.KINDS}
    shown |= {("colour", v): (images["colour"] == v) | (images["companion_colour"] == v) for v in scenes.COLOURS}
    shown |= {("background", v): images["background"] == v for v in scenes.BACKGROUNDS}
    shown |= {("relation", v): images["relation"] == v for v in scenes.RELATIONS}
    planted = dict.fromkeys(cue for cue, _ in scenes.CUE_OF.values())
    shown |= {("cue", v): cues.apply(lambda has, v=v: v in has) for v in [*planted, *signs]}
    table = pd.DataFrame({key: column.to_numpy(bool) for key, column in shown.items()})
    table.columns = pd.MultiIndex.from_tuples(shown, names=["factor", "value"])
    return table


def halves(n: int, *, seed: int) -> Bool[NDArray, " image"]:
    """A random half of n images, True for the first part."""
    first = np.zeros(n, bool)
    first[np.random.default_rng([seed, *b"halves"]).permutation(n)[: n // 2]] = True
    return first


def scored(presence: pd.DataFrame, first: Bool[NDArray, " image"]) -> pd.DataFrame:
    """The columns with `AT_LEAST` images that show the value, and as many that do not, in each part."""
    counts = [presence[part].sum() for part in (first, ~first)]
    sizes = [first.sum(), (~first).sum()]
    good = [(count >= AT_LEAST) & (size - count >= AT_LEAST) for count, size in zip(counts, sizes, strict=True)]
    return presence.loc[:, good[0] & good[1]]


# Bases -----------------------------------------------------------------------------------------------------------


def dictionary(codes: Pooled, n_images: int, n_latents: int) -> csc_array:
    """The latents of a dictionary, from `concepts.pooled` of all images' codes."""
    entries = (codes.value.numpy(), (codes.image.numpy(), codes.latent.numpy()))
    return csc_array(entries, shape=(n_images, n_latents))


def neurons(x: Float[Tensor, "image width"]) -> csc_array:
    """The activations as they are, and with the other sign: unit j is neuron j, unit width + j its negative."""
    held = csc_array(x.numpy())
    return hstack([held, -held], format="csc")


def random_dictionary(
    x: Float[Tensor, "image width"], first: Bool[NDArray, " image"], *, n_latents: int, k: int, seed: int
) -> csc_array:
    """The `k` largest projections of each image on random unit vectors, where positive, of x minus the first part's
    mean: what a dictionary of the same shape scores without having learnt anything."""
    drawn = np.random.default_rng([seed, *b"random dictionary"]).standard_normal((n_latents, x.shape[1]))
    rows = torch.nn.functional.normalize(torch.from_numpy(drawn).float(), dim=1)
    centred, parts = x - x[torch.from_numpy(first)].mean(0), []
    for few in centred.split(max(1, 2**24 // n_latents)):
        value, latent = (few @ rows.T).topk(k, dim=1)
        image = torch.arange(len(few))[:, None].expand_as(latent)
        parts.append(
            csc_array((value.clamp_min(0).flatten(), (image.flatten(), latent.flatten())), shape=(len(few), n_latents))
        )
    return vstack(parts, format="csc")


def principal_components(x: Float[Tensor, "image width"], first: Bool[NDArray, " image"]) -> csc_array:
    """Projections on the principal components of the first part, with both signs, ordered as in `neurons`."""
    fitted = x[torch.from_numpy(first)].double()
    mean = fitted.mean(0)
    components = torch.linalg.svd(fitted - mean, full_matrices=False).Vh
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return neurons(((x.double() - mean) @ (components * largest.sign()).T).float())


# Comparison ------------------------------------------------------------------------------------------------------


class Recovery(NamedTuple):
    """How well each basis recovers the factors."""

    factors: pd.DataFrame
    """A row a basis and factor value: basis, factor, value, n (images of the second part that show it), unit,
    auroc_first (on the first part), auroc, auroc_low, auroc_high, own, f1_unit, threshold, f1, f1_low, f1_high."""
    summary: pd.DataFrame
    """A row a basis and measure (`MEASURES`): basis, measure, value, low, high, and difference, difference_low,
    difference_high of the first basis minus this one, on the same resamples (NaN for the first). A count of what
    exceeds a bound grows when images are drawn again, so that its resamples say nothing; low and high of "own" and
    "mixing" count instead what does so for certain (with the lower end of its own interval) and what may (with the
    upper end), and their difference has no interval."""
    bases: pd.DataFrame
    """A row a basis: basis, n_units, n_on (that are not zero throughout), n_detecting (that detect a factor value on
    both parts), n_mixing, n_factors (factor values that were scored)."""


def compare(
    bases: Mapping[str, csc_array],
    presence: pd.DataFrame,
    first: Bool[NDArray, " image"],
    *,
    n_resamples: int,
    seed: int,
    level: float = 0.95,
    detects: float = DETECTS,
) -> Recovery:
    """Score bases over the same images against `presence` (of `factors`); intervals over the images of the second part.

    The intervals hold the choice of units and thresholds fixed, as it was made on the first part. A resample in which
    a rare value does not occur leaves it out of the mean.
    """
    presence = scored(presence, first)
    if presence.shape[1] < 2:
        raise ValueError(
            f"{presence.shape[1]} factor values are shown by {AT_LEAST} images of each part; two or more are needed"
        )
    settings = {"n_resamples": n_resamples, "seed": seed}
    found = {name: _score(units, presence, first, detects, level, settings) for name, units in bases.items()}
    best, *_ = found.values()
    rows = []
    for name, one in found.items():
        for measure in MEASURES:
            value, low, high = one.measures[measure]
            between = (np.nan, np.nan)
            if measure in one.draws and one is not best:
                between = _interval(best.draws[measure] - one.draws[measure], level)
            difference = np.nan if one is best else best.measures[measure][0] - value
            rows.append((name, measure, value, low, high, difference, *between))
    columns = ["basis", "measure", "value", "low", "high", "difference", "difference_low", "difference_high"]
    tables = [one.factors for one in found.values()]
    return Recovery(
        pd.concat(tables, keys=found, names=["basis"]).reset_index("basis").reset_index(drop=True),
        pd.DataFrame(rows, columns=columns),
        pd.DataFrame([{"basis": name, **one.sizes} for name, one in found.items()]),
    )


class _Scores(NamedTuple):
    """Of one basis."""

    factors: pd.DataFrame
    measures: dict[str, tuple[float, float, float]]
    draws: dict[str, Float[NDArray, " draw"]]
    sizes: dict[str, int]


def _score(
    units: csc_array,
    presence: pd.DataFrame,
    first: Bool[NDArray, " image"],
    detects: float,
    level: float,
    settings: Mapping[str, int],
) -> _Scores:
    shown, n_factors = presence.to_numpy(), presence.shape[1]
    y, held = shown[~first], units[~first]
    on_first, on_second = auroc(units[first], shown[first]), auroc(held, y)
    best = on_first.argmax(axis=0)
    activation = held[:, best].toarray()

    best_by_f1 = best_f1(units[first], shown[first]).argmax(axis=0)
    fitted = units[first][:, best_by_f1].toarray()
    bound = np.array([threshold(a, p) for a, p in zip(fitted.T, shown[first].T, strict=True)])
    called = held[:, best_by_f1].toarray() >= bound
    mixing_unit, mixing_tests = _mixing(units, shown, first, on_first >= detects, detects)

    def measured(counts: NDArray) -> NDArray:
        """(draw, ...): AUROC of each factor value, then its F1, then the least AUROC of each test of mixing."""
        area = [auroc_draws(a, p, counts) for a, p in zip(activation.T, y.T, strict=True)]
        total = counts @ called.astype(float) + counts @ y.astype(float)
        f1 = np.divide(2 * counts @ (called & y), total, out=np.full(total.shape, np.nan), where=total > 0)
        return np.stack([*area, *f1.T, *(_least(*test, counts) for test in mixing_tests)], axis=1)

    value, draws = measured(np.ones((1, len(y))))[0], stats.bootstrap_draws(measured, len(y), **settings)
    low, high = _interval(draws, level)
    low, high = np.fmin(low, value), np.fmax(high, value)
    area, f1, least = slice(0, n_factors), slice(n_factors, 2 * n_factors), slice(2 * n_factors, None)

    detected = value[area] >= detects
    alone = ((best[:, None] == best) & detected).sum(axis=1) - detected == 0
    measures, means = {}, {"auroc": np.nanmean(draws[:, area], axis=1), "f1": np.nanmean(draws[:, f1], axis=1)}
    for measure, part in (("auroc", area), ("f1", f1)):
        measures[measure] = float(value[part].mean()), *map(float, _interval(means[measure], level))
    measures["own"] = tuple(float(((x[area] >= detects) & alone).sum()) for x in (value, low, high))
    measures["mixing"] = tuple(float(len(set(mixing_unit[x[least] >= detects]))) for x in (value, low, high))
    table = pd.DataFrame(
        {
            "factor": presence.columns.get_level_values("factor"),
            "value": presence.columns.get_level_values("value"),
            "n": y.sum(axis=0),
            "unit": best,
            "auroc_first": on_first[best, np.arange(n_factors)],
            "auroc": value[area],
            "auroc_low": low[area],
            "auroc_high": high[area],
            "own": detected & alone,
            "f1_unit": best_by_f1,
            "threshold": bound,
            "f1": value[f1],
            "f1_low": low[f1],
            "f1_high": high[f1],
        }
    )
    sizes = {
        "n_units": units.shape[1],
        "n_on": int((abs(units).sum(axis=0) > 0).sum()),
        "n_detecting": int(((on_first >= detects) & (on_second >= detects)).any(axis=1).sum()),
        "n_mixing": int(measures["mixing"][0]),
        "n_factors": n_factors,
    }
    return _Scores(table, measures, means, sizes)


def _mixing(
    units: csc_array,
    shown: Bool[NDArray, "image factor"],
    first: Bool[NDArray, " image"],
    detected: Bool[NDArray, "unit factor"],
    detects: float,
) -> tuple[NDArray, list[tuple[NDArray, NDArray, NDArray]]]:
    """What mixes on the first part: the unit of each pair, and what to test on the second, as `_least` takes it."""
    found, tests, once = [], [], np.ones((1, int(first.sum())))
    for unit in np.flatnonzero(detected.sum(axis=1) >= 2):
        activation = units[:, [unit]].toarray()[:, 0]
        for pair in combinations(np.flatnonzero(detected[unit]), 2):
            a, b = shown[:, pair].T
            if _least(activation[first], a[first], b[first], once)[0] >= detects:
                found.append(unit)
                tests.append((activation[~first], a[~first], b[~first]))
    return np.array(found, dtype=int), tests


def _least(
    activation: Float[NDArray, " image"],
    a: Bool[NDArray, " image"],
    b: Bool[NDArray, " image"],
    counts: Float[NDArray, "draw image"],
) -> Float[NDArray, " draw"]:
    """The least of four AUROCs: of a, of b, of a among the images without b, of b among those without a."""
    everywhere = [auroc_draws(activation, shown, counts) for shown in (a, b)]
    apart = [auroc_draws(activation[~other], shown[~other], counts[:, ~other]) for shown, other in ((a, b), (b, a))]
    return np.min([*everywhere, *apart], axis=0)


def _interval(draws: NDArray, level: float) -> NDArray:
    """Percentile interval over resamples (the first dimension), NaN left out: (2, ...)."""
    return np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
