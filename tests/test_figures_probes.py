"""The figures of probes against text: the numbers they were given, one look a reader, and nothing lost on the way."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import ImageFont

from clipshift_core import canvas, probes
from clipshift_core import figures_probes as figures
from clipshift_core.figures_probes import READER_LOOKS

STRENGTHS = (1 / 11, 0.5, 0.9, 1.0)
SETTINGS = {"n_resamples": 100, "seed": 0}
N = 60


def _answers(seed: int) -> probes.Answers:
    rng = np.random.default_rng(seed)

    def right() -> dict[str, np.ndarray]:
        return {name: rng.random(N) < p for name, p in (("aligned", 0.97), ("balanced", 0.9), ("reversed", 0.7))}

    return probes.Answers({strength: right() for strength in STRENGTHS}, right())


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(5)
    accuracy = [probes.accuracy_table(_answers(seed), **SETTINGS) for seed in (0, 1)]
    share = probes.share_table({s: rng.random(N) * s for s in STRENGTHS}, rng.random(N) / 5, **SETTINGS)
    both = pd.concat(
        [table.assign(model=name) for name, table in zip(("scene-s16", "scene-xs12"), accuracy, strict=True)]
    )
    gap = [
        ("ink", "probe", 0.01, -0.05, 0.07, False), ("ink", "text", -0.02, -0.08, 0.04, False),
        ("ruler", "probe", 0.30, 0.24, 0.36, True), ("ruler", "text", 0.10, 0.04, 0.16, True),
        ("patch", "probe", -0.25, -0.3, -0.2, True), ("patch", "text", -0.1, -0.15, -0.05, True),
        ("light_skin", "probe", 0.4, 0.3, 0.5, True),
    ]  # fmt: skip
    gap = pd.DataFrame(gap, columns=["artefact", "reader", "value", "low", "high", "planted"])
    return {"accuracy": accuracy[0], "both": both, "share": share, "shares": pd.concat(
        [share.assign(model="scene-s16"), share.assign(model="scene-xs12")]), "gaps": gap}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tables) -> dict[str, go.Figure]:
    """Each figure, of one model and of two, with unknown intervals, and empty."""
    unknown = {name: table.assign(low=np.nan, high=np.nan) for name, table in tables.items()}
    found = {}
    for prefix, some in (("", tables), ("unknown ", unknown), ("empty ", {k: t[:0] for k, t in tables.items()})):
        found[f"{prefix}accuracy"] = figures.robustness(some["accuracy"])
        found[f"{prefix}both"] = figures.robustness(some["both"])
        found[f"{prefix}share"] = figures.shares(some["share"])
        found[f"{prefix}shares"] = figures.shares(some["shares"])
        found[f"{prefix}gaps"] = figures.gaps(some["gaps"], n=N)
    return found


def _named(figure: go.Figure, reader: str) -> list[go.Scatter]:
    """The traces of one reader, panel by panel."""
    return [trace for trace in figure.data if trace.name == READER_LOOKS[reader].label]


def _close(values) -> pytest.approx:
    return pytest.approx(list(values), rel=1e-5)


# what every figure keeps to


def test_every_figure_fits_the_page_and_says_what_it_shows(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1000, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert ImageFont.load_default(size).getlength(text) < canvas.WIDTH - 30, f"{name}: {text!r}"
        empty = name.startswith("empty") and "gaps" not in name
        assert ("no images" if empty else f"{N} images") in layout.title.subtitle.text, name


def test_figures_are_small_and_plain(everything):
    for name, figure in everything.items():
        text = figure.to_json()
        assert len(text) < 60_000 and "bdata" not in text and "NaN" not in text and "Infinity" not in text, name
        for trace in figure.data:
            for value in [*(trace.x or ()), *(trace.y or ())]:
                assert value == float(f"{value:.6g}"), name


def test_the_order_of_the_rows_does_not_matter(tables, everything):
    shuffled = {name: table.sample(frac=1, random_state=2) for name, table in tables.items()}
    again = {
        "accuracy": figures.robustness(shuffled["accuracy"]),
        "share": figures.shares(shuffled["share"]),
        "gaps": figures.gaps(shuffled["gaps"], n=N),
    }
    for name, figure in again.items():
        assert canvas.data_sha256(figure) == canvas.data_sha256(everything[name]), name


# against the strength


def test_accuracies_are_drawn_where_they_are(tables, everything):
    table, figure = tables["accuracy"], everything["accuracy"]
    titles = [a.text for a in figure.layout.annotations]
    assert titles == list(figures.SPLIT_TITLES.values())
    for split, probe, text in zip(
        ("aligned", "balanced", "reversed"), _named(figure, "probe"), _named(figure, "text"), strict=True
    ):
        rows = table[table["split"] == split]
        trained = rows[rows["reader"] == "probe"]
        assert list(probe.y) == _close(trained["accuracy"]) and list(probe.x) == [0, 1, 2, 3]
        assert np.subtract(probe.y, probe.error_y.arrayminus) == pytest.approx(trained["low"], abs=1e-5)
        assert np.add(probe.y, probe.error_y.array) == pytest.approx(trained["high"], abs=1e-5)
        assert list(text.y) == _close(rows[rows["reader"] == "text"]["accuracy"].repeat(2))
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    text = table[table["reader"] == "text"]
    assert [max(band.y) for band in bands] == _close(text["high"]) and [min(band.y) for band in bands] == _close(
        text["low"]
    )
    low, high = figure.layout.yaxis.range
    assert low < table["low"].min() and high > 1
    assert list(figure.layout.xaxis.ticktext) == ["1 in 11", "50%", "90%", "100%"]


def test_each_model_has_a_row_of_panels(tables, everything):
    figure = everything["both"]
    assert len(_named(figure, "probe")) == 6 and sum(bool(t.showlegend) for t in figure.data if t.name) == 2
    titles = [figure.layout[f"yaxis{i or ''}"].title.text for i in ("", 4)]
    assert titles == ["scene-s16: accuracy", "scene-xs12: accuracy"]
    other = tables["both"].query("model == 'scene-xs12' and reader == 'probe' and split == 'aligned'")
    assert list(_named(figure, "probe")[3].y) == _close(other["accuracy"])
    spans = [figure.layout[f"yaxis{i or ''}"].range for i in ("", 4)]
    assert spans[0] == spans[1]


def test_shares_are_drawn_without_differences(tables, everything):
    table, figure = tables["share"].set_index("reader"), everything["share"]
    (probe,), (text,) = _named(figure, "probe"), _named(figure, "text")
    assert list(probe.y) == _close(table.loc["probe", "share"]) and list(text.y) == _close(
        [table.loc["text", "share"]] * 2
    )
    assert (
        figure.layout.yaxis.range[0] == 0 and figure.layout.yaxis.range[1] > table.loc[["probe", "text"], "high"].max()
    )
    assert [a.text for a in everything["shares"].layout.annotations] == ["scene-s16", "scene-xs12"]


def test_strengths_are_said_without_rounding():
    said = [figures.strength_text(strength) for strength in (1 / 11, 0.5, 0.9, 1.0, 0.123456)]
    assert said == ["1 in 11", "50%", "90%", "100%", "0.123"]


# gaps


def test_gaps_stand_in_rows_with_planted_artefacts_first(everything):
    figure = everything["gaps"]
    # mean values of the planted: light skin 0.4, ruler 0.2, patch -0.175; ink is not planted
    assert list(figure.layout.yaxis.ticktext) == ["light skin", "ruler", "patch", "ink (not planted)"]
    (probe,), (text,) = _named(figure, "probe"), _named(figure, "text")
    assert list(probe.x) == [0.4, 0.3, -0.25, 0.01] and np.round(probe.y).tolist() == [0, 1, 2, 3]
    assert list(text.x) == [0.1, -0.1, -0.02] and np.round(text.y).tolist() == [1, 2, 3]  # none for light skin
    assert min(np.subtract(text.y, probe.y[1:])) > 0.2
    assert [(s.endswith("-open")) for s in probe.marker.symbol] == [False, False, False, True]
    assert list(probe.error_x.array) == pytest.approx([0.1, 0.06, 0.05, 0.06])
    low, high = figure.layout.xaxis.range
    assert low < -0.3 and high > 0.5 and figure.layout.xaxis.zeroline


def test_a_gap_of_unknown_interval_is_hollow(everything):
    assert all(symbol.endswith("-open") for trace in everything["unknown gaps"].data for symbol in trace.marker.symbol)


def test_readers_have_looks_of_their_own():
    found = figures.looks(["mine", "text", "probe", "text_two", "mine"])
    assert list(found) == ["probe", "text", "mine", "text_two"] and found["text_two"].label == "text two"
    for part in ("label", "colour", "symbol"):
        assert len({getattr(look, part) for look in found.values()}) == 4
