"""The figures of unexpected reliance: what was found, how well each method finds it, and where each planted one stands.

Tables in, a plotly figure out. The tables are those of `reliance`; `scores` and `planted_ranks` also take those of
several models, joined, with a column model.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.canvas import INK, MUTED, canvas, n_images, numbers
from clipshift_core.figures_attribution import BOUNDS, METHOD_LOOKS, MethodLook, method_look
from clipshift_core.figures_dose import spread
from clipshift_core.figures_preservation import _panels

FREQUENCY = MethodLook("activation frequency", "#781400", "cross", "dot")
"""The look of a method that attributes nothing; its colour is as far from the others as they are from one another."""
MEASURE_TITLES = {
    "average precision": ("Average precision", "over all candidates"),
    "precision": ("Precision", "true among the best"),
    "recall": ("Recall of the planted", "planted ones that are hit"),
    "recall of causal": ("Recall of the causal", "causes that are hit"),
}
"""Title and axis of each panel of `scores`."""
FOUND = "#0072B2"
STATES = {
    "found": (FOUND, "circle"),
    "has a rank, not found": ("#D55E00", "diamond-open"),
    "no candidate hits it": (MUTED, "x"),
}
"""Colour and symbol of each planted reliance in `planted_ranks`."""
N_LABELLED = 12
"""Findings that have their names beside them."""
LABEL_PITCH = 22
"""Pixels from one of these names to the next, at least."""


def look_of(name: str) -> MethodLook:
    """How to draw a method of `reliance.score_table`."""
    return FREQUENCY if name == "frequency" else method_look(name)


def in_reading_order(names: Iterable[str]) -> list[str]:
    """The distinct names, from what is exact to what knows nothing; names that are not ours stand before random."""
    names = list(dict.fromkeys(names))
    ours = [name for name in (*METHOD_LOOKS, "frequency") if name in names and name != "random"]
    return [
        *ours,
        *(name for name in names if name not in ours and name != "random"),
        *["random"] * ("random" in names),
    ]


def attribution_and_alignment(table: pd.DataFrame, threshold: float, *, n_labelled: int = N_LABELLED) -> go.Figure:
    """Every candidate by relative alignment and attribution, those found told apart, the best of them named.

    table, threshold: of `reliance.discover`. The line is the threshold; the rate written on it is the largest q-value
    of what is found.
    """
    found = table["found"].to_numpy(dtype=bool)
    n_found = int(found.sum())
    some = f"{n_found:,} found" if n_found else "none found"
    figure = canvas(
        "Latents that a class relies on and that do not mean the class",
        f"Each point: a latent in the images of one class ({len(table):,} candidates, {some}), "
        f"over {n_images(table['n']) + ' a class' if len(table) else 'no images'}",
        height=640, showlegend=False, margin={"t": 90, "b": 70, "r": 210},
    )  # fmt: skip
    for which, (colour, symbol), size in ((~found, (MUTED, "circle-open"), 4), (found, (FOUND, "diamond"), 8)):
        rows = table[which]
        name = [f"{row.word}, latent {row.latent}" for row in rows.itertuples()] if size > 4 else None
        figure.add_scatter(
            x=numbers(rows["relative"]), y=numbers(rows["attribution"]), mode="markers", text=name,
            marker={"color": colour, "symbol": symbol, "size": size, "opacity": 0.55 if name is None else 0.9},
            hovertemplate="%{text}: %{y:.4g}<extra></extra>", hoverinfo="skip" if name is None else None,
        )  # fmt: skip
    (left, right), (bottom, top) = (_range(table[column]) for column in ("relative", "attribution"))
    if np.isfinite(threshold):
        rate = table.loc[found, "fdr"].max()
        figure.add_hline(y=numbers([threshold])[0], line={"color": INK, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=0, xref="x domain", xanchor="left", y=numbers([threshold])[0], yanchor="top", showarrow=False,
            text=f"found from {threshold:.3g} on: {rate:.1%} of them expected to be false", font={"size": 13},
            bgcolor="rgba(255,255,255,0.8)",
        )  # fmt: skip
    named = table[found].sort_values(["attribution", "word", "latent"], ascending=[False, True, True])[:n_labelled]
    least = LABEL_PITCH / (640 - 160) * (top - bottom)
    for row, y in zip(named.itertuples(), _beside(named["attribution"], least, top), strict=True):
        figure.add_scatter(
            x=numbers([row.relative, right]), y=numbers([row.attribution, y]), mode="lines",
            line={"color": FOUND, "width": 1, "dash": "dot"}, opacity=0.7, hoverinfo="skip",
        )  # fmt: skip
        figure.add_annotation(
            x=1, xref="paper", y=numbers([y])[0], text=f"<b>{row.word}</b>  latent {row.latent}", xanchor="left",
            showarrow=False, xshift=5, font={"size": 13},
        )  # fmt: skip
    figure.update_xaxes(
        title="Alignment with the class's text (1: that of the best aligned latent)", range=numbers([left, right])
    )
    figure.update_yaxes(
        title="Attribution (mean part of the cosine with the class's text)",
        range=numbers([bottom, top]), zeroline=True, zerolinecolor=MUTED,
    )  # fmt: skip
    return figure


def scores(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Each measure of each method with its interval, a panel a measure; with a column model, a row of panels a model.

    table: of `reliance.score_table`. The dotted line is what chance gives.
    """
    table = _with_model(table)
    models, methods = list(dict.fromkeys(table["model"])), in_reading_order(set(table["method"]) - {"chance"})
    measures = [name for name in MEASURE_TITLES if name in set(table["measure"])]
    n_rows, each = max(len(models), 1), 46 * max(len(methods), 2) + 20
    gap = 60  # between the rows of panels
    figure = _panels(
        "How well does each method find the reliances that are there?",
        f"Candidates in the order of each method's mean over {n_images(table['n']) if len(table) else 'no images'}, "
        f"with {level:.0%} intervals; dotted: chance",
        n_rows, max(len(measures), 1), height=190 + n_rows * each + (n_rows - 1) * gap,
        titles=[MEASURE_TITLES[name][0] for name in measures], shared_yaxes=True, horizontal_spacing=0.035,
        vertical_spacing=gap / (n_rows * each + (n_rows - 1) * gap) if n_rows > 1 else None,
    )  # fmt: skip
    figure.update_layout(margin={"t": 124, "b": 66})
    for c, measure in enumerate(measures, 1):
        of_measure = table[table["measure"] == measure]
        most = np.nanmax([*of_measure[["value", "low", "high"]].to_numpy(dtype=float).ravel(), 0.05])
        for r, model in enumerate(models, 1):
            rows = of_measure[of_measure["model"] == model].set_index("method")
            for y, name in enumerate(methods):
                if name in rows.index:
                    _dot(figure, rows.loc[name], look_of(name), y, row=r, col=c)
            if "chance" in rows.index:
                figure.add_scatter(
                    x=numbers([rows.loc["chance", "value"]] * 2), y=[-0.7, len(methods) - 0.4], mode="lines",
                    line={"color": INK, "width": 1.5, "dash": "dot"},
                    hovertemplate="chance: %{x:.3g}<extra></extra>", row=r, col=c,
                )  # fmt: skip
        # every share on an axis from 0, so that all models of a measure compare
        figure.update_xaxes(range=numbers([-0.06 * most, 1.16 * most]), nticks=4, rangemode="tozero", col=c)
        figure.update_xaxes(title=MEASURE_TITLES[measure][1], row=n_rows, col=c)
    figure.update_yaxes(
        tickvals=list(range(len(methods))), ticktext=[look_of(name).label for name in methods],
        range=[len(methods) - 0.4, -0.75], showgrid=True,
    )  # fmt: skip
    for r, model in enumerate(models, 1):
        if model:
            figure.update_yaxes(title=f"<b>{model}</b>", row=r, col=1)
    return figure


def planted_ranks(ranks: pd.DataFrame) -> go.Figure:
    """The rank of each planted reliance among all candidates, by kind; with a column model, a panel a model.

    ranks: of `reliance.ranks`. What no candidate hits stands right of the axis.
    """
    ranks = _with_model(ranks)
    models = list(dict.fromkeys(ranks["model"]))
    lines, place = [], {}
    for kind, rows in ranks.groupby("kind", sort=False):
        lines.append(f"<b>{str(kind)[:1].upper()}{str(kind)[1:]}</b>")
        for word, cue in dict.fromkeys(zip(rows["word"], rows["cue"], strict=True)):
            place[kind, word, cue] = len(lines)
            lines.append(f"{word} · {cue}")
    totals = {model: (int(rows["found"].sum()), len(rows)) for model, rows in ranks.groupby("model", sort=False)}
    said = {model: f"{n} of {of} found" for model, (n, of) in totals.items()}
    figure = _panels(
        "Where each planted reliance stands among all candidates",
        "Rank of the first candidate that hits it, 1 is the best"
        + (f"; {said[models[0]]}" if models == [""] else "; " * bool(models) + "a panel a model" * bool(models)),
        1, max(len(models), 1), height=210 + 23 * max(len(lines), 3),
        titles=[f"{model}: {said[model]}" for model in models] if models and models != [""] else None,
        shared_yaxes=True, horizontal_spacing=0.03,
    )  # fmt: skip
    known = ranks["rank"].dropna()
    end = np.log10(max(known.max() if len(known) else 10, 10)) + 0.25
    never = end + 0.16 * end
    for c, model in enumerate(models, 1):
        rows = ranks[ranks["model"] == model]
        hit, found = rows["rank"].notna().to_numpy(), rows["found"].to_numpy(dtype=bool)
        which = (hit & found, hit & ~found, ~hit)
        for (name, (colour, symbol)), mine in zip(STATES.items(), which, strict=True):
            some = rows[mine]
            look = {"color": colour, "symbol": symbol, "size": 11, "line": {"color": colour, "width": 2}}
            figure.add_scatter(
                x=numbers(some["rank"].astype(float).fillna(10**never)), mode="markers+text", marker=look,
                y=[place[key] for key in zip(some["kind"], some["word"], some["cue"], strict=True)],
                text=[f"\u00a0{rank:,}" if pd.notna(rank) else "" for rank in some["rank"]],
                textposition="middle right", textfont={"size": 12, "color": INK}, cliponaxis=False,
                customdata=[f"latent {j}" if pd.notna(j) else name for j in some["latent"]], name=name,
                hovertemplate="%{customdata}<extra></extra>", showlegend=False, row=1, col=c,
            )  # fmt: skip
            if c == 1:  # the legend says all three, whichever there are
                figure.add_scatter(x=[None], y=[None], mode="markers", marker=look, name=name, showlegend=True)
    decades = [10**power for power in range(int(np.floor(end)) + 1)]
    figure.update_xaxes(
        type="log", range=numbers([-0.12 * end, never + 0.08 * end]), title="Rank (logarithmic)",
        tickvals=numbers([*decades, 10**never]), ticktext=[*(f"{tick:,}" for tick in decades), "none"],
    )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(lines))), ticktext=lines, range=[max(len(lines), 3) - 0.4, -0.6])
    figure.update_layout(
        showlegend=True, margin={"t": 144, "b": 60},
        legend={"yref": "container", "y": 1 - 78 / figure.layout.height, "yanchor": "top"},
    )  # fmt: skip
    return figure


def _dot(figure: go.Figure, said: pd.Series, look: MethodLook, y: int, **where) -> None:
    """A value with its number above it, and its interval; one that does not hold the value is drawn as it is."""
    ends = numbers(said[["low", "high"]])
    if None not in ends:
        figure.add_scatter(
            x=ends, y=[y, y], mode="lines+markers", line={"color": look.colour, "width": 2}, hoverinfo="skip",
            marker={"symbol": "line-ns", "size": 9, "line": {"color": look.colour, "width": 2}}, **where,
        )  # fmt: skip
    value = float(said["value"])
    if np.isnan(value):
        word = {"text": ["unknown"], "textposition": "top right", "textfont": {"size": 13, "color": MUTED}}
        figure.add_scatter(x=[0], y=[y], mode="text", name=look.label, hoverinfo="skip", **word, **where)
        return
    figure.add_scatter(
        x=numbers([value]), y=[y], mode="markers+text", text=[f"{value:.2f}"], textposition="top center",
        textfont={"size": 13, "color": INK}, cliponaxis=False, customdata=[ends], name=look.label,
        marker={"color": look.colour, "symbol": look.symbol, "size": 12},
        hovertemplate=f"{look.label}: %{{x:.3g}} {BOUNDS}<extra></extra>", **where,
    )  # fmt: skip


def _beside(values: pd.Series, least: float, top: float) -> list[float]:
    """Places of labels for falling values, `least` apart and none above the top."""
    placed, room = spread(values, least=least), top - least / 2
    found = []
    for y in placed:
        found.append(min(y, room))
        room = found[-1] - least
    return found


def _range(values: pd.Series) -> tuple[float, float]:
    """The ends of an axis that holds the values, and 0."""
    low, high = values.min() if len(values) else 0.0, values.max() if len(values) else 0.0
    low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.05 * ((high - low) or 1.0)
    return low - pad, high + pad


def _with_model(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column model, of one name without letters where there is none."""
    return table if "model" in table else table.assign(model="")
