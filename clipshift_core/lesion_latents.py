"""Which latents of a dictionary stand for an artefact of lesions, how much hangs on them, and what goes without them.

Follows `lesion_study`: its images (`Images`, with class tokens) and its readers. A factor is an artefact, or something
that the lesion is. One half of a test split in which artefacts say nothing of the label chooses latents, the other half
scores them. A latent stands for the factor for which its AUROC is largest on the first half, if that is at least
`DETECTS`. Its part in a reader's margin is by exact ablation: the margin minus the margin without the latent.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.sparse import csc_array
from torch import Tensor

from clipshift_core import attribution, ground_truth, stats
from clipshift_core.attribution import Target
from clipshift_core.detection import auroc
from clipshift_core.lesion_study import Images, known, mean_gap, tests
from clipshift_core.splice import Splice, State

DETECTS = 0.65
"""Least AUROC of a latent that stands for a factor. Lower than `ground_truth.DETECTS`: a ruler that may lie anywhere is
written by several latents, and each of them is on in a part of the images with rulers."""
NONE = "none"
"""The factor of a latent that stands for none."""
N_DRAWS = 20
"""Random choices of latents that a deletion is compared with."""
N_DRIVERS = 10
"""Latents that are listed for each reader."""


class Latents(NamedTuple):
    """What the latents stand for, and what hangs on them."""

    latents: pd.DataFrame
    """A row a latent that is on in the first half: latent, factor (`NONE` where it stands for none), auroc_first, auroc
    (on the second half), frequency (share of the first half's images in which it is on)."""
    factors: pd.DataFrame
    """A row a factor: factor, n_latents (that stand for it), latent (the best on the first half), auroc_first, auroc
    (on the second half)."""
    shares: pd.DataFrame
    """Share of a reader's absolute attribution on the latents of each factor: reader, factor (the artefacts' together
    as "artefacts"), share, low, high, n."""
    drivers: pd.DataFrame
    """The latents that drive each reader most: reader, rank, latent, factor, auroc, part (mean over images, in logits),
    size (mean of its absolute value), share."""
    split: str
    """The test split that chose them and scored them."""
    chosen_by: Bool[NDArray, " image"]
    """Its first half."""

    def of(self, factors: Collection[str]) -> list[int]:
        """The latents that stand for one of the factors."""
        return self.latents.loc[self.latents["factor"].isin(factors), "latent"].tolist()


def latents(
    images: Images,
    readers: Mapping[str, Target],
    splice: Splice,
    *,
    factors: Sequence[str] = (),
    split: str = "balanced",
    n_resamples: int,
    seed: int,
) -> Latents:
    """Choose latents on the first half of a test split; score them, and attribute each reader's margin, on the second.

    factors: bool columns of the table beside the artefacts. splice: at class tokens after the last block. Raises
    ValueError for images without class tokens, and for a split that is no test.
    """
    if images.tokens is None or split not in tests(images.table):
        has = "no class tokens" if images.tokens is None else f"the test splits {', '.join(tests(images.table))}"
        raise ValueError(f"latents by the split {split!r}: the images have {has}; a test with class tokens is accepted")
    names = [*images.artefacts, *factors]
    rows = np.flatnonzero(images.table["split"] == split)
    half = ground_truth.halves(len(rows), seed=seed)
    by, held = rows[half], rows[~half]
    state = splice.from_activations(images.tokens)
    units = _units(state, len(splice.W_dec))
    area, area_held = (aurocs(units[part], images.table.iloc[part][names]) for part in (by, held))
    frequency = (units[by] > 0).mean(axis=0)
    best, value = _largest(area)
    table = pd.DataFrame(
        {
            "latent": np.arange(len(best)),
            "factor": np.where(value >= DETECTS, np.array(names, dtype=object)[best], NONE),
            "auroc_first": value,
            "auroc": area_held[np.arange(len(best)), best],
            "frequency": frequency,
        }
    )[frequency > 0].reset_index(drop=True)
    top = np.where(np.isnan(area), -1, area).argmax(axis=0)
    place = np.arange(len(names))
    per_factor = pd.DataFrame(
        {
            "factor": names,
            "n_latents": [int((table["factor"] == name).sum()) for name in names],
            "latent": top,
            "auroc_first": area[top, place],
            "auroc": area_held[top, place],
        }
    )
    chosen_by = np.zeros(len(images.table), bool)
    chosen_by[by] = True
    found = Latents(table, per_factor, pd.DataFrame(), pd.DataFrame(), split, chosen_by)
    parts = {name: _parts(splice, images.tokens[held], target) for name, target in readers.items()}
    shares, drivers = _shares(found, parts, images.artefacts, names, n_resamples, seed), _drivers(found, parts)
    return found._replace(shares=shares, drivers=drivers)


def turned(
    splice: Splice, tokens: Float[Tensor, "drawing width"], pairs: pd.DataFrame, *, n_resamples: int, seed: int
) -> pd.DataFrame:
    """The latents that adding a cue alone turns up most.

    tokens: of the drawings of `lesion_study.pairs`, whose table is `pairs`. Columns artefact, rank, latent, change
    (mean of its activation with the cue minus without, over lesions), low, high, up (share of the pairs in which it
    rises).
    """
    units = _units(splice.from_activations(tokens), len(splice.W_dec))
    rows = []
    for artefact, group in pairs.groupby("artefact", sort=False):
        change = units[group["with"]] - units[group["without"]]
        lesion = pd.DataFrame(change).groupby(group["lesion"].to_numpy()).mean().to_numpy()
        for rank, latent in enumerate(np.argsort(-lesion.mean(axis=0), kind="stable")[:N_DRIVERS]):
            found = stats.bootstrap_mean(lesion[:, latent], n_resamples=n_resamples, seed=seed)
            rows.append((artefact, rank + 1, int(latent), *found, float((change[:, latent] > 0).mean())))
    return pd.DataFrame(rows, columns=["artefact", "rank", "latent", "change", "low", "high", "up"])


def suppressed(
    images: Images,
    readers: Mapping[str, Target],
    splice: Splice,
    found: Latents,
    *,
    n_draws: int = N_DRAWS,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """What each reader makes of the test images without the latents of the artefacts (of the planted ones, if any).

    Beside them as many other latents, drawn at random among those that the choosing half turns on, the more often the
    likelier; mean over the draws. Of the split that chose the latents its other half alone counts.
    Columns reader, split, measure, deleted, value, low, high, n. Measures: accuracy, "mean gap" (of the planted
    artefacts, signed) and "gap of NAME". deleted: none, artefacts, random, and on the same images "artefacts - none"
    and "artefacts - random".
    """
    names = tuple(images.planted or images.artefacts)
    gone = found.of(names)
    others = found.latents[~found.latents["latent"].isin(gone)]
    rng, odds = np.random.default_rng([seed, *b"random latents"]), others["frequency"] / others["frequency"].sum()
    size = min(len(gone), len(others))
    drawn = [rng.choice(others["latent"], size, replace=False, p=odds).tolist() for _ in range(n_draws)]
    use = images.table["split"].isin(tests(images.table)).to_numpy() & ~found.chosen_by
    part, state = images.table[use], splice.from_activations(images.tokens[torch.from_numpy(use)])
    rows = []
    for reader, target in readers.items():
        calls = {name: _called(splice, state, target, each) for name, each in (("none", []), ("artefacts", gone))}
        calls["random"] = np.mean([_called(splice, state, target, each) for each in drawn], axis=0)
        for other in ("none", "random"):
            calls[f"artefacts - {other}"] = calls["artefacts"] - calls[other]
        for split in tests(part):
            here = (part["split"] == split).to_numpy()
            label = part["malignant"].to_numpy(float)[here]
            cues = {name: known(part[name])[here] for name in names}
            for deleted, call in calls.items():
                for measure, statistic in _measures(call[here], label, cues, images.planted, " - " in deleted).items():
                    value = stats.bootstrap(statistic, len(label), n_resamples=n_resamples, seed=seed)
                    rows.append((reader, split, measure, deleted, *stats.settled(value), len(label)))
    return pd.DataFrame(rows, columns=["reader", "split", "measure", "deleted", "value", "low", "high", "n"])


def aurocs(units: Float[NDArray, "image latent"], shown: pd.DataFrame) -> Float[NDArray, "latent factor"]:
    """`detection.auroc` of each latent for each column, over the images of which it is known; NaN where all, or none,
    show it."""
    found = np.full((units.shape[1], shown.shape[1]), np.nan)
    for i, name in enumerate(shown):
        cue = known(shown[name])
        there = ~np.isnan(cue)
        if there.any():
            found[:, i] = auroc(csc_array(units[there]), cue[there, None] == 1)[:, 0]
    return found


def _units(state: State, n_latents: int) -> Float[NDArray, "image latent"]:
    return state.codes.dense(n_latents).detach().cpu().numpy()


def _largest(area: Float[NDArray, "latent factor"]) -> tuple[NDArray, NDArray]:
    """The factor with the largest AUROC of each latent, and that AUROC."""
    filled = np.where(np.isnan(area), -1, area)
    return filled.argmax(axis=1), filled.max(axis=1)


def _parts(splice: Splice, tokens: Float[Tensor, "image width"], target: Target) -> Float[NDArray, "image latent"]:
    """Each latent's part in the target: what deleting it alone takes away."""
    state = splice.from_activations(tokens)
    found = attribution.ablation(splice, state, target)
    dense = found.values.new_zeros(len(tokens), len(splice.W_dec)).scatter_add(1, found.latents, found.values)
    return dense.double().cpu().numpy()


def _shares(
    found: Latents,
    parts: Mapping[str, Float[NDArray, "image latent"]],
    artefacts: Collection[str],
    names: Sequence[str],
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    groups = {name: found.of([name]) for name in names} | {"artefacts": found.of(artefacts)}
    rows = []
    for reader, part in parts.items():
        size = np.abs(part)
        total = size.sum(axis=1)
        listed = sorted({latent for group in groups.values() for latent in group})
        for factor, group in (groups | {NONE: np.setdiff1d(np.arange(size.shape[1]), listed)}).items():
            own = size[:, group].sum(axis=1)
            share = stats.bootstrap(
                lambda counts, own=own, total=total: (counts @ own) / (counts @ total),
                len(own), n_resamples=n_resamples, seed=seed,
            )  # fmt: skip
            rows.append((reader, factor, *share, len(own)))
    return pd.DataFrame(rows, columns=["reader", "factor", "share", "low", "high", "n"])


def _drivers(found: Latents, parts: Mapping[str, Float[NDArray, "image latent"]]) -> pd.DataFrame:
    known_as = found.latents.set_index("latent")
    rows = []
    for reader, part in parts.items():
        size = np.abs(part).mean(axis=0)
        for rank, latent in enumerate(np.argsort(-size, kind="stable")[:N_DRIVERS]):
            stands = known_as.loc[latent, ["factor", "auroc"]] if latent in known_as.index else (NONE, np.nan)
            rows.append(
                (
                    reader,
                    rank + 1,
                    int(latent),
                    *stands,
                    part[:, latent].mean(),
                    size[latent],
                    size[latent] / size.sum(),
                )
            )
    return pd.DataFrame(rows, columns=["reader", "rank", "latent", "factor", "auroc", "part", "size", "share"])


@torch.no_grad()
def _called(splice: Splice, state: State, target: Target, gone: Sequence[int]) -> Float[NDArray, " image"]:
    """1 where the target is above 0 without some latents, else 0."""
    kept = ~torch.isin(state.latents, torch.tensor(gone, dtype=torch.long, device=state.latents.device))
    return (target(splice.embed(state, state.scaled(kept.float()))) > 0).double().cpu().numpy()


def _measures(
    call: Float[NDArray, " image"],
    label: Float[NDArray, " image"],
    cues: Mapping[str, Float[NDArray, " image"]],
    signs: Mapping[str, int],
    is_difference: bool,
) -> dict[str, stats.Statistic]:
    """What is read off calls; all of it is linear in them, so that a difference of calls gives the differences."""
    right = (2 * label - 1) * call + (0 if is_difference else 1 - label)
    found = {"accuracy": lambda counts: counts @ right / len(right)}
    if signs:
        found["mean gap"] = mean_gap(call, cues, signs)
    return found | {f"gap of {name}": mean_gap(call, cues, {name: 1}) for name in cues}
