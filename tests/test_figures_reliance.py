"""The figures of unexpected reliance: the numbers they were given, nothing lost, no label on another."""

import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import ImageFont
from skimage.color import deltaE_ciede2000, rgb2lab

from clipshift_core import canvas, reliance
from clipshift_core import figures_reliance as figures
from clipshift_core.figures_attribution import METHOD_LOOKS

METHODS = ["random", "logit_lens", "frequency", "act_x_grad", "ablation"]
ORDER = ["ablation", "act_x_grad", "logit_lens", "frequency", "random"]


def _table(n: int = 400, n_found: int = 15) -> pd.DataFrame:
    """Candidates as `reliance.discover` gives them, the best nearly equal so that their labels must make room."""
    rng = np.random.default_rng(0)
    attribution = np.sort(np.r_[rng.normal(0, 0.001, n - n_found), 0.01 + rng.normal(0, 1e-4, n_found)])[::-1]
    found = np.arange(n) < n_found
    return pd.DataFrame(
        {
            "word": rng.choice(["duck", "mushroom"], n), "latent": np.arange(n), "n": rng.choice([20, 25], n),
            "n_on": 5, "attribution": attribution, "low": attribution - 0.001, "high": attribution + 0.001,
            "alignment": 0.01, "relative": rng.uniform(-0.4, 0.5, n), "fdr": np.where(found, 0.083, 0.7),
            "found": found,
        }
    )  # fmt: skip


def _scores() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [(method, measure) for method in METHODS for measure in reliance.MEASURES]
    table = pd.DataFrame(rows, columns=["method", "measure"]).assign(value=rng.uniform(0.1, 0.8, 20))
    table = table.assign(low=table["value"] - 0.06, high=table["value"] + 0.1)
    chance = pd.DataFrame({"method": "chance", "measure": reliance.MEASURES[:2], "value": 0.02})
    return pd.concat([table, chance], ignore_index=True).assign(n=900)


def _ranks() -> pd.DataFrame:
    rows = [
        ("co-occurrence", "duck", "ripples", 1, 40, 0.6, True),
        ("artefact", "car", "watermark", 1234, 7, 0.2, False),
    ]
    rows += [("co-occurrence", "owl", "moon", None, None, np.nan, False)]
    table = pd.DataFrame(rows, columns=["kind", "word", "cue", "rank", "latent", "share", "found"])
    return table.astype({"rank": "Int64", "latent": "Int64"})


def _models(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table.assign(model="ViT-S/16"), table.assign(model="ResNet")], ignore_index=True)


@pytest.fixture(scope="module")
def everything() -> dict[str, go.Figure]:
    """Each figure once, with two models, and the hard cases: nothing found, unknown values, nothing at all."""
    table, scores, ranks = _table(), _scores(), _ranks()
    unknown = scores.copy()
    unknown.loc[unknown["method"] == "act_x_grad", ["value", "low", "high"]] = np.nan
    unknown.loc[unknown["method"] == "random", ["low", "high"]] = np.nan
    return {
        "found": figures.attribution_and_alignment(table, float(table["attribution"][14])),
        "found_none": figures.attribution_and_alignment(table.assign(found=False), np.inf),
        "found_empty": figures.attribution_and_alignment(table[:0], np.inf),
        "scores": figures.scores(scores),
        "scores_models": figures.scores(_models(scores)),
        "scores_unknown": figures.scores(unknown),
        "scores_empty": figures.scores(scores[:0]),
        "ranks": figures.planted_ranks(ranks),
        "ranks_models": figures.planted_ranks(_models(ranks)),
        "ranks_never": figures.planted_ranks(ranks[2:]),
        "ranks_empty": figures.planted_ranks(ranks[:0]),
    }


def _close(values) -> pytest.approx:
    return pytest.approx(list(values), rel=1e-5, nan_ok=True)


# what every figure keeps to


def test_every_figure_fits_the_page_and_says_what_it_shows(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1000, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert ImageFont.load_default(size).getlength(text) < canvas.WIDTH - 30, f"{name}: {text!r}"
    assert "400 candidates, 15 found" in everything["found"].layout.title.subtitle.text
    assert "none found" in everything["found_none"].layout.title.subtitle.text
    assert "900 images" in everything["scores"].layout.title.subtitle.text
    assert "1 of 3 found" in everything["ranks"].layout.title.subtitle.text


def test_figures_are_small_and_plain(everything):
    for name, figure in everything.items():
        text = figure.to_json()
        assert len(text) < 100_000 and "bdata" not in text and "NaN" not in text and "Infinity" not in text, name
        for trace in figure.data:
            for value in [*(trace.x or ()), *(trace.y or ())]:
                if isinstance(value, float):
                    assert value == float(f"{value:.6g}"), name


# what was found


def test_candidates_stand_where_they_are(everything):
    table, (others, found) = _table(), everything["found"].data[:2]
    assert list(found.x) == _close(table["relative"][:15]) and list(found.y) == _close(table["attribution"][:15])
    assert list(others.x) == _close(table["relative"][15:]) and list(others.y) == _close(table["attribution"][15:])
    assert found.marker.color != others.marker.color and found.marker.symbol != others.marker.symbol
    assert found.text[0] == f"{table['word'][0]}, latent 0" and len(found.text) == 15
    low, high = everything["found"].layout.yaxis.range
    assert low < table["attribution"].min() and table["attribution"].max() < high


def test_the_threshold_is_a_line_with_its_rate(everything):
    line = everything["found"].layout.shapes[0]
    assert line.y0 == line.y1 == pytest.approx(_table()["attribution"][14], rel=1e-5)
    said = everything["found"].layout.annotations[0]
    assert "8.3%" in said.text and said.y == line.y0
    assert not everything["found_none"].layout.shapes and not everything["found_none"].layout.annotations


def test_the_twelve_best_are_named_and_no_name_touches_another(everything):
    figure, table = everything["found"], _table()
    names = figure.layout.annotations[1:]
    assert [a.text for a in names] == [f"<b>{table['word'][i]}</b>  latent {i}" for i in range(12)]
    low, high = figure.layout.yaxis.range
    inner = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    at = np.array([(high - a.y) / (high - low) * inner for a in names])  # pixels from the top
    assert np.diff(at).min() > 20 and at.min() > 0 and at.max() < inner
    for i, (name, line) in enumerate(zip(names, figure.data[2:], strict=True)):
        assert list(line.y) == _close([table["attribution"][i], name.y])
        assert line.x[0] == pytest.approx(table["relative"][i], rel=1e-5)
    widest = max(ImageFont.load_default(13).getlength(a.text.replace("<b>", "").replace("</b>", "")) for a in names)
    assert widest + 20 < figure.layout.margin.r


# scores


def test_each_method_has_one_look_of_its_own():
    looks = {**METHOD_LOOKS, "frequency": figures.FREQUENCY}
    assert all(figures.look_of(name) == look for name, look in looks.items())
    for part in ("label", "colour", "symbol"):
        assert len({getattr(look, part) for look in looks.values()}) == len(looks)
    assert figures.in_reading_order([*METHODS, "mine", "random"]) == [*ORDER[:-1], "mine", "random"]


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
def test_the_methods_compared_do_not_look_alike(vision):
    colours = [figures.look_of(name).colour for name in (*METHOD_LOOKS, "frequency")]
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    lab = rgb2lab(np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
    assert min(float(deltaE_ciede2000(a, b)) for a, b in itertools.combinations(lab, 2)) > 13


def _axis(trace: go.Scatter) -> int:
    return int((trace.xaxis or "x")[1:] or 1)


def test_scores_are_dots_with_their_intervals_and_chance(everything):
    table, figure = _scores().set_index(["measure", "method"]), everything["scores"]
    assert list(figure.layout.yaxis.ticktext) == [figures.look_of(name).label for name in ORDER]
    titles = [a.text for a in figure.layout.annotations]
    assert titles == ["Average precision", "Precision", "Recall of the planted", "Recall of the causal"]
    for panel, measure in enumerate(reliance.MEASURES, 1):
        mine = [t for t in figure.data if _axis(t) == panel]
        for y, method in enumerate(ORDER):
            row, look = table.loc[(measure, method)], figures.look_of(method)
            whisker, dot = mine[2 * y : 2 * y + 2]
            assert list(whisker.x) == _close(row[["low", "high"]]) and list(whisker.y) == [y, y]
            assert list(dot.x) == _close([row["value"]]) and dot.y == (y,) and dot.text == (f"{row['value']:.2f}",)
            assert (dot.marker.color, dot.marker.symbol, dot.name) == (look.colour, look.symbol, look.label)
        assert [list(t.x) for t in mine[10:]] == ([[0.02, 0.02]] if panel < 3 else [])
        low, high = figure.layout[f"xaxis{panel if panel > 1 else ''}"].range
        assert low < 0 and high > table.loc[measure]["high"].max()


def test_each_model_has_a_row_of_panels_on_the_same_axes(everything):
    figure, one = everything["scores_models"], everything["scores"]
    assert len(figure.data) == 2 * len(one.data)
    assert figure.layout.yaxis.title.text == "<b>ViT-S/16</b>" and figure.layout.yaxis5.title.text == "<b>ResNet</b>"
    for panel in range(1, 5):
        first, second = ([list(t.x) for t in figure.data if _axis(t) == at] for at in (panel, panel + 4))
        assert first == second == [list(t.x) for t in one.data if _axis(t) == panel]
        assert figure.layout[f"xaxis{panel + 4}"].range == one.layout[f"xaxis{panel if panel > 1 else ''}"].range


def test_unknown_scores_are_not_drawn(everything):
    mine = [t for t in everything["scores_unknown"].data if _axis(t) == 1]
    dots = {t.name: t for t in mine if t.name}
    assert dots["act x grad"].mode == "text" and dots["act x grad"].text == ("unknown",)
    assert len([t for t in mine if t.mode == "lines+markers"]) == 3


# ranks


def test_ranks_stand_by_kind_and_tell_three_states_apart(everything):
    figure = everything["ranks"]
    lines = ["<b>Co-occurrence</b>", "duck · ripples", "owl · moon", "<b>Artefact</b>", "car · watermark"]
    assert list(figure.layout.yaxis.ticktext) == lines and list(figure.layout.yaxis.tickvals) == list(range(5))
    drawn = {t.name: t for t in figure.data if not t.showlegend}
    assert list(drawn) == list(figures.STATES) == [t.name for t in figure.data if t.showlegend]
    found, missed, never = drawn.values()
    assert (found.x, found.y, found.text) == ((1,), (1,), ("\u00a01",))
    assert (missed.x, missed.y, missed.text) == ((1234,), (4,), ("\u00a01,234",))
    assert never.y == (2,) and never.text == ("",) and never.x[0] > 1234
    axis = figure.layout.xaxis
    assert axis.type == "log" and dict(zip(axis.tickvals, axis.ticktext, strict=True))[never.x[0]] == "none"
    assert list(axis.ticktext) == ["1", "10", "100", "1,000", "none"]
    assert axis.range[0] < 0 and axis.range[1] > np.log10(never.x[0])
    for part in (0, 1):
        assert len({look[part] for look in figures.STATES.values()}) == 3


def test_each_model_has_a_panel_of_ranks(everything):
    figure = everything["ranks_models"]
    assert [a.text for a in figure.layout.annotations] == ["ViT-S/16: 1 of 3 found", "ResNet: 1 of 3 found"]
    assert list(figure.layout.yaxis.ticktext) == list(everything["ranks"].layout.yaxis.ticktext)
    first, second = ([(t.x, t.y) for t in figure.data if _axis(t) == at and not t.showlegend] for at in (1, 2))
    assert first == second and len(first) == 3
