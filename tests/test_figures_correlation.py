"""The figures of how metrics go together: each pair in its cell, and a scatter that stays small without lying."""

import numpy as np
import pandas as pd
import pytest
from PIL import ImageFont

from clipshift_core import canvas
from clipshift_core.figures_correlation import DRAWN, correlation_heatmap, metric_scatter

NINE = list(canvas.ORDER[1:])


def _table(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["metric_a", "metric_b", "mean", "low", "high"])


@pytest.fixture(scope="module")
def shifts() -> pd.DataFrame:
    """400 images under the nine: 3,600 pairs, more than are drawn."""
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"image_id": [f"image-{k}" for k in range(400)], "augmentation": name, "edge": rng.random(400)})
        for name in rng.permutation(NINE)
    ]
    return pd.concat(frames, ignore_index=True).assign(cosine=lambda t: t["edge"] ** 2)


def test_each_pair_stands_in_its_cell_of_the_lower_triangle():
    rows = [("cosine", "edge", 0.8312, 0.796, 0.861), ("detail", "cosine", -0.25, -0.3, 0.004)]
    heat = correlation_heatmap(_table([*rows, ("edge", "detail", -0.004, -0.1, 0.1)])).data[0]
    # in the order of first appearance: cosine, detail, edge
    assert heat.x == ("Cosine", "Detail") and heat.y == ("Detail", "Edge")
    assert [list(row) for row in heat.z] == [[-0.25, None], [0.8312, -0.004]]
    texts = [list(row) for row in heat.text]
    assert texts == [["−0.25<br>[−0.30, 0.00]", ""], ["0.83<br>[0.80, 0.86]", "0.00<br>[−0.10, 0.10]"]]


def test_text_fits_its_cell_for_few_metrics_and_for_all():
    for metrics in (canvas.SIMILARITIES, tuple(canvas.METRICS)):
        pairs = [(a, b, -0.83, -0.86, -0.81) for i, a in enumerate(metrics) for b in metrics[:i]]
        figure = correlation_heatmap(_table(pairs))
        heat, names = figure.data[0], [canvas.label(m) for m in metrics]
        cell = (canvas.WIDTH - 120 - ImageFont.load_default(14).getlength(max(names, key=len))) / len(heat.x)
        assert len(heat.x) == len(metrics) - 1
        for texts, size in ((heat.x, 14), ([t for row in heat.text for t in row], heat.textfont.size)):
            lines = [line for text in texts for line in text.split("<br>")]
            assert max(ImageFont.load_default(size).getlength(line) for line in lines) < cell + 4


def test_colour_is_centred_on_zero_and_told_apart_without_red_and_green():
    heat = correlation_heatmap(_table([("cosine", "edge", 0.5, 0.4, 0.6)])).data[0]
    assert heat.zmin == -1 and heat.zmax == 1
    ends = [[int(v) for v in colour[4:-1].split(",")] for _, colour in (heat.colorscale[0], heat.colorscale[-1])]
    # blue is the channel that protan and deutan vision keep
    assert ends[1][2] - ends[0][2] > 60 and ends[0][0] - ends[1][0] > 60


def test_what_is_unknown_is_said_and_not_drawn():
    nan = float("nan")
    figure = correlation_heatmap(_table([("cosine", "edge", nan, nan, nan), ("cosine", "detail", 0.5, nan, nan)]))
    assert [list(row) for row in figure.data[0].text] == [["unknown", ""], ["0.50", ""]]
    assert figure.data[0].z[0][0] is None and "NaN" not in figure.to_json()


def test_the_subtitle_says_which_correlation_it_is():
    table = _table([("cosine", "edge", 0.5, 0.4, 0.6)])
    figure = correlation_heatmap(
        table, statistic="Spearman correlation over pairs of image and augmentation", level=0.9
    )
    expected = "Spearman correlation over pairs of image and augmentation, with its 90% interval over images"
    assert figure.layout.title.subtitle.text == expected
    assert ImageFont.load_default(14).getlength(expected) < canvas.WIDTH - 30


def test_scatter_draws_a_share_of_the_images_and_means_of_all(shifts):
    figure = metric_scatter(shifts, "edge", "cosine")
    points, means = figure.data[:9], figure.data[9:]
    assert sum(len(t.x) for t in points) <= DRAWN and {len(t.x) for t in points} == {DRAWN // 9}
    assert "166 of 400 images" in figure.layout.title.subtitle.text
    known = {
        (f"{x:.6g}", f"{y:.6g}", n) for n, x, y in shifts[["augmentation", "edge", "cosine"]].itertuples(index=False)
    }
    of_all = shifts.groupby("augmentation")[["edge", "cosine"]].mean()
    for name, small, large in zip(NINE, points, means, strict=True):
        assert {(f"{x:.6g}", f"{y:.6g}", name) for x, y in zip(small.x, small.y, strict=True)} <= known
        assert [*large.x, *large.y] == pytest.approx(of_all.loc[name].tolist(), rel=1e-5)
        assert small.marker.color == large.marker.color == canvas.COLOURS[name]
        assert small.marker.symbol == large.marker.symbol == canvas.SYMBOLS[name]
        assert large.name == canvas.LABELS[name] and large.marker.size > 2 * small.marker.size
    assert figure.layout.xaxis.title.text.startswith("Edge preservation (")
    assert figure.layout.yaxis.title.text.startswith("Cosine similarity (")


def test_the_same_images_are_drawn_under_each_augmentation_every_time(shifts):
    numbered = shifts.assign(edge=shifts["image_id"].str.removeprefix("image-").astype(int))
    figure = metric_scatter(numbered, "edge", "cosine")
    drawn = {tuple(t.x) for t in figure.data[:9]}
    assert len(drawn) == 1
    first, *_, last = drawn.pop()
    assert first == 0 and last == 399
    assert canvas.data_sha256(metric_scatter(numbered, "edge", "cosine")) == canvas.data_sha256(figure)


def test_scatter_of_few_images_draws_each_and_leaves_out_the_unknown(shifts):
    few = shifts[shifts["image_id"].isin([f"image-{k}" for k in range(20)])].copy()
    few.loc[few.index[3], "cosine"] = np.nan
    figure = metric_scatter(few, "edge", "cosine")
    assert sum(len(t.x) for t in figure.data[:9]) == 180 and "each of 20 images" in figure.layout.title.subtitle.text
    assert sum(v is None for t in figure.data[:9] for v in t.y) == 1
    assert all(t.y[0] is not None for t in figure.data[9:]) and "NaN" not in figure.to_json()


def test_scatter_stays_small(shifts):
    assert len(metric_scatter(shifts, "edge", "cosine").to_json()) < 60_000
