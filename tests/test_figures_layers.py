"""The figures of depth, heads and models: their numbers, and text that neither overlaps nor is cut off."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import ImageFont
from scipy.optimize import minimize

from clipshift_core import canvas
from clipshift_core import figures_layers as figures

NINE = list(canvas.ORDER[1:])
PAPER = ["ViT-B-32/openai", "ViT-B-16/openai", "ViT-L-14/openai", "ViT-B-32/laion2b_s34b_b79k", "ViT-B-16-SigLIP/webli"]


def tidy(**dims) -> pd.DataFrame:
    """Every combination of the levels, augmentations in reverse reading order, with a mean and an interval."""
    table = pd.DataFrame(itertools.product(*dims.values()), columns=list(dims)).iloc[::-1].reset_index(drop=True)
    table["mean"] = np.random.default_rng(len(table)).gamma(2, 0.1, len(table))
    return table.assign(low=0.9 * table["mean"], high=1.2 * table["mean"], n=512)


def lines(n_blocks: int) -> pd.DataFrame:
    """Five of the nine end within one label's height of each other."""
    table = tidy(block=range(n_blocks), augmentation=NINE)
    close = {name: 0.01 + 0.001 * i if i < 5 else 0.3 * i for i, name in enumerate(NINE)}
    mean = table["augmentation"].map(close) * (1 + table["block"]) / n_blocks
    return table.assign(mean=mean, low=0.9 * mean, high=1.1 * mean)


def cka(n_blocks: int) -> pd.DataFrame:
    table = lines(n_blocks)
    return table.assign(cka=1 - table["mean"] / 3, low=1 - table["high"] / 3, high=1 - table["low"] / 3)


def ranks(models: list[str]) -> pd.DataFrame:
    table = tidy(model=models, augmentation=NINE)
    table = table.sort_values("model", key=lambda names: names.map(models.index), kind="stable")
    table["rank"] = table.groupby("model")["mean"].rank(ascending=False).astype(int)
    return table.assign(distance=table["mean"], distance_low=table["low"], distance_high=table["high"])


def agreement(models: list[str]) -> pd.DataFrame:
    rows = [(a, b, 0.7, 0.61, 0.83, 512) for a, b in itertools.combinations(models, 2)]
    return pd.DataFrame(rows, columns=["model", "other", "tau", "low", "high", "n"])


@pytest.fixture(scope="module")
def everything() -> dict:
    """Each figure in the demo's size and in that of the paper's models, and of one image."""
    two = ["scene-s16", "scene-xs12"]
    table, taus = ranks(two), agreement(two)
    unknown = {name: np.nan for name in ("low", "high", "distance_low", "distance_high")}
    one = table.assign(n=1, **unknown)
    return {
        "lines": figures.block_lines(lines(5)),
        "relative": figures.block_lines(lines(12), "relative"),
        "cka_lines": figures.block_lines(cka(5), "cka"),
        "one_image_lines": figures.block_lines(lines(5).assign(low=np.nan, high=np.nan, n=1)),
        "one_block": figures.block_lines(lines(1)),
        "cka": figures.cka_heatmap(cka(5)),
        "cka_12": figures.cka_heatmap(cka(12)),
        "cka_24": figures.cka_heatmap(cka(24)),
        "heads": figures.head_heatmap(tidy(block=range(5), head=range(5), augmentation=NINE)),
        "heads_12": figures.head_heatmap(tidy(block=range(12), head=range(12), augmentation=NINE)),
        "two_views": figures.head_heatmap(tidy(block=[0, 2], head=range(5), augmentation=NINE[:2])),
        "ranks": figures.model_ranks(table, taus),
        "ranks_5": figures.model_ranks(ranks(PAPER), agreement(PAPER)),
        "one_image_ranks": figures.model_ranks(one, taus.assign(low=np.nan, high=np.nan)),
        "scatter": figures.model_scatter(table),
        "scatter_5": figures.model_scatter(ranks(PAPER)),
        "one_image_scatter": figures.model_scatter(one),
        "not_moved": figures.model_scatter(table.assign(distance_low=0.0)),
    }


def walk(value, path=""):
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if _is_list(value) else ():
        yield from walk(inner, f"{path}.{key}")


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


def width(text: str, size: float) -> float:
    return ImageFont.load_default(size).getlength(text)


def test_numbers_are_plain_and_rounded(everything):
    for name, figure in everything.items():
        assert "bdata" not in figure.to_json()
        for path, value in walk(figure.to_plotly_json()["data"]):
            assert not isinstance(value, np.ndarray | np.generic), f"{name}{path}"
            if isinstance(value, float) and "colorscale" not in path:
                assert value == float(f"{value:.6g}"), f"{name}{path}"


def test_titles_fit_and_axes_are_named(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 300 <= layout.height < 1300, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert width(text, size) < canvas.WIDTH - 30, f"{name}: {text}"
    for name in ("lines", "relative", "cka_lines", "scatter"):
        assert (
            "1 − " in everything[name].layout.yaxis.title.text or "(0 same)" in everything[name].layout.yaxis.title.text
        )
    assert everything["lines"].layout.title.subtitle.text == "Mean over 512 images, with 95% intervals"
    assert everything["one_image_lines"].layout.title.subtitle.text == "Mean over 1 image, intervals unknown"


# lines


def test_lines_hold_the_table_in_the_reading_order(everything):
    for name, table in (("lines", lines(5)), ("relative", lines(12))):
        figure = everything[name]
        assert [trace.name for trace in figure.data] == [canvas.LABELS[n] for n in NINE]
        for trace, augmentation in zip(figure.data, NINE, strict=True):
            rows = table[table["augmentation"] == augmentation].sort_values("block")
            assert list(trace.x) == list(rows["block"]) and list(trace.y) == pytest.approx(rows["mean"], rel=1e-5)
            assert list(trace.error_y.array) == pytest.approx(rows["high"] - rows["mean"], rel=1e-4)
            assert trace.line.color == canvas.COLOURS[augmentation]
            assert trace.marker.symbol == canvas.SYMBOLS[augmentation]


def test_cka_is_drawn_as_what_is_lost_with_its_interval_turned(everything):
    table, figure = cka(5), everything["cka_lines"]
    rows = table[table["augmentation"] == NINE[7]].sort_values("block")
    trace = figure.data[7]
    assert list(trace.y) == pytest.approx(1 - rows["cka"], rel=1e-5)
    assert list(trace.error_y.array) == pytest.approx(rows["cka"] - rows["low"], rel=1e-4)
    assert list(trace.error_y.arrayminus) == pytest.approx(rows["high"] - rows["cka"], rel=1e-4)


def test_an_unknown_interval_is_not_drawn(everything):
    assert all(trace.error_y.visible is False for trace in everything["one_image_lines"].data)
    points = [trace for trace in everything["one_image_scatter"].data if trace.mode == "markers"]
    assert all(trace.error_x.visible is False and trace.error_y.visible is False for trace in points)
    assert "interval unknown" in everything["one_image_ranks"].layout.title.subtitle.text


@pytest.mark.parametrize("name", ["lines", "relative", "cka_lines", "one_image_lines", "one_block"])
def test_labels_at_the_right_end_neither_overlap_nor_leave_the_figure(everything, name):
    figure = everything[name]
    layout, labels = figure.layout, figure.layout.annotations
    bottom, top = layout.yaxis.range
    plot = layout.height - layout.margin.t - layout.margin.b
    at = [plot * (top - a.y) / (top - bottom) + a.ay for a in labels]
    assert sorted(a.text for a in labels) == sorted(canvas.LABELS[n] for n in NINE)
    assert np.diff(sorted(at)).min() > 18 and min(at) >= -1 and max(at) <= plot + 1
    ends = {trace.name: trace.y[-1] for trace in figure.data}
    assert all(a.y == pytest.approx(ends[a.text], rel=1e-5) for a in labels)
    by_height = [a.text for _, a in sorted(zip(at, labels, strict=True), key=lambda pair: pair[0])]
    assert [ends[text] for text in by_height] == sorted(ends.values(), reverse=True)
    for a in labels:  # the line ends a little left of the right edge of the plot
        assert a.ax + width(a.text, 13) < layout.margin.r


def test_spread_is_the_nearest_arrangement():
    places = np.array([5.0, 0, 1, 1.5, 30])
    found = figures.spread(places, 4, -100, 100)
    order = np.argsort(places)
    apart = {"type": "ineq", "fun": lambda z: np.diff(z[order]) - 4}
    oracle = minimize(lambda z: ((z - places) ** 2).sum(), places, constraints=[apart], method="SLSQP").x
    np.testing.assert_allclose(found, oracle, atol=1e-3)
    assert list(figures.spread([0.0, 0, 0], 4, 0, 8)) == [0, 4, 8] and list(figures.spread([9.0, 9], 4, 0, 9)) == [5, 9]


# heatmaps


def test_cka_heatmap_holds_the_table(everything):
    heat, table = everything["cka_12"].data[0], cka(12).set_index(["augmentation", "block"])["cka"]
    assert list(heat.y) == [canvas.LABELS[n] for n in NINE] and list(heat.x) == list(range(12))
    for name, row in zip(NINE, heat.z, strict=True):
        assert list(row) == pytest.approx(table[name].sort_index(), rel=1e-5)
    assert heat.zmax == 1 and heat.zmin == pytest.approx(table.min(), rel=1e-5)
    cell = (canvas.WIDTH - 260) / 12  # beside names and colour bar
    assert heat.texttemplate and max(width(text, 13) for row in heat.text for text in row) < cell
    assert not everything["cka_24"].data[0].texttemplate


def test_one_panel_of_heads_an_augmentation(everything):
    table = tidy(block=range(12), head=range(12), augmentation=NINE)
    figure = everything["heads_12"]
    assert [a.text for a in figure.layout.annotations] == [canvas.LABELS[n] for n in NINE]
    for name, panel in zip(NINE, figure.data, strict=True):
        for row in table[table["augmentation"] == name].itertuples():
            assert panel.z[row.block][row.head] == pytest.approx(row.mean, rel=1e-5)
        assert panel.coloraxis == "coloraxis"
    shared = figure.layout.coloraxis
    assert [shared.cmin, shared.cmax] == pytest.approx([table["mean"].min(), table["mean"].max()], rel=1e-5)
    axes = [figure.layout[f"yaxis{i or ''}"] for i in (0, *range(2, 10))]
    assert {axis.autorange for axis in axes} == {"reversed"}  # the first block on top
    pixels = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    for axis in axes:
        assert pixels * (axis.domain[1] - axis.domain[0]) / len(axis.tickvals) > 12


def test_blocks_that_were_left_out_stay_left_out(everything):
    figure = everything["two_views"]
    assert len(figure.data) == 2 and list(figure.data[0].y) == [0, 2]


# models


@pytest.mark.parametrize(("name", "models"), [("ranks", ["scene-s16", "scene-xs12"]), ("ranks_5", PAPER)])
def test_ranks_from_model_to_model(everything, name, models):
    figure, table = everything[name], ranks(models).set_index(["augmentation", "model"])
    for trace, augmentation in zip(figure.data, NINE, strict=True):
        assert list(trace.y) == [table.loc[(augmentation, model), "rank"] for model in models]
        assert trace.line.color == canvas.COLOURS[augmentation]
    for side, model in ((0, models[0]), (len(models) - 1, models[-1])):
        written = {a.y: a.text for a in figure.layout.annotations if a.x == side}
        assert len(written) == 9
        for augmentation in NINE:
            rank = table.loc[(augmentation, model), "rank"]
            assert set(written[rank].split("  ")) == {str(rank), canvas.LABELS[augmentation]}
            assert 16 + width(written[rank], 14) < figure.layout.margin.r
    first, last = figure.layout.yaxis.range
    assert first > 9 > 1 > last  # rank 1 on top


def test_agreement_is_written_once_or_below_each(everything):
    assert "Kendall's tau 0.70, 95% interval 0.61 to 0.83" in everything["ranks"].layout.title.subtitle.text
    below = everything["ranks_5"].layout.xaxis.ticktext
    assert ["0.70<br>0.61 to 0.83" in text for text in below] == [False] + [True] * 4
    cell = (canvas.WIDTH - 2 * everything["ranks_5"].layout.margin.l) / 4
    assert all(width(line, 12) < cell for text in below for line in text.split("<br>"))


def test_scatter_compares_the_first_model_with_every_other(everything):
    table = ranks(PAPER).set_index(["model", "augmentation"])
    figure = everything["scatter_5"]
    points = [trace for trace in figure.data if trace.mode == "markers"]
    for (other, name), point in zip(itertools.product(PAPER[1:], NINE), points, strict=True):
        x, y = table.loc[(PAPER[0], name)], table.loc[(other, name)]
        assert [point.x[0], point.y[0]] == pytest.approx([x["distance"], y["distance"]], rel=1e-5)
        assert point.error_x.array[0] == pytest.approx(x["distance_high"] - x["distance"], rel=1e-4)
        assert point.error_y.arrayminus[0] == pytest.approx(y["distance"] - y["distance_low"], rel=1e-4)
        assert (point.marker.color, point.marker.symbol) == (canvas.COLOURS[name], canvas.SYMBOLS[name])
    assert sum(bool(point.showlegend) for point in points) == 9
    assert figure.layout.xaxis4.title.text == "1 − cosine, ViT-B-32 openai"
    assert figure.layout.yaxis4.title.text == "1 − cosine, ViT-B-16-SigLIP webli"
    for trace in figure.data:
        if trace.mode == "lines":
            assert trace.x == trace.y  # the diagonal


def test_scatter_is_by_ratio_unless_something_did_not_move(everything):
    for name, kind in (("scatter", "log"), ("one_image_scatter", "log"), ("not_moved", "linear")):
        layout, points = everything[name].layout, everything[name].data[1:]
        assert layout.xaxis.type == layout.yaxis.type == kind and layout.xaxis.range == layout.yaxis.range
        low, high = (10.0**v if kind == "log" else v for v in layout.xaxis.range)
        assert all(low <= point.x[0] <= high and low <= point.y[0] <= high for point in points)
        if kind == "log":
            assert all(low <= tick <= high for tick in layout.xaxis.tickvals) and len(layout.xaxis.tickvals) > 1
