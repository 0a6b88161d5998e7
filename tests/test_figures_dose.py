"""The figures of dose and response: the numbers they were given, the house's colours, labels that do not collide."""

import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr
from PIL import ImageFont
from sklearn.isotonic import IsotonicRegression

from clipshift_core import canvas, dose, figures_dose, stats

NINE = list(canvas.ORDER[1:])
RESAMPLING = {"n_resamples": 100, "seed": 0}
LEVEL = {"mse": 40.0, "ssim": 0.7}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Twelve images under the nine, each at its own severities; the shift grows with their logarithm."""
    rng = np.random.default_rng(0)
    rows = [
        {"image_id": f"i{i}", "augmentation": name, "severity": s, "l2": (1 + k) * np.log1p(s) * rng.uniform(0.8, 1.2)}
        for k, (name, steps) in enumerate(dose.SEVERITIES.items())
        for i in range(12)
        for s in steps
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def curves(table) -> pd.DataFrame:
    return dose.curves(table, "l2", **RESAMPLING)


def lines(by: str) -> pd.DataFrame:
    """As dose.along gives it: eight lines, of which each ends elsewhere, and the flip's one row."""
    middle = LEVEL[by] if by == "mse" else 1 - LEVEL[by]
    grid = middle * 10.0 ** (np.arange(-13, 8) / 10)
    rows = [
        {"augmentation": name, "distortion": x, "l2": (k + 1) * np.sqrt(x / middle)}
        for k, name in enumerate(dose.DOSED)
        for x in grid[: len(grid) - 7 + k]
    ]
    rows.append({"augmentation": "horizontal_flip", "distortion": 2 * middle, "l2": 5.0})
    return pd.DataFrame(rows).assign(cosine_distance=lambda rows: rows["l2"] / 100)


@pytest.fixture(scope="module")
def ranks() -> pd.DataFrame:
    """As dose.compare gives it; the order turned round."""
    return pd.DataFrame(
        {
            "augmentation": dose.DOSED,
            "rank": range(1, 9),
            "mean": [8.0 - k for k in range(8)],
            "published_rank": range(8, 0, -1),
            "published_mean": [1.5 + k for k in range(8)],
            "n": 11,
        }
    )


@pytest.fixture(scope="module")
def everything(table, curves, ranks) -> dict[str, go.Figure]:
    one = dose.curves(table[table["image_id"] == "i0"], "l2", **RESAMPLING)
    return {
        "curves": figures_dose.dose_curves(curves),
        "curves_of_one_image": figures_dose.dose_curves(one),
        "by_mse": figures_dose.shift_against_distortion(lines("mse"), "mse", LEVEL["mse"]),
        "by_ssim": figures_dose.shift_against_distortion(lines("ssim"), "ssim", LEVEL["ssim"], "cosine_distance"),
        "ranking": figures_dose.matched_ranking(ranks, "mse", LEVEL["mse"]),
        "ranking_by_cosine": figures_dose.matched_ranking(ranks, "ssim", LEVEL["ssim"], "cosine_distance"),
        "no_lines": figures_dose.shift_against_distortion(lines("mse").iloc[:0], "mse", LEVEL["mse"]),
        "no_ranking": figures_dose.matched_ranking(ranks.iloc[:0], "ssim", LEVEL["ssim"]),
    }


def _walk(value, path=""):
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner, path)


def test_numbers_are_plain_rounded_lists(everything):
    for name, figure in everything.items():
        for path, value in _walk(figure.to_plotly_json()["data"]):
            assert not isinstance(value, np.ndarray | np.generic), f"{name}{path} would be written as bdata"
            if isinstance(value, float):
                assert value == float(f"{value:.6g}"), f"{name}{path}"
        assert "bdata" not in figure.to_json()


def test_every_figure_fits_the_page(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1400, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            width = ImageFont.load_default(size).getlength(text)
            assert width < canvas.WIDTH - 30, f"{name}: {text!r} is {width:.0f} px wide"


def test_curves_hold_mean_interval_and_the_two_marked_severities(curves, everything):
    figure = everything["curves"]
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [canvas.LABELS[name] for name in NINE]
    for index, name in enumerate(NINE):
        band, line = figure.data[2 * index : 2 * index + 2]
        rows = curves[curves["augmentation"] == name]
        assert list(line.y) == canvas.numbers(rows["mean"]) and line.line.color == canvas.COLOURS[name]
        assert list(band.y) == canvas.numbers([*rows["low"], *rows["high"][::-1]])
        assert list(line.x[1:]) == canvas.numbers(np.log10(rows["severity"].iloc[1:]))
        assert line.x[0] < line.x[1] and line.marker.color[0] == "white"
        published = list(rows["severity"]).index(1)
        assert line.x[published] == 0 and line.marker.size[published] == max(line.marker.size)
    published = [shape for shape in figure.layout.shapes if shape.x0 == shape.x1 == 0]
    assert len(published) == 9 and {shape.xref for shape in published} == {t.xaxis or "x" for t in figure.data}


def test_severities_on_the_axis_stand_where_they_are_and_apart(everything):
    figure = everything["curves"]
    for index in range(9):
        axis = figure.layout[f"xaxis{index + 1 if index else ''}"]
        ticks = dict(zip(axis.ticktext, axis.tickvals, strict=True))
        assert ticks["1"] == 0 and ticks["0"] == figure.data[2 * index + 1].x[0]
        for text, place in ticks.items():
            assert text == "0" or place == pytest.approx(np.log10(float(text)), abs=1e-5)
        width = axis.range[1] - axis.range[0]
        # a panel is some 250 px wide, a label at most 35
        assert min(np.diff(axis.tickvals)) / width > 35 / 300


def test_one_image_has_no_band(everything):
    figure = everything["curves_of_one_image"]
    assert all(len(band.x) == 0 for band in figure.data[::2]) and all(len(line.x) == 12 for line in figure.data[1::2])


@pytest.mark.parametrize(("key", "by", "metric"), [("by_mse", "mse", "l2"), ("by_ssim", "ssim", "cosine_distance")])
def test_lines_markers_and_the_level(everything, key, by, metric):
    figure, table = everything[key], lines(by)
    middle = LEVEL[by] if by == "mse" else 1 - LEVEL[by]
    assert figure.layout.shapes[0].x0 == figure.layout.shapes[0].x1 == pytest.approx(middle, rel=1e-5)
    assert figure.layout.xaxis.type == "log" and f"{LEVEL[by]:g}" in figure.layout.title.subtitle.text
    drawn, labels = figure.data[:18], {a.text: a.y for a in figure.layout.annotations}
    for index, name in enumerate(NINE):
        line, marker = drawn[2 * index : 2 * index + 2]
        rows = table[table["augmentation"] == name]
        assert line.line.color == marker.marker.color == canvas.COLOURS[name]
        assert list(line.x) == canvas.numbers(rows["distortion"]) and list(line.y) == canvas.numbers(rows[metric])
        at = rows if name == "horizontal_flip" else rows[np.isclose(rows["distortion"], middle)]
        assert list(marker.y) == canvas.numbers(at[metric]) and len(marker.y) == 1
        leader = figure.data[18 + index]
        assert (leader.y[0], leader.y[1]) == (line.y[-1], labels[canvas.LABELS[name]])
    # 470 px of plot, text of 14 px
    low, high = figure.layout.yaxis.range
    gaps = [abs(a - b) / (high - low) * 470 for a, b in itertools.combinations(labels.values(), 2)]
    assert len(labels) == 9 and min(gaps) > 17


def test_ranking_names_both_ends(ranks, everything):
    figure = everything["ranking"]
    assert len(figure.data) == 8
    for trace, row in zip(figure.data, ranks.itertuples(), strict=True):
        assert tuple(trace.y) == (row.published_rank, row.rank)
        assert trace.line.color == canvas.COLOURS[row.augmentation]
    ends = {(a.x, a.y): a.text for a in figure.layout.annotations}
    for row in ranks.itertuples():
        name = canvas.LABELS[row.augmentation]
        assert ends[1, row.rank] == f"{row.rank}  {name} ({row.mean:.2f})"
        assert ends[0, row.published_rank] == f"{name} ({row.published_mean:.2f})  {row.published_rank}"
    assert "11 images" in figure.layout.title.subtitle.text and "MSE of 40.0" in figure.layout.title.subtitle.text
    widest = max(ImageFont.load_default(14).getlength(text) for text in ends.values())
    assert widest + 14 < figure.layout.margin.l - 5


def test_nothing_to_compare_is_said(everything):
    assert "No image reaches an MSE of 40.0" in everything["no_lines"].layout.title.subtitle.text
    assert "No image reaches an SSIM of 0.700" in everything["no_ranking"].layout.title.subtitle.text
    assert not everything["no_lines"].data and not everything["no_ranking"].data


@pytest.mark.parametrize("seed", range(5))
def test_labels_move_as_little_as_they_must(seed):
    """Least squares with neighbours at least d apart is isotonic regression of the values less d times their rank."""
    values, least = np.random.default_rng(seed).gamma(1, 3, 9), 1.3
    placed = np.array(figures_dose.spread(values, least=least))
    order = np.argsort(values)
    steps = least * np.arange(9)
    expected = IsotonicRegression().fit_transform(np.arange(9), values[order] - steps) + steps
    np.testing.assert_allclose(placed[order], expected)
    assert (np.diff(placed[order]) >= least - 1e-9).all()
    far = 10.0 * np.arange(9)
    assert figures_dose.spread(far, least=least) == far.tolist()


def test_whole_chain_from_a_dataset(table):
    """The figures take what dose gives them, names and all."""
    wide = table.pivot(index=["image_id", "augmentation"], columns="severity", values="l2")
    severity = np.array(list(dose.SEVERITIES.values()), float)
    ids = [f"i{i}" for i in range(12)]
    l2 = np.array([[[wide.loc[(i, name), s] for s in dose.SEVERITIES[name]] for name in NINE] for i in ids])
    dims = ("image", "augmentation", "level")
    held = {"l2": l2, "cosine_distance": l2 / 100, "mse": 10 * l2**2, "ssim": 1 - l2 / 50}
    data = {name: (dims, values) for name, values in held.items()}
    coordinates = {"image": ids, "augmentation": NINE, "severity": (dims[1:], severity)}
    data = xr.Dataset(data, coordinates)
    level = 5.0  # which even the flattest curve reaches: noise, 10 log(3)^2 = 12
    found = dose.compare(data, "mse", level, **RESAMPLING)
    assert isinstance(found.tau, stats.Interval)
    assert len(figures_dose.matched_ranking(found.table, "mse", level).data) == 8
    assert len(figures_dose.shift_against_distortion(dose.along(data, "mse", level), "mse", level).data) == 27
