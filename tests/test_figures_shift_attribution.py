"""The figures of shifts taken apart: the numbers they were given, in the reading order, with every label there."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import ImageFont

from clipshift_core import canvas
from clipshift_core import figures_shift_attribution as figures

NINE = list(canvas.ORDER[1:])
NAMES = [canvas.LABELS[name] for name in NINE]
SIZES = (1, 2, 5, 10, 20)
LABELS = {latent: f"label {latent}" for latent in range(60)} | {
    7: "a very long label of ripples, moons and leaves in brown meadows",
    8: None,
}


def _tidy(values: dict[str, np.ndarray], n: int = 40) -> pd.DataFrame:
    """A row an augmentation and quantity, shuffled, with intervals that are wider above than below."""
    rows = [
        (name, quantity, value, value - 0.1 * abs(value), value + 0.2 * abs(value), n)
        for quantity, each in values.items()
        for name, value in zip(NINE, each, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["augmentation", "quantity", "mean", "low", "high", "n"])
    return table.sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    lost, gained, error = -rng.uniform(0.01, 0.3, 9), rng.uniform(0, 0.1, 9), rng.normal(0, 0.02, 9)
    account = {"change": lost + gained + error, "lost": lost, "gained": gained, "error": error, "gap": 1e-6 * gained}
    prints = []
    for i, name in enumerate(rng.permutation(NINE)):
        part = rng.normal(0, 0.01, 8)
        part = part[np.argsort(-np.abs(part))]
        rows = pd.DataFrame({"augmentation": name, "latent": np.arange(8) * (1 + i % 3) + i, "part": part})
        prints.append(rows.assign(share=0.05, part_low=part - 0.002, part_high=part + 0.003, n=40))
    half = rng.uniform(1, 5, 9)
    rows = []
    for measure, n in (("target", 360), ("predictions", 70), ("broken", 1)):
        for size in SIZES:
            for chosen in ("top", "random", "top - random"):
                share = rng.random()
                rows.append((measure, chosen, size, share, share - 0.1, share + 0.05, n))
        rows.append((measure, "every", pd.NA, 0.875, 0.8, 0.9, n))
    repair = pd.DataFrame(rows, columns=["measure", "chosen", "size", "share", "low", "high", "n"])
    return {
        "account": _tidy({**account, "rest": np.zeros(9)}),
        "fingerprints": pd.concat(prints, ignore_index=True),
        "concentration": _tidy({"half": half, "ninety": 3 * half, "latents": 6 * half, "error": error}),
        "repair": repair.astype({"size": "Int64"}),
        "turnover": pd.concat(
            _tidy({"lost": half / share, "gained": half / 2 / share}).assign(kind=kind)
            for kind, share in (("colour", 20), ("thing", 10), ("weather", 40))
        ).reset_index(drop=True),
    }


def _all(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    return {
        "account": figures.account(tables["account"]),
        "fingerprints": figures.fingerprints(tables["fingerprints"], LABELS),
        "concentration": figures.concentration(tables["concentration"]),
        "repair": figures.repair(tables["repair"], measures=("target", "predictions", "broken")),
        "turnover": figures.turned_over(tables["turnover"]),
    }


@pytest.fixture(scope="module")
def everything(tables) -> dict[str, go.Figure]:
    """Each figure once, and the hard cases: unknown values and intervals, one augmentation, no row at all."""
    unknown = {name: table.copy() for name, table in tables.items()}
    for table in unknown.values():
        first = table.columns.intersection(["mean", "part", "share"])[0]
        ends = [column for column in table if column.endswith(("low", "high"))]
        table.loc[table.index[::3], ends] = np.nan
        table.loc[table.index[::4], [first, *ends]] = np.nan
    one = {
        name: table[table["augmentation"] == "blur"] if "augmentation" in table else table
        for name, table in tables.items()
    }
    empty = {name: table[:0] for name, table in tables.items()}
    found = {"": tables, "unknown_": unknown, "one_": one, "empty_": empty}
    return {f"{prefix}{name}": figure for prefix, some in found.items() for name, figure in _all(some).items()}


def _of(table: pd.DataFrame, quantity: str, column: str = "mean") -> list[float]:
    return table[table["quantity"] == quantity].set_index("augmentation").loc[NINE, column].tolist()


def _close(values) -> pytest.approx:
    return pytest.approx(list(values), rel=1e-5, abs=2e-8)


def _ends(values, bars) -> tuple[list[float], list[float]]:
    """Lower and upper ends of error bars."""
    return np.subtract(values, bars.arrayminus).tolist(), np.add(values, bars.array).tolist()


# what every figure keeps to


def test_every_figure_fits_the_page_and_says_what_it_shows(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1200, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            assert ImageFont.load_default(size).getlength(text) < canvas.WIDTH - 30, f"{name}: {text!r}"
        if not name.endswith("repair"):
            assert ("no images" if name.startswith("empty") else "40 images") in layout.title.subtitle.text, name


def test_figures_are_small_and_plain(everything):
    for name, figure in everything.items():
        text = figure.to_json()
        assert len(text) < 60_000 and "bdata" not in text and "NaN" not in text and "Infinity" not in text, name
        for trace in figure.data:
            for value in [*(trace.x or ()), *(trace.y or ())]:
                if isinstance(value, float):
                    assert value == float(f"{value:.6g}"), name


def test_the_order_of_augmentations_does_not_matter(tables, everything):
    again = {name: table.sort_values(list(table.columns[:2]), kind="stable") for name, table in tables.items()}
    prints = tables["fingerprints"]
    again["fingerprints"] = pd.concat([prints[prints["augmentation"] == name] for name in NINE[::-1]])
    for name, figure in _all(again).items():
        assert canvas.data_sha256(figure) == canvas.data_sha256(everything[name]), name


# the account


def test_account_stacks_the_parts_and_marks_their_sum(tables, everything):
    figure = everything["account"]
    *bars, change = figure.data
    assert [bar.name.split(":")[0] for bar in bars] == ["lost", "gained", "error"]
    for bar, quantity in zip(bars, ("lost", "gained", "error"), strict=True):
        assert list(bar.y) == NAMES and list(bar.x) == _close(_of(tables["account"], quantity))
    assert np.sum([bar.x for bar in bars], axis=0).tolist() == pytest.approx(list(change.x), abs=1e-6)
    low, high = _ends(change.x, change.error_x)
    assert low == _close(_of(tables["account"], "change", "low")) and high == _close(
        _of(tables["account"], "change", "high")
    )
    assert figure.layout.barmode == "relative" and figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.xaxis.title.text == "Mean change in cosine similarity (view minus image)"
    looks = {(bar.marker.color, bar.marker.pattern.shape) for bar in bars}
    assert len(looks) == 3 and not {colour for colour, _ in looks} & set(canvas.COLOURS.values())
    written = {a.y: a.text for a in figure.layout.annotations}
    for name, value in zip(NAMES, change.x, strict=True):
        assert float(written[name].replace("−", "-")) == pytest.approx(value, abs=5.1e-4)


def test_account_shows_what_unread_tokens_add_where_they_do(tables):
    table = tables["account"].copy()
    table.loc[table["quantity"] == "rest", "mean"] = 0.04
    figure = figures.account(table, target="logit")
    rest = figure.data[3]
    assert rest.name.startswith("rest") and set(rest.x) == {0.04}
    assert "logit" in figure.layout.title.text and "logit" in figure.layout.xaxis.title.text


# fingerprints


def test_each_panel_holds_the_first_latents_of_its_augmentation(tables, everything):
    figure, table = everything["fingerprints"], tables["fingerprints"]
    assert len(figure.data) == 9
    titles = [a.text for a in figure.layout.annotations if a.text.startswith("<b>")]
    # six of a share of 0.05 each
    assert titles == [f"<b>{name}</b>, 30% of all parts" for name in NAMES]
    for i, (name, bar) in enumerate(zip(NINE, figure.data, strict=True)):
        rows = table[table["augmentation"] == name].head(6)
        axis = f"x{i + 1 if i else ''}"
        assert bar.xaxis == axis and list(bar.x) == _close(rows["part"]) and list(bar.y) == [0, 1, 2, 3, 4, 5]
        low, high = _ends(bar.x, bar.error_x)
        assert low == _close(rows["part_low"]) and high == _close(rows["part_high"])
        shapes = ["" if value >= 0 else "/" for value in rows["part"]]
        assert list(bar.marker.pattern.shape) == shapes
        written = [a.text for a in figure.layout.annotations if a.xref == f"{axis} domain" and "<span" in a.text]
        for text, hover, latent in zip(written, bar.text, rows["latent"], strict=True):
            label = LABELS[latent] or "no label"
            assert text.startswith(label[:28]) and f">{latent}<" in text
            assert hover == f"{label} (latent {latent})"


def test_the_panels_run_over_three_columns(everything):
    layout = everything["fingerprints"].layout
    lefts = [round(layout[f"xaxis{i or ''}"].domain[0], 3) for i in ("", *range(2, 10))]
    assert lefts[:3] == lefts[3:6] == lefts[6:] and len(set(lefts)) == 3
    assert [layout[f"xaxis{i or ''}"].title.text for i in ("", 5, 7, 9)] == [None, None, "Mean part", "Mean part"]


# concentration, repair, turnover


def test_concentration_joins_half_and_nine_tenths(tables, everything):
    figure, table = everything["concentration"], tables["concentration"]
    spans, *rest = figure.data
    pairs = zip(_of(table, "half"), _of(table, "ninety"), strict=True)
    assert list(spans.x) == [v and pytest.approx(v, rel=1e-5) for pair in pairs for v in (*pair, None)]
    dots = [trace for trace in rest if trace.mode == "markers+text"]
    for dot, quantity in zip(dots, ("half", "ninety"), strict=True):
        assert list(dot.y) == NAMES and list(dot.x) == _close(_of(table, quantity))
        low, high = _ends(dot.x, dot.error_x)
        assert low == _close(_of(table, quantity, "low")) and high == _close(_of(table, quantity, "high"))
        assert list(dot.marker.line.color) == [canvas.COLOURS[name] for name in NINE]
        assert [float(text) for text in dot.text] == pytest.approx(_of(table, quantity), abs=0.051)
    assert list(rest[-1].x) == _close(_of(table, "latents")) and rest[-1].name == "all that changed"
    assert [t.name for t in rest if t.showlegend is not False] == [
        "half of the sum",
        "nine tenths of it",
        "all that changed",
    ]
    assert figure.layout.xaxis.title.text == "Latents (fewer is more concentrated)"


def test_repair_draws_top_against_random_with_their_bands(tables, everything):
    figure, table = everything["repair"], tables["repair"].set_index(["measure", "chosen"])
    titles = [a.text for a in figure.layout.annotations]
    assert [title.split("<br>")[1] for title in titles] == [
        "360 views; dotted, all restored: 88%",
        "70 views; dotted, all restored: 88%",
        "1 view; dotted, all restored: 88%",
    ]
    assert [axis.title.text.split(" ")[0] for axis in figure.select_yaxes()] == ["Share"] * 3
    for axis, measure in zip(("x", "x2", "x3"), ("target", "predictions", "broken"), strict=True):
        top_band, random_band, top, random = (t for t in figure.data if t.xaxis == axis)
        for line, band, chosen in ((top, top_band, "top"), (random, random_band, "random")):
            rows = table.loc[(measure, chosen)]
            assert list(line.x) == list(SIZES) and list(line.y) == _close(rows["share"])
            assert list(band.y) == _close([*rows["high"], *rows["low"][::-1]])
        assert top.line.dash != random.line.dash and top.marker.symbol != random.marker.symbol
    assert [(shape.y0, shape.line.dash) for shape in figure.layout.shapes] == [(0.875, "dot")] * 3
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.tickvals) == list(SIZES)
    assert [t.name for t in figure.data if t.showlegend] == ["those that cost most", "as many random ones"]


def test_repair_without_predictions_has_one_panel(tables):
    figure = figures.repair(tables["repair"][tables["repair"]["measure"] == "target"])
    assert {trace.xaxis for trace in figure.data} == {"x"}


def test_turnover_is_mirrored_and_stacked_by_kind(tables, everything):
    figure, table = everything["turnover"], tables["turnover"]
    bars = [t for t in figure.data if t.type == "bar"]
    assert [bar.name for bar in bars] == ["thing"] * 2 + ["colour"] * 2 + ["weather"] * 2  # ours first, then the rest
    assert len({(bar.marker.pattern.fgcolor, bar.marker.pattern.shape) for bar in bars}) == 3
    for bar, (sign, quantity) in zip(bars, [(-1, "lost"), (1, "gained")] * 3, strict=True):
        of = table[table["kind"] == bar.name]
        assert list(bar.y) == NAMES and list(bar.x) == _close(sign * np.array(_of(of, quantity)))
        assert list(bar.customdata) == _close(_of(of, quantity))
    lost, gained = (t for t in figure.data if t.type == "scatter")
    wholes = table.groupby(["quantity", "augmentation"])["mean"].sum()
    assert list(lost.x) == _close(-wholes["lost"].loc[NINE]) and list(gained.x) == _close(wholes["gained"].loc[NINE])
    assert lost.text[0].strip("\u00a0") == f"{wholes['lost', NINE[0]]:.0%}"
    axis = figure.layout.xaxis
    assert [float(t.strip("%")) / 100 for t in axis.ticktext] == pytest.approx(
        [abs(v) for v in axis.tickvals], abs=0.005
    )
    assert axis.range[0] == -axis.range[1] and axis.range[1] > wholes.max()


def test_ticks_are_few_and_round():
    """At most five up to the end, at 1, 2 or 5 times a power of ten: 8.4 / 5 = 1.68, 26 / 5 = 5.2, 0.5 / 5 = 0.1."""
    assert [figures._step(most) for most in (8.4, 26, 0.5)] == [2, 10, pytest.approx(0.1)]


def test_unknown_values_are_said_and_not_drawn(tables, everything):
    for name in ("concentration",):
        texts = [text for t in everything[f"unknown_{name}"].data for text in (t.text or ())]
        assert "unknown" in [text.strip("\u00a0") for text in texts], name
    repair = everything["unknown_repair"]
    assert any(None in t.y for t in repair.data if t.mode == "lines+markers")
