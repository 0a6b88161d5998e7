"""The figures of depth, heads and models: a table of `layers` in, a plotly figure out."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.optimize import isotonic_regression

from clipshift_core.canvas import (
    COLOURS,
    MUTED,
    SYMBOLS,
    WIDTH,
    canvas,
    in_order,
    label,
    n_images,
    numbers,
    short,
    whiskers,
)
from clipshift_core.figures import SEQUENTIAL

BLOCK = "Block (0 is the first)"
MEASURES = {
    "distance": (
        "How far the class token moves, block by block",
        "1 − cosine similarity of the class tokens (0 same)",
    ),
    "relative": (
        "How far the class token moves, in distances between images",
        "Cosine distance over that of two images (0 same)",
    ),
    "cka": ("How much of the representation changes, block by block", "1 − linear CKA (0 same, 1 unrelated)"),
}
"""Title and axis of what `block_lines` draws: layers.by_block, layers.relative_distance, layers.block_cka."""


def block_lines(table: pd.DataFrame, measure: str = "distance", *, level: float = 0.95) -> go.Figure:
    """One line an augmentation over the blocks, with intervals, named at its right end.

    Columns block, augmentation, mean, low, high, n; for "cka" a column cka instead of mean, drawn as 1 - CKA.
    """
    title, axis = MEASURES[measure]
    if measure == "cka":
        table = table.assign(mean=1 - table["cka"], low=1 - table["high"], high=1 - table["low"])
    names, blocks = in_order(table["augmentation"]), sorted(table["block"].unique().tolist())
    height, margin = 560, {"t": 100, "b": 70, "r": 240}
    what = "Debiased, over" if measure == "cka" else "Mean over"
    figure = canvas(title, f"{what} {_images(table, level)}", height=height, showlegend=False)
    figure.update_layout(margin=margin)
    ends = []
    for name in names:
        rows = table[table["augmentation"] == name].sort_values("block", kind="stable")
        look = {"color": COLOURS.get(name, MUTED)}
        figure.add_scatter(
            x=rows["block"].tolist(),
            y=numbers(rows["mean"]),
            mode="lines+markers",
            line={**look, "width": 2},
            marker={**look, "size": 9, "symbol": SYMBOLS.get(name, "circle")},
            error_y=whiskers(rows, **look, thickness=1.5, width=4),
            name=label(name),
            hovertemplate=f"{label(name)}, block %{{x}}: %{{y:.4g}}<extra></extra>",
        )
        ends.append(rows["mean"].fillna(0).iloc[-1])
    top = 1.05 * np.nanmax(table[["mean", "high"]].to_numpy(), initial=1e-6)
    bottom = min(0.0, np.nanmin(table[["mean", "low"]].to_numpy(), initial=0.0)) - 0.03 * top
    pixels = (height - margin["t"] - margin["b"]) / (top - bottom)
    places = spread([-end * pixels for end in ends], 19, -top * pixels, -bottom * pixels)
    for name, end, place in zip(names, ends, places, strict=True):
        _end_label(figure, blocks[-1], end, label(name), COLOURS.get(name, MUTED), place + end * pixels)
    pad = 0.04 * max(blocks[-1] - blocks[0], 1)
    figure.update_xaxes(title=BLOCK, tickvals=blocks, range=numbers([blocks[0] - pad, blocks[-1] + pad]))
    figure.update_yaxes(title=axis, range=numbers([bottom, top]), automargin=False)
    figure.update_layout(margin_l=80)
    return figure


def cka_heatmap(table: pd.DataFrame) -> go.Figure:
    """Augmentation x block: debiased linear CKA with the originals, from layers.block_cka."""
    names, blocks = in_order(table["augmentation"]), sorted(table["block"].unique().tolist())
    wide = table.pivot(index="augmentation", columns="block", values="cka").loc[names]
    figure = canvas(
        "What each augmentation leaves of the representation, block by block",
        f"Linear CKA of the class tokens of {n_images(table['n'])} with their originals', debiased",
        height=190 + 38 * len(names),
    )
    figure.add_heatmap(
        z=[numbers(row) for row in wide.to_numpy()],
        x=blocks,
        y=[label(name) for name in names],
        text=[[short(v) if np.isfinite(v) else "" for v in row] for row in wide.to_numpy()],
        # beyond, the numbers would be wider than the cells; they stay in the hover
        texttemplate="%{text}" if len(blocks) <= 13 else None,
        textfont={"size": 13},
        hovertemplate="%{y}, block %{x}: %{text}<extra></extra>",
        colorscale=SEQUENTIAL,
        zmax=1,
        zmin=numbers([min(0.9, np.nanmin(wide.to_numpy(), initial=1))])[0],
        colorbar={"title": {"text": "CKA (1 same, 0 unrelated)", "side": "right"}, "thickness": 16},
        xgap=1,
        ygap=1,
    )
    figure.update_xaxes(title=BLOCK, tickvals=blocks, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def head_heatmap(table: pd.DataFrame) -> go.Figure:
    """One panel an augmentation: mean attention similarity of every block x head, from layers.by_head."""
    names, blocks = in_order(table["augmentation"]), sorted(table["block"].unique().tolist())
    heads = sorted(table["head"].unique().tolist())
    n_rows, n_columns, each, gap = -(-len(names) // 3), min(len(names), 3), max(110, 15 * len(blocks)), 58
    plot = n_rows * each + (n_rows - 1) * gap
    figure = make_subplots(
        n_rows,
        n_columns,
        subplot_titles=[label(name) for name in names],
        horizontal_spacing=0.06 if n_columns > 1 else 0,
        vertical_spacing=gap / plot if n_rows > 1 else 0,
    )
    figure.update_annotations(font={"size": 14})
    empty = canvas(
        "Which heads still attend to the same places",
        f"Attention similarity of each head's map to the original's, mean over {n_images(table['n'])}",
        height=plot + 190,
    )
    figure.update_layout(empty.layout)
    low, high = table["mean"].min(), table["mean"].max()
    for i, name in enumerate(names):
        rows = table[table["augmentation"] == name]
        wide = rows.pivot(index="block", columns="head", values="mean").reindex(index=blocks, columns=heads)
        where = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.add_heatmap(
            z=[numbers(row) for row in wide.to_numpy()],
            x=heads,
            y=blocks,
            coloraxis="coloraxis",
            hovertemplate=f"{label(name)}, block %{{y}}, head %{{x}}: %{{z:.4g}}<extra></extra>",
            xgap=1,
            ygap=1,
            **where,
        )
        last = i + n_columns >= len(names)
        steps = [{"tickvals": values[:: -(-len(values) // 12)]} for values in (heads, blocks)]
        small = {"showgrid": False, "tickfont": {"size": 12}}
        figure.update_xaxes(title="Head" if last else None, **steps[0], **small, **where)
        first = "Block" if i % n_columns == 0 else None
        figure.update_yaxes(title=first, autorange="reversed", **steps[1], **small, **where)
    figure.update_layout(
        margin={"t": 120, "b": 70},
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": numbers([low])[0],
            "cmax": numbers([high if high > low else low + 1e-6])[0],
            "colorbar": {"title": {"text": "Attention similarity (1 same)", "side": "right"}, "thickness": 16},
        },
    )
    return figure


def model_ranks(table: pd.DataFrame, agreement: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """The augmentations' ranks from model to model, from layers.by_model and layers.model_agreement."""
    models = list(dict.fromkeys(table["model"]))
    tau = agreement[agreement["model"] == models[0]].set_index("other")
    figure = canvas(
        "Do models rank the augmentations alike?",
        f"1 moves the embedding most, by mean L2 over {n_images(table['n'])}; "
        + (
            f"Kendall's tau {tau['tau'].iloc[0]:.2f}, {_interval(tau.iloc[0], f'{level:.0%} interval ')}"
            if len(models) == 2
            else f"below each, Kendall's tau with {_name(models[0])} and its {level:.0%} interval"
        ),
        height=200 + 40 * table["augmentation"].nunique(),
        showlegend=False,
    )
    for name in in_order(table["augmentation"]):
        rows = table[table["augmentation"] == name].set_index("model").loc[models]
        look = {"color": COLOURS.get(name, MUTED)}
        figure.add_scatter(
            x=list(range(len(models))),
            y=rows["rank"].tolist(),
            mode="lines+markers",
            line={**look, "width": 3},
            marker={**look, "size": 14, "symbol": SYMBOLS.get(name, "circle")},
            customdata=numbers(rows["mean"]),
            hovertemplate=f"{label(name)}: place %{{y}}, relative L2 %{{customdata:.4g}}<extra></extra>",
            name=label(name),
            cliponaxis=False,
        )
        for x, anchor, shift in ((0, "right", -16), (len(models) - 1, "left", 16)):
            rank = int(rows["rank"].iloc[x])
            text = f"{label(name)}  {rank}" if anchor == "right" else f"{rank}  {label(name)}"
            figure.add_annotation(x=x, y=rank, text=text, showarrow=False, xanchor=anchor, xshift=shift)
    side = 205
    letters = int((WIDTH - 2 * side) / max(len(models) - 1, 1) / 7)
    under = ["<br>".join(textwrap.wrap(_name(model), letters)) for model in models]
    if len(models) > 2:
        under[1:] = [
            f"{text}<br>{tau.loc[model, 'tau']:.2f}<br>{_interval(tau.loc[model])}"
            for text, model in zip(under[1:], models[1:], strict=True)
        ]
    figure.update_xaxes(
        tickvals=list(range(len(models))),
        ticktext=under,
        range=[0, len(models) - 1],
        tickangle=0,
        tickfont={"size": 14 if len(models) < 4 else 12},
    )
    figure.update_yaxes(visible=False, range=[table["rank"].max() + 0.5, 0.5])
    figure.update_layout(margin={"l": side, "r": side, "b": 20 + 18 * max(text.count("<br>") + 1 for text in under)})
    return figure


def model_scatter(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Mean cosine distance in the first model against every other one, one point an augmentation, with intervals."""
    first, *others = list(dict.fromkeys(table["model"]))
    names = in_order(table["augmentation"])
    n_columns = min(len(others), 2)
    n_rows = -(-len(others) // n_columns)
    gap, each = 90, 400 if n_columns == 1 else 300
    plot = n_rows * each + (n_rows - 1) * gap
    figure = make_subplots(
        n_rows,
        n_columns,
        horizontal_spacing=0.2 if n_columns > 1 else 0,
        vertical_spacing=gap / plot if n_rows > 1 else 0,
    )
    empty = canvas(
        "How far each augmentation moves the embedding, model against model",
        f"Mean cosine distance over {_images(table, level)}; dashed: both move alike",
        height=plot + 180,
    )
    figure.update_layout(empty.layout)
    values = table[["distance", "distance_low", "distance_high"]].to_numpy()
    # by ratio where that can be drawn: the smallest shift is a hundredth of the largest
    log = bool(np.nanmin(values) > 0)
    ends = np.array([np.nanmin(values), np.nanmax(values)]) if log else np.array([0.0, np.nanmax(values)])
    ends = ends * [0.8, 1.25] if log else ends * 1.05
    by_model = {model: rows.set_index("augmentation").loc[names] for model, rows in table.groupby("model")}
    ticks = _ticks(ends, n_columns > 1) if log else {}
    for i, other in enumerate(others):
        where = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.add_scatter(
            x=numbers(ends),
            y=numbers(ends),
            mode="lines",
            line={"color": MUTED, "dash": "dash", "width": 1.5},
            hoverinfo="skip",
            showlegend=False,
            **where,
        )
        for name in names:
            x, y = (by_model[model].loc[[name]] for model in (first, other))
            look = {"color": COLOURS.get(name, MUTED)}
            figure.add_scatter(
                x=numbers(x["distance"]),
                y=numbers(y["distance"]),
                mode="markers",
                marker={**look, "size": 12, "symbol": SYMBOLS.get(name, "circle")},
                error_x=whiskers(_bounds(x), **look, thickness=1.5, width=4),
                error_y=whiskers(_bounds(y), **look, thickness=1.5, width=4),
                name=label(name),
                legendgroup=name,
                showlegend=i == 0,
                hovertemplate=f"{label(name)}: %{{x:.4g}}, %{{y:.4g}}<extra></extra>",
                **where,
            )
        limits = numbers(np.log10(ends) if log else ends)
        axis = {"type": "log" if log else "linear", "range": limits, "tickformat": "~g", "tickangle": 0, **ticks}
        figure.update_xaxes(title=f"1 − cosine, {_name(first)}", **axis, **where)
        figure.update_yaxes(title=f"1 − cosine, {_name(other)}", **axis, **where)
    legend = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    figure.update_layout(legend=legend, margin={"r": 40 if n_columns == 2 else 200, "b": 60})
    return figure


def spread(places: Sequence[float], gap: float, low: float, high: float) -> NDArray[np.float64]:
    """The places nearest to the given ones (least squares) that are at least `gap` apart, in the same order.

    Kept within low to high if all fit there. Less i gaps, the sorted places need only not descend.
    """
    places = np.asarray(places, dtype=float)
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    level = isotonic_regression(places[order] - steps).x
    result = np.empty(len(places))
    result[order] = np.clip(level, low, max(low, high - steps[-1])) + steps
    return result


def _end_label(figure: go.Figure, x: float, y: float, text: str, colour: str, down: float) -> None:
    """A line's name right of its end, `down` px below it, joined to it by a thin line of its colour."""
    at = {"x": x, "y": numbers([y])[0], "ax": 56, "ay": numbers([down])[0], "xanchor": "left", "yanchor": "middle"}
    arrow = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1.2, "arrowcolor": colour, "standoff": 6}
    figure.add_annotation(**at, **arrow, text=text, font={"size": 13})


def _images(table: pd.DataFrame, level: float) -> str:
    """ "512 images, with 95% intervals", in a subtitle."""
    known = f"with {level:.0%} intervals" if table["low"].notna().any() else "intervals unknown"
    return f"{n_images(table['n'])}, {known}"


def _bounds(rows: pd.DataFrame) -> pd.DataFrame:
    names = {"distance": "mean", "distance_low": "low", "distance_high": "high"}
    return rows[list(names)].rename(columns=names)


def _interval(row: pd.Series, before: str = "") -> str:
    return f"{before}{row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else "interval unknown"


def _name(model: str) -> str:
    """A model's name without its place, and its tag after a space."""
    return model.removeprefix("hf-hub:").replace("/", " ")


def _ticks(ends: NDArray, few: bool) -> dict:
    """Ticks of a logarithmic axis at powers of ten, and 2 and 5 times those: plotly's own write "2" and "5" alone."""
    powers = range(int(np.floor(np.log10(ends[0]))), int(np.ceil(np.log10(ends[1]))) + 1)
    steps = (1,) if few and ends[1] > 100 * ends[0] else (1, 2, 5)
    ticks = [m * 10.0**power for power in powers for m in steps]
    return {"tickvals": numbers(t for t in ticks if ends[0] <= t <= ends[1])}
