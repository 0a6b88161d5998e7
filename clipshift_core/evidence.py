"""The evidence beside a finding: what a latent that a class relies on unexpectedly has to do with the class.

A finding is a class word c and a latent j of a dictionary. Everything here is read off images, activations and words;
nothing of how the images were made is asked, so that it says the same of photographs as of drawn scenes. The kind is a
guess by a written-down rule (`judge`), and every number that it goes by stands in the table beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from clipshift_core.concepts import SHOWN, Examples, pooled
from clipshift_core.splice import Splice

GRID = 5
"""Cells along a side that are covered one at a time: 16 of the 25 lie along the border."""
N_COVERED = 6
"""Images of a finding that are covered cell by cell."""
N_COMPARED = 20
"""Images of a finding whose pixels are compared."""
N_GROUNDS = 12
"""Images that each word is written on."""
N_OTHERS = 8
"""Words beside those of the findings that are written for comparison, where there are as many."""
N_DRAWS = 50
"""Random groups that a split is compared with."""
BATCH = 256
"""Pictures encoded at a time."""

READ = 0.2
"""The written word alone, on images of other classes, brings a fifth of the activation of the best examples."""
SHARED = 3
"""Letters that two words share at least: shorter stretches ("at" in "bat" and "hat") are no part of meaning."""
PRESENT = 0.6
"""An ordinary picture of a thing stays below the latent's best examples, and a likeness near half of them or below."""
REPEATED = 0.12
"""An eighth of the pixels' variance is common to different images: a quarter in half of the loss, say. Scenes that
were composed anew share next to none, place by place."""
BESIDE = 0.5
"""At least half of the loss is along the border. Every place alike would make it `by_chance()`, but the thing that an
image is named after stands in the middle, as a rule."""
SOME, MOST = 0.2, 0.8
"""A sense of a word shows in a part of its images: fewer are strays, more are the class itself."""
APART = 1.3
"""Images with and without the latent differ by a third more than random groups: not just one group that varies."""

KINDS = ("typography", "compound", "artefact", "co-occurrence", "polysemy", "other")
"""In the order in which `judge` asks for them."""

SEEN = ("share_on", "presence", "reads", "fixed", "border", "repeats", "shared_text", "split")
"""What is measured, each by the function of that name; `share_on` is n_on / n, by chance the latent's frequency."""

See = Callable[[UInt8[np.ndarray, "image h w 3"]], Float[Tensor, "image latent"]]
"""Images of one size -> activations of all latents."""
Read = Callable[[int], UInt8[np.ndarray, "h w 3"]]
"""An audited image by its number, all of one size."""


class Evidence(NamedTuple):
    """What was found for each finding, row by row."""

    table: pd.DataFrame
    """The findings' columns, then label, those of `SEEN`, kind and because."""
    images: Int[Tensor, "finding image"]
    """The class's images to which the latent contributes most, the largest first; -1 where there are no more."""
    maps: Float[Tensor, "finding image row col"]
    """`covered` of these; NaN where there are none."""


class Judgement(NamedTuple):
    """What a finding probably is."""

    kind: str
    """One of `KINDS`."""
    because: str
    """The evidence that decided it, in words, with its number."""


def evidence(
    findings: pd.DataFrame,
    *,
    words: Sequence[str],
    examples: Examples,
    labels: pd.Series,
    latents: Int[Tensor, "image unit"],
    activations: Float[Tensor, "image unit"],
    contributions: Float[Tensor, "image unit"],
    classes: Int[Tensor, " image"],
    embeddings: Float[Tensor, "image dim"],
    read: Read,
    see: See,
    most: int = 24,
) -> Evidence:
    """Evidence for the first `most` findings (columns word, latent, n, n_on, and any others).

    words: the classes; classes: of each audited image, an index into them. examples, labels: of every latent, on
    reference images. latents, activations, contributions: of the audited images, `State.latents`, their values, and
    what each adds to the image's own class. It encodes N_COVERED x (1 + GRID^2) pictures a finding, and N_GROUNDS a
    word that is written.
    """
    found = findings.head(most).reset_index(drop=True)
    found = found.assign(label=[labels[latent] for latent in found["latent"]])
    best = best_activation(examples)
    heard = written(found, words, classes, read, see)
    images = torch.full((len(found), N_COVERED), -1)
    maps = torch.full((len(found), N_COVERED, GRID, GRID), torch.nan)
    rows = []
    for i, row in enumerate(found.itertuples()):
        here = classes == list(words).index(row.word)
        chosen = _most(_column(latents, contributions, row.latent), here, N_COMPARED)
        pictures = [read(k) for k in chosen.tolist()]
        lost = covered(pictures[:N_COVERED], row.latent, see)
        images[i, : len(lost)], maps[i, : len(lost)] = chosen[:N_COVERED], lost
        values = _column(latents, activations, row.latent)[here]
        seen = {
            "label": row.label,
            "word": row.word,
            "share_on": row.n_on / row.n,
            "presence": presence(values, float(best[row.latent])),
            "reads": float(heard[i] / best[row.latent]),
            "fixed": fixed(lost),
            "border": border(lost),
            "repeats": repeats(pictures, lost),
            "shared_text": shared_text(row.word, row.label),
            "split": split(embeddings[here], values > 0),
        }
        rows.append(seen | judge(seen)._asdict())
    seen = pd.DataFrame(rows, columns=[*SEEN, "kind", "because"], index=found.index)
    return Evidence(pd.concat([found, seen], axis=1), images, maps)


def judge(seen: Mapping[str, Any]) -> Judgement:
    """A finding's kind by the first rule that holds, from a row of evidence; what is unknown (NaN) holds no rule.

    typography     the class's word, written on other images, brings the latent
    compound       the latent's label shares a part with the class's word, and is another word
    other          what the latent stands for is not there, only something alike
    artefact       the same pixels, at the same place, where the latent is
    co-occurrence  the latent is beside the middle of the image, where the thing is
    polysemy       it is on the thing, in a part of the class's images that look unlike the others
    other          it is on the thing, whatever the image: a likeness

    An artefact and a thing that always lies in one corner, drawn alike, cannot be told apart this way.
    """
    if seen["reads"] >= READ:
        return Judgement("typography", f"the written word brings it: reads {seen['reads']:.2f}")
    if seen["shared_text"] and seen["label"] != seen["word"]:
        return Judgement("compound", f"both words hold “{seen['shared_text']}”")
    if np.isnan([seen["presence"], seen["border"]]).any():
        return Judgement("other", "too little is known")
    if seen["presence"] < PRESENT:
        return Judgement("other", f"faintly alike: presence {seen['presence']:.2f}")
    if seen["repeats"] >= REPEATED:
        return Judgement("artefact", f"same pixels in place: repeats {seen['repeats']:.2f}")
    if seen["border"] >= BESIDE:
        return Judgement("co-occurrence", f"beside the middle: border {seen['border']:.2f}")
    if SOME <= seen["share_on"] <= MOST and seen["split"] >= APART:
        return Judgement("polysemy", f"in {seen['share_on']:.0%}, unlike the rest: split {seen['split']:.1f}")
    return Judgement("other", f"on the thing itself: border {seen['border']:.2f}")


def best_activation(examples: Examples) -> Float[Tensor, " latent"]:
    """Mean activation of each latent on its `SHOWN` best examples; NaN for one that is never on."""
    here = examples.image[:, :SHOWN] >= 0
    return (examples.value[:, :SHOWN] * here).sum(1) / here.sum(1)


def presence(values: Float[Tensor, " image"], best: float) -> float:
    """Mean activation where it is on, over that on its best examples.

    About 1: what the latent stands for is there; a third: something faintly like it. 0 at least, rarely above 1; NaN
    where the latent is never on. A latent that fires on anything alike has no value that chance would give.
    """
    on = values[values > 0]
    return float(on.mean() / best) if len(on) else float("nan")


# Where ------------------------------------------------------------------------------------------------------------


def covered(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], latent: int, see: See) -> Float[Tensor, "image row col"]:
    """Share of a latent's activation that covering each cell of a grid by the image's mean colour takes away.

    1: all is lost; 0: none, as in an image on which it is off; below 0: covering brings more of it. (Occlusion: Zeiler
    and Fergus 2014)
    """
    if not pictures:
        return torch.empty(0, GRID, GRID)
    views = np.concatenate([_with_cells_covered(picture) for picture in pictures])
    values = torch.cat([see(views[start : start + BATCH])[:, latent] for start in range(0, len(views), BATCH)])
    values = values.reshape(len(pictures), -1)
    lost = torch.where(values[:, :1] > 0, 1 - values[:, 1:] / values[:, :1], 0.0)
    return lost.reshape(len(pictures), GRID, GRID)


def _with_cells_covered(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "view h w 3"]:
    """The picture as it is, then with each cell covered, row by row."""
    views = np.repeat(picture[None], 1 + GRID**2, axis=0)
    for k, (row, col) in enumerate(np.ndindex(GRID, GRID)):
        views[1 + k][_cell(picture, row, col)] = np.round(picture.mean((0, 1)))
    return views


def fixed(maps: Float[Tensor, "image row col"]) -> float:
    """How alike the maps of different images are: mean correlation of two of them.

    1: always at one place; 0: by chance, where places have nothing to do with each other. NaN for fewer than two maps
    that vary. Not every fixed place is an artefact's: things stand in the middle, water lies below.
    """
    flat = maps.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    flat = flat[flat.norm(dim=1) > 1e-9]
    return _mean_cosine(flat) if len(flat) >= 2 else float("nan")


def border(maps: Float[Tensor, "image row col"]) -> float:
    """Share of what is lost that is lost by covering the outer cells, 0 to 1; by chance `by_chance()`.

    Mean over the images; cells in which nothing is lost count as 0. NaN where nothing is lost anywhere.
    """
    lost = maps.clamp_min(0)
    inner = lost[:, 1:-1, 1:-1].sum((1, 2))
    whole = lost.sum((1, 2))
    share = (1 - inner / whole)[whole > 0]
    return float(share.mean()) if len(share) else float("nan")


def by_chance() -> float:
    """The share of the cells that are outer ones: what `border` would be if every cell lost the same."""
    return 1 - (GRID - 2) ** 2 / GRID**2


def repeats(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], maps: Float[Tensor, "image row col"]) -> float:
    """Whether different images hold the same pixels where the latent is: a stamp, not a thing in the scene.

    In each cell the mean correlation of two images' pixels (each channel less its mean there), averaged over the cells
    by what covering them takes. 1: the very same pixels wherever the latent is; 0: by chance, for images composed
    independently (more where all share a layout, such as a sky above). NaN for fewer than two images or no loss.
    """
    weight = maps.clamp_min(0).mean(0).double()
    if len(pictures) < 2 or not weight.sum() > 0:
        return float("nan")
    alike = torch.zeros(GRID, GRID, dtype=torch.double)
    for row, col in np.ndindex(GRID, GRID):
        cells = np.stack([picture[_cell(picture, row, col)] for picture in pictures]).astype(np.float64)
        flat = torch.from_numpy((cells - cells.mean((1, 2), keepdims=True)).reshape(len(cells), -1))
        alike[row, col] = _mean_cosine(flat)
    return float((weight * alike).sum() / weight.sum())


def _cell(picture: UInt8[np.ndarray, "h w 3"], row: int, col: int) -> tuple[slice, slice]:
    height, width, _ = picture.shape
    rows = slice(row * height // GRID, (row + 1) * height // GRID)
    return rows, slice(col * width // GRID, (col + 1) * width // GRID)


def _mean_cosine(vectors: Float[Tensor, "image dim"]) -> float:
    """Of two different vectors; one of length 0 is like none."""
    n = len(vectors)
    return float((F.normalize(vectors, dim=1).sum(0).square().sum() - (vectors != 0).any(1).sum()) / (n * (n - 1)))


# Words ------------------------------------------------------------------------------------------------------------


def written(
    findings: pd.DataFrame, words: Sequence[str], classes: Int[Tensor, " image"], read: Read, see: See
) -> Float[Tensor, " finding"]:
    """What writing the class's word on images of other classes brings of the latent, more than other words do.

    In units of the activation: the mean over `N_GROUNDS` images with the word less that over the same images with the
    findings' other words and up to `N_OTHERS` more. 0 by chance. Over `best_activation` it is `reads`: 1 where the
    latent takes the written word for its best examples. On images, not on plain grounds, which may be far from all that
    a model was shown. NaN without other words.
    """
    asked = list(dict.fromkeys(findings["word"]))
    rest = [word for word in words if word not in asked]
    asked += rest[:: max(1, -(-len(rest) // N_OTHERS))]
    grounds = torch.linspace(0, len(classes) - 1, min(N_GROUNDS, len(classes))).long()
    latents = torch.tensor(findings["latent"].to_numpy(np.int64))
    pictures = [read(k) for k in grounds.tolist()]
    brought = torch.stack(
        [see(np.stack([with_word(p, word, k) for k, p in enumerate(pictures)]))[:, latents] for word in asked]
    )  # (word, ground, finding)
    out = torch.full((len(findings),), torch.nan)
    for i, word in enumerate(findings["word"]):
        here = brought[:, classes[grounds] != list(words).index(word), i].mean(1)
        own = asked.index(word)
        out[i] = here[own] - torch.cat([here[:own], here[own + 1 :]]).mean()
    return out


def with_word(picture: UInt8[np.ndarray, "h w 3"], word: str, place: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with the word in black capitals on a white board: at the top, in the middle or below.

    As large as fits into 0.64 of the picture's width and 0.16 of its height. OpenCV draws ASCII alone: other letters
    become question marks.
    """
    height, width, _ = picture.shape
    out, font = picture.copy(), cv2.FONT_HERSHEY_SIMPLEX
    text = word.upper()
    (long, tall), _ = cv2.getTextSize(text, font, 1.0, 2)
    scale = min(0.64 * width / long, 0.16 * height / tall)
    thick = max(1, round(2 * scale))
    long, tall = round(long * scale), round(tall * scale)
    pad = max(2, round(0.03 * width))
    left = (width - long) // 2
    base = (round(0.22 * height), (height + tall) // 2, round(0.9 * height))[place % 3]
    cv2.rectangle(out, (left - pad, base - tall - pad), (left + long + pad, base + pad), (255, 255, 255), -1)
    cv2.putText(out, text, (left, base), font, scale, (20, 20, 20), thick, cv2.LINE_AA)
    return out


def shared_text(word: str, label: str | None) -> str:
    """The longest part of at least `SHARED` letters that the class's word and the label share; empty where none.

    A whole word of one ("cat" of "Egyptian cat"), or a word of one within a word of the other ("star" in "starfish").
    """
    mine, theirs = ("" if pd.isna(text) else text.lower().replace("-", " ").split() for text in (word, label))
    parts = {small for a in mine for b in theirs for small in [min(a, b, key=len)] if small in a and small in b}
    return max((part for part in parts if len(part) >= SHARED), key=lambda part: (len(part), part), default="")


# Groups -----------------------------------------------------------------------------------------------------------


def split(embeddings: Float[Tensor, "image dim"], on: Bool[Tensor, " image"], *, seed: int = 0) -> float:
    """How much more the class's images with the latent differ from those without than random groups of these sizes do.

    1 - cosine of the groups' mean embeddings, over its mean in `N_DRAWS` random splits: 0 at least, 1 by chance. NaN
    where a group has fewer than two images.
    """
    n_on, n = int(on.sum()), len(on)
    if min(n_on, n - n_on) < 2:
        return float("nan")
    unit = F.normalize(embeddings.double(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.stack([on, *(on[torch.randperm(n, generator=generator)] for _ in range(N_DRAWS))]).double()
    apart = 1 - F.cosine_similarity(draws @ unit / n_on, (1 - draws) @ unit / (n - n_on), dim=1)
    return float(apart[0] / apart[1:].mean())


# Models -----------------------------------------------------------------------------------------------------------


def seeing(splice: Splice) -> See:
    """What `evidence` sees with: a dictionary in a model, the largest activation over an image's tokens."""

    @torch.no_grad()
    def see(images: UInt8[np.ndarray, "image h w 3"]) -> Float[Tensor, "image latent"]:
        codes = (part.unflatten(0, (len(images), -1)) for part in splice.read(images).codes)
        image, latent, value = pooled(*codes, splice.sae.n_latents)
        return torch.zeros(len(images), splice.sae.n_latents).index_put((image, latent), value)

    return see


def _column(
    latents: Int[Tensor, "image unit"], values: Float[Tensor, "image unit"], latent: int
) -> Float[Tensor, " image"]:
    """The values of one latent, 0 where it is not on."""
    return torch.where(latents == latent, values, 0.0).sum(1)


def _most(values: Float[Tensor, " image"], among: Bool[Tensor, " image"], n: int) -> Int[Tensor, " some"]:
    """The n images, of some, where the values are largest and above 0, the largest first."""
    values = torch.where(among, values, 0.0)
    order = values.argsort(descending=True, stable=True)[:n]
    return order[values[order] > 0]
