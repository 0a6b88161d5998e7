"""The figures of dose and response: shift along severity, shift along distortion, and the ranking before and after.

A table in, a plotly figure out, as in `figures`.
"""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.canvas import (
    COLOURS,
    INK,
    MUTED,
    SYMBOLS,
    Metric,
    canvas,
    in_order,
    label,
    metric_spec,
    n_images,
    numbers,
    short,
)
from clipshift_core.dose import By

SPECS = {
    "mse": Metric("Mean squared error", "squared grey levels, logarithmic", True, (0, 255.0**2)),
    "ssim": Metric("1 − SSIM", "0 same, 1 unrelated, logarithmic", True, (0, 2)),
}
"""How shift and distortion stand on an axis here."""
COLUMNS = 3


def dose_curves(table: pd.DataFrame, metric: str = "l2", *, level: float = 0.95) -> go.Figure:
    """Mean shift against severity, one panel an augmentation, with the interval of the mean as a band.

    `table` is dose.curves's. The severity is logarithmic; severity 0, which has no logarithm, stands at the left of
    a gap, hollow. A dashed line marks the published severity. All panels share the axis of the shift.
    """
    spec, names = _spec(metric), in_order(table["augmentation"])
    n_rows = -(-len(names) // COLUMNS)
    figure = canvas(
        f"{spec.label} against the severity of each augmentation",
        f"Mean over {n_images(table['n'])} with its {level:.0%} interval; hollow: the image itself; "
        "dashed: the published severity",
        height=150 + 230 * n_rows,
        showlegend=False,
    )
    figure.set_subplots(
        n_rows,
        COLUMNS,
        shared_yaxes=True,
        subplot_titles=[label(name) for name in names],
        horizontal_spacing=0.04,
        vertical_spacing=0.36 / n_rows,
    )
    figure.update_annotations(font={"size": 15})
    top = 1.06 * float(table[["mean", "high"]].max(axis=None))
    for index, name in enumerate(names):
        at = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        rows = table[table["augmentation"] == name].sort_values("severity", kind="stable")
        severity = rows["severity"].to_numpy(float)
        places = _places(severity)
        colour, spread = COLOURS.get(name, MUTED), rows.dropna(subset=["low", "high"])
        figure.add_scatter(
            x=numbers([*places[: len(spread)], *places[: len(spread)][::-1]]),
            y=numbers([*spread["low"], *spread["high"][::-1]]),
            fill="toself",
            mode="lines",
            line={"width": 0, "color": colour},
            opacity=0.35,
            hoverinfo="skip",
            **at,
        )
        figure.add_scatter(
            x=numbers(places),
            y=numbers(rows["mean"]),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={
                "color": ["white" if s == 0 else colour for s in severity],
                "size": [11 if s == 1 else 7 for s in severity],
                "symbol": SYMBOLS.get(name, "circle"),
                "line": {"color": colour, "width": 1.5},
            },
            customdata=numbers(severity),
            hovertemplate=f"{label(name)}, severity %{{customdata}}: %{{y:.4g}}<extra></extra>",
            **at,
        )
        # after the traces: a panel that is still empty would get no line
        figure.add_vline(x=0, line={"color": MUTED, "width": 1.5, "dash": "dash"}, **at)
        ticks = _ticks(severity)
        figure.update_xaxes(
            tickvals=numbers(places[np.isin(severity, ticks)]),
            ticktext=[f"{tick:g}" for tick in ticks],
            range=numbers([places[0] - 0.05 * np.ptp(places), places[-1] + 0.05 * np.ptp(places)]),
            **at,
        )
    figure.update_yaxes(range=numbers([-0.03 * top, top]))
    figure.update_yaxes(title=spec.axis, row=n_rows // 2 + 1, col=1)
    figure.update_xaxes(title="Severity (1 = published)", row=n_rows)
    return figure


def shift_against_distortion(table: pd.DataFrame, by: By, level: float, metric: str = "l2") -> go.Figure:
    """Mean shift against pixel distortion, one line an augmentation, and the level at which all are compared.

    `table` is dose.along's, `level` in the units of `by`. What has a single row (the flip) is a marker alone.
    """
    spec, ground = _spec(metric), SPECS[by]
    if table["augmentation"].nunique() < 2:
        return _nothing(f"{spec.label} against the distortion of the pixels", by, level)
    names = in_order(table["augmentation"])
    middle = level if by == "mse" else 1 - level
    figure = canvas(
        f"{spec.label} against the distortion of the pixels",
        f"Mean over the images that reach the dashed {level_name(by, level)} under all with a dose; "
        "a line ends where one is lost",
        height=620,
        showlegend=False,
    )
    ends = {}
    for name in names:
        rows = table[table["augmentation"] == name].sort_values("distortion", kind="stable")
        at = rows[rows["distortion"] <= middle * 1.0001].iloc[-1:] if len(rows) > 1 else rows
        colour = COLOURS.get(name, MUTED)
        shape = {"color": colour, "size": 11, "symbol": SYMBOLS.get(name, "circle")}
        line = {"color": colour, "width": 2.5}
        for part, mode, style in ((rows, "lines", {"line": line}), (at, "markers", {"marker": shape})):
            figure.add_scatter(
                x=numbers(part["distortion"]),
                y=numbers(part[metric]),
                mode=mode,
                hovertemplate=f"{label(name)}, {ground.inline} %{{x:.4g}}: %{{y:.4g}}<extra></extra>",
                **style,
            )
        ends[name] = (rows["distortion"].iloc[-1], rows[metric].iloc[-1])
    low, high = np.log10(table["distortion"].min()), np.log10(table["distortion"].max())
    top = 1.05 * float(table[metric].max())
    beside = dict(zip(ends, spread([y for _, y in ends.values()], least=0.042 * top), strict=True))
    edge = high + 0.03 * (high - low)
    for name, (x, y) in ends.items():
        colour = COLOURS.get(name, MUTED)
        figure.add_scatter(
            x=numbers([x, 10**edge]),
            y=numbers([y, beside[name]]),
            mode="lines",
            line={"color": colour, "width": 1, "dash": "dot"},
            hoverinfo="skip",
        )
        figure.add_annotation(
            x=1,
            xref="paper",
            y=numbers([beside[name]])[0],
            text=label(name),
            xanchor="left",
            showarrow=False,
            xshift=4,
        )
    figure.add_vline(x=numbers([middle])[0], line={"color": INK, "width": 1.5, "dash": "dash"})
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high)) for digit in (1, 2, 5)]
    figure.update_xaxes(
        title=ground.axis,
        type="log",
        tickvals=numbers(ticks),
        ticktext=[f"{tick:g}" for tick in ticks],
        range=numbers([low - 0.02 * (high - low), edge]),
    )
    figure.update_yaxes(title=spec.axis, range=numbers([-0.03 * top, top]))
    figure.update_layout(margin={"r": 200})
    return figure


def matched_ranking(table: pd.DataFrame, by: By, level: float, metric: str = "l2") -> go.Figure:
    """From the rank at the published parameters to the rank at matched distortion, with the means at both ends.

    `table` is the one of dose.compare: augmentation, rank, mean, published_rank, published_mean, n.
    """
    title = f"The ranking by {_spec(metric).inline}, as published and at the same distortion"
    if table.empty:
        return _nothing(title, by, level)
    figure = canvas(
        title,
        f"Mean over {n_images(table['n'])} in brackets; on the right all are at an {level_name(by, level)}",
        height=150 + 50 * len(table),
        showlegend=False,
    )
    for row in table.itertuples():
        colour = COLOURS.get(row.augmentation, MUTED)
        figure.add_scatter(
            x=[0, 1],
            y=[row.published_rank, row.rank],
            mode="lines+markers",
            line={"color": colour, "width": 4},
            marker={"color": colour, "size": 14, "symbol": SYMBOLS.get(row.augmentation, "circle")},
            hovertemplate=f"{label(row.augmentation)}: rank %{{y}}<extra></extra>",
        )
        for x, rank, mean in ((0, row.published_rank, row.published_mean), (1, row.rank, row.mean)):
            name = f"{label(row.augmentation)} ({short(mean)})"
            figure.add_annotation(
                x=x,
                y=rank,
                text=f"{rank}  {name}" if x else f"{name}  {rank}",
                xanchor="left" if x else "right",
                xshift=14 if x else -14,
                showarrow=False,
            )
    figure.update_xaxes(
        tickvals=[0, 1],
        ticktext=["Published parameters", "Same distortion"],
        range=[-0.02, 1.02],
        side="top",
        showgrid=False,
        tickfont={"size": 15},
    )
    figure.update_yaxes(visible=False, range=[len(table) + 0.6, 0.4])
    figure.update_layout(margin={"l": 270, "r": 270, "t": 120, "b": 20})
    return figure


def level_name(by: By, level: float) -> str:
    """A level of distortion in words, such as "MSE of 864" or "SSIM of 0.896"."""
    digits = short(level) if level < 100 else f"{level:,.0f}"
    return f"{by.upper()} of {digits}"


def spread(values: Iterable[float], *, least: float) -> list[float]:
    """Places for labels: the values, moved apart as little as keeps neighbours `least` apart, order kept.

    The least squares solution: pools of touching labels sit around the mean of where they want to be.
    """
    values = np.asarray(list(values), float)
    order = np.argsort(values, kind="stable")
    pools: list[list[float]] = []  # of wanted places of the first label, each less its offset within the pool
    for rank, value in enumerate(values[order]):
        pools.append([value - least * rank])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    placed = np.empty(len(values))
    placed[order] = np.repeat([np.mean(pool) for pool in pools], [len(pool) for pool in pools])
    placed[order] += least * np.arange(len(values))
    return placed.tolist()


def _spec(name: str) -> Metric:
    return SPECS.get(name) or metric_spec(name)


def _nothing(title: str, by: By, level: float) -> go.Figure:
    """What is shown where there is nothing to compare, so that a run on one odd image goes through."""
    figure = canvas(title, f"No image reaches an {level_name(by, level)} under every augmentation", height=220)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _places(severity: np.ndarray) -> np.ndarray:
    """Where ascending severities stand: their decimal logarithms, and 0 a seventh of their span to the left."""
    logs = np.log10(severity[severity > 0])
    gap = max(np.ptp(logs), 1.0) / 7
    return np.concatenate([np.full((severity == 0).sum(), logs[0] - gap), logs])


def _ticks(severity: np.ndarray) -> list[float]:
    """0, 1, the ends, and such others as find room, at least a seventh of the span from each other."""
    places = dict(zip(severity.tolist(), _places(severity), strict=True))
    least = np.ptp(list(places.values())) / 7.5
    kept: list[float] = []
    for tick in dict.fromkeys([0.0, 1.0, severity[-1], severity[1], *severity]):
        if tick in places and all(abs(places[tick] - places[other]) >= least for other in kept):
            kept.append(float(tick))
    return sorted(kept)
