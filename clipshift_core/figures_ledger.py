"""The figures of the last notebook: the ledger at a glance, and every figure of a run on a few sheets."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image

from clipshift_core import ledger
from clipshift_core.canvas import INK, MUTED, WIDTH, canvas, data_uri, numbers, short

VERDICTS = {
    "reproduced": ("#0072B2", "circle"),
    "not reproduced": ("#D55E00", "diamond"),
    "not testable here": ("#939393", "x"),
}
"""Colour and symbol of each verdict."""
ROW, WORDS = 40, 62
"""Pixels of a claim, and the letters of its statement in a line."""
COLUMNS, THUMB, CAPTION, TOP = 4, (220, 150), 62, 90
"""Figures side by side on a sheet, pixels of each, of the words below it, and of the sheet's title."""


def claims(table: pd.DataFrame) -> go.Figure:
    """Each claim's statistic with its interval, moved and scaled so that its bound is at 0 and success to the right.

    table: as of `claims.read`. A row is divided by its own largest distance from the bound: rows compare in sign, not
    in length.
    """
    figure = canvas(
        "The ledger: which claims hold in this run",
        "each statistic with its 95 % interval, scaled row by row; right of the line is the claim's side of its bound",
        height=148 + ROW * len(table),
        margin={"l": 20, "r": 200, "t": 130, "b": 30},
        xaxis={
            "range": [-1.08, 1.08],
            "showticklabels": False,
            "showgrid": False,
            "zeroline": True,
            "zerolinecolor": INK,
        },
        yaxis={"ticks": "", "showgrid": False, "range": [len(table) - 0.5, -0.5]},
    )
    for verdict, (colour, symbol) in VERDICTS.items():
        rows = [_scaled(row) | {"y": y} for y, row in enumerate(table.itertuples()) if row.verdict == verdict]
        if not rows:
            continue
        figure.add_scatter(
            x=numbers(row["value"] for row in rows),
            y=[row["y"] for row in rows],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": numbers(row["more"] for row in rows),
                "arrayminus": numbers(row["less"] for row in rows),
                "thickness": 2,
            },
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11},
            name=f"{verdict} ({len(rows)})",
            showlegend=True,
            hovertext=[row["hover"] for row in rows],
            hoverinfo="text",
        )
    names = [f"<b>{row.claim}</b>  " + "<br>".join(textwrap.wrap(row.statement, WORDS)) for row in table.itertuples()]
    figure.update_yaxes(tickvals=list(range(len(table))), ticktext=names, tickfont={"size": 12})
    for y, row in enumerate(table.itertuples()):
        known = np.isfinite([row.ci_low, row.ci_high]).all()
        interval = f"  [{short(row.ci_low)}, {short(row.ci_high)}]" if known else ""
        written = f"{short(row.value)}{interval}" if np.isfinite(row.value) else "left out"
        figure.add_annotation(
            x=1, xref="paper", xshift=10, xanchor="left", y=y, text=written, showarrow=False,
            font={"size": 12, "color": MUTED},
        )  # fmt: skip
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"})
    return figure


def sheet(pictures: Sequence[Path], title: str) -> go.Figure:
    """The figures of some notebooks, small, with their titles; each a `.png` with its `.json` beside it."""
    n_rows = -(-len(pictures) // COLUMNS)
    cell = (WIDTH - 40) / COLUMNS
    height = TOP + n_rows * (THUMB[1] + CAPTION)
    figure = canvas(
        title, "named NN-name after the notebook that makes them; each is in figures/ as .html, .png and .json",
        height=height, margin={"l": 20, "r": 20, "t": TOP, "b": 0},
        xaxis={"visible": False, "range": [0, WIDTH - 40]},
        yaxis={"visible": False, "range": [height - TOP, 0]},
    )  # fmt: skip
    figure.add_scatter(x=[0], y=[0], mode="markers", marker={"opacity": 0}, hoverinfo="skip", showlegend=False)
    for number, path in enumerate(pictures):
        row, column = divmod(number, COLUMNS)
        x, y = (column + 0.5) * cell, row * (THUMB[1] + CAPTION)
        with Image.open(path) as picture:
            shown = np.asarray(picture.convert("RGB"))
        figure.add_layout_image(
            source=data_uri(shown, 5 * THUMB[0] // 4), x=x, y=y, xref="x", yref="y", sizex=THUMB[0], sizey=THUMB[1],
            xanchor="center", yanchor="top", sizing="contain",
        )  # fmt: skip
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        words = "<br>".join(textwrap.wrap(told["title"], 36)[:2])
        figure.add_annotation(
            x=x, y=y + THUMB[1] + 2, xref="x", yref="y", yanchor="top", showarrow=False,
            text=f"<b>{path.stem}</b><br>{words}", font={"size": 10, "color": INK},
        )  # fmt: skip
    return figure


def _scaled(row: tuple) -> dict:
    """A claim's value and interval, its bound at 0, at most 1 away from it."""
    at, side = ledger.bound(row.statistic)
    found = np.array([row.value, row.ci_low, row.ci_high], dtype=float)
    moved = (found - at) * (-1 if side == "below" else 1)
    value, *ends = moved / (np.nanmax(np.abs(moved)) or 1) if np.isfinite(moved).any() else moved
    low, high = sorted(ends)
    if not side and np.isfinite(row.value):  # decided otherwise: shown on the side of its verdict, without a length
        value, low, high = (0.5 if row.verdict == "reproduced" else -0.5), np.nan, np.nan
    hover = f"<b>{row.claim}</b> {row.statement}<br>" + "<br>".join(textwrap.wrap(row.statistic, 80))
    known = np.isfinite([low, high]).all()
    return {
        "value": value,
        "less": value - low if known else 0.0,
        "more": high - value if known else 0.0,
        "hover": hover,
    }
