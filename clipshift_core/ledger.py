"""How to read the ledger: what each verdict means, and what it does not, and on which side of which bound it lies.

A verdict is about one statistic, on the images and the model of one run. `claims` and `claims_latents` hold the
statistics; here stands, for a reader, what follows from each and what does not.
"""

import re
from typing import NamedTuple

import pandas as pd


class Meaning(NamedTuple):
    """How to read one claim's verdict."""

    means: str
    """What it would say about the model if the claim is reproduced."""
    not_means: str
    """What a reader might take it for, and should not."""


MEANINGS: dict[str, Meaning] = {
    "A1a": Meaning(
        "three augmentations, drawn with the published parameters, move this model's embedding further than the others",
        "that they are the strongest kinds of change: the nine are not doses of equal strength (05)",
    ),
    "A1b": Meaning(
        "noise moves it furthest of all",
        "that noise is what the model bears least: it also destroys most of the picture, and its effect depends on the "
        "size at which it is applied (02, 05)",
    ),
    "A2a": Meaning(
        "a view under these two is nearer to its original than a tenth of the way to another image",
        "that the model was made invariant to them: the published brightness and contrast change little of the picture",
    ),
    "A2b": Meaning(
        "a view under these two is nearer to its original than a quarter of the way to another image",
        "invariance to elastic deformation: the published one moves pixels by a fifth of a pixel (05)",
    ),
    "A3a": Meaning(
        "images whose edges are kept keep their embedding",
        "that edges are why: over all augmentations the strength of the change drives both",
    ),
    "A3b": Meaning("images whose fine contrast is kept keep their embedding", "that fine contrast is why"),
    "A4a": Meaning(
        "the embeddings under noise are unlike those under any other augmentation",
        "that noise is alone in this: the test is met, too, where every augmentation stands alone",
    ),
    "A4b": Meaning(
        "colour-like augmentations move an image in directions of their own, and geometry-like ones in theirs",
        "that there are two clusters in the dendrogram: means are compared, no cut is tested",
    ),
    "B1a": Meaning(
        "deleting latents in the order of activation times gradient takes more of the similarity, sooner",
        "that either order is the right one: exact ablation is cheap here, and stands beside them (09)",
    ),
    "B1b": Meaning(
        "the same for latents that are inserted into nothing",
        "that few latents explain the prediction: much of the similarity needs none (09)",
    ),
    "B1c": Meaning(
        "one gradient orders latents almost as well as the gradients along a path",
        "that the two give the same numbers: only orders are compared, and the 95 % is this project's choice",
    ),
    "B2a": Meaning(
        "for many latents some class gets more from them than shuffled texts would, though their examples show "
        "something else",
        "that each of them is spurious: resemblance counts as well, and the rate is one against shuffled texts, not "
        "against the truth (11 has both)",
    ),
    "B2b": Meaning(
        "each of the four kinds of reliance that were planted is found at least once, and acts as the pictures say",
        "that a kind which is not found is not there: a latent may write cue and class as one, or not at all",
    ),
    "B3a": Meaning(
        "a probe trained on biased images loses more, where the bias turns round, than text does",
        "that text is robust: text leans on what the model itself has learned, and both can lose (12)",
    ),
    "B3b": Meaning(
        "more of the probe's evidence comes from latents that a cue alone turns on",
        "how often it errs for it: shares of attribution are no accuracies",
    ),
    "B3c": Meaning(
        "text errs more on words that mean two things, or are part of another word",
        "that the words are why: drawings of such words may also be harder to tell",
    ),
    "B4a": Meaning(
        "what says nothing about a lesion still sways the probe",
        "that the probe learned it alone: the embedding may carry the shortcut already (B4c)",
    ),
    "B4b": Meaning(
        "the probe follows the shortcut more often than the labels do",
        "that an unbiased training set would cure it",
    ),
    "B4c": Meaning(
        "the shortcut comes from training the probe, over and above what text has of it",
        "if it fails, that the probe is clean: text can be as biased",
    ),
}
"""By claim; B1d to B1f are read as B1a to B1c."""
SAME = {"B1d": "B1a", "B1e": "B1b", "B1f": "B1c"}


def meaning(claim: str) -> Meaning:
    """How to read a claim of the ledger. KeyError for one that is not in it."""
    return MEANINGS[SAME.get(claim, claim)]


def bound(statistic: str) -> tuple[float, str]:
    """The bound and its side, "above" or "below", of a ledger's statistic; NaN where it is decided otherwise."""
    found = re.search(r"interval lies (above|below) ([-+.\de]+)$", statistic)
    return (float(found[2]), found[1]) if found else (float("nan"), "")


def explained(ledger: pd.DataFrame) -> pd.DataFrame:
    """For each row of the ledger: claim, verdict, "if reproduced, it means", "it does not mean"."""
    read = [meaning(claim) for claim in ledger["claim"]]
    columns = {"if reproduced, it means": [m.means for m in read], "it does not mean": [m.not_means for m in read]}
    return ledger[["claim", "statement", "verdict"]].assign(**columns)
