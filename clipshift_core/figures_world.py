"""The figures of the world and its model: galleries of scenes and views, factors, training, zero-shot accuracy.

A table or arrays in, a plotly figure out, as in `figures`, which hands these on to the notebooks.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clipshift_core.canvas import (
    INK,
    PALETTE,
    TEMPLATE,
    WIDTH,
    canvas,
    data_uri,
    in_order,
    label,
    n_images,
    numbers,
    plain,
    whiskers,
)


def zero_shot_bars(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Zero-shot accuracy per task with its interval, and the level of chance.

    Columns task, mean, low, high (shares from 0 to 1), n, chance; a column `model`, if there, gives a bar per model.
    """
    table = table.assign(model=table.get("model", "accuracy"))
    tasks = list(dict.fromkeys(table["task"]))
    figure = canvas(
        "Zero-shot accuracy of the model on held-out images",
        f"Share of {n_images(table['n'])} whose best-matching prompt is right, with its {level:.0%} interval",
        height=420,
        barmode="group",
        bargap=0.4,
    )
    for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
        figure.add_bar(
            x=[label(task) for task in rows["task"]],
            y=numbers(100 * rows["mean"]),
            marker={"color": PALETTE[i % len(PALETTE)]},
            error_y=whiskers(100 * rows[["mean", "low", "high"]], color=INK, thickness=2, width=6),
            text=[f"{v:.1%}" for v in rows["mean"]],
            textposition="inside",
            insidetextanchor="middle",
            textfont={"color": "white", "size": 14},
            hovertemplate=f"{model}, %{{x}}: %{{y:.2f}} %<extra></extra>",
            name=str(model),
            showlegend=table["model"].nunique() > 1,
        )
    chance = table.drop_duplicates("task").set_index("task").loc[tasks, "chance"]
    for i, value in enumerate(numbers(100 * chance)):
        figure.add_shape(
            type="line",
            x0=i - 0.45,
            x1=i + 0.45,
            y0=value,
            y1=value,
            line={"color": INK, "width": 2, "dash": "dot"},
        )
    figure.add_scatter(x=[None], y=[None], mode="lines", line={"color": INK, "width": 2, "dash": "dot"}, name="chance")
    figure.update_yaxes(title="Accuracy (%)", range=[0, 105])
    figure.update_xaxes(showgrid=False)
    return figure


def training_curves(history: pd.DataFrame, *, labels: Mapping[str, str] | None = None) -> go.Figure:
    """One panel a curve over the training steps; columns step, any number of curves, `model` if there are several.

    `labels` gives a curve its title with its unit, such as {"loss": "Contrastive loss (nats)"}.
    """
    curves = [c for c in history.columns if c not in ("step", "model")]
    titles = [(labels or {}).get(c, label(c)) for c in curves]
    models = history.groupby("model", sort=False) if "model" in history else [("model", history)]
    figure = _panels(
        "How the model was trained",
        "One panel a quantity, over the optimiser's steps",
        titles,
        [230] * -(-len(curves) // 3),
    )
    for i, curve in enumerate(curves):
        for m, (model, rows) in enumerate(models):
            rows = rows.dropna(subset=[curve])
            figure.add_scatter(
                x=rows["step"].tolist(),
                y=numbers(rows[curve]),
                mode="lines" if len(rows) > 30 else "lines+markers",
                line={
                    "color": PALETTE[m % len(PALETTE)],
                    "width": 2,
                    "dash": ["solid", "dash", "dot"][m % 3],
                },
                name=str(model),
                legendgroup=str(model),
                showlegend="model" in history and i == 0,
                hovertemplate=f"{titles[i]}, step %{{x}}: %{{y:.4g}}<extra>{model}</extra>",
                row=i // 3 + 1,
                col=i % 3 + 1,
            )
        figure.update_xaxes(title="Training step", row=i // 3 + 1, col=i % 3 + 1)
    return figure


def factor_counts(table: pd.DataFrame, factors: Sequence[str]) -> go.Figure:
    """How many images carry each level of each factor: one panel a factor, levels by count; no level is (none)."""
    counts = [
        table[f].astype(object).where(table[f].notna() & (table[f] != ""), "(none)").value_counts() for f in factors
    ]
    titles = [label(f) for f in factors]
    rows = [max(len(c) for c in counts[i : i + 3]) for i in range(0, len(counts), 3)]
    figure = _panels(
        "What the sampled images show",
        f"Images per level of each factor, of {len(table):,}",
        titles,
        [20 * longest for longest in rows],
    )
    for i, count in enumerate(counts):
        count = count.loc[sorted(count.index, key=lambda level, c=count: (-c[level], str(level)))]
        where = {"row": i // 3 + 1, "col": i % 3 + 1}
        figure.add_bar(
            x=[int(v) for v in count],
            y=[str(v).replace("_", " ") for v in count.index],
            orientation="h",
            marker={"color": PALETTE[0]},
            hovertemplate=f"{titles[i]} %{{y}}: %{{x}} images<extra></extra>",
            showlegend=False,
            **where,
        )
        # the same range in every panel of a row, so that all bars are equally thick
        bottom = rows[i // 3] - 0.5
        figure.update_yaxes(type="category", range=[bottom, -0.5], dtick=1, tickfont={"size": 12}, **where)
        figure.update_yaxes(showgrid=False, **where)
        figure.update_xaxes(title="Images", rangemode="tozero", **where)
    return figure


def image_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 6,
    title: str,
    subtitle: str = "",
    size: int = 160,
) -> go.Figure:
    """A gallery of uint8 RGB images, `columns` a row, each with its caption below; `size` px are kept of each."""
    captions = list(captions) if captions is not None else [""] * len(images)
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    cell = (WIDTH - 20) / columns
    wrapped = [textwrap.wrap(str(c), max(int(cell / 6.6), 8), max_lines=3, placeholder=" …") for c in captions]
    lines = max((len(w) for w in wrapped), default=0)
    places = [(i % columns, i // columns) for i in range(len(images))]
    figure = _gallery(images, places, captions, (1 + (18 * lines + 8) / cell), cell, size, title, subtitle)
    for (x, y), text in zip(places, wrapped, strict=True):
        if text:
            figure.add_annotation(
                x=x,
                y=y * (1 + (18 * lines + 8) / cell) + 0.48,
                yanchor="top",
                text="<br>".join(map(plain, text)),
                showarrow=False,
                font={"size": 12},
            )
    return figure


def views_grid(
    images: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    title: str = "The same images under the nine augmentations",
    subtitle: str = "One row an image; the first column is the original, resized",
    size: int = 96,
) -> go.Figure:
    """One row an image, one column a view: images (row, view, h, w, 3) uint8, in the order of `names`."""
    order = [list(names).index(n) for n in in_order(names)]
    cell = (WIDTH - 20) / len(order)
    flat = [row[i] for row in images for i in order]
    places = [(x, y) for y in range(len(images)) for x in range(len(order))]
    rows = [str(c) for c in captions] if captions is not None else [f"image {y + 1}" for y in range(len(images))]
    hover = [f"{label(names[i])}: {text}" for text in rows for i in order]
    figure = _gallery(flat, places, hover, 1.0, cell, size, title, subtitle, head=36)
    for x, i in enumerate(order):
        text = "<br>".join(textwrap.wrap(label(names[i]), max(int(cell / 7), 8)))
        figure.add_annotation(x=x, y=-0.5, yanchor="bottom", text=text, showarrow=False, font={"size": 12})
    return figure


def _gallery(
    images: Sequence[np.ndarray],
    places: Sequence[tuple[int, int]],
    hover: Sequence[str],
    pitch: float,
    cell: float,
    size: int,
    title: str,
    subtitle: str,
    head: int = 0,
) -> go.Figure:
    """Images of 0.94 cells at (column, row * pitch); one unit of either axis is one cell of `cell` px."""
    columns, rows = max(x for x, _ in places) + 1, max(y for _, y in places) + 1
    bottom = (rows - 1) * pitch + 0.5 + (pitch - 1)
    top = 76 + head
    figure = canvas(title, subtitle, height=round(top + 12 + cell * (bottom + 0.5)), showlegend=False)
    figure.update_layout(
        margin={"l": 10, "r": 10, "t": top, "b": 12},
        images=[
            {
                "source": data_uri(image, size),
                "xref": "x",
                "yref": "y",
                "x": x,
                "y": round(y * pitch, 4),
                "sizex": 0.94,
                "sizey": 0.94,
                "xanchor": "center",
                "yanchor": "middle",
            }
            for image, (x, y) in zip(images, places, strict=True)
        ],
    )
    figure.add_scatter(
        x=[x for x, _ in places],
        y=numbers(y * pitch for _, y in places),
        mode="markers",
        marker={"opacity": 0, "size": 30},
        text=[plain(str(h)) for h in hover],
        hovertemplate="%{text}<extra></extra>",
    )
    width = (WIDTH - 20) / cell
    figure.update_xaxes(visible=False, range=[-0.5, max(columns, width) - 0.5])
    figure.update_yaxes(visible=False, range=[bottom, -0.5])
    return figure


def _panels(title: str, subtitle: str, titles: Sequence[str], heights: Sequence[int]) -> go.Figure:
    """Panels in rows of three at most; one height (px of plot) for each row."""
    rows, columns, gap = len(heights), min(len(titles), 3), 110
    plot = sum(heights) + gap * (rows - 1)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=titles,
        row_heights=list(heights),
        horizontal_spacing=0.12 if columns > 1 else 0,
        vertical_spacing=gap / plot if rows > 1 else 0,
    )
    figure.update_annotations(font={"size": 15})
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}},
        height=plot + 180,
        margin={"t": 120, "b": 60},
        legend={"y": 0.98, "yref": "container", "yanchor": "top"},
    )
    return figure
