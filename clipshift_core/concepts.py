"""What the latents of a dictionary stand for: the images that activate each of them most, and how alike those are.

Codes come in batches, image after image, as a sparse autoencoder's `encode` gives them: indices and values of the
latents that are on, (image, slot), or (image, token, slot) for tokens. A latent is on where its value is positive.
The scores are paper B's, over the embeddings of a latent's examples in any CLIP. What cannot be known, such as the
clarity of a latent with one example, is NaN.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHOWN = 20
"""Examples that the scores look at (paper B's: 20, of 100 that are stored)."""

WAITING = 2**20
"""Candidates for the best examples that are collected at least before they are merged in."""

Batch = tuple[Int[Tensor, "image *token slot"], Float[Tensor, "image *token slot"]]
"""Indices and values of some images' codes, such as `sae_kernels.Codes`."""
Pool = Literal["max", "mean"]
"""What an image's activation is made of, over its tokens; tokens at which a latent is off count as zero."""


class Pooled(NamedTuple):
    """The activations of some images that are not zero: one entry an image and latent, sorted by image."""

    image: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]


class Examples(NamedTuple):
    """What a stream of codes has shown of every latent."""

    image: Int[Tensor, "latent example"]
    """The images that activate it most, the strongest first, numbered as they came; -1 where there are no more."""
    value: Float[Tensor, "latent example"]
    """Their activations; 0 where there are no more."""
    frequency: Float[Tensor, " latent"]
    """Share of the images on which it is on at all."""
    mean: Float[Tensor, " latent"]
    """Mean activation over all images, those included on which it is off."""
    n_images: int

    @property
    def max(self) -> Float[Tensor, " latent"]:
        """The largest activation; 0 for a latent that is never on."""
        return self.value[:, 0]


def pooled(
    indices: Int[Tensor, "image *token slot"],
    values: Float[Tensor, "image *token slot"],
    n_latents: int,
    over: Pool = "max",
) -> Pooled:
    """Each image's activations, image after image."""
    if indices.shape != values.shape or indices.ndim not in (2, 3):
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} and values of shape {tuple(values.shape)}: both must be "
            "(image, slot) or (image, token, slot)"
        )
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_latents:
        raise ValueError(f"latents {int(indices.min())} to {int(indices.max())}: 0 to {n_latents - 1} are accepted")
    if not values.isfinite().all():
        raise ValueError("some activations are NaN or infinite; the model or the dictionary is damaged")
    if over not in ("max", "mean"):
        raise ValueError(f"over = {over!r}: 'max' or 'mean' is accepted")
    indices, values = indices.detach().cpu(), values.detach().cpu().float().clamp_min(0)
    if indices.ndim == 2:
        image, slot = values.nonzero(as_tuple=True)
        return Pooled(image, indices[image, slot], values[image, slot])
    parts = [_over_tokens(indices[:0], values[:0], n_latents, over)]
    n_images = max(1, 2**21 // n_latents)
    for start in range(0, len(indices), n_images):
        few = slice(start, start + n_images)
        image, latent, value = _over_tokens(indices[few], values[few], n_latents, over)
        parts.append(Pooled(image + start, latent, value))
    return Pooled(*(torch.cat(part) for part in zip(*parts, strict=True)))


def examples(batches: Iterable[Batch], n_latents: int, *, n_examples: int = 100, over: Pool = "max") -> Examples:
    """The `n_examples` images that activate each latent most, exactly, whatever the size of the batches.

    Equal activations rank in the order in which the images came. Held in memory are the best so far and as many
    candidates again, never all activations.
    """
    best = _Best(n_latents, n_examples)
    on, total, n_images = torch.zeros(n_latents, dtype=torch.long), torch.zeros(n_latents, dtype=torch.float64), 0
    for indices, values in batches:
        image, latent, value = pooled(indices, values, n_latents, over)
        on += torch.bincount(latent, minlength=n_latents)
        total.index_add_(0, latent, value.double())
        best.add(image + n_images, latent, value)
        n_images += len(indices)
    if not n_images:
        raise ValueError("no codes: there is nothing to find examples in")
    return Examples(*best.table(), (on / n_images).float(), (total / n_images).float(), n_images)


def heat_maps(
    indices: Int[Tensor, "image token slot"],
    values: Float[Tensor, "image token slot"],
    latent: int,
    grid: tuple[int, int],
) -> Float[Tensor, "image row col"]:
    """Where a latent is on: its activation at every patch, of codes over the patches alone, row by row."""
    if indices.ndim != 3 or indices.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"codes of shape {tuple(indices.shape)}: (image, token, slot) with {grid[0]} x {grid[1]} tokens is "
            "accepted; leave the class token out"
        )
    found = torch.where(indices == latent, values.clamp_min(0), 0.0).sum(-1)
    return found.reshape(len(found), *grid)


# Scores ----------------------------------------------------------------------------------------------------------


def mean_embedding(
    embeddings: Float[Tensor, "image dim"], images: Int[Tensor, "latent example"]
) -> Float[Tensor, "latent dim"]:
    """Mean of the unit-length embeddings of each latent's examples; NaN without any. A row of `images` may end in -1.

    It is not of length 1: its squared length is what `clarity` is made of.
    """
    here = images >= 0
    unit = F.normalize(embeddings.float(), dim=1)
    summed = F.embedding_bag(images.clamp_min(0), unit, per_sample_weights=here.float(), mode="sum")
    return summed / here.sum(1, keepdim=True)


def clarity(mean: Float[Tensor, "latent dim"], n: Int[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """(|mean V|^2 - 1/n) n / (n - 1): the mean cosine between two different ones of a latent's n examples V.

    1 where all are alike, 0 where they have nothing in common, -1/(n - 1) at least.
    """
    n = n.double()
    found = (mean.double().square().sum(1) - 1 / n) * n / (n - 1)
    return torch.where(n >= 2, found, torch.nan).float()


def similarity(a: Float[Tensor, "latent dim"], b: Float[Tensor, "other dim"]) -> Float[Tensor, "latent other"]:
    """Cosine between the mean embeddings of latents, or of latents and texts."""
    return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


class Nearest(NamedTuple):
    """For each latent, the other one that is most like it."""

    cosine: Float[Tensor, " latent"]
    """NaN for a latent without examples, and where there is no other."""
    latent: Int[Tensor, " latent"]
    """-1 there."""

    @property
    def redundancy(self) -> float:
        """Paper B's score of a whole dictionary: the mean of these cosines."""
        return float(self.cosine.nanmean())


def nearest(mean: Float[Tensor, "latent dim"], *, chunk: int = 1024) -> Nearest:
    """The highest cosine of each latent's mean embedding with another latent's."""
    cosine, latent = torch.full((len(mean),), torch.nan), torch.full((len(mean),), -1)
    known = mean.isfinite().all(1).nonzero()[:, 0]
    if len(known) >= 2:
        unit = F.normalize(mean[known].float(), dim=1)
        for start in range(0, len(known), chunk):
            part = unit[start : start + chunk] @ unit.T
            part.diagonal(start).fill_(-torch.inf)
            highest, where = part.max(1)
            rows = known[start : start + chunk]
            cosine[rows], latent[rows] = highest, known[where]
    return Nearest(cosine, latent)


def polysemanticity(
    embeddings: Float[Tensor, "image dim"], images: Int[Tensor, "latent example"], *, chunk: int = 1024
) -> Float[Tensor, " latent"]:
    """1 - clarity of the centres of two clusters of each latent's examples: 0 one meaning, 1 two unrelated ones.

    Clusters by k-means on the unit-length embeddings, without chance: it starts from every example and the one farthest
    from it, and keeps the split with the least spread. Centres are scaled to length 1, so that the clarity of the two
    is their cosine. 0 where all examples are the same.
    """
    unit, found = F.normalize(embeddings.float(), dim=1), []
    for rows in images.split(chunk):
        here = rows >= 0
        vectors = unit[rows.clamp_min(0)] * here[..., None]
        second = two_means(vectors, here)
        centres = [(part.float()[:, None] @ vectors)[:, 0] for part in (here & ~second, second)]
        cosine = torch.where(second.any(1), F.cosine_similarity(*centres), 1.0)
        found.append(torch.where(here.sum(1) >= 2, 1 - cosine, torch.nan))
    return torch.cat(found)


def two_means(
    vectors: Float[Tensor, "latent example dim"], here: Bool[Tensor, "latent example"]
) -> Bool[Tensor, "latent example"]:
    """Which of each latent's vectors are in the second of two clusters by k-means; those not `here` must be zero.

    k-means is tried from every vector and the one farthest from it, and the split with the least spread is kept: no
    chance in it. All runs on products of the vectors, which hold every distance. None is in the second cluster where
    all are the same.
    """
    gram = vectors @ vectors.mT
    length = gram.diagonal(dim1=1, dim2=2)
    apart = (length[:, :, None] + length[:, None, :] - 2 * gram).masked_fill(~here[:, None], -1.0)
    farthest = apart.argmax(2)
    # (latent, start, vector): which vectors are nearer to the farthest one than to the start
    second = apart.gather(1, farthest[..., None].expand_as(apart)) < apart
    n, everywhere = here.sum(1)[:, None, None], (gram @ here.float()[..., None]).mT
    for _ in range(100):
        size = second.sum(2, keepdim=True).clamp_min(1)
        to_second = second.float() @ gram
        of_second = (to_second * second).sum(2, keepdim=True)
        to_first = everywhere - to_second
        of_first = (to_first * (here[:, None] & ~second)).sum(2, keepdim=True)
        left = (n - size).clamp_min(1)
        before = second
        # squared distances from the two centres, without the vector's own squared length
        second = here[:, None] & (of_second / size**2 - 2 * to_second / size < of_first / left**2 - 2 * to_first / left)
        if torch.equal(before, second):
            break
    # the spread is least where the squared lengths of the clusters' sums, over their sizes, are most
    explained = (of_second / size + of_first / left)[..., 0].masked_fill(~here, -torch.inf)
    best = explained.argmax(1)
    return second[torch.arange(len(second)), best]


def mono_score(
    batches: Iterable[tuple[*Batch, Float[Tensor, "image dim"]]], n_latents: int
) -> Float[Tensor, " latent"]:
    """Mean cosine between two different images, each pair weighted by the product of its activations.

    sum a_i a_j cos_ij / sum a_i a_j over i != j, in closed form from sums over images alone:
    (|sum a_i e_i|^2 - sum a_i^2) / ((sum a_i)^2 - sum a_i^2) with e_i of unit length. Activations are the largest over
    tokens; their scale does not matter. Batches hold indices, values and the images' embeddings. NaN for a latent
    that is on in fewer than two images. (Pach et al. 2025)
    """
    weighted, sums = None, torch.zeros(2, n_latents, dtype=torch.float64)
    for indices, values, embeddings in batches:
        image, latent, value = pooled(indices, values, n_latents)
        value, unit = value.double(), F.normalize(embeddings.double().cpu(), dim=1)
        if weighted is None:
            weighted = torch.zeros(n_latents, unit.shape[1], dtype=torch.float64)
        weighted.index_add_(0, latent, value[:, None] * unit[image])
        sums[0].index_add_(0, latent, value)
        sums[1].index_add_(0, latent, value.square())
    if weighted is None:
        raise ValueError("no codes: there is nothing to score")
    pairs = sums[0].square() - sums[1]
    several = pairs > 1e-12 * sums[0].square()  # below is rounding: one image alone
    return torch.where(several, (weighted.square().sum(1) - sums[1]) / pairs, torch.nan).float()


def describe(found: Examples, embeddings: Float[Tensor, "image dim"], *, n_examples: int = SHOWN) -> pd.DataFrame:
    """One row a latent: latent, frequency, mean, max, n_examples, clarity, polysemanticity, redundancy, nearest.

    The scores look at the first `n_examples` examples, embedded by any CLIP. redundancy is the highest cosine with
    another latent, `nearest` that latent (-1 where there is none).
    """
    images = found.image[:, :n_examples]
    mean, n = mean_embedding(embeddings, images), (images >= 0).sum(1)
    other = nearest(mean)
    return pd.DataFrame(
        {
            "latent": range(len(images)),
            "frequency": found.frequency.numpy(),
            "mean": found.mean.numpy(),
            "max": found.max.numpy(),
            "n_examples": n.numpy(),
            "clarity": clarity(mean, n).numpy(),
            "polysemanticity": polysemanticity(embeddings, images).numpy(),
            "redundancy": other.cosine.numpy(),
            "nearest": other.latent.numpy(),
        }
    )


class _Best:
    """The largest values of every latent so far, and candidates that are merged in when there are as many again."""

    def __init__(self, n_latents: int, n: int):
        if n < 1:
            raise ValueError(f"n_examples = {n}: 1 or more is accepted")
        self.n_latents, self.n = n_latents, n
        self.kept = Pooled(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))
        self.waiting, self.n_waiting = [], 0
        self.least = torch.zeros(n_latents)
        """What a later image must exceed to be among the n of a latent; an equal one comes after those it has."""

    def add(self, image: Tensor, latent: Tensor, value: Tensor) -> None:
        good = value > self.least[latent]
        self.waiting.append(Pooled(image[good], latent[good], value[good]))
        self.n_waiting += int(good.sum())
        if self.n_waiting > max(WAITING, self.n_latents * self.n):
            self._merge()

    def _merge(self) -> None:
        """Sort by latent, falling value and order of arrival, and cut each latent's list off behind the n-th."""
        image, latent, value = (torch.cat(part) for part in zip(self.kept, *self.waiting, strict=True))
        # Positive floats are in the order of their bits, so that one stable sort of integers does all three.
        key = (latent << 32) | (0x7FFFFFFF - value.view(torch.int32).long())
        order = key.sort(stable=True).indices
        latent = latent[order]
        count = torch.bincount(latent, minlength=self.n_latents)
        rank = torch.arange(len(latent)) - (count.cumsum(0) - count)[latent]
        good = rank < self.n
        self.kept = Pooled(image[order[good]], latent[good], value[order[good]])
        self.rank = rank[good]
        last = self.rank == self.n - 1
        self.least[self.kept.latent[last]] = self.kept.value[last]
        self.waiting, self.n_waiting = [], 0

    def table(self) -> tuple[Int[Tensor, "latent example"], Float[Tensor, "latent example"]]:
        self._merge()
        image, value = torch.full((self.n_latents, self.n), -1), torch.zeros(self.n_latents, self.n)
        image[self.kept.latent, self.rank], value[self.kept.latent, self.rank] = self.kept.image, self.kept.value
        return image, value


def _over_tokens(
    indices: Int[Tensor, "image token slot"], values: Float[Tensor, "image token slot"], n_latents: int, over: Pool
) -> Pooled:
    """A few images' activations, written out with all their zeros: quicker than sorting."""
    place = (indices + n_latents * torch.arange(len(indices))[:, None, None]).flatten()
    if over == "max":
        written = torch.zeros(len(indices) * n_latents).scatter_reduce_(0, place, values.flatten(), "amax")
    else:  # summed in float64, so that the mean over equal tokens is exactly that of one of them
        written = torch.zeros(len(indices) * n_latents, dtype=torch.float64)
        written = written.index_add_(0, place, values.flatten().double()).div_(indices.shape[1]).float()
    on = written.nonzero()[:, 0]
    return Pooled(on // n_latents, on % n_latents, written[on])
