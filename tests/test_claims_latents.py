"""Paper B's claims against arithmetic by hand on curves that are made up."""

import numpy as np
import pandas as pd
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


def test_an_earlier_block_has_letters_of_its_own():
    found = made(act_x_grad=(0.1, 0.9), logit_lens=(0.2, 0.8), integrated_gradients=(0.1, 0.9), random=(0.5, 0.5))
    rows = rows_of(found, criteria=claims_latents.EARLIER)
    assert list(rows) == ["B1d", "B1e", "B1f"] and {row.verdict for row in rows.values()} == {"reproduced"}
    assert all(row.statement.endswith("; patches at an earlier block") for row in rows.values())


def test_nothing_to_divide_by_is_not_testable():
    same = dict.fromkeys(("act_x_grad", "logit_lens", "integrated_gradients", "random"), (0.3, 0.3))
    assert rows_of(made(**same))["B1c"].verdict == "not testable here"


def test_latents_relied_on_are_counted_once_and_by_their_bounds():
    found = pd.DataFrame(
        {
            "latent": [3, 3, 5, 8, 9],
            "attribution": [0.5, 0.3, 0.2, 0.1, 0.05],
            "low": [0.4, 0.2, 0.1, 0.05, 0.0],
            "high": [0.6, 0.4, 0.3, 0.2, 0.1],
        }
    )
    hits = found.iloc[[0, 2, 3]].assign(kind=["artefact", "compound", "typography"])
    settings = {"n_latents": 100, "n_images": 7, "notebook": "11"}
    share, kinds = claims_latents.reliances(found, 0.2, hits, **settings)
    # from 0.2: latents 3 and 5; for certain only 3; at most 3, 5 and 8
    assert (share.value, share.ci_low, share.ci_high) == (0.02, 0.01, 0.03) and share.verdict == "reproduced"
    assert (kinds.value, kinds.ci_low, kinds.ci_high) == (2, 1, 3) and kinds.verdict == "not reproduced"
    nothing = claims_latents.reliances(found, np.inf, None, **settings)
    assert nothing[0].value == 0 and nothing[0].verdict == "not reproduced"
    assert nothing[1].verdict == "not testable here"


def test_probes_and_text_by_hand():
    lost = {"probe": np.repeat([1, 0], [60, 40]), "text": np.repeat([1, 0, -1], [30, 60, 10])}
    share = {"probe": np.full(50, 0.3), "text": np.full(50, 0.3)}
    right, ambiguous = np.repeat([True, False, True, False], [60, 40, 95, 5]), np.repeat([True, False], [100, 100])
    settings = {"n_resamples": 500, "seed": 0, "notebook": "12"}
    robust, leans, unclear = claims_latents.probes_against_text(lost, share, right, ambiguous, **settings)
    assert robust.value == pytest.approx(0.6 - 0.2) and robust.verdict == "reproduced" and robust.n == 100
    assert leans.value == 0 and leans.verdict == "not reproduced"
    assert unclear.value == pytest.approx(0.4 - 0.05) and unclear.verdict == "reproduced"


def test_shortcuts_by_hand():
    # ruler: 8 of 10 called with it, 4 of 10 without; a patch in every second image speaks for benign
    called = np.array([1] * 8 + [0] * 2 + [1] * 4 + [0] * 6, bool)
    shown = pd.DataFrame({"ruler": [True] * 10 + [False] * 10, "patch": [True, False] * 10})
    with_patch, without = called[::2].mean(), called[1::2].mean()
    labels = np.array([1] * 6 + [0] * 4 + [1] * 4 + [0] * 6, bool)
    many = {name: np.tile(each, 30) for name, each in (("probe", called), ("text", labels), ("label", labels))}
    table = pd.concat([shown] * 30, ignore_index=True)
    settings = {"n_resamples": 500, "seed": 0, "notebook": "12"}
    rows = claims_latents.shortcuts(many, table, many, table, {"ruler": 1, "patch": -1}, **settings)
    ours = (0.4 - (with_patch - without)) / 2
    theirs = (0.2 - (labels[::2].mean() - labels[1::2].mean())) / 2
    assert [row.value for row in rows] == pytest.approx([ours, ours - theirs, ours - theirs])
    assert [row.claim for row in rows] == ["B4a", "B4b", "B4c"]
