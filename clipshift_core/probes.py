"""Linear probes against zero-shot text: which of the two leans more on what merely goes with a class?

Both read an image's embedding linearly, one logit a class, so both are a `Reader` and everything asked here is asked of
both alike. Written down before any value was seen:

accuracy        share of images whose largest logit is that of their own class, on three splits of the same things:
                "aligned" (each with the cue that went with its class in training), "balanced" (any cue) and "reversed"
                (always another class's cue).
loss            accuracy on "aligned" minus accuracy on "reversed": what a reader loses where the cue misleads. The
                probe is the less robust one where its loss minus that of text, on the same images, is above 0 (B3a).
spurious share  share of the absolute attribution of an image's *contrast*, the logit of its own class minus the mean
                of the others', that falls on latents which somebody has called spurious. The contrast leaves out what
                moves all logits alike, and a share has no units, so that a probe and text compare (B3b).
ambiguity       error rate on images of ambiguous words minus that on images of other words (B3c).

Embeddings are scaled to length 1 before a probe sees them: text reads an embedding's direction alone, and a probe that
also saw its length would differ from text by more than by its directions. Intervals draw the test images again; they
hold the trained probe, and the words, as they are.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression

from clipshift_core import attribution, stats
from clipshift_core.attribution import Target
from clipshift_core.splice import Splice, State

GRID = tuple(10.0**power for power in range(-4, 5))
"""Inverse strengths of regularisation C to choose from: the range of scikit-learn's LogisticRegressionCV."""
READERS = ("probe", "text")
DIFFERENCE = "probe - text"


@dataclass(frozen=True, eq=False)
class Reader:
    """One logit a class, weight . e / |e| + bias, from an embedding e."""

    classes: tuple
    """Names of the classes, in the order of the logits: a probe's are sorted, those of text as they were given."""
    weight: Float[NDArray, "class dim"]
    bias: Float[NDArray, " class"]

    def logits(self, embeddings: ArrayLike) -> Float[NDArray, "image class"]:
        """Of embeddings of any length, (image, dim)."""
        return _unit(embeddings) @ self.weight.T + self.bias

    def predict(self, embeddings: ArrayLike) -> NDArray:
        """The class with the largest logit, the first of equals: (image,)."""
        return np.asarray(self.classes)[self.logits(embeddings).argmax(axis=1)]

    def right(self, embeddings: ArrayLike, truth: Sequence) -> Bool[NDArray, " image"]:
        """Of which images it names the class."""
        return self.logits(embeddings).argmax(axis=1) == self.index(truth)

    def index(self, labels: Sequence) -> Int[NDArray, " image"]:
        """The number of each label's class; raises ValueError for a label that is none of the classes."""
        number = {name: i for i, name in enumerate(self.classes)}
        unknown = [label for label in dict.fromkeys(labels) if label not in number]
        if unknown:
            raise ValueError(f"labels {unknown}: accepted are {', '.join(map(str, self.classes))}")
        return np.array([number[label] for label in labels], dtype=np.int64)

    def target(self, labels: Sequence) -> Target:
        """The logit of each image's label."""
        index = self.index(labels)
        return _target(self.weight[index], self.bias[index])

    def contrast(self, labels: Sequence) -> Target:
        """The logit of each image's label, minus the mean logit of all other classes."""
        index, n = self.index(labels), len(self.classes)
        # w_c - (sum w - w_c) / (n - 1) = (n w_c - sum w) / (n - 1)
        rows = (n * self.weight - self.weight.sum(axis=0)) / (n - 1)
        biases = (n * self.bias - self.bias.sum()) / (n - 1)
        return _target(rows[index], biases[index])


@dataclass(frozen=True, eq=False)
class Probe(Reader):
    """A logistic regression, made by `fit`."""

    C: float
    """Inverse strength of regularisation, as scikit-learn defines it."""
    validation: pd.DataFrame
    """Columns C, accuracy (on the validation split), n: how C was chosen, from the strongest regularisation on."""


def fit(
    train_x: ArrayLike, train_y: Sequence, valid_x: ArrayLike, valid_y: Sequence, *, grid: Sequence[float] = GRID
) -> Probe:
    """Multinomial logistic regression on embeddings of length 1, C chosen by accuracy on a validation split.

    Of equally accurate ones the strongest regularisation is taken. With two classes the regression has one direction
    w; they are given -w / 2 and w / 2, which says the same. Raises ValueError for fewer than two classes in the
    training split, and for a validation label that it lacks.
    """
    x, y = _unit(train_x), np.asarray(train_y)
    if len(np.unique(y)) < 2:
        raise ValueError(f"the training split holds the class {np.unique(y).tolist()} alone; two or more are accepted")
    if not len(grid) or not len(valid_y):
        raise ValueError(f"{len(grid)} values of C, {len(valid_y)} images to choose by; one or more are accepted")
    found: list[tuple[float, Reader, float]] = []
    for C in sorted(grid):
        model = LogisticRegression(C=C, max_iter=5000).fit(x, y)
        weight, bias = model.coef_, model.intercept_
        if len(weight) == 1:
            weight, bias = (np.concatenate([-part, part]) / 2 for part in (weight, bias))
        reader = Reader(tuple(model.classes_.tolist()), weight, bias)
        found.append((float(C), reader, float(reader.right(valid_x, valid_y).mean())))
    C, best, _ = max(found, key=lambda each: each[2])  # the first of equals
    table = pd.DataFrame({"C": [c for c, *_ in found], "accuracy": [a for *_, a in found], "n": len(valid_y)})
    return Probe(best.classes, best.weight, best.bias, C, table)


def text(classes: Sequence, directions: ArrayLike) -> Reader:
    """Zero-shot text as a reader: the cosine to one direction a class, (class, dim), of any length."""
    if len(classes) != len(directions):
        raise ValueError(f"{len(classes)} classes, {len(directions)} directions; one for each is accepted")
    return Reader(tuple(classes), _unit(directions), np.zeros(len(classes)))


# Accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """Which images each reader names rightly; made by `answers`."""

    probe: Mapping[float, Mapping[str, Bool[NDArray, " image"]]]
    """By strength of the bias in training, then by split."""
    text: Mapping[str, Bool[NDArray, " image"]]
    """By split."""

    def loss(self, reader: str, strength: float) -> Float[NDArray, " image"]:
        """Right on "aligned" minus right on "reversed", -1, 0 or 1 for each thing; reader: one of `READERS`."""
        if reader not in READERS:
            raise ValueError(f"reader {reader!r} is unknown; accepted: {', '.join(READERS)}")
        right = self.probe[strength] if reader == "probe" else self.text
        return right["aligned"].astype(float) - right["reversed"]

    def loss_difference(self, strength: float) -> Float[NDArray, " image"]:
        """The probe's loss minus that of text, for each thing: what decides B3a."""
        return self.loss("probe", strength) - self.loss("text", strength)


def answers(
    probes: Mapping[float, Reader],
    zero_shot: Reader,
    splits: Mapping[str, ArrayLike],
    truth: Sequence,
) -> Answers:
    """Ask every reader about every split. probes: by strength; splits: embeddings (image, dim), of the same things in
    the same order, "aligned" and "reversed" among them; truth: the class of each thing."""
    sizes = {name: len(x) for name, x in splits.items()}
    if set(sizes.values()) != {len(truth)}:
        raise ValueError(f"splits of {sizes} images for {len(truth)} labels; the same things in each are accepted")

    def asked(reader: Reader) -> dict[str, NDArray]:
        return {name: reader.right(x, truth) for name, x in splits.items()}

    return Answers({strength: asked(reader) for strength, reader in probes.items()}, asked(zero_shot))


def accuracy_table(found: Answers, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Columns reader, strength (NaN for text, which no split has trained), split, accuracy, low, high, n."""
    rows = []
    for reader, strength, by_split in [
        *(("probe", s, r) for s, r in found.probe.items()),
        ("text", np.nan, found.text),
    ]:
        for split, right in by_split.items():
            interval = stats.bootstrap_mean(right.astype(float), n_resamples=n_resamples, seed=seed)
            rows.append((reader, strength, split, *interval, len(right)))
    return pd.DataFrame(rows, columns=["reader", "strength", "split", "accuracy", "low", "high", "n"])


def loss_table(found: Answers, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """For each strength the loss of the probe, of text, and their difference, paired by image.

    Columns reader (probe, text, or probe - text), strength, loss, low, high, n.
    """
    rows = []
    for strength in found.probe:
        losses = {name: found.loss(name, strength) for name in READERS}
        losses[DIFFERENCE] = found.loss_difference(strength)
        for reader, loss in losses.items():
            interval = stats.bootstrap_mean(loss, n_resamples=n_resamples, seed=seed)
            rows.append((reader, strength, *interval, len(loss)))
    return pd.DataFrame(rows, columns=["reader", "strength", "loss", "low", "high", "n"])


# Attribution ------------------------------------------------------------------------------------------------------


def spurious_share(
    splice: Splice,
    state: State,
    target: Target,
    spurious: Bool[NDArray, "*image latent"],
    method: str = "act_x_grad",
) -> Float[NDArray, " image"]:
    """Share of the absolute attribution of each image that falls on spurious latents; NaN where there is none at all.

    target: one reading of each image, such as `Reader.contrast` of its own class. spurious: (latent,), or
    (image, latent) where what is spurious differs by image. method: of `attribution.METHODS`, act x grad or ablation.
    """
    spurious, (n, n_latents) = np.asarray(spurious), (len(state.latents), len(splice.W_dec))
    if spurious.dtype != bool or spurious.shape not in ((n_latents,), (n, n_latents)):
        raise ValueError(
            f"spurious latents of shape {spurious.shape}, {spurious.dtype}; accepted: bool of ({n_latents},) or "
            f"({n}, {n_latents})"
        )
    # a bias adds the same to the reading with a latent and to that without it
    found = attribution.METHODS[method](splice, state, replace(target, bias=0.0))
    if found.values.ndim != 2:
        raise ValueError(f"attributions of shape {tuple(found.values.shape)}; a target of one text is accepted")
    size = found.values.abs().double().cpu().numpy()
    called = np.take_along_axis(np.broadcast_to(spurious, (n, n_latents)), found.latents.cpu().numpy(), axis=1)
    whole = size.sum(axis=1)
    return np.divide((size * called).sum(axis=1), whole, out=np.full(n, np.nan), where=whole > 0)


def share_table(
    probe: Mapping[float, Float[NDArray, " image"]],
    zero_shot: Float[NDArray, " image"],
    *,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Mean spurious share of the probe of each strength and of text, and their difference on the same images.

    Columns reader (probe, text, or probe - text), strength (NaN for text), share, low, high, n. An image without any
    attribution by one of the readers is left out of all.
    """
    known = np.isfinite([*probe.values(), zero_shot]).all(axis=0)
    rows = [("probe", strength, share) for strength, share in probe.items()] + [("text", np.nan, zero_shot)]
    rows += [(DIFFERENCE, strength, share - zero_shot) for strength, share in probe.items()]
    settings = {"n_resamples": n_resamples, "seed": seed}
    rows = [(*row, *stats.bootstrap_mean(share[known], **settings), int(known.sum())) for *row, share in rows]
    return pd.DataFrame(rows, columns=["reader", "strength", "share", "low", "high", "n"])


# Ambiguity --------------------------------------------------------------------------------------------------------


def ambiguity(
    right: Mapping[str, Bool[NDArray, " image"]],
    words: Sequence[str],
    ambiguous: Collection[str],
    *,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Error rate on images of ambiguous words minus that on images of other words, of each reader.

    right: by reader, on the same images; words: the true word of each. With two readers, "probe" and "text", a third
    row, "text - probe", has the difference of their differences, on the same resamples; its error rates are those of
    text minus the probe's. Columns reader, ambiguous, other, difference, low, high, n_ambiguous, n_other.
    """
    is_ambiguous = np.isin(np.asarray(words), list(ambiguous))
    n_ambiguous, n_other = int(is_ambiguous.sum()), int((~is_ambiguous).sum())
    if not n_ambiguous or not n_other:
        raise ValueError(f"{n_ambiguous} images of ambiguous words, {n_other} of others; one or more each are accepted")
    wrong = {reader: 1.0 - each for reader, each in right.items()}
    if set(wrong) == set(READERS):
        wrong["text - probe"] = wrong["text"] - wrong["probe"]
    rows = []
    for reader, error in wrong.items():
        means = [float(error[group].mean()) for group in (is_ambiguous, ~is_ambiguous)]
        found = stats.bootstrap(
            lambda counts, error=error: ambiguity_statistic(counts, error, is_ambiguous),
            len(error), n_resamples=n_resamples, seed=seed,
        )  # fmt: skip
        rows.append((reader, *means, *found, n_ambiguous, n_other))
    columns = ["reader", "ambiguous", "other", "difference", "low", "high", "n_ambiguous", "n_other"]
    return pd.DataFrame(rows, columns=columns)


def ambiguity_statistic(
    counts: Float[NDArray, "draw image"], error: Float[NDArray, " image"], is_ambiguous: Bool[NDArray, " image"]
) -> Float[NDArray, " draw"]:
    """Mean error of the ambiguous images minus that of the others in each resample (`stats.Statistic`).

    NaN in a resample that has none of a kind.
    """
    means = []
    for group in (is_ambiguous, ~is_ambiguous):
        n = counts @ group.astype(float)
        means.append(np.divide(counts @ (error * group), n, out=np.full(len(counts), np.nan), where=n > 0))
    return means[0] - means[1]


def _target(weight: Float[NDArray, "image dim"], bias: Float[NDArray, " image"]) -> Target:
    return attribution.probe(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), normalised=True)


def _unit(embeddings: ArrayLike) -> Float[NDArray, "row dim"]:
    x = np.asarray(embeddings, dtype=np.float64)
    if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"embeddings of shape {x.shape}; finite numbers (image, dim), one image or more, are accepted")
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
