"""How well a dictionary writes activations: streaming, over more of them than fit into memory."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipshift_core.sae import SaeError, TopK

DENSE_FROM = 0.1
"""A latent that is on in more than this share of the rows counts as dense."""


class Quality(NamedTuple):
    """How well a dictionary writes a set of activations."""

    nmse: float
    """sum |x - x_hat|^2 / sum |x - mean|^2 over the whole set: 0 is perfect, 1 no better than the mean."""
    cosine: float
    """Mean over rows of the cosine between x and x_hat."""
    l0: float
    """Mean number of latents that are on."""
    n_dead: int
    """Latents that are never on."""
    n_dense: int
    """Latents that are on in more than `DENSE_FROM` of the rows."""
    n_rows: int
    firing: Float[Tensor, " latent"]
    """Share of the rows in which each latent is on."""


@torch.no_grad()
def quality(sae: TopK, batches: Iterable[Float[Tensor, "row width"]]) -> Quality:
    """Measure over any iterator of batches, in float64 sums; the batches are never held together."""
    device = sae.b_dec.device
    of_x = torch.zeros(sae.width, dtype=torch.float64, device=device)
    on = torch.zeros(sae.n_latents, dtype=torch.float64, device=device)
    n_rows, squares, error, cosine = 0, 0.0, 0.0, 0.0
    for batch in batches:
        x = batch.to(device)
        codes = sae.encode(x)
        x_hat = sae.decode(codes)
        # Moved near the mean first: the difference of two large sums below would lose digits.
        moved = x.double() - sae.b_dec.double()
        n_rows += len(x)
        of_x += moved.sum(0)
        squares += float(moved.square().sum())
        error += float((x.double() - x_hat.double()).square().sum())
        cosine += float(F.cosine_similarity(x.double(), x_hat.double(), dim=1).sum())
        on += torch.bincount(codes.indices[codes.values != 0], minlength=sae.n_latents)
    if not n_rows:
        raise SaeError("no batches: there is nothing to measure")
    total = squares - float(of_x.square().sum()) / n_rows
    firing = (on / n_rows).cpu()
    return Quality(
        nmse=error / total if total > 0 else float("nan"),
        cosine=cosine / n_rows,
        l0=float(firing.sum()),
        n_dead=int((firing == 0).sum()),
        n_dense=int((firing > DENSE_FROM).sum()),
        n_rows=n_rows,
        firing=firing.float(),
    )
