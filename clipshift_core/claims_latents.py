"""Paper B's claims: the statistic that decides each, written down before any value was seen (see `claims`).

B1a  Activation times gradient orders latents more faithfully than logit lens, by deletion: the area under the
     normalised deletion curve by logit lens minus that by act x grad, mean over images, above 0.
B1b  The same by insertion: the area by act x grad minus that by logit lens, above 0.
B1c  It is about as faithful as integrated gradients: of what integrated gradients gain over a random order, in
     deletion area, act x grad gains at least 95 %. (That it costs a fraction needs no test: one gradient against one
     for each step.)

B1d to B1f are B1a to B1c for a dictionary of the patches' tokens at an earlier block.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clipshift_core import stats
from clipshift_core.claims import Claim, Criterion
from clipshift_core.faithfulness import Curves

_FAITHFUL = (
    Criterion(
        "B1a",
        "Act x grad is more faithful than logit lens (deletion)",
        "Area of the normalised deletion curve by logit lens minus that by act x grad",
        bound=0,
    ),
    Criterion(
        "B1b",
        "Act x grad is more faithful than logit lens (insertion)",
        "Area of the normalised insertion curve by act x grad minus that by logit lens",
        bound=0,
    ),
    Criterion(
        "B1c",
        "Act x grad is about as faithful as integrated gradients",
        "Share of integrated gradients' lead over a random order, in deletion area, that act x grad has",
        bound=0.95,
    ),
)


def faithfulness(
    found: Curves,
    *,
    notebook: str,
    n_resamples: int,
    seed: int,
    letters: str = "abc",
    where: str = "",
) -> list[Claim]:
    """The rows of B1 from the normalised curves of the methods of `attribution`.

    letters, where: of a dictionary at another place, such as "def" and "patches after block 3".
    """
    deletion, insertion = (dict(zip(found.methods, areas, strict=True)) for areas in found.areas.values())
    n, settings = len(deletion["act_x_grad"]), {"n_resamples": n_resamples, "seed": seed}

    def lead(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        ours, exact = (counts @ (deletion["random"] - deletion[m]) for m in ("act_x_grad", "integrated_gradients"))
        return np.divide(ours, exact, out=np.full(len(ours), np.nan), where=exact > 0)

    statistics = (
        lambda counts: counts @ (deletion["logit_lens"] - deletion["act_x_grad"]) / n,
        lambda counts: counts @ (insertion["act_x_grad"] - insertion["logit_lens"]) / n,
        lead,
    )
    rows = []
    for letter, criterion, statistic in zip(letters, _FAITHFUL, statistics, strict=True):
        statement = f"{criterion.statement}; {where}" if where else criterion.statement
        here = replace(criterion, claim=f"B1{letter}", statement=statement)
        rows.append(here.decide(stats.bootstrap(statistic, n, **settings), n, notebook))
    return rows
