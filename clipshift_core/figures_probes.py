"""The figures of probes against text: what each loses where a cue misleads, and what it leans on.

Tables in, a plotly figure out. The tables are those of `probes`; several models' come joined, with a column model.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.canvas import PALETTE, n_images, numbers, whiskers
from clipshift_core.figures_attribution import BOUNDS, ZERO, _band, _bounds, _over
from clipshift_core.figures_preservation import _panels


class ReaderLook(NamedTuple):
    """How one reader of embeddings is named and drawn."""

    label: str
    colour: str
    symbol: str
    dash: str


READER_LOOKS = {
    "probe": ReaderLook("linear probe", PALETTE[1], "circle", "solid"),
    "text": ReaderLook("zero-shot text", PALETTE[0], "diamond", "dash"),
}
"""In the reading order of every figure."""
OTHERS = tuple(zip(PALETTE[2:], ("square", "triangle-up", "x", "star", "pentagon"), strict=True))
"""Colours and symbols of further readers, in turn."""
SPLIT_TITLES = {
    "aligned": "Own cue: as in training",
    "balanced": "Any cue: it says nothing",
    "reversed": "Another word's cue: it misleads",
}
STRENGTH_AXIS = "Images with their own cue, in training"
PITCH, DODGE = 64, 0.34
"""Pixels from artefact to artefact; share of it over which readers are spread."""


def looks(names: Iterable[str]) -> dict[str, ReaderLook]:
    """How to draw each reader, in the reading order; those that are not ours follow in the order given."""
    names = list(dict.fromkeys(names))
    found = {name: READER_LOOKS[name] for name in READER_LOOKS if name in names}
    for name in names:
        if name not in found:
            colour, symbol = OTHERS[(len(found) - len(found.keys() & READER_LOOKS.keys())) % len(OTHERS)]
            found[name] = ReaderLook(str(name).replace("_", " "), colour, symbol, "dot")
    return found


def robustness(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Accuracy against the strength of the bias in training, a panel a split, a row of panels a model.

    table: of `probes.accuracy_table`. Text is not trained, and so the same at every strength.
    """
    models = _models(table)
    splits = [split for split in SPLIT_TITLES if split in set(table["split"])]
    figure = _panels(
        "Accuracy where the cue helps, says nothing, and misleads",
        f"Share of {_over(table)} of the same things, with its {level:.0%} interval;"
        " text (dashed, with a band) is not trained on any of them",
        max(len(models), 1), max(len(splits), 1), height=170 + 270 * max(len(models), 1), shared_yaxes=True,
        titles=[SPLIT_TITLES[split] for split in splits], horizontal_spacing=0.03,
        vertical_spacing=0.1 / max(len(models), 1),
    )  # fmt: skip
    bounds = _range(table, ceiling=1.0)
    for r, (model, rows) in enumerate(models.items(), 1):
        for c, split in enumerate(splits, 1):
            _against_strength(figure, rows[rows["split"] == split], "accuracy", first=(r, c) == (1, 1), row=r, col=c)
            last = r == len(models)
            figure.update_xaxes(title=STRENGTH_AXIS if last else None, showticklabels=last, row=r, col=c)
            figure.update_yaxes(range=bounds, tickformat=".0%", row=r, col=c)
        figure.update_yaxes(title=f"{model}: accuracy" if model else "Accuracy", row=r, col=1)
    return _finished(figure)


def shares(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Share of attribution on spurious latents against the strength of the bias in training, a panel a model.

    table: of `probes.share_table`; differences are left out.
    """
    table = table[table["reader"].isin(list(READER_LOOKS))]
    models = _models(table)
    figure = _panels(
        "How much of a prediction rests on spurious latents?",
        f"Mean over {_over(table)}, with its {level:.0%} interval; prediction: the own class's logit minus the"
        " mean of the others'",
        1, max(len(models), 1), height=440, shared_yaxes=True, titles=list(models), horizontal_spacing=0.05,
    )  # fmt: skip
    for c, rows in enumerate(models.values(), 1):
        _against_strength(figure, rows, "share", first=c == 1, row=1, col=c)
        figure.update_xaxes(title=STRENGTH_AXIS, row=1, col=c)
    figure.update_yaxes(range=_range(table, floor=0.0), tickformat=".1%")
    figure.update_yaxes(title="Share of absolute attribution", row=1, col=1)
    return _finished(figure)


def gaps(
    table: pd.DataFrame,
    *,
    title: str = "What an artefact alone does to the diagnosis",
    axis: str = "Share called malignant with the artefact minus without it",
    n: int | None = None,
    level: float = 0.95,
) -> go.Figure:
    """A dot with its interval for each artefact and reader; a hollow mark is one whose interval holds 0.

    table: columns artefact, reader, value, low, high, planted (bool). Planted artefacts come first, each group from
    the largest mean of its readers' values down. n: the number of images, for the subtitle.
    """
    order = table.groupby("artefact", sort=True).agg(planted=("planted", "any"), value=("value", "mean"))
    order = order.sort_values(["planted", "value"], ascending=False, kind="stable")
    over = f"over {n_images([n])}, " if n else ""
    figure = _panels(
        title, f"Mean {over}with its {level:.0%} interval; hollow: not told apart from 0",
        1, 1, height=180 + PITCH * max(len(order), 1),
    )  # fmt: skip
    found = looks(table["reader"])
    offsets = DODGE * (np.arange(len(found)) - (len(found) - 1) / 2) / max(len(found) - 1, 1) * min(len(found) - 1, 2)
    for offset, (name, look) in zip(offsets, found.items(), strict=True):
        rows = table[table["reader"] == name].set_index("artefact").reindex(order.index).dropna(subset="value")
        hollow = ~((rows["low"] > 0) | (rows["high"] < 0))
        places = [order.index.get_loc(artefact) + offset for artefact in rows.index]
        figure.add_scatter(
            x=numbers(rows["value"]), y=numbers(places), mode="markers", name=look.label,
            marker={"color": look.colour, "size": 11, "line": {"color": look.colour, "width": 2},
                    "symbol": [f"{look.symbol}{'-open' if is_open else ''}" for is_open in hollow]},
            error_x=whiskers(rows.rename(columns={"value": "mean"}), color=look.colour, thickness=2, width=5),
            customdata=[[str(artefact), *pair] for artefact, pair in zip(rows.index, _bounds(rows), strict=True)],
            hovertemplate="%{customdata[0]}: %{x:.4g} [%{customdata[1]:.4g}, %{customdata[2]:.4g}]"
                          f"<extra>{look.label}</extra>",
        )  # fmt: skip
    labels = [
        str(name).replace("_", " ") + ("" if planted else " (not planted)")
        for name, planted in zip(order.index, order["planted"], strict=True)
    ]
    figure.update_yaxes(
        tickvals=list(range(len(order))), ticktext=labels, range=[max(len(order), 1) - 0.5, -0.5], showgrid=False
    )
    known = table[["value", "low", "high"]].to_numpy(dtype=float)
    known = np.append(known[np.isfinite(known)], 0.0)
    pad = 0.06 * max(np.ptp(known), 0.02)
    figure.update_xaxes(title=axis, range=numbers([known.min() - pad, known.max() + pad]), **ZERO)
    for between in range(1, len(order)):
        figure.add_hline(y=between - 0.5, line={"color": "#D0D0D0", "width": 1}, layer="below")
    return _finished(figure)


def _models(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each model, in the order given; all of them under no name where there is no such column."""
    if "model" not in table:
        return {"": table} if len(table) else {}
    return {str(name): rows for name, rows in table.groupby("model", sort=False)}


def _against_strength(figure: go.Figure, rows: pd.DataFrame, value: str, *, first: bool, row: int, col: int) -> None:
    """Text as a band with a dashed line across the panel; the probe as dots with whiskers, evenly spaced."""
    rows = rows.rename(columns={value: "mean"})
    probe, text = rows[rows["reader"] == "probe"].sort_values("strength", kind="stable"), rows[rows["reader"] == "text"]
    across, where = [-0.35, max(len(probe), 1) - 0.65], {"row": row, "col": col}
    if len(text):
        look = READER_LOOKS["text"]
        both = pd.concat([text[:1]] * 2)
        _band(figure, pd.Series(across), both, look.colour, **where)
        figure.add_scatter(
            x=across, y=numbers(both["mean"]), mode="lines",
            line={"color": look.colour, "width": 2.5, "dash": look.dash},
            name=look.label, legendgroup=look.label, showlegend=first, customdata=_bounds(both),
            hovertemplate="%{y:.4g} " + BOUNDS + f"<extra>{look.label}</extra>", **where,
        )  # fmt: skip
    look, said = READER_LOOKS["probe"], [strength_text(strength) for strength in probe["strength"]]
    figure.add_scatter(
        x=list(range(len(probe))), y=numbers(probe["mean"]), mode="lines+markers",
        line={"color": look.colour, "width": 2}, marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        error_y=whiskers(probe, color=look.colour, thickness=2, width=5), name=look.label, legendgroup=look.label,
        showlegend=first, cliponaxis=False,
        customdata=[[text, *pair] for text, pair in zip(said, _bounds(probe), strict=True)],
        hovertemplate="trained at %{customdata[0]}: %{y:.4g} [%{customdata[1]:.4g}, %{customdata[2]:.4g}]"
                      f"<extra>{look.label}</extra>", **where,
    )  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(probe))), ticktext=said, range=across, showgrid=False, **where)


def strength_text(strength: float) -> str:
    """A probability as "90%", or "1 in 11" where a percentage would round it."""
    if abs(100 * strength - round(100 * strength)) < 1e-9:
        return f"{strength:.0%}"
    return f"1 in {1 / strength:.0f}" if abs(1 / strength - round(1 / strength)) < 1e-9 else f"{strength:.3g}"


def _range(table: pd.DataFrame, *, floor: float | None = None, ceiling: float | None = None) -> list[float | None]:
    """An axis that holds every interval; from the floor, if one is given, and to just above the ceiling."""
    known = table[[name for name in ("accuracy", "share", "low", "high") if name in table]].to_numpy(dtype=float)
    known = known[np.isfinite(known)]
    low = floor if floor is not None else known.min(initial=1.0)
    high = ceiling if ceiling is not None else known.max(initial=0.0)
    pad = 0.08 * max(high - low, 0.02)
    return numbers([low if floor is not None else low - pad, high + pad])


def _finished(figure: go.Figure) -> go.Figure:
    """The legend in a line of its own, between the subtitle and the panels."""
    below = {"y": round(1 - 70 / figure.layout.height, 4), "yref": "container", "yanchor": "top"}
    figure.update_layout(showlegend=True, legend={"x": 1, "xanchor": "right", **below}, margin={"t": 132, "b": 60})
    return figure
