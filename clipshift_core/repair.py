"""Giving a view the latents back that its augmentation took: does the prediction come back?

The latents are chosen by a decomposition of the shift (`shift_attribution`), and restored in the view's forward pass.
If the parts mean what they say, a few of them bring back much more than as many random ones.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import stats
from clipshift_core.sae_kernels import Codes, weighted_rows
from clipshift_core.shift_attribution import ALL, Activations, Embed, Pair, Shift, Target, by_token, one_text, union

SIZES = (1, 2, 5, 10, 20)
"""Numbers of latents that are restored."""
N_DRAWS = 5
"""Random choices of latents for each size, over which the mean is taken."""
CHOSEN = ("top", "random", "top - random")
LEAST_POSITIVE = 0.95
"""A ratio of means is unknown where fewer of the resamples than this share have a denominator above 0."""


class Outcome(NamedTuple):
    """What is read off the original, the view, and the view with some latents restored."""

    original: Float[Tensor, " image"]
    view: Float[Tensor, " image"]
    top: Float[Tensor, "size image"]
    """With the latents restored that cost most."""
    random: Float[Tensor, "size image"]
    """With as many random ones restored, mean over the draws."""
    every: Float[Tensor, " image"]
    """With all restored; what is then missing is the error's."""


class Repair(NamedTuple):
    """What restoring latents does to each view."""

    sizes: tuple[int, ...]
    """Numbers of latents restored."""
    target: Outcome
    prediction: Outcome | None
    """1 where the predicted class is that of the original, else 0."""


@torch.no_grad()
def repair(
    shift: Shift,
    x1: Activations,
    codes0: Pair,
    codes1: Pair,
    W_dec: Float[Tensor, "latent width"],
    embed: Embed,
    target: Target,
    *,
    seed: int,
    original: Float[Tensor, "image dim"] | None = None,
    directions: Float[Tensor, "class dim"] | None = None,
    tokens: slice = ALL,
    sizes: Sequence[int] = SIZES,
    n_draws: int = N_DRAWS,
    images: Int[NDArray, " image"] | None = None,
) -> Repair:
    """Give latents of the view their original activations, x1 + sum (a0_j - a1_j) d_j, and look again.

    Restored are the latents whose parts in `shift`, the decomposition of the same codes, are lowest: those that cost
    most. Beside them as many drawn at random from those that are on in either; the draw follows from `seed`, the
    image's number in `images` (its place by default) and the latent alone, so that it does not change with the images
    it is made among. An image with fewer latents has them all restored. With `directions`, unit vectors of classes,
    and `original`, the embeddings of the originals, predictions are compared, too.
    """
    entries = union(codes0, codes1)
    if not torch.equal(entries.latent, one_text(shift).latent):
        raise ValueError("the shift is not that of these codes")
    if (directions is None) != (original is None):
        raise ValueError("directions and embeddings of the originals are accepted together only")
    there, slots = entries.latent >= 0, codes0[0].shape[-1] + codes1[0].shape[-1]
    numbers = np.arange(len(x1)) if images is None else np.asarray(images)
    costly = _rank(torch.where(there, shift.part, torch.inf))
    drawn = [_rank(_random_keys(entries.latent, numbers, seed, draw)) for draw in range(n_draws)]
    predicted = None if original is None else (original @ directions.T).argmax(1)

    def look(chosen: Bool[Tensor, "image slot"]) -> Float[Tensor, "measure image"]:
        back = (entries.before - entries.after) * F.pad(chosen, (0, 1)).gather(1, entries.place)
        moved = weighted_rows(Codes(entries.indices.view(-1, slots), back.view(-1, slots)), W_dec)
        restored = by_token(x1).clone()
        restored[:, tokens] += moved.view(len(x1), -1, x1.shape[-1])
        embedding = embed(restored.view_as(x1))
        found = [target(embedding).double()]
        if predicted is not None:
            found.append(((embedding @ directions.T).argmax(1) == predicted).double())
        return torch.stack(found)

    view, every = look(torch.zeros_like(there)), look(there)
    top = torch.stack([look(costly < size) for size in sizes], dim=1)
    random = torch.stack([sum(look(rank < size) for rank in drawn) / n_draws for size in sizes], dim=1)
    outcomes = [Outcome(shift.original, view[0], top[0], random[0], every[0])]
    if predicted is not None:
        outcomes.append(Outcome(torch.ones_like(view[1]), view[1], top[1], random[1], every[1]))
    return Repair(tuple(sizes), outcomes[0], outcomes[1] if predicted is not None else None)


def joined(parts: Iterable[Repair]) -> Repair:
    """The repairs of several sets of images as one."""
    parts = list(parts)

    def outcome(name: str) -> Outcome | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else Outcome(*(torch.cat(each, dim=-1) for each in zip(*found, strict=True)))

    return Repair(parts[0].sizes, outcome("target"), outcome("prediction"))


def table(found: Repair, *, n_resamples: int, seed: int, of: Int[NDArray, " view"] | None = None) -> pd.DataFrame:
    """How much the restored latents bring back, over images.

    Columns measure, chosen, size, share, low, high, n. chosen is top, random, top - random (on the same images, drawn
    together) or every; size is how many latents were restored, <NA> for every. The measures, all ratios of means:

    target       sum (y_repaired - y_view) / sum (y_original - y_view), over all n images
    predictions  of the n views whose predicted class is not that of the original, the share in which it is again
    broken       of the n other views, the share whose prediction the repair turns away from the original's

    A share of the target exceeds 1 where latents that cost are restored and those that gained are not. It is NaN where
    it is not certain that anything was lost on average: a mean loss of 0 or less in more than 1 resample of 20.

    of: the image that each row is a view of, where an image has several: they are drawn together.
    """
    y, prediction = found.target, found.prediction
    measures = [("target", y, lambda value: value - y.view, y.original - y.view)]
    if prediction is not None:
        right = prediction.view
        measures.append(("predictions", prediction, lambda value: (1 - right) * value, 1 - right))
        measures.append(("broken", prediction, lambda value: right * (1 - value), right))
    rows = []
    for measure, outcome, brought, whole in measures:
        n = len(whole) if measure == "target" else int(whole.sum())
        top, random = brought(outcome.top), brought(outcome.random)
        by_size = zip(found.sizes, zip(top, random, top - random, strict=True), strict=True)
        shares = [(chosen, size, each) for size, group in by_size for chosen, each in zip(CHOSEN, group, strict=True)]
        for chosen, size, each in [*shares, ("every", pd.NA, brought(outcome.every))]:
            share, low, high = _ratio(each, whole, n_resamples, seed, of)
            rows.append((measure, chosen, size, share, low, high, n))
    made = pd.DataFrame(rows, columns=["measure", "chosen", "size", "share", "low", "high", "n"])
    return made.astype({"size": "Int64"})


def _ratio(
    part: Tensor, whole: Tensor, n_resamples: int, seed: int, of: Int[NDArray, " view"] | None = None
) -> stats.Interval:
    """sum part / sum whole, with its interval over images."""
    part, whole = part.double().cpu().numpy(), whole.double().cpu().numpy()
    if of is not None:
        part, whole = (np.bincount(np.unique(of, return_inverse=True)[1], each) for each in (part, whole))
    settings = {"n": len(whole), "n_resamples": n_resamples, "seed": seed}

    def ratio(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        below = counts @ whole
        return np.divide(counts @ part, below, out=np.full(len(counts), np.nan), where=below > 0)

    found = stats.bootstrap(ratio, **settings)
    positive = stats.bootstrap_draws(lambda counts: counts @ whole > 0, **settings).mean()
    return found if positive >= LEAST_POSITIVE else stats.Interval(*[float("nan")] * 3)


def _rank(score: Float[Tensor, "image slot"]) -> Int[Tensor, "image slot"]:
    """Place of each slot in the growing order of its image, from 0."""
    return score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def _random_keys(
    latent: Int[Tensor, "image slot"], images: Int[NDArray, " image"], seed: int, draw: int
) -> Float[Tensor, "image slot"]:
    """A number in [0, 1) that follows from seed, draw, image and latent alone; infinity in empty slots.

    By the finaliser of splitmix64 (Steele, Lea and Flood 2014), in turn over the four: no generator could be placed at
    each image without a loop over them.
    """
    key = np.zeros(latent.shape, dtype=np.uint64)
    for word in (np.array([[seed]]), np.array([[draw]]), images[:, None], latent.cpu().numpy()):
        key = (key ^ word.astype(np.int64).view(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(31)
    uniform = torch.from_numpy((key >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(latent.device)
    return torch.where(latent >= 0, uniform, torch.inf)
