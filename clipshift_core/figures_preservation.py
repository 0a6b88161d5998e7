"""The figures of what a view preserves: the five similarities of paper A beside each other, and what they share.

A table in, a plotly figure out. A summary is tidy: augmentation, metric, mean, std, low, high, n, as
stats.bootstrap_table gives it for one metric.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from clipshift_core.canvas import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    SIMILARITIES,
    SYMBOLS,
    canvas,
    in_order,
    label,
    metric_spec,
    n_images,
    numbers,
    short,
    whiskers,
)
from clipshift_core.figures_correlation import brief, correlation_cells

FLOOR = 65025 / 65274
"""What the published patch similarity cannot fall below: 1 / (1 + 249 / 255^2), 249 the largest square modulo 256."""


def radar(summary: pd.DataFrame) -> go.Figure:
    """One panel an augmentation, its five similarities a closed line (paper A, figure 5), the others in grey."""
    similarities = _measured(summary)
    means = _means(summary, similarities)
    names, n_columns = list(means.index), 3
    n_rows = -(-len(names) // n_columns)
    start = _start(means)
    figure = _panels(
        "What each augmentation preserves",
        f"Mean over {n_images(summary['n'])}; every axis runs from {_signed(start)} at the centre"
        " to 1, unchanged, at the rim; in grey the others",
        n_rows,
        n_columns,
        height=110 + 290 * n_rows,
        titles=[label(name) for name in names],
        kind="polar",
        horizontal_spacing=0.14,
        vertical_spacing=0.26 / n_rows,
    )
    figure.update_annotations(yshift=12)
    figure.update_layout(margin={"t": 130, "l": 70, "r": 90, "b": 40})
    axes = [brief(metric) for metric in similarities]
    for i, name in enumerate(names):
        where = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        others = [
            [*numbers(means.loc[other, [*similarities, similarities[0]]]), None] for other in names if other != name
        ]
        figure.add_scatterpolar(
            r=[value for line in others for value in line],
            theta=[*axes, axes[0], axes[0]] * len(others),
            mode="lines",
            line={"color": "#C4C4C4", "width": 1},
            hoverinfo="skip",
            **where,
        )
        figure.add_scatterpolar(
            r=numbers(means.loc[name, [*similarities, similarities[0]]]),
            theta=[*axes, axes[0]],
            mode="lines+markers",
            line={"color": COLOURS.get(name, MUTED), "width": 2.5},
            marker={"symbol": SYMBOLS.get(name, "circle"), "size": 8},
            fill="toself",
            fillcolor=_soft(name, 0.25),
            name=label(name),
            hovertemplate=f"{label(name)}, %{{theta}}: %{{r:.4g}}<extra></extra>",
            **where,
        )
    figure.update_polars(
        bgcolor="white",
        gridshape="linear",
        radialaxis={
            "range": [start, 1],
            "tickvals": [start, 0.5, 1],
            "ticktext": [_signed(start), "0.5", ""],
            "ticks": "",
            "angle": 18,
            "tickangle": 18,
            "tickfont": {"size": 12, "color": MUTED},
            "gridcolor": "#D0D0D0",
            "showline": False,
        },
        angularaxis={
            "rotation": 90,
            "direction": "clockwise",
            "gridcolor": GRID,
            "linecolor": MUTED,
            "tickfont": {"size": 13},
        },
    )
    return figure


def comparison_bars(summary: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """The five similarities of every augmentation with their intervals, one panel a metric (paper A's bars)."""
    similarities = _measured(summary)
    means = _means(summary, similarities)
    start, names = _start(means), list(means.index)
    figure = _panels(
        "Similarities between an image and its augmented view",
        f"Mean over {n_images(summary['n'])} with its {level:.0%} interval;"
        f" every axis runs from {_signed(start)} to 1, unchanged",
        1,
        len(similarities),
        height=150 + 42 * len(names),
        shared_yaxes=True,
        horizontal_spacing=0.02,
    )
    for i, metric in enumerate(similarities):
        rows = _rows(summary, metric, names)
        _bars(figure, rows, [_decimals(v) for v in rows["mean"]], row=1, col=i + 1)
        title = metric_spec(metric).label
        figure.update_xaxes(
            title=title, range=numbers([start, 1.1]), tickvals=[0, 0.5, 1], side="top", row=1, col=i + 1
        )
    figure.update_layout(bargap=0.3, margin={"t": 140, "b": 20})
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def overall(
    shifts: pd.DataFrame, summary: pd.DataFrame, correlations: pd.DataFrame, *, statistic: str = "Correlation"
) -> go.Figure:
    """Four panels (paper A, figure 4): mean L2, cosine over images, means of five similarities, their correlation.

    `shifts` is the tidy table of the pass; `summary` holds l2 beside the five; `correlations` and `statistic` as
    in `correlation_heatmap`. Boxes run from the first to the third quartile, their whiskers from 5 to
    95 % of the images.
    """
    similarities = _measured(summary)
    means = _means(summary, ("l2", *similarities))
    names = list(means.index)
    labels = [label(name) for name in names]
    figure = _panels(
        "The nine augmentations in one view",
        f"{n_images(summary['n'])}; whiskers: 95% interval of a mean (left), 5 to 95% of the images (right);"
        " cells: darkest is most moved in its column",
        2,
        2,
        height=190 + 2 * 40 * len(names),
        titles=["Mean L2 distance", "Cosine similarity over images", "Mean of each similarity", statistic],
        column_widths=[0.54, 0.46],
        horizontal_spacing=0.1,
        vertical_spacing=0.15,
    )
    rows = _rows(summary, "l2", names)
    _bars(figure, rows, [short(v) if np.isfinite(v) else "unknown" for v in rows["mean"]], row=1, col=1)
    figure.update_xaxes(title=metric_spec("l2").axis, rangemode="tozero", row=1, col=1)
    by_name = shifts.groupby("augmentation", observed=True)["cosine"]
    for i, name in enumerate(names):
        low, q1, median, q3, high = (
            [v] for v in numbers(by_name.get_group(name).quantile([0.05, 0.25, 0.5, 0.75, 0.95]))
        )
        figure.add_box(
            y=[labels[i]],
            lowerfence=low,
            q1=q1,
            median=median,
            q3=q3,
            upperfence=high,
            orientation="h",
            line={"color": COLOURS.get(name, MUTED), "width": 2},
            fillcolor=_soft(name),
            name=labels[i],
            row=1,
            col=2,
        )
    figure.update_xaxes(title=metric_spec("cosine").axis, row=1, col=2)
    figure.update_yaxes(showticklabels=False, row=1, col=2)
    five = means[similarities]
    span = (five.max() - five.min()).replace(0, 1)
    figure.add_heatmap(
        z=[numbers(row) for row in ((five.max() - five) / span).to_numpy()],
        x=[brief(metric) for metric in similarities],
        y=labels,
        text=[[_decimals(v) for v in row] for row in five.to_numpy()],
        texttemplate="%{text}",
        textfont={"size": 12},
        hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        colorscale="Viridis",
        reversescale=True,
        showscale=False,
        xgap=1,
        ygap=1,
        row=2,
        col=1,
    )
    figure.add_trace(correlation_cells(correlations, 360).update(showscale=False), row=2, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False, row=2)
    figure.update_layout(margin={"t": 120})
    return figure


def kernels_side_by_side(summary: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Patch similarity as published, where differences of uint8 wrap, and corrected: means, intervals and ranks.

    On the left both on one axis, on the right the published kernel alone; at the far right the rank of each
    augmentation by either mean, 1 for the least similar.
    """
    means = _means(summary, ("patch", "patch_published"))
    names, ranks = list(means.index), means.rank(method="min")
    figure = _panels(
        "What the uint8 wrap does to patch similarity",
        f"Mean over {n_images(summary['n'])} with its {level:.0%} interval; rank 1 is the least similar, bold where the"
        " two kernels differ",
        1,
        2,
        height=190 + 42 * len(names),
        shared_yaxes=True,
        horizontal_spacing=0.06,
        column_widths=[0.58, 0.42],
    )
    figure.add_scatter(
        x=[v for pair in means.to_numpy() for v in (*numbers(pair), None)],
        y=[label(name) for name in names for _ in range(3)],
        mode="lines",
        line={"color": "#B0B0B0", "width": 2},
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    for metric, col in (("patch", 1), ("patch_published", 1), ("patch_published", 2)):
        rows = _rows(summary, metric, names)
        dots = {
            "x": numbers(rows["mean"]),
            "y": [label(name) for name in names],
            "mode": "markers",
            "showlegend": False,
        }
        colours = [COLOURS.get(name, MUTED) for name in names]
        figure.add_scatter(
            **dots, marker=_dot(metric, colours), hovertemplate="%{y}: %{x:.6g}<extra></extra>", row=1, col=col
        )
        # over the markers, and not under them, since most intervals are narrower
        bars = whiskers(rows, color=INK, thickness=1.5, width=5)
        figure.add_scatter(**dots, marker={"size": 3, "color": INK}, error_x=bars, hoverinfo="skip", row=1, col=col)
    for metric, kernel in (("patch", "corrected"), ("patch_published", "published")):
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=_dot(metric, MUTED), name=kernel)
    floor = numbers([FLOOR])[0]
    figure.add_vrect(x0=floor, x1=1, fillcolor=GRID, line_width=0, layer="below", row=1, col=1)
    figure.add_vline(x=floor, line={"color": INK, "width": 1.5, "dash": "dash"}, row=1, col=2)
    figure.add_annotation(
        x=floor,
        y=-0.75,
        text=f"floor: 65025 / 65274 = {FLOOR:.4f}",
        showarrow=False,
        xanchor="left",
        xshift=5,
        font={"size": 12},
        row=1,
        col=2,
    )
    place = {"x": 1, "xref": "paper", "xanchor": "center", "yref": "y", "showarrow": False}
    for metric, kernel, shift in (("patch", "corrected", 55), ("patch_published", "published", 130)):
        figure.add_annotation(
            y=-0.9, text=f"rank,<br>{kernel}", xshift=shift, font={"size": 12, "color": MUTED}, **place
        )
        for i, name in enumerate(names):
            rank, other = ranks.loc[name, metric], ranks.loc[name].drop(metric).item()
            text = f"{rank:.0f}" if np.isfinite(rank) else "unknown"
            differs = np.isfinite(rank) and rank != other
            figure.add_annotation(y=i, text=f"<b>{text}</b>" if differs else text, xshift=shift, **place)
    figure.update_xaxes(title="Patch similarity (1 same); grey: all that published can reach", row=1, col=1)
    figure.update_xaxes(title="Published kernel alone, enlarged", range=numbers([FLOOR - 0.0002, 1.0002]), row=1, col=2)
    figure.update_yaxes(range=[len(names) - 0.5, -1.3])
    figure.update_layout(showlegend=True, margin={"r": 170})
    return figure


def _bars(figure: go.Figure, rows: pd.DataFrame, text: Sequence[str], **where) -> None:
    """Horizontal bars of means with intervals; rows indexed by augmentation."""
    names = list(rows.index)
    labels = [label(name) for name in names]
    figure.add_bar(
        y=labels,
        x=numbers(rows["mean"]),
        orientation="h",
        marker={
            "color": [_soft(name) for name in names],
            "line": {"color": [COLOURS.get(name, MUTED) for name in names], "width": 1.5},
        },
        error_x=whiskers(rows, color=INK, thickness=2.5, width=0),
        customdata=[list(pair) for pair in zip(numbers(rows["low"]), numbers(rows["high"]), strict=True)],
        hovertemplate="%{y}: %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
        **where,
    )
    # within its bar, or right of the whisker where the bar is too short for a text
    ends = rows[["mean", "high"]].max(axis=1).fillna(0)
    figure.add_scatter(
        y=labels,
        x=numbers(ends.where(ends < 0.4 * ends.max(), 0).clip(lower=0)),
        mode="text",
        text=[f"\u00a0{value}" for value in text],
        textposition="middle right",
        textfont={"color": INK, "size": 13},
        hoverinfo="skip",
        **where,
    )


def _panels(
    title: str, subtitle: str, n_rows: int, n_columns: int, *, height: int, titles=None, kind: str = "xy", **spacing
) -> go.Figure:
    """The house's canvas with a grid of panels."""
    figure = canvas(title, subtitle, height=height, showlegend=False)
    layout = figure.layout.to_plotly_json()
    figure = make_subplots(
        n_rows, n_columns, subplot_titles=titles, specs=[[{"type": kind}] * n_columns] * n_rows, **spacing
    )
    figure.update_annotations(font={"size": 14})
    figure.update_layout(layout)
    return figure


def _measured(summary: pd.DataFrame) -> list[str]:
    """The five similarities; the four others for a model whose attention cannot be read."""
    return [metric for metric in SIMILARITIES if metric != "attention" or metric in set(summary["metric"])]


def _means(summary: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Means, augmentation x metric, in the reading order. Raises ValueError for a metric that is not there."""
    missing = [metric for metric in metrics if metric not in set(summary["metric"])]
    if missing:
        raise ValueError(f"the summary has no {', '.join(missing)}; it holds {', '.join(summary['metric'].unique())}")
    wide = summary.pivot(index="augmentation", columns="metric", values="mean")
    return wide.loc[in_order(summary["augmentation"]), list(metrics)]


def _rows(summary: pd.DataFrame, metric: str, names: Sequence[str]) -> pd.DataFrame:
    """The summary of one metric, a row for each of `names`, NaN where there is none."""
    return summary[summary["metric"] == metric].set_index("augmentation").reindex(names)


def _dot(metric: str, colour: str | list[str]) -> dict:
    """The marker of one kernel of patch similarity: a disc for the corrected, an open diamond for the published."""
    filled = metric == "patch"
    return {
        "size": 13,
        "symbol": "circle" if filled else "diamond",
        "color": colour if filled else "white",
        "line": {"color": colour, "width": 2.5},
    }


def _start(values: pd.DataFrame) -> float:
    """Where an axis of similarities starts: 0, or the tenth below the least of them if that is negative."""
    return min(0.0, float(np.floor(10 * np.nanmin(values)) / 10))


def _signed(value: float) -> str:
    """With the minus sign of the axes."""
    return f"{value:g}".replace("-", "−")


def _soft(name: str, alpha: float = 0.55) -> str:
    return f"rgba{(*hex_to_rgb(COLOURS.get(name, MUTED)), alpha)}"


def _decimals(value: float) -> str:
    """A similarity for a label, in three decimals: those near 1 stay apart, and a column of them lines up."""
    return f"{value:.3f}" if np.isfinite(value) else "unknown"
