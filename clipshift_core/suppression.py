"""Repair by suppression: a class is scored without the latents that it is found to lean on for the wrong reasons.

A found reliance is a pair (class, latent). When, and only when, that class is scored its latents are set to zero in the
forward pass: a latent of balloons that ducks lean on is not taken from balloons. What this should do is help where a
cue misleads, and cost little where none does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import scenes, stats
from clipshift_core.sae_kernels import Codes
from clipshift_core.splice import Splice, State

Suppressed = Mapping[int, Sequence[int]]
"""The latents that are not to count for a class, by its number; a class that is not named keeps all."""
NOTHING = "nothing"
"""The name of the set that all others are compared with."""
N_DRAWS = 5
"""Random choices of latents, over which the mean is taken."""
LEAST_ON = 0.1
"""Share of a class's images in which a latent must be on to be drawn: one that is hardly ever on is no rival."""


# What is scored -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores(
    spliced: Splice, state: State, texts: Float[Tensor, "class dim"], suppressed: Suppressed
) -> Float[Tensor, "image class"]:
    """Cosine of each image with each class's text, for class c without the latents `suppressed[c]`.

    The images are embedded once, and once more for a class with something to suppress those in which it is on.
    """
    texts = F.normalize(texts.to(spliced.W_dec), dim=-1)
    found = F.normalize(spliced.embed(state), dim=-1) @ texts.T
    for c, latents in suppressed.items():
        out = torch.isin(state.latents, torch.as_tensor(list(latents), dtype=torch.long, device=state.latents.device))
        (images,) = (out & state.on).any(1).nonzero(as_tuple=True)
        if len(images):
            some = _some(state, images)
            embedding = spliced.embed(some, some.scaled((~out[images]).float()))
            found[images, c] = F.normalize(embedding, dim=-1) @ texts[c]
    return found


def intercepts(
    cosines: Float[Tensor, "image class"], truth: Int[Tensor, " image"], scale: float
) -> Float[Tensor, " class"]:
    """What to add to each class's cosine so that the right classes are most likely by softmax of scale x cosine.

    Without a latent a class scores lower wherever it was on, right or wrong; an intercept makes up for that on ordinary
    images, and only what depends on the image is left to tell. At the maximum the mean probability of each class is its
    share of the images, but for a penalty of 0.001 times the mean square that bounds the intercept of a class that no
    image shows.
    """
    logits, added = scale * cosines.double(), torch.zeros(cosines.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([added], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(logits + added, truth) + 1e-3 * added.square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    return (added.detach() / scale).to(cosines)


def on_in_class(
    state: State, truth: Int[NDArray, " image"], n_classes: int, n_latents: int
) -> Bool[Tensor, "class latent"]:
    """The latents that are on in at least the share `LEAST_ON` of a class's images; none for a class without any."""
    on = torch.zeros(len(state.latents), n_latents, dtype=torch.float64, device=state.latents.device)
    on.scatter_add_(1, state.latents, state.on.double())
    member = F.one_hot(torch.as_tensor(truth, device=on.device).long(), n_classes).double()
    n = member.sum(0)[:, None]
    return (member.T @ (on > 0).double() >= LEAST_ON * n) & (n > 0)


def random_instead(
    suppressed: Suppressed, on: Bool[Tensor, "class latent"], *, seed: int, n_draws: int = N_DRAWS
) -> list[dict[int, list[int]]]:
    """As many other latents for each class, drawn from those that are on in its images (`on_in_class`); all if fewer.

    A draw follows from seed, draw and class alone.
    """

    def drawn(draw: int, c: int, latents: Sequence[int]) -> list[int]:
        others = np.setdiff1d(on[c].cpu().nonzero()[:, 0].numpy(), list(latents))
        rng = np.random.default_rng([seed, draw, c, *b"suppressed"])
        return sorted(rng.choice(others, min(len(set(latents)), len(others)), replace=False).tolist())

    return [{c: drawn(draw, c, latents) for c, latents in suppressed.items()} for draw in range(n_draws)]


def by_class(pairs: pd.DataFrame, words: Sequence[str]) -> dict[int, list[int]]:
    """What to suppress, from rows word and latent: found reliances, or the causal truth (`causal.Rises.removed`).

    Of the truth the rows of family "cue" are those to suppress: another thing may raise a word through latents that
    are the word's own (a starfish that of stars), and without them the class goes, too.
    """
    number = {word: c for c, word in enumerate(words)}
    return {number[word]: sorted(set(rows)) for word, rows in pairs.groupby("word", sort=False)["latent"]}


# Scenes in which a cue misleads ---------------------------------------------------------------------------------------


class Misleading(NamedTuple):
    """A scene with the cue of another word."""

    scene: scenes.Scene
    owner: str
    """The word whose cue it is."""
    base: int
    """Number of the scene it was made from, which has no cue."""


def misleading(n: int, *, first_seed: int) -> tuple[list[scenes.Scene], list[Misleading]]:
    """n scenes as they are sampled but without cues, and each with every cue, one at a time, that another word owns."""
    base = [replace(scenes.sample(first_seed + i), cues=()) for i in range(n)]
    return base, [
        Misleading(replace(scene, cues=(cue,)), owner, i)
        for i, scene in enumerate(base)
        for owner, (cue, _) in scenes.CUE_OF.items()
        if owner != scene.word
    ]


def misled(
    without: Int[NDArray, " base"],
    with_cue: Int[NDArray, " image"],
    given: Sequence[Misleading],
    base: Sequence[scenes.Scene],
    words: Sequence[str],
) -> Bool[NDArray, " image"]:
    """Which of the scenes of `misleading` are misled: predicted right without the cue, and with it as the cue's word.

    without, with_cue: numbers of the predicted words.
    """
    number = {word: c for c, word in enumerate(words)}
    of = np.array([each.base for each in given], dtype=np.int64)
    right = np.asarray(without) == np.array([number[scene.word] for scene in base])
    return right[of] & (np.asarray(with_cue) == np.array([number[each.owner] for each in given]))


# What comes of it -----------------------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    """What is predicted on one kind of scenes, set by set."""

    truth: Int[NDArray, " image"]
    """Number of the right class."""
    by_set: Mapping[str, Int[NDArray, "*draw image"]]
    """The predicted class by the name of what is suppressed, `NOTHING` among them; (draw, image) for random sets."""
    of: Int[NDArray, " image"] | None = None
    """The scene that each image was made from, where several were made from one: they are drawn together."""


def outcome_table(found: Mapping[str, Predicted], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """How often the right class is predicted, a row for each kind of scenes and each set.

    Columns: scenes, suppressed, accuracy with low and high, difference from nothing suppressed on the same images with
    difference_low and difference_high (95 %, bootstrap), n images. Random sets count by the mean over their draws. Of
    scenes that were chosen because they are predicted wrongly, such as `misled` ones, the accuracy with nothing
    suppressed is 0 by that choice. Without a single image everything but n is NaN.
    """
    rows = []
    for name, (truth, by_set, of) in found.items():
        truth = np.asarray(truth)
        right = {
            each: (np.asarray(predicted) == truth).reshape(-1, len(truth)).mean(axis=0) if len(truth) else np.empty(0)
            for each, predicted in by_set.items()
        }
        for each, value in right.items():
            accuracy, difference = (_mean(part, of, n_resamples, seed) for part in (value, value - right[NOTHING]))
            rows.append((name, each, *accuracy, *difference, len(truth)))
    columns = ["accuracy", "low", "high", "difference", "difference_low", "difference_high", "n"]
    return pd.DataFrame(rows, columns=["scenes", "suppressed", *columns])


def _mean(
    values: Float[NDArray, " image"], of: Int[NDArray, " image"] | None, n_resamples: int, seed: int
) -> stats.Interval:
    """Mean over images, with its interval from drawing again the scenes that they were made from."""
    if not len(values):
        return stats.Interval(*[float("nan")] * 3)
    group = np.arange(len(values)) if of is None else np.unique(of, return_inverse=True)[1]
    total, size = np.bincount(group, values), np.bincount(group)
    return stats.bootstrap(
        lambda counts: (counts @ total) / (counts @ size), len(size), n_resamples=n_resamples, seed=seed
    )


def _some(state: State, images: Int[Tensor, " some"]) -> State:
    """The state of some of the images."""
    rows = torch.arange(len(state.error), device=images.device).view(len(state.stream), -1)[images].flatten()
    codes = Codes(state.codes.indices[rows], state.codes.values[rows])
    return State(state.stream[images], codes, state.error[rows], state.latents[images], state.unit[rows])
