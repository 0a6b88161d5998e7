"""Every claim can be read, and the figure puts each on the side of its bound that the arithmetic gives."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from clipshift_core import claims, figures_ledger, ledger
from clipshift_core.claims import Claim, Criterion
from clipshift_core.profiles import ROOT
from clipshift_core.stats import Interval


def decided(name: str, side: str, bound: float, *values: float) -> Claim:
    return Criterion(name, f"what {name} says", "a mean", bound, side).decide(Interval(*values), 9, "02")


ROWS = [
    decided("A1a", "above", 0.5, 0.7, 0.6, 0.9),
    decided("A2a", "below", 0.1, 0.3, 0.2, 0.4),
    decided("B3a", "above", 0.0, 0.0, np.nan, np.nan),
    Claim("A4a", "stands apart", "a share; reproduced if it is alone", 1.0, np.nan, np.nan, 9, "reproduced", "02"),
]


def test_the_bound_is_read_back_from_what_the_ledger_says():
    assert [ledger.bound(row.statistic) for row in ROWS[:2]] == [(0.5, "above"), (0.1, "below")]
    value, side = ledger.bound(ROWS[3].statistic)
    assert np.isnan(value) and side == ""
    tiny = decided("B2a", "above", 100 / 30_000, 0.1, 0.1, 0.1)
    assert ledger.bound(tiny.statistic)[0] == pytest.approx(100 / 30_000, rel=1e-4)


def test_every_claim_that_the_code_can_record_has_a_meaning():
    told = "".join((ROOT / "clipshift_core" / f"{room}.py").read_text() for room in ("claims", "claims_latents"))
    named = set(re.findall(r"^([AB]\d[a-z])  ", told, flags=re.MULTILINE)) - set(ledger.SAME)
    assert named == set(ledger.MEANINGS) and set(ledger.SAME.values()) <= named
    shipped = claims.table(ROWS)
    assert ledger.explained(shipped)["it does not mean"].str.len().gt(20).all()
    with pytest.raises(KeyError):
        ledger.meaning("C9")


def test_success_is_right_of_the_line():
    figure = figures_ledger.claims(claims.table(ROWS))
    points = {trace.name.split(" (")[0]: trace for trace in figure.data}
    good, bad, unknown = points["reproduced"], points["not reproduced"], points["not testable here"]
    # (0.7 - 0.5) / (0.9 - 0.5); its interval from 0.25 to 1
    assert good.x[0] == pytest.approx(0.5) and good.x[1] == 0.5
    assert (good.error_x.arrayminus[0], good.error_x.array[0]) == pytest.approx((0.25, 0.5))
    # below 0.1: (0.1 - 0.3) / 0.3, from -1 to -1/3
    assert bad.x[0] == pytest.approx(-2 / 3)
    assert (bad.error_x.arrayminus[0], bad.error_x.array[0]) == pytest.approx((1 / 3, 1 / 3))
    assert unknown.x[0] == 0 and list(good.y) == [0, 3]


def test_a_sheet_names_every_figure(tmp_path):
    for number in range(5):
        Image.fromarray(np.full((30, 60, 3), 40 * number, np.uint8)).save(tmp_path / f"0{number}-x.png")
        (tmp_path / f"0{number}-x.json").write_text(json.dumps({"title": f"What {number} shows"}))
    figure = figures_ledger.sheet(sorted(tmp_path.glob("*.png")), "All")
    assert len(figure.layout.images) == 5
    told = [annotation.text for annotation in figure.layout.annotations]
    assert told == [f"<b>0{n}-x</b><br>What {n} shows" for n in range(5)]
    assert {image.y for image in figure.layout.images} == {0, 150 + figures_ledger.CAPTION}
    assert isinstance(figures_ledger.claims(claims.table([])).data, tuple)
