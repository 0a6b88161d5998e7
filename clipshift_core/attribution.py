"""What each latent contributes to a prediction: six approximations, and exact ablation to judge them by.

A prediction y is a `Target` of the image's embedding, in a forward pass with the autoencoder spliced in and its error
added back (`splice`). A method gives one number for each unit, a latent j of an image with activation a_j and decoder
row d_j (with spatial tokens: in all of the image's tokens):

    act_x_grad            a_j dy/da_j, at the image's own codes: "attribution patching", one step of what follows
    integrated_gradients  a_j times the mean of dy/da_j along t a, t from 0 to 1, the error held (Sundararajan et al.
                          2017); the units sum to y(a) - y(0) but for a `gap` that more steps close
    logit_lens            what y reads in d_j alone, taken through the tower's final norm and projection: a cosine for a
                          cosine; the same in every image where the latent is on
    act_x_logit_lens      a_j times that
    energy                a_j |d_j|, whatever is asked
    random                uniform numbers from a seed
    ablation              y minus y with a_j at zero, by running the rest of the tower again for every unit

Spatial units are summed over tokens. Units that are not on have 0. Paper B's public code gives act x grad's values as
those of integrated gradients.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clipshift_core.splice import Splice, State, Stream

CHUNK_TOKENS = 1600
"""Tokens that `ablation` and `evaluator` send on at a time: their activations stay in a processor's cache."""
CHUNK_ENTRIES = 2**22
"""Entries of gathered decoder rows held at a time (16 MiB in float32)."""


class AttributionError(ValueError):
    """An attribution that cannot be made as asked: the value, and what would be accepted."""


# What is predicted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Target:
    """A linear reading of the embedding's direction, y = direction . e / |e| + bias, or of e itself.

    direction: (dim,), one text for every image; (image, dim), one for each image; or (text, 1, dim), several for every
    image, and then all that follows from it has a leading axis text. `cosine`, `logit`, `margin` and `probe` make it.
    """

    direction: Float[Tensor, "*text image dim"]
    bias: Float[Tensor, "..."] | float = 0.0
    """One number, one for each text as (text, 1), or, beside a direction for each image, one for each image."""
    normalised: bool = True
    """Whether e is divided by its length."""

    def __post_init__(self):
        if not 1 <= self.direction.ndim <= 3 or not self.direction.isfinite().all():
            raise AttributionError(
                f"a direction of shape {tuple(self.direction.shape)}; finite numbers in (dim,), (image, dim) or "
                "(text, 1, dim) are accepted"
            )

    def __call__(self, embedding: Float[Tensor, "*variant image dim"]) -> Float[Tensor, "*text image"]:
        """y of each image; of one text also (variant, image) from as many embeddings of each."""
        return self.read(F.normalize(embedding, dim=-1) if self.normalised else embedding) + self._bias(embedding)

    def read(self, vectors: Float[Tensor, "*variant image dim"]) -> Float[Tensor, "*text image"]:
        """direction . vector, as it stands."""
        direction, (*variants, n_images, dim) = self.direction.to(vectors), vectors.shape
        if variants and direction.ndim == 3:
            raise AttributionError(f"embeddings of {tuple(vectors.shape)} and several texts; one text is accepted")
        if direction.shape[-1] != dim or (direction.ndim > 1 and direction.shape[-2] not in (1, n_images)):
            raise AttributionError(
                f"a direction of shape {tuple(direction.shape)} for embeddings of {(n_images, dim)}; accepted: "
                f"({dim},), ({n_images}, {dim}) or (text, 1, {dim})"
            )
        if direction.ndim == 3 and direction.shape[1] == 1:
            return direction[:, 0] @ vectors.T
        return (direction * vectors).sum(-1)

    def gradient(self, embedding: Float[Tensor, "image dim"]) -> Float[Tensor, "*text image dim"]:
        """dy/de = (direction - (direction . u) u) / |e| with u = e / |e|; without the division, the direction."""
        direction = self.direction.to(embedding)
        if not self.normalised:
            return direction.expand(*direction.shape[:-2], *embedding.shape)
        length = embedding.norm(dim=-1, keepdim=True)
        u = embedding / length
        return (direction - self.read(u)[..., None] * u) / length

    def at(self, images: Int[Tensor, " some"]) -> "Target":
        """The same for some of the images, in any order and number."""
        if self.direction.ndim == 1 or self.direction.shape[-2] == 1:
            return self
        made = copy(self)  # not made anew: it would be checked again, and this is called for every few images
        object.__setattr__(made, "direction", self.direction[..., images.to(self.direction.device), :])
        if isinstance(self.bias, Tensor) and self.bias.ndim and self.bias.shape[-1] == self.direction.shape[-2]:
            object.__setattr__(made, "bias", self.bias[..., images.to(self.bias.device)])
        return made

    def _bias(self, like: Tensor) -> Tensor | float:
        return self.bias.to(like) if isinstance(self.bias, Tensor) else self.bias


def cosine(text: Float[Tensor, "*text dim"]) -> Target:
    """Cosine between the image's embedding and a text's, of any length."""
    return Target(F.normalize(text, dim=-1))


def logit(text: Float[Tensor, "*text dim"], scale: float) -> Target:
    """Zero-shot logit: scale (`Encoder.logit_scale`) times the cosine."""
    return Target(scale * F.normalize(text, dim=-1))


def margin(text: Float[Tensor, "*text dim"], against: Float[Tensor, "*text dim"], scale: float = 1.0) -> Target:
    """Zero-shot logit of one class minus that of another."""
    return Target(scale * (F.normalize(text, dim=-1) - F.normalize(against, dim=-1)))


def probe(weight: Float[Tensor, "*text dim"], bias: Float[Tensor, "..."] | float = 0.0, *, normalised: bool) -> Target:
    """Logit of a linear probe, weight . e + bias; normalised: whether it was trained on embeddings of length 1.

    For several classes at once weight is (class, 1, dim) and bias (class, 1).
    """
    return Target(weight, bias, normalised)


# The methods --------------------------------------------------------------------------------------------------------


class Attribution(NamedTuple):
    """What one method gives for a batch of images."""

    latents: Int[Tensor, "image unit"]
    """`State.latents`: with class tokens, the indices of the codes."""
    values: Float[Tensor, "*text image unit"]
    """The contributions, in the units of y (logit lens, energy and random in their own); 0 where a unit is not on."""
    gap: Float[Tensor, "*text image"] | None = None
    """Integrated gradients': sum over units minus (y(a) - y(0)), which more steps bring to 0."""


def act_x_grad(splice: Splice, state: State, target: Target) -> Attribution:
    """a_j dy/da_j: exact to first order, one step of the tail forward and one backward a text."""
    return Attribution(state.latents, state.by_latent(state.codes.values * _slopes(splice, state, target)))


def integrated_gradients(
    splice: Splice, state: State, target: Target, *, steps: int = 16, rule: str = "gausslegendre"
) -> Attribution:
    """a_j times the mean slope along the path that scales all codes from 0 to 1, with its completeness gap.

    steps: slopes taken, each as expensive as `act_x_grad`. rule: how they are spaced and weighted, one of `RULES`.
    """
    values = state.codes.values
    slopes = _slopes(splice, state, target, *nodes(steps, rule))
    found = state.by_latent(values * slopes)
    with torch.no_grad():
        whole, none = (target(splice.through(state.stream, tokens)) for tokens in _ends(splice, state))
    return Attribution(state.latents, found, found.sum(-1) - (whole - none))


def logit_lens(splice: Splice, state: State, target: Target) -> Attribution:
    """What y reads in each decoder direction: of a cosine the cosine, of a margin the margin; a bias is left out."""
    direction, lengths = target.direction.to(splice.W_dec), splice.lens.norm(dim=-1).clamp_min(1e-12)
    if direction.ndim == 2 and len(direction) == len(state.latents):  # a text an image: only what is listed is read
        found = _along(direction[None], splice.lens, state.latents)[0]
        return Attribution(state.latents, found / lengths[state.latents] * state.on)
    table = direction @ splice.lens.T / lengths
    lead = table.shape[:-2]
    table = table.expand(*lead, len(state.latents), -1)
    return Attribution(state.latents, table.gather(-1, state.latents.expand(*lead, -1, -1)) * state.on)


def act_x_logit_lens(splice: Splice, state: State, target: Target) -> Attribution:
    """The activation of each unit, summed over tokens, times the logit lens."""
    activation = state.by_latent(state.codes.values)
    return Attribution(state.latents, activation * logit_lens(splice, state, target).values)


def energy(splice: Splice, state: State, target: Target) -> Attribution:
    """a_j |d_j|: how much of the activation a unit writes; the same for every text."""
    found = state.by_latent(state.codes.values) * splice.W_dec.norm(dim=1)[state.latents]
    return Attribution(state.latents, found.expand(*target.direction.shape[:-2], *found.shape))


def random(splice: Splice, state: State, target: Target, *, seed: int = 0, first: int = 0) -> Attribution:
    """A number from 0 to 1 for each unit, by seed, number of the image and latent alone; the same for every text.

    first: the number, within the run, of the first image of the batch.
    """
    tables = [
        np.random.default_rng([seed, first + i, *b"random attribution"]).random(len(splice.W_dec), np.float32)
        for i in range(len(state.latents))
    ]
    drawn = torch.from_numpy(np.stack(tables)).to(splice.W_dec).gather(1, state.latents) * state.on
    return Attribution(state.latents, drawn.expand(*target.direction.shape[:-2], *drawn.shape))


@torch.no_grad()
def ablation(splice: Splice, state: State, target: Target) -> Attribution:
    """y minus y with one unit at zero, for every unit that is on: exact, whatever follows the splice.

    At the last block that is final norm and projection for every pair of an image and a unit; at earlier ones the
    remaining blocks, on the whole stream of the image for each of its units. `CHUNK_TOKENS` at a time bound the memory.
    """
    tokens = splice.tokens(state)
    whole = target(splice.through(state.stream, tokens))
    image, unit = state.on.nonzero(as_tuple=True)
    amounts = _by_token(state)
    found = whole.new_zeros(*whole.shape, state.latents.shape[1])
    step = max(1, CHUNK_TOKENS // state.stream.shape[1])
    for i, u in zip(image.split(step), unit.split(step), strict=True):
        removed = amounts[i, u][..., None] * splice.W_dec[state.latents[i, u]][:, None]
        without = splice.through(state.stream[i], tokens[i] - removed)
        found[..., i, u] = whole[..., i] - target.at(i)(without)
    return Attribution(state.latents, found)


METHODS: dict[str, Callable[..., Attribution]] = {
    method.__name__: method
    for method in (act_x_grad, integrated_gradients, logit_lens, act_x_logit_lens, energy, random, ablation)
}
"""Each method by its name; all are called with (splice, state, target)."""


# Many latents at a time ---------------------------------------------------------------------------------------------


def evaluator(
    splice: Splice, state: State, target: Target
) -> Callable[[Float[Tensor, "image variant unit"]], Float[Tensor, "image variant"]]:
    """What `faithfulness` asks: y with the units at zero deleted. Nothing before the splice runs again.

    Class tokens at the last block go through the head `CHUNK_TOKENS` at a time, all variants of an image together, its
    decoder rows gathered once; all else one variant of all images at a time.
    """

    def one_by_one(values: Float[Tensor, "image variant unit"]) -> Float[Tensor, "image variant"]:
        kept = (values != 0).float().unbind(1)
        return torch.stack([target(splice.embed(state, state.scaled(each))) for each in kept], dim=1)

    def together(values: Float[Tensor, "image variant unit"]) -> Float[Tensor, "image variant"]:
        n_images, n_variants, _ = values.shape
        n = max(1, CHUNK_TOKENS // n_variants)
        parts = []
        for some, given in zip(torch.arange(n_images, device=values.device).split(n), values.split(n), strict=True):
            amounts = (given != 0) * state.codes.values[some, None]
            rest = (splice.b_dec + state.error[some])[:, None]
            tokens = torch.baddbmm(rest, amounts, splice.W_dec[state.latents[some]])
            embedding = splice.tail(tokens.flatten(0, 1)[:, None])
            y = target.at(some)(embedding.unflatten(0, (-1, n_variants)).transpose(0, 1))
            parts.append(y.T)
        return torch.cat(parts)

    return torch.no_grad()(together if splice.tail.needs_class_alone else one_by_one)


# What they are made of ----------------------------------------------------------------------------------------------

RULES: dict[str, Callable[[int], tuple[np.ndarray, np.ndarray]]] = {
    "midpoint": lambda n: ((np.arange(n) + 0.5) / n, np.full(n, 1 / n)),
    "trapezoid": lambda n: (np.linspace(0, 1, n), np.r_[0.5, np.ones(n - 2), 0.5] / (n - 1)),
    "gausslegendre": lambda n: tuple(part / 2 + shift for part, shift in zip(_legendre(n), (0.5, 0.0), strict=True)),
}
"""Quadrature rules by name: places in 0..1 and their weights, which sum to 1, for a number of steps."""


def nodes(steps: int, rule: str) -> tuple[list[float], list[float]]:
    """Places and weights of a rule of `RULES`. Raises AttributionError for too few steps or another rule."""
    least = 2 if rule == "trapezoid" else 1
    if rule not in RULES or steps < least:
        raise AttributionError(
            f"{steps} steps of rule {rule!r}; accepted: {', '.join(RULES)}, with 1 step or more (trapezoid: 2)"
        )
    places, weights = RULES[rule](steps)
    return places.tolist(), weights.tolist()


def _legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(n)


def _slopes(
    splice: Splice, state: State, target: Target, places: Sequence[float] = (1.0,), weights: Sequence[float] = (1.0,)
) -> Float[Tensor, "*text row slot"]:
    """dy/da of every code, at the codes times each of `places`, summed with `weights`.

    At each place the tail runs forward once, and back once a text, or a dimension if those are fewer.
    """
    whole, none = _ends(splice, state)
    found, lead = 0.0, ()
    for place, weight in zip(places, weights, strict=True):
        tokens = torch.lerp(none, whole, place).detach().requires_grad_()
        with torch.enable_grad():
            embedding = splice.through(state.stream, tokens)
        wanted = weight * target.gradient(embedding.detach())
        lead = wanted.shape[:-2]
        wanted = wanted.reshape(-1, *embedding.shape)
        n_images, dim = embedding.shape
        few = len(wanted) <= dim
        back = wanted if few else torch.eye(dim).to(wanted)[:, None].expand(-1, n_images, -1)
        pulled = [torch.autograd.grad(embedding, tokens, each.contiguous(), retain_graph=True)[0] for each in back]
        pulled = torch.stack(pulled).flatten(1, 2)
        if not few:  # from a slope for each entry of the embedding to one for each text
            along = _along_codes(splice, state, pulled).unflatten(1, (n_images, -1))
            pulled = torch.einsum("tid,dirs->tirs", wanted, along).flatten(1, 2)
        found = found + pulled
    if few:  # what is pulled back to the tokens adds up before it is read along the decoder rows, once
        found = _along_codes(splice, state, found)
    return found.reshape(*lead, *found.shape[1:])


def _along_codes(splice: Splice, state: State, gradient: Float[Tensor, "n row width"]) -> Float[Tensor, "n row slot"]:
    """gradient . d_j for the decoder row of every code."""
    return _along(gradient, splice.W_dec, state.codes.indices)


def _along(
    vectors: Float[Tensor, "n row width"], table: Float[Tensor, "latent width"], indices: Int[Tensor, "row slot"]
) -> Float[Tensor, "n row slot"]:
    """vector . table row for the rows of the table that each vector's indices name, gathered a few at a time."""
    found = vectors.new_empty(len(vectors), *indices.shape)
    step = max(1, CHUNK_ENTRIES // (indices.shape[1] * vectors.shape[-1]))
    for start in range(0, len(indices), step):
        rows = slice(start, start + step)
        found[:, rows] = torch.einsum("nrw,rsw->nrs", vectors[:, rows], table[indices[rows]])
    return found


@torch.no_grad()
def _ends(splice: Splice, state: State) -> tuple[Stream, Stream]:
    """The spliced tokens with all codes and with none."""
    none = (splice.b_dec + state.error).unflatten(0, (len(state.stream), -1))
    return splice.tokens(state), none


def _by_token(state: State) -> Float[Tensor, "image unit token"]:
    """The activation of each unit in each spliced token of its image."""
    n_images, n_units = state.latents.shape
    unit, values = (part.unflatten(0, (n_images, -1)) for part in (state.unit, state.codes.values))
    found = values.new_zeros(*values.shape[:2], n_units).scatter_add(2, unit, values)
    return found.transpose(1, 2)
