"""The figures of what a view preserves: the numbers and intervals given, in the reading order, on honest axes."""

import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from PIL import ImageFont

from clipshift_core import canvas, preservation, stats
from clipshift_core.canvas import SIMILARITIES
from clipshift_core.figures_preservation import FLOOR, comparison_bars, kernels_side_by_side, overall, radar

NINE = list(canvas.ORDER[1:])
LABELS = [canvas.LABELS[name] for name in NINE]
RESAMPLING = {"n_resamples": 100, "seed": 0}
METRICS = ("l2", *SIMILARITIES, "patch_published")


@pytest.fixture(scope="module")
def shifts() -> pd.DataFrame:
    """Thirty images under the nine, in shuffled order of augmentations."""
    rng = np.random.default_rng(0)
    frames = []
    for name in rng.permutation(NINE):
        moved = rng.beta(2, 12, (30, 1)) * rng.uniform(0.2, 3)
        values = 1 - moved * rng.uniform(0.05, 0.3, len(METRICS))
        frame = pd.DataFrame(values, columns=METRICS).assign(l2=20 * moved[:, 0], augmentation=name)
        frame["patch_published"] = 1 - 0.003 * rng.random(30)
        frames.append(frame.assign(image_id=[f"image-{i}" for i in range(30)]))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def summary(shifts) -> pd.DataFrame:
    return _summary(shifts)


@pytest.fixture(scope="module")
def everything(shifts, summary) -> dict[str, go.Figure]:
    """Each figure once, and the hard cases: one image, means below zero, unknown means."""
    one = _summary(shifts[shifts["image_id"] == "image-0"])
    below = summary.assign(mean=np.where(summary["metric"] == "cosine", -0.13, summary["mean"]))
    unknown = summary.copy()
    unknown.loc[summary["augmentation"] == "blur", ["mean", "std", "low", "high"]] = np.nan
    pairs = _correlations()
    return {
        "radar": radar(summary),
        "bars": comparison_bars(summary),
        "overall": overall(shifts, summary, pairs, statistic="Spearman correlation over pairs"),
        "kernels": kernels_side_by_side(summary),
        "one_radar": radar(one),
        "one_bars": comparison_bars(one),
        "one_overall": overall(shifts[shifts["image_id"] == "image-0"], one, pairs),
        "one_kernels": kernels_side_by_side(one),
        "below_radar": radar(below),
        "below_bars": comparison_bars(below),
        "unknown_radar": radar(unknown),
        "unknown_bars": comparison_bars(unknown),
        "unknown_overall": overall(shifts, unknown, pairs),
        "unknown_kernels": kernels_side_by_side(unknown),
    }


def _summary(shifts: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([stats.bootstrap_table(shifts, m, **RESAMPLING).assign(metric=m) for m in METRICS])


def _correlations() -> pd.DataFrame:
    pairs = list(itertools.combinations(SIMILARITIES, 2))
    means = np.linspace(-0.9, 0.9, len(pairs))
    rows = [(a, b, m, m - 0.05, m + 0.05) for (a, b), m in zip(pairs, means, strict=True)]
    return pd.DataFrame(rows, columns=["metric_a", "metric_b", "mean", "low", "high"])


def _of(summary: pd.DataFrame, metric: str, column: str = "mean") -> list[float]:
    return summary[summary["metric"] == metric].set_index("augmentation").loc[NINE, column].tolist()


def _close(values) -> pytest.approx:
    return pytest.approx(list(values), rel=1e-5)


# what every figure keeps to


def test_every_figure_fits_the_page_and_says_what_it_shows(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1400, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            width = ImageFont.load_default(size).getlength(text)
            assert width < canvas.WIDTH - 30, f"{name}: {text!r} is {width:.0f} px wide"
        count = "30 images" if not name.startswith("one") else "1 image"
        assert count in layout.title.subtitle.text, name


def test_figures_are_small_plain_and_free_of_nan(everything):
    for name, figure in everything.items():
        text = figure.to_json()
        assert len(text) < 60_000 and "bdata" not in text and "NaN" not in text, name


def test_the_order_of_the_rows_does_not_matter(shifts, summary, everything):
    shuffled = summary.sample(frac=1, random_state=1)
    again = {
        "radar": radar(shuffled),
        "bars": comparison_bars(shuffled),
        "overall": overall(shifts.sample(frac=1, random_state=2), shuffled, _correlations(), statistic="Any"),
        "kernels": kernels_side_by_side(shuffled),
    }
    for name, figure in again.items():
        assert canvas.data_sha256(figure) == canvas.data_sha256(everything[name]), name


def test_a_missing_metric_is_named(summary):
    for draw in (radar, comparison_bars):
        with pytest.raises(ValueError, match="no edge, detail; it holds l2, cosine"):
            draw(summary[~summary["metric"].isin(["edge", "detail"])])


# the numbers of each


def test_radar_closes_one_line_an_augmentation_and_greys_the_others(summary, everything):
    figure = everything["radar"]
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == LABELS == [a.text for a in figure.layout.annotations]
    values = np.array([_of(summary, metric) for metric in SIMILARITIES]).T
    for i, name in enumerate(NINE):
        line, grey = lines[LABELS[i]], figure.data[2 * i]
        assert line.line.color == canvas.COLOURS[name] and line.marker.symbol == canvas.SYMBOLS[name]
        assert list(line.r) == _close([*values[i], values[i, 0]])
        assert line.theta == ("Cosine", "Attention", "Patch", "Edge", "Detail", "Cosine")
        assert line.subplot == grey.subplot
        others = [[*v, v[0], None] for j, v in enumerate(values) if j != i]
        assert list(grey.r) == [None if v is None else pytest.approx(v, rel=1e-5) for o in others for v in o]
        assert len(grey.theta) == len(grey.r)
    assert len({trace.subplot for trace in figure.data}) == 9


def test_radar_says_where_its_axes_start(everything):
    for name, start, said in (("radar", 0, "0"), ("below_radar", -0.2, "−0.2")):
        layout = everything[name].layout
        axes = [layout[f"polar{i or ''}"].radialaxis for i in (0, *range(2, 10))]
        assert {axis.range for axis in axes} == {(start, 1)}
        assert f"from {said} at the centre to 1" in layout.title.subtitle.text


def test_bars_are_the_means_with_their_intervals_on_one_scale(summary, everything):
    figure = everything["bars"]
    bars = [trace for trace in figure.data if trace.type == "bar"]
    axes = [figure.layout[f"xaxis{i or ''}"] for i in (0, 2, 3, 4, 5)]
    for metric, bar, text, axis in zip(SIMILARITIES, bars, figure.data[1::2], axes, strict=True):
        mean, low, high = (_of(summary, metric, column) for column in ("mean", "low", "high"))
        assert list(bar.y) == LABELS and list(bar.x) == _close(mean)
        assert np.subtract(bar.x, bar.error_x.arrayminus).tolist() == _close(low)
        assert np.add(bar.x, bar.error_x.array).tolist() == _close(high)
        assert list(bar.marker.line.color) == [canvas.COLOURS[name] for name in NINE]
        assert [float(t) for t in text.text] == pytest.approx(mean, abs=5e-4)
        assert axis.title.text == canvas.METRICS[metric].label and axis.range == (0, 1.1)
    assert everything["below_bars"].layout.xaxis.range == (-0.2, 1.1)
    assert "from −0.2 to 1" in everything["below_bars"].layout.title.subtitle.text


def test_a_text_stands_in_its_bar_or_clear_of_the_whisker(everything, summary):
    bar, text = everything["overall"].data[:2]
    ends = np.array(_of(summary, "l2", "high"))
    inside = ends >= 0.4 * ends.max()
    assert 0 < inside.sum() < 9
    assert list(text.x) == _close(np.where(inside, 0, ends)) and list(text.y) == list(bar.y)


def test_unknown_means_and_intervals_are_not_drawn(everything):
    assert all(t.error_x.visible is False for t in everything["one_bars"].data if t.type == "bar")
    bar, text = everything["unknown_bars"].data[:2]
    assert bar.x[1] is None and text.text[1].strip() == "unknown" and None not in (bar.x[0], *bar.x[2:])
    assert everything["unknown_radar"].data[3].r == (None,) * 6
    ranks = [a for a in everything["unknown_kernels"].layout.annotations if a.y == 1]
    assert [a.text for a in ranks] == ["unknown"] * 2


def test_overall_holds_the_four_panels(shifts, summary, everything):
    figure = everything["overall"]
    bar, _, *boxes, means, correlation = figure.data
    assert list(bar.x) == _close(_of(summary, "l2"))
    by_name = shifts.groupby("augmentation")["cosine"]
    assert [box.name for box in boxes] == LABELS
    for name, box in zip(NINE, boxes, strict=True):
        drawn = [box.lowerfence[0], box.q1[0], box.median[0], box.q3[0], box.upperfence[0]]
        assert drawn == _close(np.quantile(by_name.get_group(name), [0.05, 0.25, 0.5, 0.75, 0.95]))
        assert box.line.color == canvas.COLOURS[name]
    values = np.array([_of(summary, metric) for metric in SIMILARITIES]).T
    np.testing.assert_allclose(np.array(means.text, float), values, atol=5e-4)
    np.testing.assert_allclose(means.z, (values.max(0) - values) / np.ptp(values, axis=0), rtol=1e-4, atol=1e-6)
    assert list(means.y) == LABELS and list(means.x) == list(correlation.x) + ["Detail"]
    assert correlation.z[0][0] == -0.9 and correlation.z[-1][-1] == 0.9
    assert figure.layout.xaxis.title.text == "L2 distance (units of the embedding)"
    assert figure.layout.xaxis2.title.text.startswith("Cosine similarity (")
    titles = [a.text for a in figure.layout.annotations]
    assert titles[-1] == "Spearman correlation over pairs"
    # the upper two panels share their rows, so that the right one needs no names
    assert list(bar.y) == [box.y[0] for box in boxes]


# the two kernels


def test_floor_is_that_of_the_kernel():
    """The largest square modulo 256 is 249; an image of that difference throughout scores the floor."""
    squares = (np.arange(256) ** 2) % 256
    assert squares.max() == 249 and pytest.approx(1 / (1 + 249 / 255**2), rel=1e-12) == FLOOR
    black = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    view = torch.full((1, 1, 8, 8, 3), int(squares.argmax()), dtype=torch.uint8)
    assert preservation.patch_similarity(black, view, "published").item() == pytest.approx(FLOOR, abs=1e-7)


def test_dumbbells_join_both_means_and_the_right_panel_enlarges_the_published(summary, everything):
    figure = everything["kernels"]
    corrected, published = _of(summary, "patch"), _of(summary, "patch_published")
    bars, *rest = figure.data
    pairs = zip(corrected, published, strict=True)
    assert list(bars.x) == [v and pytest.approx(v, rel=1e-5) for pair in pairs for v in (*pair, None)]
    assert list(bars.y) == [label for label in LABELS for _ in range(3)]
    for trace, panel, metric in zip(
        rest[:6:2], ("x", "x", "x2"), ("patch", "patch_published", "patch_published"), strict=True
    ):
        assert list(trace.x) == _close(_of(summary, metric)) and trace.xaxis == panel and list(trace.y) == LABELS
        assert list(trace.marker.line.color) == [canvas.COLOURS[name] for name in NINE]
    for trace, metric in zip(rest[1:6:2], ("patch", "patch_published", "patch_published"), strict=True):
        assert np.add(trace.x, trace.error_x.array).tolist() == _close(_of(summary, metric, "high"))
    low, high = figure.layout.xaxis2.range
    assert low < FLOOR < min(published) and max(published) < 1 < high
    assert [s.x0 for s in figure.layout.shapes] == _close([FLOOR, FLOOR]) and figure.layout.shapes[0].x1 == 1
    assert any("65025 / 65274 = 0.9962" in a.text for a in figure.layout.annotations)
    assert [t.name for t in rest[6:]] == ["corrected", "published"]


def test_ranks_are_those_of_either_mean_and_bold_where_they_differ():
    """Noise and elastic have equal means as corrected (both 2nd), and 1st and 3rd as published; blur 1st and 2nd."""
    rows = [("noise", 0.9, 0.997), ("blur", 0.8, 0.998), ("elastic", 0.9, 0.999), ("perspective", 0.99, 0.9995)]
    table = pd.DataFrame(
        [(n, m, v) for n, a, b in rows for m, v in (("patch", a), ("patch_published", b))],
        columns=["augmentation", "metric", "mean"],
    ).assign(std=0.1, low=np.nan, high=np.nan, n=5)
    figure = kernels_side_by_side(table)
    places = list(figure.data[1].y)
    written = {(places[a.y], a.xshift): a.text for a in figure.layout.annotations if a.y in range(4)}
    near, far = sorted({shift for _, shift in written})
    assert [written[label, near] for label in places] == ["<b>2</b>", "<b>1</b>", "<b>2</b>", "4"]
    assert [written[label, far] for label in places] == ["<b>1</b>", "<b>2</b>", "<b>3</b>", "4"]


def test_without_attention_the_other_four_are_shown(summary):
    without = summary[summary["metric"] != "attention"]
    assert list(radar(without).data[-1].theta) == ["Cosine", "Patch", "Edge", "Detail", "Cosine"]
    titles = [axis.title.text for axis in comparison_bars(without).select_xaxes()]
    assert titles == ["Cosine similarity", "Patch similarity", "Edge preservation", "Detail preservation"]
