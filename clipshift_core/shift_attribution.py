"""The change in a target between an image and a view of it, taken apart into the latents of a dictionary.

x0 and x1 are the activations of the image and of its view, both (image, width) or (image, token, width), a0 and a1
their codes, and y = target(embed(x)) what is asked of them, such as the cosine to a text. Along the straight path
x(t) = x0 + t (x1 - x0),

    y(x1) - y(x0) = (x1 - x0) . g,   g = integral over t from 0 to 1 of dy/dx at x(t)
    x1 - x0       = sum over j of (a1_j - a0_j) d_j  +  (e1 - e0)

with d_j the decoder's rows and e = x - x_hat, whose bias cancels. So the change is a sum with a part for each latent,
(a1_j - a0_j) d_j . g, and one named part for what the dictionary does not write, (e1 - e0) . g. It is integrated
gradients (Sundararajan et al. 2017) with the image itself as the baseline of its view. A part below 0 is similarity
that is lost. Over tokens a latent's parts, and its activations, are summed.

`embed` and `target` are given all images of a call at once, in their order, and must treat each on its own. A run that
cannot hold the caches of all its images calls `decompose` for some at a time and puts the results together by `joined`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clipshift_core.faithfulness import mean_intervals

FEWEST_NODES, MOST_NODES = 8, 128
"""Points of the path at which the gradient is taken (Gauss-Legendre): doubled until the change is complete.

Behind a last block, norm and projection, the fewest are enough; attention in between needs more.
"""
TOLERANCE = 1e-4
"""Largest gap, in units of a cosine, that counts as complete; of a target beyond 1 this share of it."""
CHUNK_ENTRIES = 2**24
"""Entries of decoder rows held at a time (64 MiB in float32)."""
ALL = slice(None)
"""Every token has codes."""
Activations = Float[Tensor, "image *token width"]
Pair = tuple[Int[Tensor, "image *token slot"], Float[Tensor, "image *token slot"]]
"""Indices and values of codes, such as `sae_kernels.Codes`; a slot with the value 0 is empty."""
Embed = Callable[[Activations], Float[Tensor, "image dim"]]
Target = Callable[[Float[Tensor, "image dim"]], Float[Tensor, "*text image"]]


class Shift(NamedTuple):
    """The change of the target from each image to its view, and what it is made of."""

    latent: Int[Tensor, "image slot"]
    """Latents that are on in the image or in its view, in growing order; -1 in slots an image has no use for."""
    before: Float[Tensor, "image slot"]
    """Their activations in the image, summed over its tokens; 0 where off."""
    after: Float[Tensor, "image slot"]
    """And in the view."""
    part: Float[Tensor, "*text image slot"]
    """What each adds to the change (float64)."""
    error: Float[Tensor, "*text image"]
    """What the two reconstruction errors add."""
    rest: Float[Tensor, "*text image"]
    """What the tokens add that have no codes; 0 where all have."""
    original: Float[Tensor, "*text image"]
    """The target of the image."""
    view: Float[Tensor, "*text image"]
    """And of its view."""

    @property
    def change(self) -> Float[Tensor, "*text image"]:
        """y(x1) - y(x0)."""
        return self.view - self.original

    @property
    def gap(self) -> Float[Tensor, "*text image"]:
        """What the parts miss of the change: how far the quadrature is from complete."""
        return self.change - self.part.sum(-1) - self.error - self.rest

    def text(self, which: int) -> "Shift":
        """The shift in the similarity to one of several texts."""
        parts = (getattr(self, name)[which] for name in ("part", "error", "rest", "original", "view"))
        return Shift(self.latent, self.before, self.after, *parts)


@torch.no_grad()
def decompose(
    x0: Activations,
    x1: Activations,
    codes0: Pair,
    codes1: Pair,
    W_dec: Float[Tensor, "latent width"],
    embed: Embed,
    target: Target,
    *,
    tokens: slice = ALL,
    n_nodes: int | None = None,
) -> Shift:
    """Take the change from x0 to x1 apart. A target of several texts, (text, image), costs a backward pass for each.

    tokens: those that the codes are of, where the tail reads others, too, such as the class token beside the patches.
    n_nodes: as many as `TOLERANCE` asks for, unless it is given; beyond `MOST_NODES` the gap stays what it is.
    """
    _checked(x0, x1, codes0, codes1, tokens)
    gradient, original, view = path_gradient(x0, x1, embed, target, n_nodes=n_nodes)
    entries = union(codes0, codes1)

    def summed(each: Float[Tensor, "what image entry"]) -> Float[Tensor, "what image slot"]:
        slots = each.new_zeros(*each.shape[:2], entries.latent.shape[1] + 1)
        return slots.scatter_add_(2, entries.place.expand_as(each), each)[..., :-1]

    # (text, image, token, width), with a token where there is no such dimension
    gradient, moved = gradient.reshape(len(gradient), *by_token(x0).shape), by_token(x1).double() - by_token(x0)
    part = summed(_along(entries, W_dec, gradient[:, :, tokens]))
    before, after = summed(torch.stack([entries.before, entries.after]))
    whole = torch.einsum("tinw,inw->nti", gradient.double(), moved)
    inside = whole[tokens].sum(0)
    found = (part, inside - part.sum(-1), whole.sum(0) - inside)
    if original.ndim == 1:
        found = (each[0] for each in found)
    return Shift(entries.latent, before, after, *found, original, view)


def path_gradient(
    x0: Activations, x1: Activations, embed: Embed, target: Target, *, n_nodes: int | None = None
) -> tuple[Float[Tensor, "text image *token width"], Float[Tensor, "*text image"], Float[Tensor, "*text image"]]:
    """The mean gradient of the target over the straight path from x0 to x1, and the target at both ends (float64).

    By Gauss-Legendre quadrature, exact where the gradient is a polynomial in t of degree 2 n_nodes - 1 or less. A
    target of shape (image,) is one text.
    """
    if n_nodes is not None and n_nodes < 1:
        raise ValueError(f"n_nodes = {n_nodes}: 1 or more is accepted")
    x0, x1 = x0.detach(), x1.detach()
    with torch.no_grad():
        original, view = (target(embed(x)).double() for x in (x0, x1))
    fits = original.ndim in (1, 2) and original.shape[-1] == len(x0)
    if not fits or not (original.isfinite() & view.isfinite()).all():
        raise ValueError(f"target of shape {tuple(original.shape)}: finite, (image,) or (text, image), is accepted")
    n_texts = 1 if original.ndim == 1 else len(original)
    wanted, moved = (view - original).reshape(n_texts, -1), x1.double() - x0.double()
    allowed = TOLERANCE * view.abs().clamp_min(1).reshape(n_texts, -1)
    n, gradient = n_nodes or FEWEST_NODES, x0.new_zeros(n_texts, *x0.shape)
    done = torch.zeros_like(wanted, dtype=torch.bool)
    while True:
        finer = _mean_gradient(x0, x1, lambda x: target(embed(x)).reshape(n_texts, -1), n_texts, n)
        # each text and image keeps the first that is complete: it does not depend on those it is taken with
        gradient = torch.where(done.view(*done.shape, *[1] * (x0.ndim - 1)), gradient, finer)
        done = (wanted - (gradient * moved).flatten(2).sum(2)).abs() <= allowed
        if n_nodes is not None or n >= MOST_NODES or done.all():
            return gradient, original, view
        n *= 2


def _mean_gradient(
    x0: Activations,
    x1: Activations,
    target: Callable[[Activations], Float[Tensor, "text image"]],
    n_texts: int,
    n_nodes: int,
) -> Float[Tensor, "text image *token width"]:
    gradient = x0.new_zeros(n_texts, *x0.shape)
    for node, weight in zip(*np.polynomial.legendre.leggauss(n_nodes), strict=True):
        with torch.enable_grad():
            x = torch.lerp(x0, x1, (1 + node) / 2).requires_grad_()
            sums = target(x).sum(1).unbind()
        for text in range(n_texts):
            (found,) = torch.autograd.grad(sums[text], x, retain_graph=text + 1 < n_texts)
            gradient[text].add_(found, alpha=weight / 2)
    return gradient


def joined(parts: Iterable[Shift]) -> Shift:
    """The shifts of several sets of images as one."""
    parts = list(parts)
    n_slots = max(part.latent.shape[1] for part in parts)
    found = {}
    for name in Shift._fields:
        each = [getattr(part, name) for part in parts]
        if name in ("latent", "before", "after", "part"):
            filling = -1 if name == "latent" else 0
            each = [F.pad(one, (0, n_slots - one.shape[-1]), value=filling) for one in each]
            found[name] = torch.cat(each, dim=-2)
        else:
            found[name] = torch.cat(each, dim=-1)
    return Shift(**found)


# Over many images -------------------------------------------------------------------------------------------------


def account_table(shifts: Mapping[str, Shift], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """What the mean change of each augmentation is made of.

    Columns augmentation, quantity, mean, low, high, n, with the quantities change, lost (the parts below 0), gained
    (those above), error, rest, and gap, the absolute one.
    """

    def quantities(shift: Shift) -> dict[str, Tensor]:
        lost, gained = one_text(shift).part.clamp_max(0).sum(1), shift.part.clamp_min(0).sum(1)
        ends = {"error": shift.error, "rest": shift.rest, "gap": shift.gap.abs()}
        return {"change": shift.change, "lost": lost, "gained": gained, **ends}

    return quantity_table({name: quantities(shift) for name, shift in shifts.items()}, n_resamples, seed)


def concentration(shift: Shift) -> dict[str, Float[Tensor, " image"]]:
    """On how few latents each image's change rests, from the absolute parts |c_j|. NaN where no latent changed.

    half, ninety: the smallest number of latents that make up 50 % and 90 % of sum |c_j|; participation: the number of
    equal parts that would be as spread out, (sum |c_j|)^2 / sum c_j^2; latents: those whose part is not 0; error: share
    of the error's absolute part in sum |c_j| + |error|.
    """
    size = one_text(shift).part.abs()
    total = size.sum(1)
    shares = size.sort(dim=1, descending=True).values.cumsum(1) / total[:, None]
    # a share that reaches the level but for rounding has reached it
    half, ninety = ((shares < level - 1e-9).sum(1) + 1.0 for level in (0.5, 0.9))
    found = {
        "half": half,
        "ninety": ninety,
        "participation": total.square() / size.square().sum(1),
        "latents": (size > 0).sum(1).double(),
        "error": shift.error.abs() / (shift.error.abs() + total),
    }
    return {name: torch.where(total > 0, each, torch.nan) for name, each in found.items()}


def concentration_table(shifts: Mapping[str, Shift], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """`concentration` over the n images whose latents changed. Columns augmentation, quantity, mean, low, high, n."""
    return quantity_table({name: concentration(shift) for name, shift in shifts.items()}, n_resamples, seed)


def latent_means(shift: Shift) -> pd.DataFrame:
    """What every latent that is on anywhere does over all images, the largest mean part in absolute value first.

    latent
    part       mean part of the change; images in which the latent is off twice count as 0, here and below
    share      of all absolute parts of all images
    lost       mean activation lost, max(a0 - a1, 0)
    gained     mean activation gained, max(a1 - a0, 0)
    destroyed  share of images in which it was on and is off
    invented   share of images in which it was off and is on
    """
    used = one_text(shift).latent >= 0
    latents, inverse = shift.latent[used].unique(return_inverse=True)
    sums = {name: each[used].double() for name, each in _effects(shift).items()}
    sums["size"] = shift.part[used].double().abs()
    found = {"latent": latents.cpu().numpy()}
    for name, each in sums.items():
        summed = torch.zeros(len(latents), dtype=torch.float64, device=each.device).index_add_(0, inverse, each)
        found[name] = (summed / len(shift.latent)).cpu().numpy()
    table = pd.DataFrame(found)
    table.insert(2, "share", table["size"] / table["size"].sum() if table["size"].any() else 0.0)
    return table.drop(columns="size").sort_values("part", key=lambda p: -p.abs(), kind="stable", ignore_index=True)


def fingerprints(shifts: Mapping[str, Shift], *, n_shown: int = 10, n_resamples: int, seed: int) -> pd.DataFrame:
    """The latents that carry each augmentation's shift: the first `n_shown` of `latent_means`, with their intervals.

    Columns augmentation, the columns of `latent_means`, n, and NAME_low, NAME_high for all but latent and share.
    """
    tables = []
    for augmentation, shift in shifts.items():
        table = latent_means(shift).head(n_shown)
        here = shift.latent[..., None] == torch.tensor(table["latent"].to_list(), device=shift.latent.device)
        for name, each in _effects(shift).items():
            by_image = (here * each.double()[..., None]).sum(1).T.cpu().numpy()
            found = mean_intervals(by_image, n_resamples=n_resamples, seed=seed, index=pd.Index(table["latent"]))
            table[[f"{name}_low", f"{name}_high"]] = found[["low", "high"]].to_numpy()
        table.insert(0, "augmentation", augmentation)
        tables.append(table.assign(n=len(shift.latent)))
    return pd.concat(tables, ignore_index=True)


class Entries(NamedTuple):
    """The codes of an image and its view side by side, an entry for each slot of either at each token."""

    latent: Int[Tensor, "image slot"]
    """The latents that are on in any entry, in growing order, then -1."""
    place: Int[Tensor, "image entry"]
    """The slot of each entry's latent; one behind the last for an empty entry."""
    indices: Int[Tensor, "image entry"]
    before: Float[Tensor, "image entry"]
    """Activation in the image; 0 in the entries of the view."""
    after: Float[Tensor, "image entry"]


def union(codes0: Pair, codes1: Pair) -> Entries:
    """Every latent of an image once, without a loop: equal ones are neighbours in a sorted row."""
    (i0, v0), (i1, v1) = codes0, codes1
    indices = torch.cat([i0, i1], dim=-1).flatten(1)
    before = torch.cat([v0, torch.zeros_like(v1)], dim=-1).flatten(1)
    after = torch.cat([torch.zeros_like(v0), v1], dim=-1).flatten(1)
    empty = torch.iinfo(indices.dtype).max
    ordered, order = torch.where((before != 0) | (after != 0), indices, empty).sort(dim=1)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = first.cumsum(1) - 1
    n_slots = int((first & (ordered < empty)).sum(1).max())
    place = torch.empty_like(slot).scatter_(1, order, torch.where(ordered < empty, slot, n_slots))
    latent = torch.full((len(indices), n_slots + 1), -1, device=indices.device)
    latent.scatter_(1, place, indices)
    return Entries(latent[:, :-1].contiguous(), place, indices, before, after)


def _along(
    entries: Entries, W_dec: Float[Tensor, "latent width"], gradient: Float[Tensor, "text image token width"]
) -> Float[Tensor, "text image entry"]:
    """The part of each entry, its change in activation times d . g at its token, a few rows at a time (float64)."""
    rows, width = gradient.flatten(1, 2), gradient.shape[-1]
    indices = entries.indices.view(rows.shape[1], -1)
    n_rows = max(1, CHUNK_ENTRIES // (indices.shape[1] * width))
    slopes = [
        torch.einsum("rew,trw->tre", W_dec[some], g)
        for some, g in zip(indices.split(n_rows), rows.split(n_rows, dim=1), strict=True)
    ]
    change = (entries.after - entries.before).double()
    return torch.cat(slopes, dim=1).double().view(-1, *change.shape) * change


def by_token(x: Activations) -> Float[Tensor, "image token width"]:
    return x.reshape(len(x), -1, x.shape[-1])


def _checked(x0: Activations, x1: Activations, codes0: Pair, codes1: Pair, tokens: slice) -> None:
    if x0.shape != x1.shape or x0.ndim not in (2, 3) or not len(x0):
        raise ValueError(
            f"activations of shape {tuple(x0.shape)} and {tuple(x1.shape)}: the same (image, width) or "
            "(image, token, width), of at least one image, is accepted for both"
        )
    rows = x0[..., 0] if x0.ndim == 2 else x0[:, tokens, 0]
    for indices, values in (codes0, codes1):
        if indices.shape != values.shape or indices.shape[:-1] != rows.shape:
            raise ValueError(
                f"codes of shape {tuple(indices.shape)} and {tuple(values.shape)}: a row of slots for each of "
                f"{tuple(rows.shape)} is accepted"
            )


def one_text(shift: Shift) -> Shift:
    if shift.part.ndim != 2:
        raise ValueError(f"a shift of {len(shift.part)} texts: choose one with .text(number)")
    return shift


def _effects(shift: Shift) -> dict[str, Float[Tensor, "image slot"]]:
    """What is averaged over images, by the names of `latent_means`."""
    was, is_on = shift.before != 0, shift.after != 0
    return {
        "part": shift.part,
        "lost": (shift.before - shift.after).clamp_min(0),
        "gained": (shift.after - shift.before).clamp_min(0),
        "destroyed": was & ~is_on,
        "invented": is_on & ~was,
    }


def quantity_table(quantities: Mapping[str, Mapping[str, Tensor]], n_resamples: int, seed: int) -> pd.DataFrame:
    """Columns augmentation, quantity, mean, low, high, n: over the images on which a quantity is known."""
    tables = []
    for augmentation, by_name in quantities.items():
        values = torch.stack(list(by_name.values())).double().cpu().numpy()
        values = values[:, np.isfinite(values).all(axis=0)]
        index = pd.MultiIndex.from_product([[augmentation], by_name], names=["augmentation", "quantity"])
        tables.append(mean_intervals(values, n_resamples=n_resamples, seed=seed, index=index).assign(n=values.shape[1]))
    return pd.concat(tables, ignore_index=True)
