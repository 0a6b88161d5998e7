"""One function a figure: a table or arrays in, a plotly figure out; nothing is read or written here.

Notebooks need this room only: colours, names, the reading order and `export` come from `canvas`, the galleries and the
figures of the world and its model from `figures_world`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from scipy.cluster import hierarchy

from clipshift_core.canvas import (
    COLOURS,
    INK,
    LABELS,
    MUTED,
    ORDER,
    PALETTE,
    SYMBOLS,
    canvas,
    export,
    in_order,
    label,
    metric_spec,
    n_images,
    numbers,
    plain,
    short,
    use_renderer,
    whiskers,
)
from clipshift_core.figures_world import (
    factor_counts,
    image_grid,
    training_curves,
    views_grid,
    zero_shot_bars,
)
from clipshift_core.stats import CUT, clusters, cut_height, density

__all__ = [
    "COLOURS",
    "LABELS",
    "ORDER",
    "export",
    "use_renderer",
    "l2_bars",
    "metric_density",
    "ranking",
    "cosine_heatmap",
    "metric_heatmap",
    "pairwise_heatmap",
    "dendrogram",
    "zero_shot_bars",
    "training_curves",
    "factor_counts",
    "image_grid",
    "views_grid",
]

SEQUENTIAL = "Viridis"


def l2_bars(summary: pd.DataFrame, metric: str = "l2", *, level: float = 0.95) -> go.Figure:
    """Mean of a metric per augmentation, its spread over images and the interval of the mean (as in the paper).

    `summary` is stats.bootstrap_table's: augmentation, mean, std, low, high, n.
    """
    names = in_order(summary["augmentation"])
    rows = summary.set_index("augmentation").loc[names]
    spec, labels = metric_spec(metric), [label(n) for n in names]
    figure = canvas(
        f"{spec.label} between an image and its augmented view",
        f"Mean over {n_images(rows['n'])}, published order",
        height=150 + 42 * len(names),
        bargap=0.35,
    )
    figure.add_bar(
        y=labels,
        x=numbers(rows["mean"]),
        orientation="h",
        marker={
            "color": [_translucent(COLOURS.get(n, MUTED)) for n in names],
            "line": {"color": [COLOURS.get(n, MUTED) for n in names], "width": 1.5},
        },
        error_x={
            "type": "data",
            "array": numbers(rows["std"]),
            "color": MUTED,
            "thickness": 1.5,
            "width": 4,
        },
        customdata=[list(row) for row in zip(numbers(rows["std"]), rows["n"].tolist(), strict=True)],
        hovertemplate="%{y}: mean %{x:.4g}, std %{customdata[0]:.4g}, n %{customdata[1]}<extra></extra>",
        showlegend=False,
    )
    figure.add_scatter(x=[None], y=[None], mode="lines", line={"color": MUTED}, name="± 1 std over images")
    figure.add_scatter(
        y=labels,
        x=numbers(rows["mean"]),
        mode="markers",
        marker={"color": INK, "size": 5},
        error_x=whiskers(rows, color=INK, thickness=3, width=0),
        hoverinfo="skip",
        name=f"mean, {level:.0%} interval",
    )
    figure.update_xaxes(title=spec.axis, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def metric_density(table: pd.DataFrame, metric: str = "l2") -> go.Figure:
    """Kernel density of a metric over images, one ridge per augmentation, with its median.

    `table` is tidy: image_id, augmentation and the metric's column. Ridges are scaled to one height, since the
    narrow ones would flatten the wide ones; areas are therefore not comparable between ridges.
    """
    spec, names = metric_spec(metric), in_order(table["augmentation"])
    values = {n: g.to_numpy(float) for n, g in table.groupby("augmentation", observed=True)[metric]}
    span = np.ptp(table[metric]) or max(abs(table[metric].iloc[0]), 1.0)
    figure = canvas(
        f"How {spec.inline} spreads over images",
        f"Kernel density over {n_images([len(v) for v in values.values()])},"
        " each ridge scaled to the same height; the tick is the median",
        height=150 + 56 * len(names),
        showlegend=False,
    )
    for row, name in enumerate(names):
        v = values[name]
        pad = 0.2 * np.ptp(v) + 0.01 * span
        grid = np.linspace(max(v.min() - pad, spec.bounds[0]), min(v.max() + pad, spec.bounds[1]), 120)
        height = density(v, grid)
        height = 0.88 * height / height.max()
        figure.add_scatter(
            x=numbers([*grid, *grid[::-1]]),
            y=numbers([*(height - row), *np.full(len(grid), -float(row))]),
            fill="toself",
            mode="lines",
            line={"color": COLOURS.get(name, MUTED), "width": 1.5, "simplify": False},
            fillcolor=_translucent(COLOURS.get(name, MUTED)),
            hoverinfo="skip",
            name=label(name),
        )
        median = float(np.median(v))
        top = float(np.interp(median, grid, height))
        figure.add_scatter(
            x=numbers([median, median]),
            y=numbers([-row, top - row]),
            mode="lines",
            line={"color": INK, "width": 2},
            hovertemplate=f"{label(name)}: median %{{x:.4g}}, n {len(v)}<extra></extra>",
            name=f"{label(name)}, median",
        )
    figure.update_xaxes(title=spec.axis)
    figure.update_yaxes(
        tickvals=[-row for row in range(len(names))],
        ticktext=[label(n) for n in names],
        range=[0.35 - len(names), 1],
    )
    return figure


def ranking(table: pd.DataFrame, metric: str = "l2", *, level: float = 0.95) -> go.Figure:
    """Augmentations as stats.ranking orders them, with intervals; a bracket joins neighbours not separated."""
    spec, names = metric_spec(metric), list(table["augmentation"])
    labels = [f"{rank}  {label(n)}" for rank, n in zip(table["rank"], names, strict=True)]
    together = [i for i, apart in enumerate(table["separated"].tolist()[:-1]) if not apart]
    test = "paired sign-flip test, Holm-corrected"
    figure = canvas(
        f"Which augmentation moves the {spec.of} most, by {spec.inline}",
        f"Mean over {n_images(table['n'])} with its {level:.0%} interval; "
        + (f"brackets join neighbours not separated ({test})" if together else f"all neighbours separated ({test})"),
        height=150 + 42 * len(names),
        showlegend=False,
    )
    figure.update_layout(margin={"r": 280})
    figure.add_scatter(
        x=numbers(table["mean"]),
        y=labels,
        mode="markers",
        marker={
            "size": 14,
            "color": [_translucent(COLOURS.get(n, MUTED)) for n in names],
            "line": {"color": [COLOURS.get(n, MUTED) for n in names], "width": 2},
            "symbol": [SYMBOLS.get(n, "circle") for n in names],
        },
        error_x=whiskers(table, color=INK, thickness=2, width=5),
        customdata=[[low, high] for low, high in zip(numbers(table["low"]), numbers(table["high"]), strict=True)],
        hovertemplate="%{y}: %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
    )
    # a trace of its own, so that a narrow interval is drawn over its marker and not under it
    figure.add_scatter(
        x=numbers(table["mean"]),
        y=labels,
        mode="markers",
        marker={"size": 3, "color": INK},
        error_x=whiskers(table, color=INK, thickness=1.5, width=5),
        hoverinfo="skip",
    )
    right = {"x": 1, "xref": "paper", "xanchor": "left", "showarrow": False}
    for i, row in enumerate(table.itertuples()):
        interval = f"[{short(row.low)}, {short(row.high)}]" if np.isfinite(row.low) else "interval unknown"
        figure.add_annotation(y=i, text=f"{short(row.mean)}  {interval}", xshift=8, **right)
    bracket = {
        "type": "line",
        "xref": "paper",
        "xsizemode": "pixel",
        "xanchor": 1,
        "line": {"color": MUTED, "width": 2},
    }
    for i in together:
        figure.add_shape(x0=182, x1=182, y0=i + 0.15, y1=i + 0.85, **bracket)
        small = {"size": 12, "color": MUTED}
        figure.add_annotation(y=i + 0.5, text="not separated", xshift=188, font=small, **right)
    figure.update_xaxes(title=spec.axis)
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def cosine_heatmap(table: pd.DataFrame, n: int, metric: str = "cosine") -> go.Figure:
    """The metric of the first `n` images of a tidy table under each augmentation; images sorted by their mean."""
    spec, names = metric_spec(metric), in_order(table["augmentation"])
    wide = table.pivot(index="image_id", columns="augmentation", values=metric)
    wide = wide.loc[table["image_id"].drop_duplicates().iloc[:n], names]
    wide = wide.loc[wide.mean(axis=1).sort_values(ascending=not spec.moved_if_larger, kind="stable").index]
    figure = canvas(
        f"{spec.label} of {len(wide)} sampled images under each augmentation",
        "One column an image, from the one that moves most on average to the one that moves least",
        height=170 + 40 * len(names),
    )
    figure.add_heatmap(
        z=[numbers(wide[name]) for name in names],
        x=list(range(1, len(wide) + 1)),
        y=[label(name) for name in names],
        customdata=[[plain(str(image)) for image in wide.index]] * len(names),
        hovertemplate="%{y}, %{customdata}: %{z:.4g}<extra></extra>",
        colorscale=SEQUENTIAL,
        reversescale=spec.moved_if_larger,
        colorbar={"title": {"text": spec.label, "side": "right"}, "thickness": 16},
        xgap=1,
        ygap=1,
    )
    figure.update_xaxes(title="Image, sorted by its mean over the augmentations", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def metric_heatmap(table: pd.DataFrame, metrics: Sequence[str], *, by: str | None = None) -> go.Figure:
    """Augmentation x metric: means written in the cells, colour from least to most moved within each metric.

    Rows are sorted by the metric `by` (the first one if not given), the augmentation that moves most on top.
    """
    by = by or metrics[0]
    means = table.groupby("augmentation", observed=True)[list(metrics)].mean()
    means = means.sort_values(by, ascending=not metric_spec(by).moved_if_larger, kind="stable")
    signed = means * [1 if metric_spec(m).moved_if_larger else -1 for m in metrics]
    span = (signed.max() - signed.min()).replace(0, 1)
    moved = (signed - signed.min()) / span
    figure = canvas(
        "Augmentations sorted by how far they move the embedding",
        f"Mean over {n_images([table['image_id'].nunique()])} in each cell; colour runs within each column;"
        f" sorted by {metric_spec(by).inline}",
        height=190 + 42 * len(means),
    )
    figure.add_heatmap(
        z=[numbers(row) for row in moved.to_numpy()],
        x=[metric_spec(m).label.replace(" ", "<br>", 1) for m in metrics],
        y=[label(n) for n in means.index],
        text=[[short(v) for v in row] for row in means.to_numpy()],
        texttemplate="%{text}",
        textfont={"size": 14},
        hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        colorscale=SEQUENTIAL,
        reversescale=True,
        colorbar={"tickvals": [0, 1], "ticktext": ["least moved", "most moved"], "thickness": 16},
        xgap=2,
        ygap=2,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(side="top", showgrid=False, tickangle=0)
    figure.update_layout(margin={"t": 140, "b": 30})
    return figure


def pairwise_heatmap(distance: ArrayLike, names: Sequence[str]) -> go.Figure:
    """Mean cosine distance between every two views, as given by metrics.pairwise_cosine_distance; published order."""
    distance = np.asarray(distance, dtype=float)
    order = [list(names).index(n) for n in in_order(names)]
    distance = distance[np.ix_(order, order)]
    labels = [label(names[i]) for i in order]
    off = ~np.eye(len(labels), dtype=bool)
    figure = canvas(
        "How far the augmented views lie from each other",
        "1 − cosine similarity of the embeddings of two views of the same image, mean over images",
        height=240 + 48 * len(labels),
    )
    figure.add_heatmap(
        z=[
            [v if keep else None for v, keep in zip(numbers(d), o, strict=True)]
            for d, o in zip(distance, off, strict=True)
        ],
        x=labels,
        y=labels,
        texttemplate="%{z:.2g}",
        textfont={"size": 13},
        hovertemplate="%{y} to %{x}: %{z:.4g}<extra></extra>",
        colorscale=SEQUENTIAL,
        reversescale=True,
        colorbar={"title": {"text": "1 − cosine similarity", "side": "right"}, "thickness": 16},
        xgap=1,
        ygap=1,
    )
    figure.update_xaxes(showgrid=False, tickangle=-35)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def dendrogram(linkage: ArrayLike, names: Sequence[str], cut: float = CUT) -> go.Figure:
    """Ward linkage of the views, one colour a cluster, with the cut at `cut` x the largest merge."""
    linkage, height = np.asarray(linkage), cut_height(np.asarray(linkage), cut)
    cluster = clusters(linkage, cut)
    tree = hierarchy.dendrogram(linkage, no_plot=True)
    leaves = tree["leaves"]
    of_leaf = [int(cluster[leaf]) for leaf in leaves]
    figure = canvas(
        "Which augmentations move the embedding alike",
        f"Ward linkage of the mean cosine distances between views; {len(set(of_leaf))} clusters below the cut",
        height=180 + 42 * len(leaves),
    )
    for across, up in zip(tree["icoord"], tree["dcoord"], strict=True):
        # scipy puts leaf i at 10 i + 5; a link's left foot always stands over a leaf of its own subtree
        below = up[1] <= height
        colour = _cycle(of_leaf[int((across[0] - 5) // 10)]) if below else "#8A8A8A"
        figure.add_scatter(
            x=numbers(up),
            y=numbers((np.array(across) - 5) / 10),
            mode="lines",
            line={"color": colour, "width": 2.5},
            hovertemplate="merge at %{x:.4g}<extra></extra>",
            showlegend=False,
        )
    for number in sorted(set(of_leaf)):
        rows = [i for i, c in enumerate(of_leaf) if c == number]
        figure.add_scatter(
            x=[0] * len(rows),
            y=rows,
            mode="markers",
            marker={
                "color": _cycle(number),
                "size": 13,
                "symbol": ["circle", "square", "diamond"][number % 3],
            },
            text=[label(names[leaves[i]]) for i in rows],
            hovertemplate=f"%{{text}}: cluster {number}<extra></extra>",
            name=f"cluster {number}",
        )
    figure.add_vline(x=numbers([height])[0], line={"color": INK, "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=numbers([height])[0],
        y=len(leaves) - 0.4,
        text=f"cut: {cut:g} × largest merge = {short(height)}",
        showarrow=False,
        xanchor="left",
        xshift=6,
        font={"size": 13},
    )
    figure.update_xaxes(
        title="Height of the merge (Ward, units of 1 − cosine similarity)",
        range=numbers([-0.02 * linkage[:, 2].max(), 1.03 * linkage[:, 2].max() or 1]),
    )
    figure.update_yaxes(
        tickvals=list(range(len(leaves))),
        ticktext=[label(names[leaf]) for leaf in leaves],
        range=[len(leaves) - 0.1, -0.6],
        showgrid=False,
    )
    return figure


def _translucent(colour: str, alpha: float = 0.55) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _cycle(number: int) -> str:
    return PALETTE[(number - 1) % len(PALETTE)]
