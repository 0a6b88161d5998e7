"""The figures of a dictionary: the numbers they were given, in the right place, under the right name."""

import base64
import io
import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image, ImageFont

from clipshift_core import canvas, figures_components
from clipshift_core.figures_attention import overlay
from clipshift_core.sae_quality import DENSE_FROM

NAMES = ["dictionary", "neurons", "random", "pca"]


@pytest.fixture(scope="module")
def components() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "latent": [7, 3, 12],
            "label": ["duck", "something very long to say about ripples, moons and leaves in brown meadows", "owl"],
            "alignment": [0.31, -0.02, np.nan],
            "clarity": [0.8, 0.123, np.nan],
            "frequency": [0.0312, 0.5, 0.0],
        }
    )


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Eight, eight and two plain pictures; component and example can be read from red and green."""
    return [
        np.array([np.full((32, 32, 3), (60 * c + 40, 25 * e + 20, 128)) for e in range(n)], np.uint8)
        for c, n in enumerate((8, 8, 2))
    ]


@pytest.fixture(scope="module")
def maps(pictures) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random((len(p), 6, 6)) for p in pictures]


@pytest.fixture(scope="module")
def factors() -> pd.DataFrame:
    """Three factors of 14, 9 and 6 values under four bases, in shuffled order of value."""
    rng, rows = np.random.default_rng(1), []
    values = [(f, f"{f} {i}") for f, n in (("kind", 14), ("colour", 9), ("cue", 6)) for i in range(n)]
    for b, basis in enumerate(NAMES):
        for factor, value in values:
            auroc, f1 = 0.95 - 0.1 * b - 0.1 * rng.random(), 0.8 - 0.1 * b - 0.1 * rng.random()
            rows.append(
                {
                    "basis": basis, "factor": factor, "value": value, "n": 20, "unit": len(rows), "own": auroc > 0.9,
                    "auroc": auroc, "auroc_low": auroc - 0.03, "auroc_high": auroc + 0.02,
                    "f1": f1, "f1_low": f1 - 0.05, "f1_high": f1 + 0.04,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def summary() -> pd.DataFrame:
    rows = []
    for basis, measure in itertools.product(NAMES, ("auroc", "f1", "own", "mixing")):
        value = {"auroc": 0.9, "f1": 0.6, "own": 31.0, "mixing": 2.0}[measure] - 0.1 * NAMES.index(basis)
        rows.append({"basis": basis, "measure": measure, "value": value, "low": value - 0.05, "high": value + 0.04})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def latents() -> pd.DataFrame:
    rng = np.random.default_rng(2)
    table = pd.DataFrame(
        {"latent": range(200), "frequency": 10 ** rng.uniform(-3, -0.3, 200), "clarity": rng.random(200)}
    )
    table.loc[:9, ["frequency", "clarity"]] = [0, np.nan]
    table.loc[10:12, "clarity"] = np.nan
    return table


@pytest.fixture(scope="module")
def everything(components, pictures, maps, factors, summary, latents) -> dict[str, go.Figure]:
    steps = np.arange(0, 2000, 20)
    history = pd.DataFrame({"step": steps, "nmse": np.exp(-steps / 500), "l0": 16.0, "n_dead": steps // 500})
    return {
        "gallery": figures_components.component_gallery(components, pictures),
        "gallery_with_maps": figures_components.component_gallery(components, pictures, maps),
        "recovery": figures_components.recovery(summary, n_factors=29),
        "by_factor": figures_components.recovery_by_factor(factors),
        "by_factor_f1": figures_components.recovery_by_factor(factors, "f1"),
        "few_factors": figures_components.recovery_by_factor(factors[factors["factor"] == "cue"]),
        "frequency": figures_components.frequency_and_clarity(latents),
        "training": figures_components.sae_training(history),
    }


def test_every_figure_fits_the_page_and_holds_plain_numbers(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1400, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert ImageFont.load_default(size).getlength(text) < canvas.WIDTH - 30, f"{name}: {text!r}"
        assert "bdata" not in figure.to_json(), name
        for trace in figure.data:
            for value in [*(trace.x or ()), *(trace.y or ())]:
                if isinstance(value, float):
                    assert value == float(f"{value:.6g}"), name


# gallery


def _pixel(source: str) -> np.ndarray:
    data = base64.b64decode(source.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data))).mean(axis=(0, 1))


def test_gallery_has_a_row_a_component(everything, components, pictures):
    figure = everything["gallery"]
    placed = sorted(((im.y, im.x, im.source) for im in figure.layout.images), key=lambda p: p[:2])
    assert len(placed) == 18 and len({y for y, _, _ in placed}) == 3
    expected = [picture for row in pictures for picture in row]
    for (_, _, source), picture in zip(placed, expected, strict=True):
        assert np.abs(_pixel(source) - picture[0, 0]).max() < 4
    assert all(x > 0 for _, x, _ in placed)
    texts = [a.text for a in figure.layout.annotations]
    assert [t.split("<br>")[-4:] for t in texts] == [
        ["latent 7", "alignment 0.31", "clarity 0.80", "on in 3.12 % of images"],
        ["latent 3", "alignment -0.02", "clarity 0.12", "on in 50.0 % of images"],
        ["latent 12", "alignment unknown", "clarity unknown", "never on"],
    ]
    assert texts[0].startswith("<b>duck</b>") and texts[1].count("<br>") == 5 and "…" in texts[1]
    # what is said stands beside the component's own pictures, left of them, and fits there
    rows = sorted({im.y for im in figure.layout.images})
    cell = (canvas.WIDTH - 20 - figures_components.LEFT) / 8
    for note, row in zip(figure.layout.annotations, rows, strict=True):
        assert note.y == pytest.approx(row - 0.47, abs=1e-3) and note.x == -0.5
        lines = note.text.replace("<b>", "").replace("</b>", "").split("<br>")
        widest = max(ImageFont.load_default(12).getlength(line) for line in lines)
        assert widest < figures_components.LEFT - 8 and 16 * len(lines) < cell * (rows[1] - rows[0])


def test_gallery_shows_where_below_what(everything, pictures, maps):
    figure = everything["gallery_with_maps"]
    at = {(round(im.x, 3), round(im.y, 3)): im.source for im in figure.layout.images}
    assert len(at) == 36
    left, rows = min(x for x, _ in at), sorted({y for _, y in at})
    for c, e in ((0, 0), (1, 5), (2, 1)):
        x, (what, where) = round(left + e, 3), rows[2 * c : 2 * c + 2]
        assert where == pytest.approx(what + 1, abs=1e-3)
        assert np.abs(_pixel(at[x, what]) - pictures[c][e][0, 0]).max() < 4
        assert np.abs(_pixel(at[x, where]) - overlay(pictures[c][e], maps[c][e]).mean(axis=(0, 1))).max() < 6


def test_gallery_refuses_what_does_not_match(components, pictures, maps):
    for wrong in ((components[:2], pictures, maps), (components, pictures, maps[:2])):
        with pytest.raises(ValueError, match="must match"):
            figures_components.component_gallery(*wrong)


# recovery


def test_recovery_shows_every_basis_under_every_measure(everything, summary):
    figure = everything["recovery"]
    for trace, measure in zip(figure.data, ("auroc", "f1", "own", "mixing"), strict=True):
        rows = summary[summary["measure"] == measure]
        assert list(trace.y) == ["Dictionary", "Raw neurons", "Random dictionary", "Principal components"]
        assert list(trace.x) == pytest.approx(rows["value"].tolist())
        assert list(trace.error_x.array) == pytest.approx([0.04] * 4) and trace.error_x.arrayminus[0] == 0.05
    titles = [a.text for a in figure.layout.annotations]
    assert titles == ["Mean AUROC", "Mean F1", "Values with a unit of their own", "Units that mix"]
    assert "29 factor values" in figure.layout.title.subtitle.text
    assert [s.x0 for s in figure.layout.shapes] == [0.5] and figure.layout.shapes[0].xref == "x"
    for axis, trace in zip(("xaxis", "xaxis2", "xaxis3", "xaxis4"), figure.data, strict=True):
        low, high = figure.layout[axis].range
        assert low < min(trace.x) - 0.05 and high > max(trace.x) + 0.04


@pytest.mark.parametrize(("name", "measure"), [("by_factor", "auroc"), ("by_factor_f1", "f1")])
def test_each_value_stands_once_with_all_its_bases(everything, factors, name, measure):
    figure = everything[name]
    texts = {}
    for c in ("", "2"):
        axis = figure.layout[f"yaxis{c}"]
        texts |= {("x" + c, tick): text for tick, text in zip(axis.tickvals, axis.ticktext, strict=True)}
        assert axis.range[0] > max(axis.tickvals) and axis.range[1] < 0
    assert len(texts) == 29
    seen = {}
    for trace in figure.data:
        for x, y in zip(trace.x, trace.y, strict=True):
            seen[trace.name, texts[trace.xaxis, y].removeprefix("<b>").removesuffix("</b>")] = x
    assert len(seen) == 29 * 4
    for row in factors.itertuples():
        shown = seen[figures_components.BASES[row.basis][0], row.value]
        assert shown == pytest.approx(getattr(row, measure), rel=1e-5)
    main = factors[factors["basis"] == "dictionary"]
    bold = {t[3:-4] for t in texts.values() if t.startswith("<b>")}
    assert bold == set(main.loc[main["own"], "value"]) and 0 < len(bold) < 29
    # within a factor from best to worst
    for factor, group in main.groupby("factor"):
        by_place = [t for _, t in sorted(texts.items()) if factor in t]
        ranked = group.sort_values(measure, ascending=False)["value"].tolist()
        assert [t.replace("<b>", "").replace("</b>", "") for t in by_place] == ranked
    whiskers = [trace for trace in figure.data if trace.error_x.array]
    assert {trace.name for trace in whiskers} == {"Dictionary"}
    assert whiskers[0].error_x.array[0] == pytest.approx(0.02 if measure == "auroc" else 0.04, abs=1e-5)


def test_few_values_take_one_column_and_an_unknown_measure_is_refused(everything, factors):
    assert "xaxis2" not in everything["few_factors"].to_plotly_json()["layout"]
    with pytest.raises(ValueError, match="'auroc' or 'f1'"):
        figures_components.recovery_by_factor(factors, "own")


# distributions and training


def test_points_are_split_at_the_dense_bound_and_the_rest_counted(everything, latents):
    figure = everything["frequency"]
    drawn = latents[(latents["frequency"] > 0) & latents["clarity"].notna()]
    for trace, rows in zip(
        figure.data, (drawn[drawn["frequency"] <= DENSE_FROM], drawn[drawn["frequency"] > DENSE_FROM]), strict=True
    ):
        assert list(trace.x) == pytest.approx(rows["frequency"].tolist(), rel=1e-5)
        assert list(trace.y) == pytest.approx(rows["clarity"].tolist(), rel=1e-5)
        assert f"({len(rows)})" in trace.name
    assert "not drawn: 10 never on, 3 on in one image alone" in figure.layout.title.subtitle.text
    assert figure.layout.shapes[0].x0 == DENSE_FROM and figure.layout.xaxis.type == "log"
    whole = figures_components.frequency_and_clarity(drawn)
    assert "all are drawn" in whole.layout.title.subtitle.text


def test_training_has_a_panel_a_quantity(everything):
    figure = everything["training"]
    assert [a.text for a in figure.layout.annotations] == ["Normalised MSE", "Latents on in a row (L0)", "Dead latents"]
    assert figure.data[0].y[0] == 1 and figure.data[2].y[-1] == 3 and len(figure.data[1].x) == 100
    assert figure.layout.title.text == "How the dictionary was trained"


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    rows = [
        ("word", 0.9, 0.88, -0.02, -0.04, 0.01, "shipped"),
        ("colour", 0.99, 0.95, -0.04, -0.05, -0.03, "shipped"),
        ("word", 0.9, 0.91, 0.01, 0.0, 0.02, "trained here"),
        ("colour", 0.99, 0.97, -0.02, -0.03, 0.0, "trained here"),
    ]
    columns = ["task", "accuracy", "accuracy_after", "change", "low", "high", "dictionary"]
    return pd.DataFrame(rows, columns=columns).assign(n=50)


def test_predictions_kept_draws_each_accuracy_with_the_interval_of_its_change(predictions):
    figure = figures_components.predictions_kept(predictions)
    lines = [trace for trace in figure.data if trace.name == "the model itself"]
    assert [list(line.x) for line in lines] == [[0.9, 0.9], [0.99, 0.99]]
    by_name = {trace.name: trace for trace in figure.data if trace.mode == "markers"}
    for name, rows in predictions.groupby("dictionary"):
        trace = by_name[name]
        assert list(trace.x) == rows["accuracy_after"].tolist()
        # from accuracy_after to accuracy + low and accuracy + high
        down = rows["accuracy_after"] - rows["accuracy"] - rows["low"]
        up = rows["accuracy"] + rows["high"] - rows["accuracy_after"]
        assert list(trace.error_x.arrayminus) == pytest.approx(down.tolist(), abs=1e-6)
        assert list(trace.error_x.array) == pytest.approx(up.tolist(), abs=1e-6)
        assert [round(y) for y in trace.y] == [0, 1] and list(trace.text) == ["Word", "Colour"]
    low, high = figure.layout.xaxis.range
    assert low < 0.86 and high > 0.99 and "50 images" in figure.layout.title.subtitle.text


def test_firing_falls_and_counts_what_is_ever_on():
    share = np.array([0.0, 0.2, 0.5, 0.01, 0.0])
    trace = figures_components.firing({"one": share, "none": np.zeros(3)}).data[0]
    assert list(trace.x) == [1, 2, 3] and list(trace.y) == [0.5, 0.2, 0.01]
    assert trace.name == "one: 3 of 5 ever on"
