"""A classifier of lesions and its shortcuts: what it takes from artefacts, and whether it takes more than its data say.

Two readers call an embedded image malignant or benign: a linear *probe* trained on a set in which artefacts go with the
label, and *text*, zero-shot. For an artefact and some images,

    gap            the share called malignant among the images that show it, minus the share among those that do not
    gap of labels  the same of the true labels: what a reader that errs nowhere would have
    amplification  the gap minus the gap of labels (as in Zhao et al. 2017: bias beyond that of the data)

Intervals draw the test images again; they hold the probe, and what it was trained on, as they are.

What a cue does by itself is asked of lesions drawn with and without it (`effects`); which latents carry it, in
`lesion_latents`. All of it takes embeddings and a table (`Images`); the drawn lesions (`world`) are one maker of that,
a folder of photographs (`isic`) another.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import attribution, lesions, probes, scenes, stats
from clipshift_core.activations import Source
from clipshift_core.attribution import Target
from clipshift_core.encoder import Encoder
from clipshift_core.pretrain import lesion_of
from clipshift_core.progress import note

CLASSES = ("benign", "malignant")
PROMPTS = ("a {} lesion", "a photo of a {} skin lesion", "a dermatoscopic photograph of a {} lesion")
"""What the zero-shot reader is asked, its classes in the place of {}."""
READERS = ("probe", "text")
LEARNED_FROM = ("train", "valid")
"""Splits that a probe is made from; every other one is a test."""
SIZES = {"train": 600, "valid": 150, "biased": 400, "balanced": 400, "reversed": 250}
"""Lesions drawn for each split."""
DRAWN_AS = {"train": "train", "valid": "train", "biased": "train", "balanced": "test", "reversed": lesions.REVERSED}
"""Split of `lesions.sample` that each is drawn from."""
FIRST, FIRST_PAIR = scenes.HELD_OUT + 900_000, scenes.HELD_OUT + 950_000
"""Seeds of the first lesion and of the first counterfactual one: nothing else is drawn from here on."""
N_PAIRS = 45
"""Lesions that are drawn with and without each planted artefact, as malignant and as benign."""
FACTORS = ("malignant", "asymmetric", "irregular", "many_colours", "large")
"""What a lesion is, in the words of its captions."""
SIGNS = {shortcut.artefact: 1 if shortcut.label == "malignant" else -1 for shortcut in lesions.PLANTED_SHORTCUTS}
"""The planted artefacts, and the sign of the gap that each was planted to give."""
ARTEFACTS = (*SIGNS, "hair", "ink", "vignette")
"""Those of the drawn world: the planted ones, and those that go with no label."""


Encode = Callable[[Source], tuple[Float[Tensor, "image dim"], Float[Tensor, "image width"] | None]]
"""From images to embeddings and class tokens, such as `encoded` of one encoder."""


class Images(NamedTuple):
    """Embedded images with their labels, their splits and what else they show."""

    table: pd.DataFrame
    """A row an image: split, malignant (bool), and a column for each artefact and factor: bool, or with <NA> where it
    is not known of each image."""
    embeddings: Float[Tensor, "image dim"]
    tokens: Float[Tensor, "image width"] | None
    """Class tokens after the last block: what a dictionary takes apart."""
    artefacts: tuple[str, ...]
    planted: Mapping[str, int] = {}
    """Those artefacts that were planted, each with the sign of its gap: 1 goes with malignant, -1 with benign."""


class Study(NamedTuple):
    """What the readers make of the test images."""

    called: pd.DataFrame
    """The images' table with, for each reader, `probe` (bool: called malignant) and `probe_margin` (its logit of
    malignant minus that of benign)."""
    accuracy: pd.DataFrame
    """split, reader, accuracy, low, high, n."""
    gaps: pd.DataFrame
    """split, artefact, reader, value (the gap), low, high, labels (the gap of labels), amplification,
    amplification_low, amplification_high, planted, n_with, n_without."""
    means: pd.DataFrame
    """Means over the planted artefacts of sign x gap: split, reader (the last one "probe - text"), value, low, high,
    labels, amplification, amplification_low, amplification_high, n."""


class Pairs(NamedTuple):
    """Lesions drawn with and without a cue, all else as it was."""

    table: pd.DataFrame
    """A row a pair: lesion (its number), artefact, label (that of the lesion's factors), without and with (indices of
    the two drawings)."""
    drawings: list[lesions.Lesion]


# The drawn world and its readers -------------------------------------------------------------------------------------


def drawn(sizes: Mapping[str, int] = SIZES, first: int = FIRST) -> tuple[pd.DataFrame, list[lesions.Lesion]]:
    """A row a lesion, the columns of `lesions.table`, `split` and `FACTORS`; and the lesions, not yet drawn.

    No model and no dictionary has seen a seed from `FIRST` on.
    """
    splits = [split for split, n in sizes.items() for _ in range(n)]
    made = [lesion_of(first + i, DRAWN_AS[split]) for i, split in enumerate(splits)]
    table = lesions.table(made)
    cuts = zip(FACTORS[1:], (("asymmetry", 0.5), ("border", 0.5), ("colours", 3), ("diameter_mm", 8)), strict=True)
    return table.assign(split=splits, **{name: table[of] > cut for name, (of, cut) in cuts}), made


def world(encode: Encode, size: int, sizes: Mapping[str, int] = SIZES) -> Images:
    """The drawn lesions at `size` pixels, embedded by `encode`."""
    table, made = drawn(sizes)
    return Images(table, *encode(Source.of_drawings(made, size)), ARTEFACTS, SIGNS)


def pairs(n: int = N_PAIRS, first: int = FIRST_PAIR, artefacts: Sequence[str] = tuple(SIGNS)) -> Pairs:
    """`lesions.counterfactuals` of n lesions: for each artefact a pair as malignant and one as benign.

    A lesion's own image is in a pair of each artefact and drawn once.
    """
    number: dict[lesions.Lesion, int] = {}
    rows = []
    for i in range(n):
        for artefact in artefacts:
            four = lesions.counterfactuals(lesion_of(first + i, "test"), artefact)
            for without, cue in (("class_only", "both"), ("neither", "cue_only")):
                ends = [number.setdefault(four[key], len(number)) for key in (without, cue)]
                rows.append((i, artefact, four[cue].label, *ends))
    return Pairs(pd.DataFrame(rows, columns=["lesion", "artefact", "label", "without", "with"]), list(number))


def encoded(
    source: Source, encoder: Encoder, batch_size: int = 64
) -> tuple[Float[Tensor, "image dim"], Float[Tensor, "image width"] | None]:
    """Embeddings of a source's images and, where the tower has blocks, their class tokens after the last one."""
    point = [f"token.{encoder.n_blocks - 1}"] if encoder.n_blocks else []
    embeddings, tokens = [], []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(source.ids), batch_size):
            span = range(start, min(start + batch_size, len(source.ids)))
            found = encoder.encode(np.stack(list(pool.map(source.read, span))), capture=point)
            embeddings.append(found.embedding)
            tokens += found.captured.values()
            note(f"lesions: image {span.stop} of {len(source.ids)}")
    return torch.cat(embeddings), torch.cat(tokens) if tokens else None


def text_reader(encoder: Encoder) -> Target:
    """Zero-shot: the logit of malignant minus that of benign."""
    benign, malignant = encoder.classifier(CLASSES, PROMPTS)
    return attribution.margin(malignant, benign, encoder.logit_scale)


def probe_reader(images: Images) -> Target:
    """The logit of a linear probe on embeddings of length 1, fitted to "train", its strength chosen on "valid"."""
    x, y = F.normalize(images.embeddings, dim=1), images.table["malignant"].to_numpy(bool).astype(int)
    train, valid = (_rows(images.table, split) for split in LEARNED_FROM)
    made = probes.fit(x[train], y[train], x[valid], y[valid])
    weight, bias = (torch.as_tensor(part).float() for part in (made.weight, made.bias))
    return attribution.probe(weight[1] - weight[0], bias[1] - bias[0], normalised=True)


# Calls and gaps -----------------------------------------------------------------------------------------------------


def study(images: Images, readers: Mapping[str, Target], *, n_resamples: int, seed: int) -> Study:
    """Accuracy and gaps of every reader on every test split, with 95 % intervals over images."""
    called = images.table.copy()
    for name, target in readers.items():
        margin = target(images.embeddings).double().numpy()
        called[f"{name}_margin"], called[name] = margin, margin > 0
    settings = {"n_resamples": n_resamples, "seed": seed}
    accuracy, gaps, means = [], [], []
    for split in tests(called):
        part = called[called["split"] == split]
        label = part["malignant"].to_numpy(float)
        cues = {name: known(part[name]) for name in images.artefacts}
        calls = {name: part[name].to_numpy(float) for name in readers}
        for reader, call in calls.items():
            accuracy.append((split, reader, *stats.bootstrap_mean(call == label, **settings), len(part)))
        for artefact, cue in cues.items():
            sides = int((cue == 1).sum()), int((cue == 0).sum())
            for reader, call in calls.items():
                row = _gap_row(call, label, {artefact: cue}, {artefact: 1}, settings)
                gaps.append((split, artefact, reader, *row, artefact in images.planted, *sides))
        if images.planted:
            for reader, call in calls.items():
                means.append((split, reader, *_gap_row(call, label, cues, images.planted, settings), len(part)))
            first, second = READERS
            if {first, second} <= set(calls):
                # Gaps are linear in what is called: the gap of the difference is the difference of the gaps.
                row = _gap_row(calls[first] - calls[second], 0 * label, cues, images.planted, settings)
                means.append((split, f"{first} - {second}", *row, len(part)))
    numbers = ["value", "low", "high", "labels", "amplification", "amplification_low", "amplification_high"]
    return Study(
        called,
        pd.DataFrame(accuracy, columns=["split", "reader", "accuracy", "low", "high", "n"]),
        pd.DataFrame(gaps, columns=["split", "artefact", "reader", *numbers, "planted", "n_with", "n_without"]),
        pd.DataFrame(means, columns=["split", "reader", *numbers, "n"]),
    )


def gap(values: Float[NDArray, " image"], cue: Float[NDArray, " image"]) -> stats.Statistic:
    """Mean of values where the cue is 1 minus their mean where it is 0, in resamples; NaN where a side is empty.

    cue: 1, 0, or NaN where it is not known.
    """
    on, off = (cue == 1).astype(float), (cue == 0).astype(float)

    def statistic(counts: Float[NDArray, "draw image"]) -> Float[NDArray, " draw"]:
        sums = ((counts @ (values * side), counts @ side) for side in (on, off))
        shown, hidden = (np.divide(a, b, out=np.full(len(counts), np.nan), where=b > 0) for a, b in sums)
        return shown - hidden

    return statistic


def mean_gap(
    values: Float[NDArray, " image"], cues: Mapping[str, Float[NDArray, " image"]], signs: Mapping[str, int]
) -> stats.Statistic:
    """Mean over the artefacts in `signs` of sign x `gap`."""
    each = [(sign, gap(values, cues[name])) for name, sign in signs.items()]
    return lambda counts: np.mean([sign * statistic(counts) for sign, statistic in each], axis=0)


def effects(
    table: pd.DataFrame, margins: Mapping[str, Float[NDArray, " drawing"]], *, n_resamples: int, seed: int
) -> pd.DataFrame:
    """What adding a cue alone does to each reader.

    table: `Pairs.table`; margins: of its drawings. Columns artefact, reader, label (that of the lesion, or "both"),
    measure, value, low, high, n. Measures: logit and probability (mean change of the margin, and of its sigmoid, with
    the cue), flips (share of the pairs in which the call changes) and to_malignant (share in which it becomes
    malignant). For "both" a lesion's two pairs are averaged first, for they are not independent; n counts lesions.
    """
    rows = []
    for reader, margin in margins.items():
        without, cue = (margin[table[end]] for end in ("without", "with"))
        changes = table.assign(
            logit=cue - without,
            probability=_sigmoid(cue) - _sigmoid(without),
            flips=((cue > 0) != (without > 0)).astype(float),
            to_malignant=((cue > 0) & (without <= 0)).astype(float),
        )
        for artefact, group in changes.groupby("artefact", sort=False):
            for label, some in (("both", group), *group.groupby("label")):
                for measure in ("logit", "probability", "flips", "to_malignant"):
                    values = some.groupby("lesion")[measure].mean()
                    found = stats.bootstrap_mean(values, n_resamples=n_resamples, seed=seed)
                    rows.append((artefact, reader, label, measure, *found, len(values)))
    return pd.DataFrame(rows, columns=["artefact", "reader", "label", "measure", "value", "low", "high", "n"])


def tests(table: pd.DataFrame) -> list[str]:
    """The test splits, in the order in which they first appear."""
    return [split for split in table["split"].unique() if split not in LEARNED_FROM]


def _gap_row(
    call: Float[NDArray, " image"],
    label: Float[NDArray, " image"],
    cues: Mapping[str, Float[NDArray, " image"]],
    signs: Mapping[str, int],
    settings: Mapping[str, int],
) -> tuple[float, ...]:
    """Gap with interval, gap of labels, amplification with interval."""
    found, more = (
        stats.bootstrap(mean_gap(values, cues, signs), len(label), **settings) for values in (call, call - label)
    )
    labels = float(mean_gap(label, cues, signs)(np.ones((1, len(label))))[0])
    return *found, labels, *more


def known(column: pd.Series) -> Float[NDArray, " image"]:
    """1, 0, or NaN where it is <NA>."""
    return column.astype("Float64").to_numpy(float, na_value=np.nan)


def _rows(table: pd.DataFrame, split: str) -> Int[NDArray, " row"]:
    return np.flatnonzero(table["split"] == split)


def _sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))
