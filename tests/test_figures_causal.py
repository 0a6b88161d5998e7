"""The figures of the causal truth and of repair: the numbers they were given, in order, every label there."""

import numpy as np
import pandas as pd
import pytest
from PIL import ImageFont

from clipshift_core import canvas
from clipshift_core import figures_causal as figures

PLANTED = [
    ("co-occurrence", "duck", "cue", "ripples", 0.14, True),
    ("co-occurrence", "balloon", "cue", "confetti", 0.002, False),
    ("artefact", "house", "cue", "film frame", 0.1, True),
    ("polysemy", "bat", "thing", "bat (club)", 0.4, True),
    ("compound", "star", "thing", "starfish", 0.25, True),
]
KEYS = ["word", "family", "cue"]


@pytest.fixture
def planted():
    table = pd.DataFrame(PLANTED, columns=["kind", *KEYS, "rise", "causal"])
    return table.assign(low=table["rise"] - 0.01, high=table["rise"] + 0.03)


@pytest.fixture
def removed():
    """Two latents of ripples, of which the second has the larger share; one of the bat's; one of a row not planted."""
    rows = [("duck", "cue", "ripples", 17, 0.25), ("duck", "cue", "ripples", 9, 0.4),
            ("bat", "thing", "bat (club)", 3, 1.2), ("owl", "cue", "ripples", 17, 0.9)]  # fmt: skip
    return pd.DataFrame(rows, columns=["word", "family", "value", "latent", "share"])


@pytest.fixture
def remaining(planted):
    return planted[["kind", *KEYS]].assign(remains=[0.07, 0.001, 0.1, 0.1, np.nan])


@pytest.fixture
def outcomes():
    rows = []
    for s, kind in enumerate(("ordinary", "misled", "misleading", "without cue")):
        for i, name in enumerate(("true", "found", "nothing", "random")):
            accuracy = 0.5 + 0.1 * s + 0.01 * i
            difference = 0.0 if name == "nothing" else (-1) ** i * 0.02
            low = difference - 0.01 - 0.02 * (name == "random")
            interval = (accuracy, accuracy - 0.04, accuracy + 0.02)
            rows.append((kind, name, *interval, difference, low, difference + 0.01, 60 + 1000 * s))
    columns = [
        "scenes",
        "suppressed",
        "accuracy",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
        "n",
    ]
    return pd.DataFrame(rows, columns=columns)


def everything(planted, removed, remaining, outcomes):
    two = [pd.concat([table.assign(model="a"), table.assign(model="b")]) for table in (planted, removed, remaining)]
    unknown = outcomes.copy()
    unknown.loc[::3, ["accuracy", "low", "high", "difference", "difference_low", "difference_high"]] = np.nan
    return {
        "rises": figures.rises(planted, removed),
        "rises with found": figures.rises(planted, removed, remaining),
        "rises of two": figures.rises(*two),
        "rises, no latent": figures.rises(planted, removed[:0]),
        "rises, one": figures.rises(planted[:1].assign(low=np.nan, high=np.nan), removed),
        "rises, none": figures.rises(planted[:0], removed, remaining),
        "suppression": figures.suppression(outcomes),
        "suppression, unknown": figures.suppression(unknown),
        "suppression, none": figures.suppression(outcomes[:0]),
        "suppression, others": figures.suppression(outcomes.replace({"suppressed": {"true": "our own choice"}})),
    }


def close(values):
    return pytest.approx(list(values), rel=1e-5)


def panel(figure, axis):
    return [trace for trace in figure.data if trace.xaxis == axis and trace.x != (None,)]


def test_every_figure_fits_the_page(planted, removed, remaining, outcomes):
    for name, figure in everything(planted, removed, remaining, outcomes).items():
        layout, text = figure.layout, figure.to_json()
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1200, name
        for line, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert ImageFont.load_default(size).getlength(line) < canvas.WIDTH - 30, f"{name}: {line!r}"
        assert len(text) < 60_000 and "bdata" not in text and "NaN" not in text and "Infinity" not in text, name


def test_rises_are_grouped_by_kind_in_the_order_given(planted, removed):
    figure = figures.rises(planted, removed)
    axis = figure.layout.yaxis
    assert dict(zip(axis.tickvals, axis.ticktext, strict=True)) == {
        0: "<b>Co-occurrence</b>", 1: "duck: ripples", 2: "balloon: confetti", 3: "<b>Artefact</b>",
        4: "house: film frame", 5: "<b>Polysemy</b>", 6: "bat: bat (club)", 7: "<b>Compound</b>", 8: "star: starfish",
    }  # fmt: skip
    assert axis.range[0] > 8 and axis.range[1] < 0
    (dots,) = panel(figure, "x")
    assert list(dots.y) == [1, 2, 4, 6, 8] and list(dots.x) == close(planted["rise"])
    assert list(np.subtract(dots.x, dots.error_x.arrayminus)) == close(planted["low"])
    assert list(np.add(dots.x, dots.error_x.array)) == close(planted["high"])
    assert list(dots.marker.symbol) == ["circle", "circle-open", "circle", "circle", "circle"]
    low, high = figure.layout.xaxis.range
    assert low < -0.008 and high > 0.43


def test_what_remains_without_latents(planted, removed, remaining):
    best, found = panel(figures.rises(planted, removed, remaining), "x2")
    # Ripples' best latent takes 0.4, the bat's 1.2; house and star have none; confetti's rise does not count.
    assert list(best.x) == [pytest.approx(0.6), None, None, pytest.approx(-0.2), None]
    assert list(found.x) == [pytest.approx(0.5), None, pytest.approx(1), pytest.approx(0.25), None]
    assert list(best.y) == list(found.y) == [1, 2, 4, 6, 8] and best.marker.symbol != found.marker.symbol
    figure = figures.rises(planted, removed, remaining)
    assert figure.layout.xaxis2.range[0] < -0.2 and figure.layout.xaxis2.range[1] > 1
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == ["without its best latent", "without all that are listed"]
    assert [trace.name for trace in figures.rises(planted, removed).data if trace.showlegend is not False] == named[:1]
    assert all(x is None for x in panel(figures.rises(planted, removed), "x2")[1].x)


def test_models_are_told_apart(planted, removed, remaining):
    other = [planted.assign(rise=planted["rise"] / 2), removed.assign(share=0.3), remaining]
    both = [pd.concat([a.assign(model="first"), b.assign(model="second")]) for a, b in
            zip((planted, removed, remaining), other, strict=True)]  # fmt: skip
    figure = figures.rises(*both)
    first, second = panel(figure, "x")
    assert list(second.x) == close(planted["rise"] / 2) and (first.name, second.name) == ("first", "second")
    assert first.marker.color != second.marker.color and first.marker.symbol[0] != second.marker.symbol[0]
    gaps = np.subtract(second.y, first.y)
    assert (gaps > 0.2).all() and (gaps < 0.5).all() and np.add(first.y, second.y).tolist() == close([2, 4, 8, 12, 16])
    best, found, best_of_second, found_of_second = panel(figure, "x2")
    assert best.x[0] == pytest.approx(0.6) and best_of_second.x[0] == best_of_second.x[3] == pytest.approx(0.7)
    assert found.x[0] == pytest.approx(0.5) and found_of_second.x[0] == pytest.approx(1)


def test_suppression_has_a_panel_for_each_kind_of_scenes(outcomes):
    figure = figures.suppression(outcomes)
    kinds, names = ["misled", "misleading", "without cue", "ordinary"], ["nothing", "random", "found", "true"]
    titles = [note.text.split("<br>")[0] for note in figure.layout.annotations]
    assert titles == [figures.SCENES[kind] for kind in kinds] and "1,060 images" in figure.layout.annotations[0].text
    for kind, axis in zip(kinds, ("x", "x2", "x3", "x4"), strict=True):
        rows = outcomes[outcomes["scenes"] == kind].set_index("suppressed").loc[names]
        dots = panel(figure, axis)
        assert [dot.y[0] for dot in dots] == [figures.SET_LOOKS[name].label for name in names]
        assert [dot.x[0] for dot in dots] == close(rows["accuracy"])
        assert [dot.x[0] - dot.error_x.arrayminus[0] for dot in dots] == close(rows["low"])
        assert [dot.x[0] + dot.error_x.array[0] for dot in dots] == close(rows["high"])
        low, high = figure.layout[axis.replace("x", "xaxis")].range
        assert low < rows["low"].min() and high > rows["high"].max()
        assert len({dot.marker.symbol for dot in dots}) == len({dot.marker.color for dot in dots}) == 4
    # Of ordinary scenes: nothing 52 %; random 53 %, -2 points with an interval from -5 to -1; found 51 %, true 50 %.
    said = [dot.text[0] for dot in panel(figure, "x4")]
    assert said == ["52.0%", "53.0% (<b>−2.0</b>)", "51.0% (<b>−2.0</b>)", "50.0% (<b>+2.0</b>)"]


def test_what_is_not_sure_is_not_bold(outcomes):
    outcomes.loc[outcomes["suppressed"] == "found", "difference_high"] = 0.001
    said = [dot.text[0] for dot in panel(figures.suppression(outcomes), "x4")]
    assert said[2] == "51.0% (−2.0)" and "<b>" in said[1]
    unknown = outcomes.assign(accuracy=np.nan, low=np.nan, high=np.nan)
    assert {dot.text[0] for dot in figures.suppression(unknown).data} == {"unknown"}
