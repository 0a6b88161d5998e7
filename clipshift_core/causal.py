"""What a word's similarity really leans on, from pictures in which one thing alone was changed.

To a neutral scene one value is given: a cue, another thing in front, a colour, a background. Whatever the cosine to a
word's text then gains was caused by that value, for all else has stayed in place. A latent carries the rise as far as
deleting it, in both pictures, removes the rise. This is the truth that found reliances are scored against: it asks
nothing of labels, alignment or attribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, t
from torch import Tensor

from clipshift_core import attribution, scenes
from clipshift_core.splice import Splice, State
from clipshift_core.suppression import Suppressed, scores

LEAST_RISE = 0.02
"""Smallest rise of a cosine that counts as one."""
LEVEL = 0.05
"""Rate of false discoveries among the rises that count."""
LEAST_SHARE = 0.2
"""Smallest share of a rise that a latent's deletion must remove, and of a latent's largest activation that a cue must
add to it."""
SURE = 0.001
"""Largest p, one-sided, at which a latent counts."""

Key = tuple[str, str]
"""A family of values and the value that a scene was given."""
BASE: Key = ("", "")
"""The key of the scenes that were given nothing."""
FACTOR = {"thing": "kind", "colour": "colour", "background": "background"}
"""The families that replace a factor of the scene, and which; a cue is added."""


class Rises(NamedTuple):
    """What raises which word, and the latents through which it does."""

    table: pd.DataFrame
    """A row a word and value: word, family, value; rise, the mean gain of the cosine to the word's text, with its 95 %
    t interval low and high; p (one-sided t test of a gain above 0), q (Benjamini and Hochberg 1995, over all rows); n
    scenes; planted, the kind of the reliance that was planted there or ""; causal, whether q <= 0.05 and the rise is at
    least `LEAST_RISE`. One scene alone leaves interval, p and q NaN."""
    removed: pd.DataFrame
    """A row a latent of a causal row: word, family, value, latent; removed, how much less the cosine rises without the
    latent, with its 95 % interval low and high; share, of the rise. Only latents that the value turns up on average,
    with a share of `LEAST_SHARE` or more and p < `SURE`, largest first within a row."""
    planted: pd.DataFrame
    """The rows of the table where a reliance was planted: kind, word, family, cue, rise, low, high, causal."""


def pictures(n: int, *, first_seed: int) -> dict[Key, list[scenes.Scene]]:
    """n neutral scenes, and the same with one value changed, for every cue, thing, colour and background.

    A neutral scene has a single thing that no planted reliance names, no companion and no cue (`counterfactuals`'
    "neither"); its colour and background follow from the seed. A thing is put in front in the neutral one's place.
    """
    visual = next(planted for planted in scenes.PLANTED if planted.cue not in scenes.KINDS)
    base = [scenes.counterfactuals(visual, first_seed + i)["neither"] for i in range(n)]
    values = [
        *(("cue", cue) for cue, _ in scenes.CUE_OF.values()),
        *(("thing", kind) for kind in scenes.KINDS),
        *(("colour", colour) for colour in scenes.COLOURS),
        *(("background", background) for background in scenes.BACKGROUNDS),
    ]
    return {BASE: base} | {
        (family, value): [_given(scene, family, value) for scene in base] for family, value in values
    }


def at_splice(
    drawn: Mapping[Key, Sequence[scenes.Scene]], activations: Float[Tensor, "image width"], spliced: Splice
) -> dict[Key, State]:
    """The states of the pictures, from their activations one after the other in the order of `drawn`."""
    parts = activations.split([len(some) for some in drawn.values()])
    return {key: spliced.from_activations(part) for key, part in zip(drawn, parts, strict=True)}


@torch.no_grad()
def rises(
    drawn: Mapping[Key, Sequence[scenes.Scene]],
    states: Mapping[Key, State],
    spliced: Splice,
    texts: Float[Tensor, "word dim"],
    words: Sequence[str],
) -> Rises:
    """What each value adds to the cosine with each word's text, and which latents carry it.

    drawn, states: of `pictures` and `at_splice`. A scene whose base already shows the word or the value says nothing
    of that row and is left out of it. Raising its own word is no finding: such rows are left out, but for the drawings
    of planted polysemy. Latents are deleted exactly (`attribution.ablation`), in the picture with the value and in its
    base: removed = mean over scenes of [y - y without j] with the value minus the same at the base. A latent that only
    goes out, such as one of the neutral thing which kept the word away, carries no rise and is left out. Raises
    ValueError for states that are not paired with the base's.
    """
    if BASE not in states or len({len(state.stream) for state in states.values()}) != 1:
        raise ValueError("as many scenes with each value as without any, under the key ('', ''), are wanted")
    target, keys = attribution.cosine(texts[:, None]), [key for key in states if key != BASE]
    cosine = {key: target(spliced.embed(state)).double().cpu().numpy() for key, state in states.items()}
    counted = {key: _counted(drawn[BASE], *key, words) for key in keys}
    planted = {(p.word, _family(p), p.cue): p.kind for p in scenes.PLANTED}
    rows = []
    for family, value in keys:
        found = _above_zero(cosine[family, value] - cosine[BASE], counted[family, value])
        for w, word in enumerate(words):
            kind = planted.get((word, family, value), "")
            if family != "thing" or scenes.KINDS[value] != word or kind == "polysemy":
                rows.append((word, family, value, *(column[w] for column in found), kind))
    table = pd.DataFrame(rows, columns=["word", "family", "value", "rise", "low", "high", "p", "n", "planted"])
    table.insert(7, "q", _adjusted(table["p"].to_numpy()))
    table["causal"] = (table["q"] <= LEVEL) & (table["rise"] >= LEAST_RISE)
    of_plan = table[table["planted"] != ""].rename(columns={"planted": "kind", "value": "cue"})
    of_plan = of_plan.set_index(["word", "family", "cue"]).reindex([at for at in planted if at[0] in words])
    of_plan = of_plan.reset_index()[["kind", "word", "family", "cue", "rise", "low", "high", "causal"]]
    return Rises(table, _removed(table[table["causal"]], states, spliced, texts, list(words), counted), of_plan)


@torch.no_grad()
def cue_latents(
    states: Mapping[Key, State], n_latents: int, *, least: float = LEAST_SHARE
) -> Bool[Tensor, "cue latent"]:
    """The latents that a cue alone turns up, cues in the order of `states`: what is called spurious elsewhere.

    Its mean gain over scenes is above 0 (one-sided t test, p < `SURE`) and at least the share `least` of the latent's
    largest activation in any of these pictures.
    """
    active = {key: _active(state, n_latents) for key, state in states.items()}
    largest = torch.stack([each.amax(0) for each in active.values()]).amax(0).double().cpu().numpy()
    found = []
    for key in states:
        if key[0] == "cue":
            gain = (active[key] - active[BASE]).T.double().cpu().numpy()
            mean, _, _, p, _ = _above_zero(gain, np.ones_like(gain, dtype=bool))
            found.append((p < SURE) & (mean >= least * largest))
    return torch.from_numpy(np.array(found).reshape(-1, n_latents))


@torch.no_grad()
def remaining(
    drawn: Mapping[Key, Sequence[scenes.Scene]],
    states: Mapping[Key, State],
    spliced: Splice,
    texts: Float[Tensor, "word dim"],
    words: Sequence[str],
    suppressed: Suppressed,
) -> pd.DataFrame:
    """What is left of each planted rise when its word is scored without the word's `suppressed` latents, all at once.

    A row for each planted reliance whose pictures are given: kind, word, family, cue; remains, the mean gain of the
    cosine without them, with its 95 % t interval low and high; n scenes.
    """
    without = {key: scores(spliced, state, texts, suppressed).double().cpu().numpy().T for key, state in states.items()}
    rows = []
    for planted in scenes.PLANTED:
        key = (_family(planted), planted.cue)
        if key in states and planted.word in words:
            gain = (without[key] - without[BASE])[list(words).index(planted.word)]
            mean, low, high, _, n = _above_zero(gain, _counted(drawn[BASE], *key, [planted.word])[0])
            rows.append((planted.kind, planted.word, *key, float(mean), float(low), float(high), int(n)))
    return pd.DataFrame(rows, columns=["kind", "word", "family", "cue", "remains", "low", "high", "n"])


def _removed(
    causal: pd.DataFrame,
    states: Mapping[Key, State],
    spliced: Splice,
    texts: Float[Tensor, "word dim"],
    words: list[str],
    counted: Mapping[Key, Bool[NDArray, "word scene"]],
) -> pd.DataFrame:
    """`Rises.removed`, one value at a time: only the words that it raises, and the base's effects held by unit."""
    n_latents, before = len(spliced.W_dec), states[BASE]
    base = attribution.ablation(spliced, before, attribution.cosine(texts[:, None])).values
    parts = []
    for (family, value), rows in causal.groupby(["family", "value"], sort=False):
        which, state = [words.index(word) for word in rows["word"]], states[family, value]
        effect = attribution.ablation(spliced, state, attribution.cosine(texts[which][:, None])).values
        up = (_active(state, n_latents) - _active(before, n_latents)).mean(0) > 0
        less = _dense(state, effect, n_latents)[..., up] - _dense(before, base[which], n_latents)[..., up]
        less = less.movedim(1, 2).double().cpu().numpy()  # (word, latent, scene)
        mean, low, high, p, _ = _above_zero(less, counted[family, value][which][:, None])
        share = mean / rows["rise"].to_numpy()[:, None]
        w, j = np.nonzero((share >= LEAST_SHARE) & (p < SURE))
        latent = up.nonzero()[:, 0].cpu().numpy()[j]
        columns = {"latent": latent, "removed": mean[w, j], "low": low[w, j], "high": high[w, j], "share": share[w, j]}
        found = pd.DataFrame({"word": rows["word"].to_numpy()[w], "family": family, "value": value} | columns)
        order = np.lexsort((-found["share"], w))
        parts.append(found.iloc[order])
    names = ["word", "family", "value", "latent", "removed", "low", "high", "share"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)


def _given(scene: scenes.Scene, family: str, value: str) -> scenes.Scene:
    """The scene with one value changed."""
    return replace(scene, cues=(value,)) if family == "cue" else replace(scene, **{FACTOR[family]: value})


def _family(planted: scenes.Planted) -> str:
    """Where a planted cue is found among the values: polysemy's and compounds' are things."""
    return "thing" if planted.cue in scenes.KINDS else "cue"


def _counted(
    base: Sequence[scenes.Scene], family: str, value: str, words: Sequence[str]
) -> Bool[NDArray, "word scene"]:
    """The scenes that show neither the word nor the value before it is given."""
    shows = [value in scene.cues if family == "cue" else getattr(scene, FACTOR[family]) == value for scene in base]
    return np.array(
        [[not has and scene.word != word for scene, has in zip(base, shows, strict=True)] for word in words]
    )


def _dense(
    state: State, values: Float[Tensor, "*word image unit"], n_latents: int
) -> Float[Tensor, "*word image latent"]:
    """A number of each unit at its latent; 0 for latents that are not on."""
    latents = state.latents.expand_as(values)
    return values.new_zeros(*values.shape[:-1], n_latents).scatter_add(-1, latents, values)


def _active(state: State, n_latents: int) -> Float[Tensor, "image latent"]:
    """Each latent's activation, summed over the tokens of spatial states."""
    return _dense(state, state.by_latent(state.codes.values), n_latents)


def _above_zero(values: Float[NDArray, "*row scene"], counted: Bool[NDArray, "*row scene"]) -> tuple[NDArray, ...]:
    """Mean over the counted scenes, its 95 % t interval, the one-sided p of a mean above 0, and their number.

    Values that are all one leave no doubt: p is 0 above zero, else 1. Of one scene, interval and p are NaN.
    """
    n = np.broadcast_to(counted, values.shape).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (values * counted).sum(-1) / n
        spread = np.sqrt(((values - mean[..., None]) ** 2 * counted).sum(-1) / (n - 1) / n)
        half = t.ppf(0.975, n - 1) * spread
        p = np.where(spread > 0, t.sf(mean / spread, n - 1), np.where(mean > 0, 0.0, 1.0))
    few = n < 2
    return mean, *(np.where(few, np.nan, each) for each in (mean - half, mean + half, p)), n


def _adjusted(p: Float[NDArray, " row"]) -> Float[NDArray, " row"]:
    """Benjamini and Hochberg's q over the known p."""
    q, known = np.full(len(p), np.nan), np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q
