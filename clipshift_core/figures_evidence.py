"""The figures of evidence: single findings with all that speaks for their kind, and how many there are of each kind.

Tables and arrays in, a plotly figure out. The tables are those of `evidence.evidence`.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from plotly.subplots import make_subplots

from clipshift_core.canvas import GRID, INK, MUTED, PALETTE, TEMPLATE, WIDTH, canvas, data_uri, numbers
from clipshift_core.evidence import KINDS
from clipshift_core.figures_attention import overlay

COLOURS = dict(zip(KINDS, PALETTE, strict=False))
"""Of a kind; its name always stands beside."""
N_EXAMPLES, N_PICTURES = 4, 2
"""Best examples of a latent, and images of the class, each of these also with its map."""
ROW, TILE, HEAD, FOOT = 104, 62, 34, 42
"""Pixels of a row, from one image to the next, of the heads above the rows, and of what is below them."""
MARGIN = 84
"""Pixels of title and subtitle."""
BARS_AT, BARS_WIDE = 238, 160
EXAMPLES_AT = 424
PICTURES_AT = EXAMPLES_AT + N_EXAMPLES * TILE + 14
INNER = WIDTH - 20
N_BINS = 20
NONE = "not planted"


def findings_gallery(
    table: pd.DataFrame,
    attributions: Sequence[Float[np.ndarray, " image"]],
    examples: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    pictures: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    maps: Sequence[Float[np.ndarray, "image row col"]],
) -> go.Figure:
    """One row a finding: what it is and why, how the attribution is distributed, what the latent stands for, where.

    table: of `evidence`, for the findings to show; of each: attributions: to the class in every image of the class, 0
    where the latent is off; examples: images that activate the latent most; pictures and maps: the class's images to
    which it contributes most, with `Evidence.maps`. Four examples and two pictures are shown.
    """
    if not len(table) == len(attributions) == len(examples) == len(pictures) == len(maps):
        raise ValueError(f"{len(table)} findings: one entry for each is accepted in all that is shown of them")
    bottom = ROW * max(len(table), 1)
    figure = canvas(
        "Findings and their evidence",
        "A class that leans on a latent which is not aligned with it; the kind is a guess from what is shown",
        height=MARGIN + HEAD + bottom + FOOT + 10, showlegend=False, margin={"l": 10, "r": 10, "t": MARGIN, "b": 10},
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, INNER])
    figure.update_yaxes(visible=False, range=[bottom + FOOT, -HEAD])
    for x, text in (
        (0, "Class, latent, kind"),
        (BARS_AT, "Attribution per image"),
        (EXAMPLES_AT, "The latent's best examples"),
        (PICTURES_AT, "The class's images, and where it is"),
    ):
        _write(figure, x, -6, f"<b>{text}</b>", yanchor="bottom")
    edges = _edges(attributions)
    for i, row in enumerate(table.itertuples()):
        top = i * ROW
        if i:
            figure.add_shape(type="line", x0=0, x1=INNER, y0=top, y1=top, line={"color": GRID, "width": 1})
        _say(figure, row, top)
        _distribution(figure, row, np.asarray(attributions[i], dtype=float), edges, top)
        tiles = [(EXAMPLES_AT + TILE * e, picture) for e, picture in enumerate(examples[i][:N_EXAMPLES])]
        for p, picture in enumerate(pictures[i][:N_PICTURES]):
            left = PICTURES_AT + 2 * TILE * p
            tiles += [(left, picture), (left + TILE, overlay(picture, np.clip(np.asarray(maps[i][p]), 0, None)))]
        for x, picture in tiles:
            figure.add_layout_image(_placed(picture, x, top + (ROW - TILE) / 2))
    _scale(figure, edges, bottom)
    how = "Bright where covering a cell takes most of the latent's activation, scaled to its own maximum"
    _write(figure, INNER, bottom + 8, how, xanchor="right", yanchor="top", font={"size": 12, "color": MUTED})
    return figure


def kinds(table: pd.DataFrame) -> go.Figure:
    """How many findings were guessed to be of each kind; with a column `planted_kind` also what they were planted as.

    table: of `evidence`. planted_kind: one of `evidence.KINDS`, or empty for a finding that was not planted.
    """
    known = "planted_kind" in table
    order = [*KINDS, *sorted(set(table["kind"]) - set(KINDS))]
    counts = table["kind"].value_counts().reindex(order, fill_value=0)
    figure = make_subplots(
        1, 1 + known, shared_yaxes=True, horizontal_spacing=0.04, column_widths=[0.4, 0.6] if known else None,
        subplot_titles=["Findings of each kind", "What they were planted as"][: 1 + known],
    )  # fmt: skip
    figure.update_annotations(font={"size": 15})
    figure.update_layout(
        template=TEMPLATE, height=430, showlegend=False, margin={"t": 122, "b": 60},
        title={
            "text": "What kinds of unexpected reliance there are, by guess from the evidence",
            "subtitle": {"text": f"{len(table):,} findings" + "; right: the darker, the more of a column" * known},
        },
    )  # fmt: skip
    figure.add_bar(
        x=counts.tolist(), y=order, orientation="h", marker={"color": [COLOURS.get(kind, INK) for kind in order]},
        text=[f"{n:,}" for n in counts], textposition="outside", textfont={"size": 14}, cliponaxis=False,
        hovertemplate="%{y}: %{x:,} findings<extra></extra>", width=0.62, row=1, col=1,
    )  # fmt: skip
    figure.update_xaxes(title="Findings", tickformat=",d", range=[0, 1.15 * max(counts.max(), 1)], nticks=5, col=1)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=order, showgrid=False)
    figure.update_yaxes(title="Guessed kind", col=1)
    if known:
        planted = table["planted_kind"].fillna("").replace("", NONE)
        columns = [name for name in (*order, NONE) if name in set(planted)]
        cells = pd.crosstab(table["kind"], planted).reindex(index=order, columns=columns, fill_value=0)
        share = cells / cells.sum()
        figure.add_heatmap(
            x=columns, y=order, z=[numbers(row) for row in share.to_numpy()], zmin=0, zmax=1, xgap=2, ygap=2,
            colorscale=[[0, "#F4F7FA"], [1, PALETTE[0]]], showscale=False,
            text=[[str(n or "") for n in row] for row in cells.to_numpy()],
            texttemplate="%{text}", textfont={"size": 14}, customdata=cells.to_numpy().tolist(),
            hovertemplate="planted as %{x}, guessed %{y}: %{customdata} (%{z:.0%} of the planted)<extra></extra>",
            row=1, col=2,
        )  # fmt: skip
        figure.update_xaxes(title="Planted kind", type="category", showgrid=False, col=2)
    return figure


def _say(figure: go.Figure, row: tuple, top: float) -> None:
    """What the finding is, on the left: the class and the latent, the kind, how often, and what decided the kind."""
    colour = COLOURS.get(row.kind, INK)
    figure.add_shape(
        type="rect", x0=0, x1=5, y0=top + 9, y1=top + ROW - 9, fillcolor=colour, line_width=0, name=row.kind
    )
    words = f"<b>{_cut(row.word, 14)}</b>, by latent {row.latent}"
    label = f"labelled “{_cut(row.label, 22)}”" if pd.notna(row.label) else "without a label"
    because = textwrap.wrap(str(row.because), 34, max_lines=2, placeholder=" …")
    lines = [words, label, f"<b>{row.kind}</b>; on in {row.n_on:,} of {row.n:,}", *because]
    small = [f"<span style='font-size:12px'>{line}</span>" for line in lines[1:]]
    _write(figure, 11, top + ROW / 2, "<br>".join([lines[0], *small]), yanchor="middle")


def _distribution(
    figure: go.Figure, row: tuple, values: Float[np.ndarray, " image"], edges: Float[np.ndarray, " edge"], top: float
) -> None:
    """A histogram of the attributions, its highest bar as high as the row allows, and a mark at their mean."""
    counts, _ = np.histogram(values, edges)
    base, high = top + ROW - 16, ROW - 34
    colour = COLOURS.get(row.kind, INK)
    middles = (edges[1:] + edges[:-1]) / 2
    figure.add_bar(
        x=numbers(_at(middles, edges)), y=numbers(-high * counts / max(counts.max(initial=0), 1)), base=base,
        width=numbers([BARS_WIDE / len(counts)])[0], marker={"color": colour, "line": {"color": "white", "width": 1}},
        customdata=[[int(n), *numbers(pair)] for n, *pair in zip(counts, edges[:-1], edges[1:], strict=True)],
        hovertemplate="%{customdata[0]} images from %{customdata[1]:.3g} to %{customdata[2]:.3g}<extra></extra>",
        name=f"{row.word}, latent {row.latent}",
    )  # fmt: skip
    left, right = BARS_AT, BARS_AT + BARS_WIDE
    figure.add_shape(type="line", x0=left, x1=right, y0=base, y1=base, line={"color": MUTED, "width": 1})
    zero = _at(np.zeros(1), edges)[0]
    figure.add_shape(
        type="line", x0=zero, x1=zero, y0=base - high, y1=base + 4, line={"color": INK, "width": 1, "dash": "dot"}
    )
    if len(values):
        mean = values.mean()
        figure.add_scatter(
            x=numbers(_at(np.array([mean]), edges)), y=[base + 6], mode="markers",
            marker={"symbol": "triangle-up", "size": 9, "color": INK},
            hovertemplate=f"mean {mean:.4g}<extra></extra>", name="mean",
        )  # fmt: skip


def _scale(figure: go.Figure, edges: Float[np.ndarray, " edge"], bottom: float) -> None:
    """The numbers below the histograms: the least, zero and the most, where they do not run into each other."""
    least, most = edges[0], edges[-1]
    room = 0.22 * (most - least)
    ticks = [tick for tick in (least, 0.0, most) if tick == 0 or abs(tick) > room]
    for tick in ticks:
        x = float(_at(np.array([tick]), edges)[0])
        text = f"{tick:.2g}".replace("-", "−")
        _write(figure, x, bottom + 2, text, xanchor="center", yanchor="top", font={"size": 12, "color": MUTED})
    said = "dotted: 0; triangle: mean"
    _write(
        figure, BARS_AT + BARS_WIDE / 2, bottom + 18, said, xanchor="center", yanchor="top",
        font={"size": 12, "color": MUTED},
    )  # fmt: skip


def _edges(attributions: Sequence[Float[np.ndarray, " image"]]) -> Float[np.ndarray, " edge"]:
    """Of about `N_BINS` bins, the same for every finding, one of them beginning at 0, where the latent is off."""
    every = np.concatenate([np.zeros(1), *(np.asarray(values, dtype=float) for values in attributions)])
    wide = (np.ptp(every) or 1.0) / N_BINS
    return wide * np.arange(np.floor(every.min() / wide + 1e-9), np.floor(every.max() / wide + 1e-9) + 2)


def _at(values: Float[np.ndarray, " value"], edges: Float[np.ndarray, " edge"]) -> Float[np.ndarray, " value"]:
    """Pixels from the left at which an attribution is drawn."""
    return BARS_AT + BARS_WIDE * (values - edges[0]) / (edges[-1] - edges[0])


def _placed(picture: UInt8[np.ndarray, "h w 3"], left: float, top: float) -> dict:
    """An image in the coordinates of the rows, with a little room to the next one."""
    side = TILE - 4
    return {
        "source": data_uri(picture, side), "xref": "x", "yref": "y", "x": left, "y": round(top + 2, 2),
        "sizex": side, "sizey": side, "xanchor": "left", "yanchor": "top",
    }  # fmt: skip


def _write(figure: go.Figure, x: float, y: float, text: str, **style) -> None:
    style = {"xanchor": "left", "font": {"size": 13}} | style
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, align="left", **style)


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
