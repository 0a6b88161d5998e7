"""Paper B's claims against arithmetic by hand on curves that are made up."""

import numpy as np
import pytest

from clipshift_core import claims_latents
from clipshift_core.faithfulness import Curves

SETTINGS = {"n_resamples": 300, "seed": 0, "notebook": "09"}
STEPS = np.array([0.0, 0.5, 1.0])


def made(**middle: tuple[float, float]) -> Curves:
    """Twenty images whose normalised curves have the given heights in the middle: deletion, insertion of each method.

    The area of a curve from 1 over h to 0 is (1 + h) / 4 + h / 4 = 0.25 + h / 2.
    """
    bump = np.linspace(-0.01, 0.01, 20)
    heights = np.array([[[kind + b for b in bump] for kind in pair] for pair in middle.values()])
    ones, zeros = np.ones((len(middle), 20)), np.zeros((len(middle), 20))
    deletion = np.stack([ones, heights[:, 0], zeros], axis=2)
    insertion = np.stack([zeros, heights[:, 1], ones], axis=2)
    return Curves(tuple(middle), STEPS, np.zeros(20), np.ones(20), deletion, insertion)


def rows_of(found, **settings):
    return {row.claim: row for row in claims_latents.faithfulness(found, **SETTINGS, **settings)}


def test_each_statistic_by_hand():
    rows = rows_of(
        made(
            act_x_grad=(0.12, 0.9), logit_lens=(0.2, 0.9), integrated_gradients=(0.1, 0.9), random=(0.5, 0.5),
        )
    )  # fmt: skip
    assert rows["B1a"].value == pytest.approx((0.2 - 0.12) / 2) and rows["B1a"].verdict == "reproduced"
    assert rows["B1b"].value == pytest.approx(0) and rows["B1b"].verdict == "not reproduced"
    # (0.5 - 0.12) / (0.5 - 0.1) = 0.95, which is not above 0.95
    assert rows["B1c"].value == pytest.approx(0.95) and rows["B1c"].verdict == "not reproduced"
    assert {row.n for row in rows.values()} == {20}


def test_a_place_of_its_own_has_letters_of_its_own():
    found = made(act_x_grad=(0.1, 0.9), logit_lens=(0.2, 0.8), integrated_gradients=(0.1, 0.9), random=(0.5, 0.5))
    rows = rows_of(found, letters="def", where="patches after block 3")
    assert list(rows) == ["B1d", "B1e", "B1f"] and {row.verdict for row in rows.values()} == {"reproduced"}
    assert all(row.statement.endswith("; patches after block 3") for row in rows.values())


def test_nothing_to_divide_by_is_not_testable():
    same = dict.fromkeys(("act_x_grad", "logit_lens", "integrated_gradients", "random"), (0.3, 0.3))
    assert rows_of(made(**same))["B1c"].verdict == "not testable here"
