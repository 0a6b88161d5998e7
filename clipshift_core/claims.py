"""The ledger: each claim of the papers, the statistic that decides it, its value in this run, and the verdict.

Paper A's claims are decided here, paper B's in `claims_latents`. The statistics and bounds were written down before any
value was seen. Images are drawn again (`stats.bootstrap`), and the smallest or largest of several means is taken anew
in each resample. A claim is reproduced if its 95 % interval lies beyond the bound, and not reproduced otherwise; where
one image leaves no interval it is not testable here.

A1a  Noise, perspective and shift-scale-rotate move the embedding most: the smallest mean L2 of the three minus the
     largest of the other six, above 0.
A1b  Noise moves it most of all: its mean L2 minus the largest of the other eight, above 0.
A2a  Brightness-contrast and horizontal flip leave it nearly unchanged: the larger of their two mean cosine distances
     (1 - cosine) from the original, divided by the mean cosine distance of two different originals of the run, so that
     0 is unchanged and 1 is like another image; below 0.10.
A2b  To a degree elastic and perspective, too: the same ratio for those two, below 0.25.
A3a  Edge preservation correlates strongly with embedding similarity: Spearman's rho with the cosine over all pairs of
     an image and an augmentation, above 0.7 (strong in the words of Schober, Boer and Schwarte 2018).
A3b  Detail preservation, too: the same.
A4a  Noise stands apart: the share of resamples in which noise is alone in its cluster, by Ward linkage of the mean
     1 - cosine between the augmentations' embeddings of an image, cut at 0.7 of the largest merge. Reproduced if it is
     alone in the sample itself and in at least 95 % of the resamples. No interval: the share is itself read off the
     resamples, and what is uncertain about it is only their number, which says nothing about other images. (It is met,
     too, where every augmentation is alone: read it beside the dendrogram.)
A4b  Colour-like (colour jitter, brightness-contrast) and geometry-like augmentations (shift-scale-rotate, perspective,
     flip, elastic) group: the mean distance of the eight pairs across the two groups minus that of the seven pairs
     within one, above 0.
On disk the ledger is `runs/<profile>/claims.csv`, to which one notebook after another adds its rows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.distance import squareform

from clipshift_core import files, profiles, stats
from clipshift_core.profiles import Profile
from clipshift_core.stats import Interval, Statistic

if TYPE_CHECKING:
    import xarray as xr

Verdict = Literal["reproduced", "not reproduced", "not testable here"]

COLOUR = ("color_jitter", "random_brightness_contrast")
GEOMETRY = ("shift_scale_rotate", "perspective", "horizontal_flip", "elastic")
LEAST_SHARE = 0.95
"""Of the resamples, in which noise must be alone."""
NO_DISTANCE = 1e-7
"""Mean cosine distance of originals below which float32 embeddings are all the same."""
SLAB = 256
"""Images whose embeddings are read at once."""


@dataclass(frozen=True)
class Claim:
    """One row of the ledger."""

    claim: str
    """Its number, such as A1a."""
    statement: str
    """What the paper says."""
    statistic: str
    """What was measured to decide it, and when it counts as reproduced."""
    value: float
    """The statistic over the images of this run."""
    ci_low: float
    """Lower end of its 95 % interval over images; NaN where there is none."""
    ci_high: float
    n: int
    """Images."""
    verdict: Verdict
    notebook: str
    """The number of the notebook that measured it."""

    def __post_init__(self):
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"claim {self.claim}: verdict {self.verdict!r}; accepted: {', '.join(get_args(Verdict))}")


COLUMNS = tuple(field.name for field in fields(Claim))


@dataclass(frozen=True)
class Criterion:
    """How a claim is decided."""

    claim: str
    statement: str
    statistic: str
    bound: float
    side: Literal["above", "below"] = "above"
    """The side of the bound on which the whole interval must lie."""

    def decide(self, interval: Interval, n: int, notebook: str) -> Claim:
        """The row of a statistic that was measured on n images."""
        value, low, high = interval
        if not np.isfinite([value, low, high]).all():
            verdict = "not testable here"
        else:
            beyond = low > self.bound if self.side == "above" else high < self.bound
            verdict = "reproduced" if beyond else "not reproduced"
        rule = f"reproduced if the 95 % interval lies {self.side} {self.bound:g}"
        return Claim(self.claim, self.statement, f"{self.statistic}; {rule}", value, low, high, n, verdict, notebook)


_MOVED_MOST = Criterion(
    "A1a",
    "Noise, perspective and shift-scale-rotate move the embedding most",
    "Smallest mean L2 of the three minus largest mean L2 of the other six",
    bound=0,
)
_NOISE_MOST = Criterion(
    "A1b",
    "Noise moves the embedding most of all",
    "Mean L2 of noise minus largest mean L2 of the other eight",
    bound=0,
)
_UNCHANGED = Criterion(
    "A2a",
    "Brightness-contrast and horizontal flip leave the embedding nearly unchanged",
    "Larger of the two mean cosine distances from the original, divided by the mean of two different originals",
    bound=0.10,
    side="below",
)
_UNCHANGED_TO_A_DEGREE = Criterion(
    "A2b",
    "To a degree, elastic and perspective leave the embedding unchanged",
    _UNCHANGED.statistic,
    bound=0.25,
    side="below",
)
_CORRELATES = {
    metric: Criterion(
        claim,
        f"{metric.capitalize()} preservation correlates strongly with embedding similarity",
        f"Spearman's rho of {metric} preservation and cosine similarity over all pairs of an image and an augmentation",
        bound=0.7,
    )
    for claim, metric in (("A3a", "edge"), ("A3b", "detail"))
}
_GROUPS = Criterion(
    "A4b",
    "Colour-like and geometry-like augmentations group",
    "Mean cosine distance of pairs across the two groups minus that of pairs within one",
    bound=0,
)


def embedding_shifts(dataset: "xr.Dataset", *, notebook: str, n_resamples: int, seed: int) -> list[Claim]:
    """The rows of A1, A2 and A4, from embedding (image, view, feature), l2 and cosine (image, augmentation)."""
    l2, distance = _by_augmentation(dataset, "l2"), 1 - _by_augmentation(dataset, "cosine")
    n, settings = len(l2), {"n_resamples": n_resamples, "seed": seed}
    originals, between = _directions(dataset, list(distance))

    def decide(criterion: Criterion, statistic: Statistic) -> Claim:
        return criterion.decide(stats.bootstrap(statistic, n, **settings), n, notebook)

    contrast = between @ _contrast(list(distance))
    return [
        decide(_MOVED_MOST, _lead(l2, ["noise", "perspective", "shift_scale_rotate"])),
        decide(_NOISE_MOST, _lead(l2, ["noise"])),
        decide(_UNCHANGED, _relative(distance[["random_brightness_contrast", "horizontal_flip"]], originals)),
        decide(_UNCHANGED_TO_A_DEGREE, _relative(distance[["elastic", "perspective"]], originals)),
        _noise_apart(_is_alone(between, list(distance).index("noise")), n, notebook, settings),
        decide(_GROUPS, lambda counts: counts @ contrast / n),
    ]


def preservation(dataset: "xr.Dataset", *, notebook: str, n_resamples: int, seed: int) -> list[Claim]:
    """The rows of A3 from the one pass: edge, detail and cosine, each (image, augmentation)."""
    cosine, rows = _by_augmentation(dataset, "cosine"), []
    for metric, criterion in _CORRELATES.items():
        values = _by_augmentation(dataset, metric)[cosine.columns]
        rho = stats.correlation(values, cosine, n_resamples=n_resamples, seed=seed)
        rows.append(criterion.decide(rho, len(values), notebook))
    return rows


def caveat(profile: Profile) -> str:
    """What a reader must know beside the verdicts: how the run departs from the profile `paper`; empty if it does not.

    That profile is paper A's setting. Paper B looks at more models, and learns its dictionaries from ImageNet.
    """
    paper, departures = Profile.load("paper"), []
    if profile.source_path.resolve() != paper.source_path.resolve():
        drawn = profile.source_path.resolve().is_relative_to((profiles.ROOT / "data" / "samples").resolve())
        shown = "drawn scenes" if drawn else f"those of {profile.source}"
        departures.append(f"images are {shown}, not Conceptual Captions")
    if profile.model != paper.model:
        name = profile.model_dir.name if profile.model_dir else profile.model
        departures.append(f"model is {name}, not OpenAI's ViT-B/32")
    if not departures:
        return ""
    return (
        f"This run's {', and its '.join(departures)}: the verdicts are about this run, not about the paper's setting."
    )


def left_out(criteria: Sequence[Criterion], reason: str, *, notebook: str) -> list[Claim]:
    """The rows of claims that this run cannot test at all, each with the reason in place of its statistic."""
    nan = float("nan")
    return [
        Claim(each.claim, each.statement, f"Left out: {reason}", nan, nan, nan, 0, "not testable here", notebook)
        for each in criteria
    ]


def record(path: Path, rows: Sequence[Claim]) -> pd.DataFrame:
    """Put the rows of a notebook into the ledger, in place of all its earlier ones, and return them as a table.

    The file is written to the side and renamed, so that a kill leaves the old ledger or the new one.
    """
    new, old = table(rows), read(path)
    if new["claim"].duplicated().any():
        raise ValueError(f"{path}: claim {new['claim'][new['claim'].duplicated()].iloc[0]} is given twice")
    kept = old[~(old["claim"].isin(new["claim"]) | old["notebook"].isin(new["notebook"]))]
    records = sorted([*kept.to_dict("records"), *new.to_dict("records")], key=lambda row: row["claim"])
    text = pd.DataFrame(records, columns=COLUMNS).to_csv(index=False, float_format="%.9g")
    files.write({path: text.encode()})
    return new


def read(path: Path) -> pd.DataFrame:
    """The ledger, sorted by claim; empty where no notebook has written to it. ValueError for another kind of file."""
    if not path.exists():
        return table([])
    texts = dict.fromkeys(("claim", "statement", "statistic", "verdict", "notebook"), str)
    ledger = pd.read_csv(path, dtype=texts)
    if tuple(ledger.columns) != COLUMNS:
        raise ValueError(f"{path}: has the columns {', '.join(ledger.columns)}; accepted: {', '.join(COLUMNS)}")
    return ledger


def table(rows: Sequence[Claim]) -> pd.DataFrame:
    """The rows as a table of COLUMNS."""
    return pd.DataFrame([asdict(row) for row in rows], columns=COLUMNS)


def _by_augmentation(dataset: "xr.Dataset", name: str) -> pd.DataFrame:
    """A metric as (image, augmentation), float64, with named columns. ValueError for a value that is not finite."""
    values = dataset[name].transpose("image", "augmentation").to_pandas().astype(np.float64)
    if not np.isfinite(values).all(axis=None):
        raise ValueError(
            f"{int((~np.isfinite(values)).sum().sum())} of {values.size} values of {name!r} are not finite"
        )
    return values


def _directions(dataset: "xr.Dataset", augmentations: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit embeddings of the originals (image, feature), and 1 - cosine of each pair of augmentations (image, pair).

    Pairs in the order of `np.triu_indices`. Embeddings are read SLAB images at a time, however many there are.
    """
    import torch  # takes seconds, and the runner only reads the ledger

    from clipshift_core import metrics

    first, second = np.triu_indices(len(augmentations), k=1)
    embedding = dataset["embedding"].transpose("image", "view", "feature")
    at = [list(embedding["view"].values).index(view) for view in ("original", *augmentations)]
    originals, between = [], []
    for start in range(0, len(embedding), SLAB):
        slab = embedding.isel(image=slice(start, start + SLAB)).values[:, at]
        units = metrics.unit(torch.from_numpy(slab)).numpy()
        if not np.isfinite(units).all():
            raise ValueError(f"embeddings of images {start} to {start + len(slab) - 1} are not all finite")
        originals.append(units[:, 0].copy())  # a view of it would keep all ten
        cosine = units[:, 1:] @ units[:, 1:].transpose(0, 2, 1)
        between.append(np.clip(1 - cosine[:, first, second], 0, 2))
    return np.concatenate(originals), np.concatenate(between)


def _noise_apart(alone: Statistic, n: int, notebook: str, settings: dict[str, int]) -> Claim:
    """A4a, the one claim that a share of the resamples decides."""
    share = float(stats.bootstrap_draws(alone, n, **settings).mean()) if n > 1 else float("nan")
    if n == 1:
        verdict = "not testable here"
    else:
        reproduced = alone(np.ones((1, n)))[0] == 1 and share >= LEAST_SHARE
        verdict = "reproduced" if reproduced else "not reproduced"
    statistic = (
        f"Share of resamples in which noise is alone in its cluster (Ward linkage, cut at {stats.CUT:g} of the largest "
        f"merge); reproduced if it is alone in the sample, too, and the share is at least {LEAST_SHARE:g}"
    )
    statement, nan = "Noise stands apart from the other augmentations", float("nan")
    return Claim("A4a", statement, statistic, share, nan, nan, n, verdict, notebook)


def _lead(values: pd.DataFrame, names: list[str]) -> Statistic:
    """Smallest mean among the named augmentations minus the largest among the others."""
    named, others, n = values[names].to_numpy(), values.drop(columns=names).to_numpy(), len(values)
    return lambda counts: ((counts @ named).min(axis=1) - (counts @ others).max(axis=1)) / n


def _relative(distance: pd.DataFrame, originals: NDArray[np.float64]) -> Statistic:
    """Largest mean distance of the augmentations given, in units of the mean distance of two different originals.

    A resample's pairs are those of two different images, i != j, each as often as the two were drawn. An image that was
    drawn twice makes no pair with itself: the zero would shrink the unit. With unit vectors u and counts c,

        sum over i != j of c_i c_j u_i.u_j  =  |sum c_i u_i|^2 - sum c_i^2 |u_i|^2

    so that no pair is visited. NaN where the resample holds one image alone, or originals that are all the same.
    """
    moved, length = distance.to_numpy(), np.einsum("if,if->i", originals, originals)

    def ratio(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        twice, n = counts**2, len(moved)
        pairs = n**2 - twice.sum(axis=1)
        similarity = ((counts @ originals) ** 2).sum(axis=1) - twice @ length
        unit = (pairs - similarity) / np.maximum(pairs, 1)
        return np.divide(
            (counts @ moved).max(axis=1) / n, unit, out=np.full(len(unit), np.nan), where=unit > NO_DISTANCE
        )

    return ratio


def _is_alone(between: NDArray[np.float64], leaf: int) -> Statistic:
    """1 where the augmentation is the only member of its cluster, else 0."""

    def alone(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        clusters = [stats.clusters(stats.ward(squareform(mean))) for mean in counts @ between / len(between)]
        return np.array([(found == found[leaf]).sum() == 1 for found in clusters], dtype=np.float64)

    return alone


def _contrast(augmentations: Sequence[str]) -> NDArray[np.float64]:
    """Weight of each pair in: mean over the pairs across the two groups, minus mean over the pairs within one."""
    groups = np.array([1 if name in COLOUR else 2 if name in GEOMETRY else 0 for name in augmentations])
    first, second = (groups[index] for index in np.triu_indices(len(augmentations), k=1))
    known = (first > 0) & (second > 0)
    across, within = known & (first != second), known & (first == second)
    return across / across.sum() - within / within.sum()
