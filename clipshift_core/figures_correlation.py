"""The figures of how metrics go together: their correlations, and one against another. A table in, a figure out."""

import textwrap

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.canvas import COLOURS, MUTED, SYMBOLS, canvas, in_order, label, metric_spec, n_images, numbers

DIVERGING = "RdBu"
"""Red below 0, blue above: told apart in every kind of colour vision."""
DRAWN = 1500
"""Points that a scatter of single images may have."""


def correlation_heatmap(table: pd.DataFrame, *, statistic: str = "Correlation", level: float = 0.95) -> go.Figure:
    """How every two metrics correlate, the value and its interval in each cell of a lower triangle.

    Columns metric_a, metric_b, mean, low, high, a row for each pair. `statistic` names what was computed and over what.
    """
    trace = correlation_cells(table, 720)
    figure = canvas(
        "How the metrics go together",
        f"{statistic}, with its {level:.0%} interval over images",
        height=200 + 64 * len(trace.y),
    )
    figure.add_trace(trace)
    figure.update_xaxes(showgrid=False, tickangle=0)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def metric_scatter(shifts: pd.DataFrame, x: str, y: str) -> go.Figure:
    """One metric against another over pairs of image and augmentation, and the mean of each augmentation.

    At most `DRAWN` points are drawn, of images evenly spaced in the table; the means are over all of them.
    """
    names = in_order(shifts["augmentation"])
    ids = shifts["image_id"].drop_duplicates().to_numpy()
    n_drawn = min(len(ids), max(1, DRAWN // len(names)))
    drawn = set(ids[np.linspace(0, len(ids) - 1, n_drawn).round().astype(int)])
    x_spec, y_spec = metric_spec(x), metric_spec(y)
    figure = canvas(
        f"{y_spec.label} against {x_spec.inline}",
        f"Small: {'each of ' if n_drawn == len(ids) else f'{n_drawn:,} of '}{n_images([len(ids)])}"
        " under each augmentation; large: mean over all images",
        height=620,
    )
    groups = dict(list(shifts.groupby("augmentation", observed=True)))
    for name in names:
        rows = groups[name][groups[name]["image_id"].isin(drawn)]
        figure.add_scatter(
            x=numbers(rows[x]),
            y=numbers(rows[y]),
            mode="markers",
            marker={
                "color": COLOURS.get(name, MUTED),
                "symbol": SYMBOLS.get(name, "circle"),
                "size": 5,
                "opacity": 0.45,
            },
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
    for name in names:
        figure.add_scatter(
            x=numbers([groups[name][x].mean()]),
            y=numbers([groups[name][y].mean()]),
            mode="markers",
            marker={
                "color": COLOURS.get(name, MUTED),
                "symbol": SYMBOLS.get(name, "circle"),
                "size": 17,
                "line": {"color": "white", "width": 1.5},
            },
            hovertemplate=f"{label(name)}: %{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            legendgroup=name,
            name=label(name),
        )
    figure.update_xaxes(title=x_spec.axis)
    figure.update_yaxes(title=y_spec.axis)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"})
    return figure


def correlation_cells(table: pd.DataFrame, width: float) -> go.Heatmap:
    """The heatmap of `correlation_heatmap` without its figure, with text that fits a plot of `width` px."""
    metrics = list(dict.fromkeys([*table["metric_a"], *table["metric_b"]]))
    pairs = {frozenset((row.metric_a, row.metric_b)): row for row in table.itertuples()}
    cell = width / max(len(metrics) - 1, 1)
    z, text = [], []
    for i, below in enumerate(metrics[1:], start=1):
        rows = [pairs.get(frozenset((below, before))) if j < i else None for j, before in enumerate(metrics[:-1])]
        z.append([None if row is None else numbers([row.mean])[0] for row in rows])
        # an interval of 14 characters takes some 95 px; the hover has it either way
        text.append(["" if row is None else _interval(row) for row in rows])
    return go.Heatmap(
        z=z,
        x=[
            "<br>".join(textwrap.wrap(brief(metric), max(1, int(cell / 7.5)), break_long_words=False))
            for metric in metrics[:-1]
        ],
        y=[brief(metric) for metric in metrics[1:]],
        text=text if cell > 95 else [[each.split("<br>")[0] for each in row] for row in text],
        customdata=text,
        texttemplate="%{text}",
        textfont={"size": 13},
        hovertemplate="%{y} and %{x}: %{customdata}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
        colorbar={"title": {"text": "Correlation", "side": "right", "font": {"size": 14}}, "thickness": 16},
        hoverongaps=False,
        xgap=2,
        ygap=2,
    )


def brief(metric: str) -> str:
    """The name of a similarity where all are similarities: "Cosine", "Edge"."""
    return metric_spec(metric).label.removesuffix(" similarity").removesuffix(" preservation")


def _interval(row) -> str:
    if not np.isfinite(row.mean):
        return "unknown"
    mean, low, high = (f"{round(value, 2) + 0:.2f}".replace("-", "−") for value in (row.mean, row.low, row.high))
    return f"{mean}<br>[{low}, {high}]" if np.isfinite(row.low) else mean
