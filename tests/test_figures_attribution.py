"""The figures of attribution: the numbers they were given, one look a method, and nothing lost on the way."""

import base64
import io
import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image, ImageFont
from skimage.color import deltaE_ciede2000, rgb2lab

from clipshift_core import attribution, canvas, faithfulness
from clipshift_core import figures_attribution as figures
from clipshift_core.figures_attribution import METHOD_LOOKS

METHODS = list(attribution.METHODS)
SETTINGS = {"n_resamples": 100, "seed": 0}
N = 30


@pytest.fixture(scope="module")
def curves() -> faithfulness.Curves:
    """Thirty images whose deletion falls, and insertion rises, by a power of the share; 2 images were left out."""
    rng = np.random.default_rng(0)
    steps = np.arange(9) / 8
    power = rng.uniform(0.2, 1.5, (len(METHODS), N, 1))
    return faithfulness.Curves(
        tuple(METHODS), steps, np.zeros(N), np.ones(N), 1 - steps**power, steps ** (1 / power), n_left_out=2
    )


@pytest.fixture(scope="module")
def tables(curves) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(1)
    agreement = faithfulness.Agreement(tuple(METHODS[:-1]), rng.uniform(-1, 1, (6, N)), rng.random((6, N)), k=5)
    areas = faithfulness.area_table(curves, **SETTINGS)
    return {
        "curves": faithfulness.curve_table(curves, **SETTINGS),
        "areas": areas,
        "agreement": faithfulness.agreement_table(agreement, **SETTINGS),
        "differences": faithfulness.difference_table(curves, reference="act_x_grad", **SETTINGS),
    }


@pytest.fixture(scope="module")
def contributions() -> pd.DataFrame:
    """Fourteen latents in no order; ten have a bar of their own, the last four a sum of 0.02 - 0.01 + 0.01 - 0.005."""
    values = [0.02, 0.3, -0.2, 0.1, -0.01, 0.09, 0.08, -0.07, 0.06, 0.05, -0.04, 0.03, 0.01, -0.005]
    labels = [f"label {i}" for i in range(13)]
    labels.append("a very long label of ripples, moons and leaves in brown meadows at night")
    return pd.DataFrame({"latent": range(100, 114), "label": labels, "value": values})


@pytest.fixture(scope="module")
def examples() -> list[list[np.ndarray]]:
    """Four plain pictures for each latent, its number in red, the example's in green."""
    return [[np.full((8, 8, 3), (15 * i, 60 * e, 128), np.uint8) for e in range(4)] for i in range(14)]


PICTURE = np.full((20, 30, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def everything(tables, contributions, examples) -> dict[str, go.Figure]:
    """Each figure once, and the hard cases: unknown values, one image, one kind."""
    unknown = {name: table.copy() for name, table in tables.items()}
    for table in unknown.values():
        table.loc[table["method"] == "energy", ["mean", "low", "high"]] = np.nan
        table.loc[table["method"] == "logit_lens", ["low", "high"]] = np.nan
    found = {
        "apart": figures.image_taken_apart(contributions, PICTURE, examples, "a duck", 0.6),
        "apart_one": figures.image_taken_apart(contributions[:1], PICTURE, examples[:1], "x " * 200, -0.1),
        "apart_none": figures.image_taken_apart(contributions[:0], PICTURE, [], "a duck", 0.2),
        "one_kind": figures.faithfulness_curves(tables["curves"], kinds=["insertion"], normalised=False),
    }
    for prefix, some in (("", tables), ("unknown_", unknown), ("empty_", {k: t[:0] for k, t in tables.items()})):
        found[f"{prefix}curves"] = figures.faithfulness_curves(some["curves"])
        found[f"{prefix}areas"] = figures.faithfulness_areas(some["areas"])
        found[f"{prefix}agreement"] = figures.agreement(some["agreement"], k=5)
        if prefix != "empty_":
            found[f"{prefix}differences"] = figures.difference_from(some["differences"])
    return found


def _close(values) -> pytest.approx:
    return pytest.approx(list(values), rel=1e-5, nan_ok=True)


def _points(figure: go.Figure, axis: str, name: str) -> go.Scatter:
    """The dot of one method in one panel."""
    return next(t for t in figure.data if t.xaxis in (axis, None) and t.name == METHOD_LOOKS[name].label)


# looks


def test_each_method_has_one_look_of_its_own():
    assert set(METHOD_LOOKS) == set(attribution.METHODS)
    for part in ("label", "colour", "symbol"):
        assert len({getattr(look, part) for look in METHOD_LOOKS.values()}) == len(METHOD_LOOKS)
    assert figures.in_method_order(["random", "mine", "act_x_grad", "random"]) == ["act_x_grad", "random", "mine"]
    assert figures.method_look("my_method").label == "my method"


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
def test_no_two_methods_look_alike(vision):
    rgb = np.array([[int(m.colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for m in METHOD_LOOKS.values()])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    lab = rgb2lab(np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
    assert min(float(deltaE_ciede2000(a, b)) for a, b in itertools.combinations(lab, 2)) > 13
    assert (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)).min() > 2.1


# what every figure keeps to


def test_every_figure_fits_the_page_and_says_what_it_shows(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1000, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert ImageFont.load_default(size).getlength(text) < canvas.WIDTH - 30, f"{name}: {text!r}"
        if not name.startswith("apart"):
            count = "no images" if name.startswith("empty") else f"{N} images"
            assert count in layout.title.subtitle.text, name


def test_figures_are_small_and_plain(everything):
    for name, figure in everything.items():
        text = figure.to_json()
        assert len(text) < 100_000 and "bdata" not in text and "NaN" not in text and "Infinity" not in text, name
        for trace in figure.data:
            for value in [*(trace.x or ()), *(trace.y or ())]:
                if isinstance(value, float):
                    assert value == float(f"{value:.6g}"), name


def test_the_order_of_the_rows_does_not_matter(tables, everything):
    shuffled = {name: table.sample(frac=1, random_state=2) for name, table in tables.items()}
    again = {
        "curves": figures.faithfulness_curves(shuffled["curves"]),
        "areas": figures.faithfulness_areas(shuffled["areas"]),
        "agreement": figures.agreement(shuffled["agreement"], k=5),
        "differences": figures.difference_from(shuffled["differences"]),
    }
    for name, figure in again.items():
        assert canvas.data_sha256(figure) == canvas.data_sha256(everything[name]), name


# one image


def test_waterfall_runs_from_what_is_left_to_the_total(contributions, everything):
    figure = everything["apart"]
    bars, joints, ends, texts = figure.data
    # by absolute value: 0.3, -0.2, 0.1, 0.09, 0.08, -0.07, 0.06, 0.05, -0.04, 0.03; the others 0.02-0.01+0.01-0.005
    drawn = [0.3, -0.2, 0.1, 0.09, 0.08, -0.07, 0.06, 0.05, -0.04, 0.03, 0.015]
    assert list(bars.x) == pytest.approx(drawn) and list(bars.y) == list(range(1, 12))
    # all of them are 0.415, so that 0.6 begins at 0.185
    assert list(ends.x) == pytest.approx([0.185, 0.6]) and list(ends.y) == [0, 12]
    assert list(bars.base) == pytest.approx(0.185 + np.cumsum([0, *drawn[:-1]]), abs=1e-6)
    assert bars.base[-1] + bars.x[-1] == pytest.approx(0.6)
    assert joints.x[0] == 0.185 and joints.x[-2] == pytest.approx(0.6) and len(joints.x) == 36
    said = [text.strip("\u00a0") for text in texts.text]
    assert said[:3] == ["0.185", "+0.300", "−0.200"] and said[-2:] == ["+0.015", "0.600"]
    low, high = figure.layout.xaxis.range
    assert low < 0.185 and high > 0.185 + sum(drawn[:5]) and figure.layout.xaxis.title.text == "Cosine similarity"


def test_waterfall_tells_signs_apart_by_more_than_colour(everything):
    bars = everything["apart"].data[0]
    for value, colour, shape in zip(bars.x, bars.marker.color, bars.marker.pattern.shape, strict=True):
        assert (colour, shape) == ((figures.POSITIVE, "") if value >= 0 else (figures.NEGATIVE, "/"))


def test_waterfall_names_each_latent_beside_its_own_examples(contributions, everything):
    figure = everything["apart"]
    written = {round(a.y): a.text for a in figure.layout.annotations if a.x > 0.1}
    order = [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    for row, i in enumerate(order, 1):
        assert contributions["label"][i] in written[row] and f"latent {100 + i}" in written[row]
    assert written[0] == "no latent: error and bias" and written[11] == "all 4 others"
    assert written[12] == "<b>total: cosine similarity</b>"
    assert figure.layout.images[0].sizex * (canvas.WIDTH - 40) == pytest.approx(210, abs=0.1)
    # three of the four examples of each, in their order, read back from the JPEGs
    assert len(figure.layout.images) == 1 + 3 * 10
    for n, image in enumerate(figure.layout.images[1:]):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.source.split(",")[1]))))
        i, e = order[n // 3], n % 3
        np.testing.assert_allclose(pixels.mean(axis=(0, 1)), [15 * i, 60 * e, 128], atol=4)
        assert image.y == n // 3 + 1
    assert any("a duck" in a.text for a in figure.layout.annotations)
    hover = figure.data[0].customdata
    assert hover[0] == "label 1, latent 101" and hover[-1] == "all 4 others"


def test_other_methods_do_not_claim_to_add_up(contributions, examples):
    figure = figures.image_taken_apart(contributions, PICTURE, examples, "a duck", 0.6, method="act_x_grad")
    assert any(a.text == "no latent: error, bias, and what does not add up" for a in figure.layout.annotations)
    assert "act x grad" in figure.layout.title.subtitle.text


def test_long_labels_are_cut_on_the_page_and_whole_in_the_hover(contributions, examples):
    figure = figures.image_taken_apart(contributions[13:], PICTURE, examples[13:], "a duck", 0.6)
    assert any("…" in a.text and "latent 113" in a.text for a in figure.layout.annotations)
    assert figure.data[0].customdata[0] == f"{contributions['label'][13]}, latent 113"


def test_examples_must_belong_to_the_latents(contributions, examples):
    with pytest.raises(ValueError, match="14 latents, 13 rows of examples"):
        figures.image_taken_apart(contributions, PICTURE, examples[1:], "a duck", 0.6)


# methods


def test_curves_are_the_means_with_their_intervals_as_bands(tables, everything):
    figure, table = everything["curves"], tables["curves"].set_index(["kind", "method"])
    labels = [a.text for a in figure.layout.annotations]
    assert labels == ["Deletion: lower is more faithful", "Insertion: higher is more faithful"]
    for axis, kind in (("x", "deletion"), ("x2", "insertion")):
        mine = [t for t in figure.data if t.xaxis == axis]
        bands, lines = mine[:7], mine[7:]
        assert [t.name for t in lines] == [look.label for look in METHOD_LOOKS.values()][::-1]
        for band, line, (name, look) in zip(bands, lines, reversed(METHOD_LOOKS.items()), strict=True):
            rows = table.loc[(kind, name)]
            assert list(line.x) == _close(rows["step"]) and list(line.y) == _close(rows["mean"])
            assert list(band.y) == _close([*rows["high"], *rows["low"][::-1]]) and len(band.x) == len(band.y) == 18
            assert (line.line.color, line.line.dash, line.marker.symbol) == (look.colour, look.dash, look.symbol)
    assert figure.layout.xaxis.title.text == "Share of an image's latents deleted, highest score first"
    assert "1 with all latents" in figure.layout.yaxis.title.text
    assert [t.name for t in figure.data if t.showlegend] == [look.label for look in METHOD_LOOKS.values()][::-1]


def test_curves_of_one_kind_or_of_numbers_of_latents(tables, everything):
    figure = everything["one_kind"]
    assert {t.xaxis for t in figure.data} == {"x"} and figure.layout.yaxis.title.text == "Target (its own units)"
    numbers = figures.faithfulness_curves(tables["curves"].assign(step=lambda t: 8 * t["step"]))
    assert numbers.layout.xaxis.title.text.startswith("Number of latents deleted")


def test_dots_are_the_means_with_their_intervals_in_one_order(tables, everything):
    panels = {"areas": ("kind", "deletion", "insertion"), "agreement": ("measure", "rho", "overlap")}
    panels["differences"] = ("kind", "deletion", "insertion")
    for name, (column, *values) in panels.items():
        figure, table = everything[name], tables[name]
        order = [m for m in METHOD_LOOKS if m in set(table["method"])]
        assert list(figure.layout.yaxis.categoryarray) == [METHOD_LOOKS[m].label for m in order]
        for axis, value in zip(("x", "x2"), values, strict=True):
            rows = table[table[column] == value].set_index("method")
            for method in order:
                dot, row = _points(figure, axis, method), rows.loc[method]
                assert list(dot.x) == _close([row["mean"]]) and dot.y == (METHOD_LOOKS[method].label,)
                assert dot.x[0] - dot.error_x.arrayminus[0] == pytest.approx(row["low"], abs=1e-5)
                assert dot.x[0] + dot.error_x.array[0] == pytest.approx(row["high"], abs=1e-5)
                assert float(dot.text[0].replace("−", "-")) == pytest.approx(row["mean"], abs=5.1e-4)
                assert dot.marker.color == METHOD_LOOKS[method].colour
    titles = [a.text for a in everything["areas"].layout.annotations]
    assert titles == ["Deletion: lower is better", "Insertion: higher is better"]
    assert "left out: 2 images" in everything["areas"].layout.title.subtitle.text
    axes = [axis.title.text for axis in everything["agreement"].select_xaxes()]
    assert axes == ["Spearman's rho (1 same order, 0 unrelated)", "Share of exact ablation's 5 among the method's 5"]


def test_unknown_values_are_said_and_not_drawn(everything):
    for name in ("areas", "agreement", "differences"):
        dot = _points(everything[f"unknown_{name}"], "x", "energy")
        assert dot.x == (None,) and dot.text == ("unknown",)
        assert _points(everything[f"unknown_{name}"], "x", "logit_lens").error_x.visible is False


def test_a_difference_that_may_be_nothing_is_hollow():
    rows = [("deletion", "energy", 0.1, 0.05, 0.2), ("deletion", "random", 0.1, -0.05, 0.2)]
    rows += [("insertion", "energy", -0.1, -0.2, 0.01), ("insertion", "random", -0.1, -0.2, -0.01)]
    table = pd.DataFrame(rows, columns=["kind", "method", "mean", "low", "high"])
    figure = figures.difference_from(table.assign(reference="act_x_grad", n=9))
    symbols = {(t.xaxis, t.name): t.marker.symbol for t in figure.data}
    assert symbols["x", "energy"] == "triangle-down" and symbols["x", "random"] == "x-open"
    assert symbols["x2", "energy"] == "triangle-down-open" and symbols["x2", "random"] == "x"
    assert [shape.x0 for shape in figure.layout.shapes] == [0, 0]
    titles = [a.text for a in figure.layout.annotations]
    assert titles == ["Deletion: left of 0 beats act x grad", "Insertion: right of 0 beats act x grad"]


def test_differences_have_one_reference(curves):
    with pytest.raises(ValueError, match="one is accepted"):
        figures.difference_from(faithfulness.difference_table(curves, **SETTINGS))


def test_numbers_keep_three_digits_of_the_largest():
    assert figures._written([0.5, -0.123456, np.nan]) == ["+0.500", "−0.123", "unknown"]
    assert figures._written([0.0123, -0.0001, -0.000001]) == ["+0.0123", "−0.0001", "0.0000"]
    assert figures._written([12.5], "") == ["12.500"]
