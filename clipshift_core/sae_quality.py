"""How well a dictionary writes activations: streaming, over more of them than fit into memory."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clipshift_core import stats
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


class Task(NamedTuple):
    """A zero-shot task: to which of some texts is an image nearest?"""

    texts: Float[Tensor, "choice dim"]
    """Directions of length 1."""
    truth: Int[Tensor, " image"] | None
    """The right choice for each image; None where nobody knows."""


def predictions(
    before: Float[Tensor, "image dim"],
    after: Float[Tensor, "image dim"],
    tasks: Mapping[str, Task],
    *,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """What changes when the model goes on with the reconstruction in place of the activation; one row a task.

    before, after: the same images' embeddings, with the activation and with its reconstruction. Columns: task;
    accuracy and accuracy_after, the shares of images that go to the right text; change, their difference, with low
    and high, its 95 % interval over images, each image paired with itself; same, the share of images that go to the
    same text as before; similarity and similarity_after, the mean cosine to the right text; moved, the mean absolute
    change of a cosine over all images and texts; n. What needs the truth is NaN where it is not known.
    """
    unit_before, unit_after = F.normalize(before, dim=1), F.normalize(after, dim=1)
    rows = []
    for name, (texts, truth) in tasks.items():
        cosines = [unit @ texts.T for unit in (unit_before, unit_after)]
        chosen = [cosine.argmax(1) for cosine in cosines]
        row = {"task": name, "same": float((chosen[0] == chosen[1]).float().mean())}
        row["moved"] = float((cosines[1] - cosines[0]).abs().mean())
        if truth is not None:
            right = np.stack([(choice == truth).numpy() for choice in chosen]).astype(float)
            to_right = [float(cosine.gather(1, truth[:, None]).mean()) for cosine in cosines]
            found = stats.bootstrap_mean(right[1] - right[0], n_resamples=n_resamples, seed=seed)
            row |= dict(zip(("change", "low", "high"), found[:3], strict=True))
            row |= {"accuracy": right[0].mean(), "accuracy_after": right[1].mean()}
            row |= {"similarity": to_right[0], "similarity_after": to_right[1]}
        rows.append(row | {"n": len(before)})
    columns = ["task", "accuracy", "accuracy_after", "change", "low", "high", "same", "similarity", "similarity_after"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "moved", "n"])
