"""A run's images attributed by every method, and what their orders are worth: what notebook 09 starts from."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from clipshift_core import attribution, faithfulness, scenes
from clipshift_core.attribution import METHODS, Attribution, Target
from clipshift_core.dictionaries import Dictionaries, Learned
from clipshift_core.faithfulness import Agreement, Curves
from clipshift_core.progress import note
from clipshift_core.splice import Splice, State

EXACT = "ablation"
"""The method that all others are judged by."""


class Attributed(NamedTuple):
    """All that is known of the methods over some images."""

    curves: Curves
    """Deletion and insertion, in units of the target."""
    agreement: Agreement
    """With exact ablation."""
    gap: Float[np.ndarray, " image"]
    """Integrated gradients': how far its parts are from summing to the change."""
    n_units: float
    """Mean number of latents that are on in an image."""


def questions(dictionaries: Dictionaries, spliced: Splice) -> Iterator[tuple[State, Target, int]]:
    """The probe's images at the splice, batch by batch, what is asked of each, and the number of the first."""
    first, table = 0, dictionaries.probe.images
    for state in dictionaries.states(spliced, dictionaries.probe.source):
        n = len(state.stream)
        embeddings = F.normalize(spliced.embed(state).float().cpu(), dim=1)
        asked = dictionaries.asked(table.iloc[first : first + n], embeddings)
        yield state, attribution.cosine(asked.texts[asked.index]), first
        first += n


def attributed(dictionaries: Dictionaries, learned: Learned, *, n_images: int | None = None) -> Attributed:
    """Each of `attribution.METHODS` on the first images of the probe, for the cosine with what is asked of each."""
    spliced = dictionaries.spliced(learned).in_double()
    n_images = min(n_images or len(dictionaries.probe.images), len(dictionaries.probe.images))
    curves, agreements, gaps, units = [], [], [], []
    for state, target, first in questions(dictionaries, spliced):
        if first >= n_images:
            break
        note(f"attribution of images {first + 1} to {first + len(state.stream)}")
        found = by_method(spliced, state, target, first=first)
        scores = {name: each.values for name, each in found.items()}
        amounts = state.by_latent(state.codes.values)
        curves.append(faithfulness.curves(amounts, scores, attribution.evaluator(spliced, state, target)))
        others = {name: each for name, each in scores.items() if name != EXACT}
        agreements.append(faithfulness.agreement(amounts, others, scores[EXACT]))
        gaps.append(found["integrated_gradients"].gap.numpy())
        units.append(state.on.sum(1).numpy())
    first = agreements[0]
    rho, overlap = (np.concatenate([getattr(each, name) for each in agreements], axis=1) for name in ("rho", "overlap"))
    return Attributed(
        faithfulness.joined(curves),
        Agreement(first.methods, rho, overlap, first.k),
        np.concatenate(gaps),
        float(np.concatenate(units).mean()),
    )


def attributed_by_class(dictionaries: Dictionaries, learned: Learned) -> Curves:
    """The same for whole classes: all images that are asked for one word lose, or get, its latents in one order.

    From stored class tokens after the last block; raises SpliceError for a dictionary at another place.
    """
    spliced = dictionaries.spliced(learned).in_double()
    x = torch.cat(list(dictionaries.unseen.in_order()))
    state = spliced.from_activations(x)
    asked = dictionaries.asked(dictionaries.probe.images, F.normalize(spliced.embed(state).float().cpu(), dim=1))
    target = attribution.cosine(asked.texts[asked.index])
    scores = {name: each.values for name, each in by_method(spliced, state, target).items()}
    amounts, evaluate = state.by_latent(state.codes.values), attribution.evaluator(spliced, state, target)
    return faithfulness.class_curves(state.latents, amounts, scores, asked.index, evaluate)


class OneImage(NamedTuple):
    """One image and one text, taken apart."""

    contributions: pd.DataFrame
    """A row a latent that is on, the largest part first: latent, label, value (by integrated gradients), exact (what
    deleting it alone takes away)."""
    picture: UInt8[np.ndarray, "h w 3"]
    examples: list[list[UInt8[np.ndarray, "h w 3"]]]
    """For each row the probe's other images that activate the latent most."""
    text: str
    total: float
    """The cosine."""


def one_image(dictionaries: Dictionaries, n_examples: int = 3) -> OneImage:
    """Of the probe the first image that shows a thing with a cue that was planted on it; else the first image."""
    learned, table = dictionaries.used, dictionaries.probe.images
    index = 0
    if dictionaries.drawn:
        planted = {(p.word, p.cue) for p in scenes.PLANTED if p.kind == "co-occurrence"}
        pairs = [
            {(word, cue) for cue in cues.split("; ")} for word, cues in zip(table["word"], table["cues"], strict=True)
        ]
        index = next((i for i, pair in enumerate(pairs) if pair & planted), 0)
    spliced = dictionaries.spliced(learned)
    picture = dictionaries.probe.source.read(index)
    state = spliced.read(picture[None])
    embedding = spliced.embed(state)
    asked = dictionaries.asked(table.iloc[[index]], F.normalize(embedding.cpu(), dim=1))
    target = attribution.cosine(asked.texts[asked.index])
    parts, exact = (METHODS[name](spliced, state, target).values[0] for name in ("integrated_gradients", EXACT))
    rows = pd.DataFrame({"latent": state.latents[0].numpy(), "value": parts.numpy(), "exact": exact.numpy()})
    rows = rows[state.on[0].numpy()].sort_values("value", ascending=False, ignore_index=True, kind="stable")
    rows.insert(1, "label", rows["latent"].map(dictionaries.components.set_index("latent")["label"]).fillna("no label"))
    images = [
        [i for i in dictionaries.examples.image[latent].tolist() if i not in (index, -1)] for latent in rows["latent"]
    ]
    shown = [[dictionaries.probe.source.read(i) for i in few[:n_examples]] for few in images]
    return OneImage(rows, picture, shown, asked.words[int(asked.index[0])], float(target(embedding)[0]))


def by_method(spliced: Splice, state: State, target: Target, *, first: int = 0) -> dict[str, Attribution]:
    """What every method says; `first` is the number of the first image within the run."""
    options = {"random": {"first": first}}
    return {name: method(spliced, state, target, **options.get(name, {})) for name, method in METHODS.items()}
