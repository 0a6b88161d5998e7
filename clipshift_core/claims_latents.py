"""Paper B's claims: the statistic that decides each, written down before any value was seen (see `claims`).

B1a  Activation times gradient orders latents more faithfully than logit lens, by deletion: the area under the
     normalised deletion curve by logit lens minus that by act x grad, mean over images, above 0.
B1b  The same by insertion: the area by act x grad minus that by logit lens, above 0.
B1c  It is about as faithful as integrated gradients: of what integrated gradients gain over a random order, in
     deletion area, act x grad gains at least 95 %. (That it costs a fraction needs no test: one gradient against one
     for each step.)

B1d to B1f are B1a to B1c for a dictionary of the patches' tokens at an earlier block.

B2a  Hundreds of latents per model are relied on unexpectedly: the share of the dictionary's latents that are in a
     finding of `reliance` at a false-discovery rate of 10 %, above 100 of 30,000 (the paper's dictionaries).
B2b  In four kinds (co-occurrence and artefacts, polysemy, compounds, typography): of these, how many have a planted
     reliance among the findings that the causal truth confirms, above 3.5; classes' images drawn again.
B3a  Zero-shot text is more robust to spurious correlation than linear probes: what a probe, trained where nine in ten
     images carry their class's own cue, loses in accuracy from images with their own cue to the same with another
     class's, minus what text loses, above 0.
B3b  The probe's attribution leans more on the cues: its share of the absolute attribution that falls on latents which
     a cue alone turns up, minus text's, on images whose cues say nothing, above 0.
B3c  Text is prone to ambiguity: zero-shot errors on words with two meanings or in compounds minus those on the other
     words, above 0.
B4a  A lesion classifier relies on hidden shortcuts: where artefacts say nothing, the share of lesions that a probe
     trained on biased ones calls malignant, with minus without the artefact, in the direction of the shortcut; mean
     over the planted ones, above 0.
B4b  It amplifies them: on biased images, that difference of its calls minus that of the labels, above 0.
B4c  More so than text: B4a's statistic for the probe minus that for zero-shot text, above 0.

Before they were decided here, the statistics of B3 and the gaps of B4a and B4c had been seen in first looks at other
images of the world; they were stated before, but for B4a's and B4c's gaps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike, NDArray

from clipshift_core import lesion_study, probes, stats
from clipshift_core.claims import Claim, Criterion, left_out
from clipshift_core.faithfulness import Curves
from clipshift_core.stats import Interval, Statistic

KINDS = (("co-occurrence", "artefact"), ("polysemy",), ("compound",), ("typography",))
"""The paper's four kinds of unexpected reliance, by the kinds of `scenes.PLANTED`."""

FAITHFUL = (
    Criterion(
        "B1a",
        "Act x grad is more faithful than logit lens (deletion)",
        "Area of the normalised deletion curve by logit lens minus that by act x grad",
        bound=0,
    ),
    Criterion(
        "B1b",
        "Act x grad is more faithful than logit lens (insertion)",
        "Area of the normalised insertion curve by act x grad minus that by logit lens",
        bound=0,
    ),
    Criterion(
        "B1c",
        "Act x grad is about as faithful as integrated gradients",
        "Share of integrated gradients' lead over a random order, in deletion area, that act x grad has",
        bound=0.95,
    ),
)
EARLIER = tuple(
    replace(criterion, claim=f"B1{letter}", statement=f"{criterion.statement}; patches at an earlier block")
    for criterion, letter in zip(FAITHFUL, "def", strict=True)
)


def faithfulness(
    found: Curves,
    *,
    notebook: str,
    n_resamples: int,
    seed: int,
    criteria: Sequence[Criterion] = FAITHFUL,
) -> list[Claim]:
    """The rows of B1 from the normalised curves of the methods of `attribution`.

    criteria: FAITHFUL, or EARLIER for a dictionary of the patches' tokens at an earlier block.
    """
    deletion, insertion = (dict(zip(found.methods, areas, strict=True)) for areas in found.areas.values())
    n, settings = len(deletion["act_x_grad"]), {"n_resamples": n_resamples, "seed": seed}

    def lead(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        ours, exact = (counts @ (deletion["random"] - deletion[m]) for m in ("act_x_grad", "integrated_gradients"))
        return np.divide(ours, exact, out=np.full(len(ours), np.nan), where=exact > 0)

    statistics = (
        lambda counts: counts @ (deletion["logit_lens"] - deletion["act_x_grad"]) / n,
        lambda counts: counts @ (insertion["act_x_grad"] - insertion["logit_lens"]) / n,
        lead,
    )
    rows = []
    for criterion, statistic in zip(criteria, statistics, strict=True):
        rows.append(criterion.decide(stats.bootstrap(statistic, n, **settings), n, notebook))
    return rows


_RELIED_ON = Criterion(
    "B2a",
    "Hundreds of latents per model are relied on unexpectedly",
    "Share of the dictionary's latents in a finding at a false-discovery rate of 10 % against shuffled texts",
    bound=100 / 30_000,
)
_FOUR_KINDS = Criterion(
    "B2b",
    "Unexpected reliance comes in four kinds",
    "Of four kinds, those with a planted reliance that is found and causally confirmed",
    bound=3.5,
)
_ROBUST = Criterion(
    "B3a",
    "Zero-shot text is more robust to spurious correlation than linear probes",
    "Accuracy lost from images with their own cue to the same with another's: probe minus text",
    bound=0,
)
_LEANS = Criterion(
    "B3b",
    "Probes' attribution leans more on spurious latents than text's",
    "Share of the absolute attribution on latents of cues, where cues say nothing: probe minus text",
    bound=0,
)
_AMBIGUOUS = Criterion(
    "B3c",
    "Zero-shot text is prone to ambiguity",
    "Zero-shot error on words with two meanings or in compounds minus that on other words",
    bound=0,
)
_SHORTCUT = Criterion(
    "B4a",
    "A lesion classifier relies on hidden shortcuts",
    "Share that a probe calls malignant with minus without a planted artefact that says nothing, in its direction",
    bound=0,
)
_AMPLIFIES = Criterion(
    "B4b",
    "A lesion classifier amplifies hidden shortcuts",
    "That difference of the probe's calls minus that of the labels, where artefacts go with the label",
    bound=0,
)
_MORE_THAN_TEXT = Criterion(
    "B4c",
    "A lesion classifier relies on shortcuts more than zero-shot text does",
    "Share called malignant with minus without a planted artefact that says nothing: probe minus text",
    bound=0,
)
RELIANCES = (_RELIED_ON, _FOUR_KINDS)
PROBES = (_ROBUST, _LEANS, _AMBIGUOUS)
LESIONS = (_SHORTCUT, _AMPLIFIES, _MORE_THAN_TEXT)


def reliances(
    found: pd.DataFrame, threshold: float, ranks: pd.DataFrame | None, *, n_latents: int, n_images: int, notebook: str
) -> list[Claim]:
    """The rows of B2, from the candidates of `reliance.discover` and where they find what was planted.

    found: latent, attribution, low, high. ranks: kind and latent of planted reliances, those alone that a candidate
    hits, with that candidate's attribution, low and high; None where nothing was planted. What exceeds a bound grows
    when images are drawn again: the interval counts what exceeds it with the lower end of its own, and with the upper.
    """
    bounds = ("attribution", "low", "high")
    shares = [found.loc[found[bound] >= threshold, "latent"].nunique() / n_latents for bound in bounds]
    row = _RELIED_ON.decide(Interval(*map(float, shares)), n_images, notebook)
    if ranks is None:
        reason = "what was planted is known for drawn scenes only"
        return [row, *left_out([_FOUR_KINDS], reason, notebook=notebook)]
    kinds = [sum(ranks.loc[ranks[b] >= threshold, "kind"].isin(kind).any() for kind in KINDS) for b in bounds]
    return [row, _FOUR_KINDS.decide(Interval(*map(float, kinds)), n_images, notebook)]


def probes_against_text(
    lost: Mapping[str, Float[np.ndarray, " image"]],
    share: Mapping[str, Float[np.ndarray, " image"]],
    right: Bool[np.ndarray, " other"],
    ambiguous: Bool[np.ndarray, " other"],
    *,
    notebook: str,
    n_resamples: int,
    seed: int,
) -> list[Claim]:
    """The rows of B3.

    lost: of "probe" and "text", 1, 0 or -1 an image: right with its own cue, minus right with another's. share: of
    both, the share of the absolute attribution on latents of cues. right: whether text names an image of any word;
    ambiguous: whether its word is.
    """
    settings = {"n_resamples": n_resamples, "seed": seed}
    rows = []
    for criterion, pair in ((_ROBUST, lost), (_LEANS, share)):
        difference = np.asarray(pair["probe"], float) - np.asarray(pair["text"], float)
        rows.append(criterion.decide(stats.bootstrap_mean(difference, **settings), len(difference), notebook))
    wrong, is_ambiguous = 1.0 - np.asarray(right), np.asarray(ambiguous)
    gap = stats.bootstrap(
        lambda counts: probes.ambiguity_statistic(counts, wrong, is_ambiguous), len(wrong), **settings
    )
    return [*rows, _AMBIGUOUS.decide(gap, len(wrong), notebook)]


def shortcuts(
    free: Mapping[str, Bool[np.ndarray, " image"]],
    free_artefacts: pd.DataFrame,
    biased: Mapping[str, Bool[np.ndarray, " other"]],
    biased_artefacts: pd.DataFrame,
    signs: Mapping[str, int],
    *,
    notebook: str,
    n_resamples: int,
    seed: int,
) -> list[Claim]:
    """The rows of B4.

    free, biased: which images "probe" and "text" (of the biased: "label") call malignant. Artefacts: a bool column
    each. signs: of the planted ones, 1 where it goes with malignant, -1 where with benign.
    """
    settings = {"n_resamples": n_resamples, "seed": seed}

    def gaps(calls: Mapping[str, ArrayLike], artefacts: pd.DataFrame) -> dict[str, Statistic]:
        shown = {name: artefacts[name].to_numpy(float) for name in signs}
        return {name: lesion_study.mean_gap(np.asarray(call, float), shown, signs) for name, call in calls.items()}

    where, there = gaps(free, free_artefacts), gaps(biased, biased_artefacts)
    tests = (
        (_SHORTCUT, where["probe"], len(free_artefacts)),
        (_AMPLIFIES, lambda counts: there["probe"](counts) - there["label"](counts), len(biased_artefacts)),
        (_MORE_THAN_TEXT, lambda counts: where["probe"](counts) - where["text"](counts), len(free_artefacts)),
    )
    return [
        criterion.decide(stats.bootstrap(statistic, n, **settings), n, notebook) for criterion, statistic, n in tests
    ]
