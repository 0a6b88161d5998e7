"""The figures of shifts taken apart: what augmentations destroy and invent, on how few latents, and what repairs them.

Tables in, a plotly figure out. The tables are those of `shift_attribution`, `repair` and `shifted`.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.canvas import (
    COLOURS,
    INK,
    MUTED,
    PALETTE,
    canvas,
    in_order,
    label,
    numbers,
    whiskers,
)
from clipshift_core.figures_attribution import (
    BOUNDS,
    NEGATIVE,
    POSITIVE,
    ZERO,
    MethodLook,
    _band,
    _bounds,
    _by_sign,
    _hatched,
    _line,
    _over,
    _written,
)
from clipshift_core.figures_preservation import _panels

PARTS = {
    "lost": ("lost: latents that lower it", NEGATIVE, "/"),
    "gained": ("gained: latents that raise it", POSITIVE, ""),
    "error": ("error: what the dictionary does not write", "#9A9A9A", "x"),
    "rest": ("rest: tokens that it does not read", "#56B4E9", "."),
}
"""Name, colour and hatching of what a mean change is made of."""
KIND_COLOURS = {
    "thing": (PALETTE[0], ""),
    "colour": (PALETTE[4], "/"),
    "background": (PALETTE[2], "."),
    "relation": (PALETTE[3], "x"),
}
"""Colour and hatching of the kinds of labels that the world has; other kinds take what is left."""
MARKS = {"half": ("half of the sum", "circle"), "ninety": ("nine tenths of it", "diamond")}
"""Name and symbol of two of the quantities of `concentration_table`."""
RESTORED = {
    "top": MethodLook("those that cost most", POSITIVE, "circle", "solid"),
    "random": MethodLook("as many random ones", MUTED, "x", "dash"),
}
RECOVERED = {
    "target": ("Similarity: higher is better", "Share of the lost similarity brought back"),
    "predictions": ("Predictions: higher is better", "Share of the changed predictions turned back"),
    "broken": ("Broken: lower is better", "Share of the unchanged predictions turned away"),
}
"""Title and axis of the measures of `repair.table`."""


def account(table: pd.DataFrame, *, target: str = "cosine similarity", level: float = 0.95) -> go.Figure:
    """The mean change of each augmentation as lost + gained + error (+ rest), stacked from 0, with the sum marked.

    table: of `shift_attribution.account_table`. target names what changes.
    """
    names = in_order(table["augmentation"])
    figure = canvas(
        f"What the change in {target} is made of",
        f"Mean over {_over(table)}: what is left of 0 is lost, right of it gained; the bars of a row sum to the"
        f" diamond, with its {level:.0%} interval",
        height=210 + 44 * max(len(names), 1),
        barmode="relative",
        bargap=0.36,
    )
    for quantity, (said, colour, hatch) in PARTS.items():
        rows = _rows(table, quantity, names)
        if quantity == "rest" and not (rows["mean"].abs() > 1e-9).any():
            continue
        figure.add_bar(
            y=[label(name) for name in names],
            x=numbers(rows["mean"]),
            orientation="h",
            marker=_hatched(colour, hatch),
            customdata=_bounds(rows),
            name=said,
            hovertemplate="%{y}: %{x:.4g} " + BOUNDS + f"<extra>{quantity}</extra>",
        )
    rows = _rows(table, "change", names)
    figure.add_scatter(
        y=[label(name) for name in names],
        x=numbers(rows["mean"]),
        mode="markers",
        marker={"symbol": "diamond", "size": 12, "color": "white", "line": {"color": INK, "width": 2}},
        error_x=whiskers(rows, color=INK, thickness=2, width=6),
        customdata=_bounds(rows),
        name="change: the sum",
        hovertemplate="%{y}: %{x:.4g} " + BOUNDS + "<extra>change</extra>",
    )
    for name, change in zip(names, _written(rows["mean"]), strict=True):
        _beside(figure, label(name), change)
    _beside(figure, 1, "change", yref="paper", yanchor="bottom", font={"size": 13, "color": MUTED})
    figure.update_xaxes(title=f"Mean change in {target} (view minus image)", **ZERO)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_layout(margin={"t": 128, "r": 90, "b": 60}, legend={"x": 0, "xanchor": "left"})
    return figure


def fingerprints(
    table: pd.DataFrame,
    labels: Mapping[int, str],
    *,
    n: int = 6,
    target: str = "cosine similarity",
    level: float = 0.95,
) -> go.Figure:
    """The `n` latents that carry each augmentation's shift, a panel an augmentation: label, then a signed bar.

    table: of `shift_attribution.fingerprints`. labels: of each latent; one without is named by its number. In the
    panels' titles the share of these latents in all absolute parts. Each panel has an axis of its own.
    """
    names, n_columns = in_order(table["augmentation"]), 3
    n_rows = max(1, -(-len(names) // n_columns))
    shown = {name: table[table["augmentation"] == name].head(n) for name in names}
    each, gap = 38 * n, 86
    plot = n_rows * each + (n_rows - 1) * gap
    figure = _panels(
        "The latents that carry each shift",
        f"Mean part in the change of the {target} over {_over(table)}, with its {level:.0%} interval;"
        " blue raises, hatched orange lowers; axes differ",
        n_rows,
        n_columns,
        height=plot + 190,
        titles=[f"<b>{label(name)}</b>, {rows['share'].sum():.0%} of all parts" for name, rows in shown.items()],
        horizontal_spacing=0.05,
        vertical_spacing=gap / plot if n_rows > 1 else 0,
    )
    figure.update_annotations(yshift=4)
    notes = []
    for i, rows in enumerate(shown.values()):
        where = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        said = [_named(latent, labels) for latent in rows["latent"]]
        bounds = rows.rename(columns={"part": "mean", "part_low": "low", "part_high": "high"})[["mean", "low", "high"]]
        figure.add_bar(
            y=list(range(len(rows))),
            x=numbers(rows["part"]),
            orientation="h",
            width=0.36,
            offset=0.08,
            marker=_by_sign(rows["part"]),
            error_x=whiskers(bounds, color=INK, thickness=1.5, width=3),
            text=[f"{text} (latent {latent})" for text, latent in zip(said, rows["latent"], strict=True)],
            textposition="none",
            customdata=_bounds(bounds),
            hovertemplate="%{text}: %{x:.4g} " + BOUNDS + "<extra></extra>",
            **where,
        )
        axis = i + 1 if i else ""
        notes += [
            {
                "x": 0, "xref": f"x{axis} domain", "xanchor": "left", "y": y - 0.2, "yref": f"y{axis}",
                "text": textwrap.shorten(text, 40, placeholder=" …") + _small(latent), "font": {"size": 12.5},
                "bgcolor": "rgba(255,255,255,0.8)", "borderpad": 0, "showarrow": False,
            }
            for y, (text, latent) in enumerate(zip(said, rows["latent"], strict=True))
        ]  # fmt: skip
        figure.update_yaxes(range=[n - 0.35, -0.55], visible=False, **where)
        figure.update_xaxes(title="Mean part" if i + n_columns >= len(names) else None, **where)
    small = {"nticks": 5, "exponentformat": "none", "tickfont": {"size": 12}}
    figure.update_xaxes(**ZERO, **small, rangemode="tozero")
    figure.update_layout(margin={"t": 124, "l": 30, "b": 60}, annotations=[*figure.layout.annotations, *notes])
    return figure


def concentration(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """How many latents make up half and nine tenths of a shift; a tick where all that changed are counted.

    table: of `shift_attribution.concentration_table`.
    """
    names = in_order(table["augmentation"])
    labels, colours = [label(name) for name in names], [COLOURS.get(name, MUTED) for name in names]
    figure = canvas(
        "On how few latents a shift rests",
        f"The fewest latents that make up so much of the sum of absolute parts; mean over {_over(table)},"
        f" with its {level:.0%} interval",
        height=200 + 42 * max(len(names), 1),
    )
    by_quantity = {quantity: _rows(table, quantity, names) for quantity in (*MARKS, "latents")}
    spans = zip(labels, *(numbers(by_quantity[q]["mean"]) for q in MARKS), strict=True)
    spans = [(name, *ends) for name, *ends in spans]
    figure.add_scatter(
        x=[x for _, low, high in spans for x in (low, high, None)], y=[name for name, *_ in spans for _ in range(3)],
        mode="lines", line={"color": "#B0B0B0", "width": 2}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    for quantity, (said, _) in MARKS.items():
        rows = by_quantity[quantity]
        figure.add_scatter(
            x=numbers(rows["mean"]),
            y=labels,
            mode="markers+text",
            marker=_mark(quantity, colours),
            error_x=whiskers(rows, color=INK, thickness=1.5, width=5),
            text=[f"{v:.1f}" if np.isfinite(v) else "unknown" for v in rows["mean"]],
            textposition="top center",
            textfont={"size": 13, "color": INK},
            customdata=_bounds(rows),
            hovertemplate="%{y}: %{x:.4g} " + BOUNDS + "<extra>" + said + "</extra>",
            showlegend=False,
        )
        figure.add_scatter(x=[None], y=labels[:1], mode="markers", marker=_mark(quantity, MUTED), name=said)
    figure.add_scatter(
        x=numbers(by_quantity["latents"]["mean"]),
        y=labels,
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 16, "color": INK, "line": {"width": 2}},
        hovertemplate="%{y}: %{x:.4g}<extra>all that changed</extra>",
        name="all that changed",
    )
    figure.update_xaxes(title="Latents (fewer is more concentrated)", rangemode="tozero")
    figure.update_yaxes(type="category", range=[len(names) - 0.5, -0.7])
    figure.update_layout(margin={"t": 124, "b": 60})
    return figure


def repair(
    table: pd.DataFrame, *, measures: Sequence[str] = ("target", "predictions"), level: float = 0.95
) -> go.Figure:
    """What restored latents bring back, against their number: those that cost most, and as many random ones.

    table: of `repair.table`. A panel for each of `measures` that the table has; the dotted line is
    with all latents restored, so that what is missing to 1 is the error's.
    """
    measures = [measure for measure in measures if measure in set(table["measure"])]
    counts = {m: int(table.loc[table["measure"] == m, "n"].max()) for m in measures}
    all_restored = table[table["chosen"] == "every"].set_index("measure")["share"].reindex(measures).astype(float)
    every = dict(zip(measures, numbers(all_restored), strict=True))
    figure = _panels(
        "Does restoring a few latents repair the prediction?",
        f"Latents of the view set back to their activations in the image; bands: {level:.0%} intervals;"
        " beyond 100%: what was gained is kept",
        1,
        max(len(measures), 1),
        height=520,
        titles=[
            f"{RECOVERED[m][0]}<br>{counts[m]:,} view{'s' * (counts[m] != 1)}"
            + (f"; dotted, all restored: {every[m]:.0%}" if every[m] is not None else "")
            for m in measures
        ],
        horizontal_spacing=0.1,
    )
    sizes = sorted(table["size"].dropna().unique().tolist())
    for c, measure in enumerate(measures, 1):
        of = table[table["measure"] == measure]
        rows_of = {chosen: of[of["chosen"] == chosen].sort_values("size", kind="stable") for chosen in RESTORED}
        for chosen, look in RESTORED.items():
            _band(figure, rows_of[chosen]["size"], rows_of[chosen], look.colour, row=1, col=c)
        for chosen, look in RESTORED.items():
            rows = rows_of[chosen]
            _line(figure, rows["size"], rows["share"], rows, look, size=10, showlegend=c == 1, row=1, col=c)
        if every[measure] is not None:
            figure.add_hline(y=every[measure], line={"color": INK, "width": 2, "dash": "dot"}, row=1, col=c)
        figure.update_yaxes(title=RECOVERED[measure][1], tickformat=".0%", rangemode="tozero", row=1, col=c)
    figure.update_xaxes(title="Latents restored (logarithmic)", type="log", tickvals=sizes)
    figure.update_layout(showlegend=True, margin={"t": 168, "b": 60}, legend={"y": 1.14, "x": 0, "xanchor": "left"})
    return figure


def turned_over(table: pd.DataFrame) -> go.Figure:
    """How much of an image's latent activation each augmentation takes, left, and adds, right, by kind of latent.

    table: columns augmentation, quantity (lost, gained), kind, mean, n, as of `shifted.by_kind`.
    """
    names, kinds = in_order(table["augmentation"]), list(dict.fromkeys(table["kind"]))
    kinds = [kind for kind in KIND_COLOURS if kind in kinds] + [kind for kind in kinds if kind not in KIND_COLOURS]
    figure = canvas(
        "What each augmentation destroys and invents",
        f"Share of an image's latent activation, by what its latents are labelled as; mean over {_over(table)}",
        height=220 + 42 * max(len(names), 1),
        barmode="relative",
        bargap=0.36,
    )
    rest = iter((PALETTE[5:] + PALETTE) * len(kinds))
    for kind in kinds:
        colour, hatch = KIND_COLOURS.get(kind) or (next(rest), "+")
        for sign, quantity in ((-1, "lost"), (1, "gained")):
            rows = table[(table["kind"] == kind) & (table["quantity"] == quantity)].set_index("augmentation")
            means = rows["mean"].reindex(names)
            figure.add_bar(
                y=[label(name) for name in names],
                x=numbers(sign * means),
                orientation="h",
                name=str(kind),
                legendgroup=str(kind),
                showlegend=sign < 0,
                marker=_hatched(colour, hatch),
                customdata=numbers(means),
                hovertemplate=f"%{{y}}, {kind}, {quantity}: %{{customdata:.3g}}<extra></extra>",
            )
    sums = table.groupby(["quantity", "augmentation"])["mean"].sum()
    for sign, quantity, side in (
        (-1, "lost", "Lost: weaker in the view"),
        (1, "gained", "Gained: stronger in the view"),
    ):
        whole = sums[quantity].reindex(names) if len(table) else pd.Series(dtype=float)
        figure.add_scatter(
            y=[label(name) for name in names],
            x=numbers(sign * whole),
            mode="text",
            text=[f"\u00a0{share:.0%}\u00a0" for share in whole],
            textposition="middle right" if sign > 0 else "middle left",
            textfont={"size": 13, "color": INK},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_annotation(
            x=0.5, xref="x domain", xanchor="left" if sign > 0 else "right", xshift=10 * sign, y=1, yref="paper",
            yanchor="bottom", yshift=4, text=f"<b>{side}</b>", showarrow=False, font={"size": 13},
        )  # fmt: skip
    most = float(sums.max()) if len(table) else 1.0
    step = _step(most)
    ticks = np.arange(-int(most // step), int(most // step) + 1) * step
    figure.update_xaxes(
        title="Share of the activation that the image's latents have",
        range=numbers([-1.18 * most, 1.18 * most]),
        tickvals=numbers(ticks),
        ticktext=[f"{abs(tick):.0%}" for tick in ticks],
        **ZERO,
    )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_layout(margin={"t": 150, "b": 60}, legend={"y": 1.1, "x": 0, "xanchor": "left"})
    return figure


def _rows(table: pd.DataFrame, quantity: str, names: Sequence[str]) -> pd.DataFrame:
    """mean, low, high of one quantity, a row for each of `names`, NaN where there is none."""
    rows = table[table["quantity"] == quantity].set_index("augmentation")
    return rows.reindex(names)[["mean", "low", "high"]].astype(float)


def _mark(quantity: str, colour: str | list[str]) -> dict:
    """The marker of one quantity of concentration: a disc for half, an open diamond for nine tenths."""
    line = {"color": colour, "width": 2.5}
    return {"symbol": MARKS[quantity][1], "size": 12, "color": colour if quantity == "half" else "white", "line": line}


def _named(latent: int, labels: Mapping[int, str]) -> str:
    return str(labels.get(latent) or "no label")


def _small(latent: int) -> str:
    return f" <span style='color:{MUTED};font-size:11px'>{latent}</span>"


def _step(most: float) -> float:
    """Distance of ticks, 1, 2 or 5 times a power of ten, with five at most up to `most`."""
    power = 10.0 ** np.floor(np.log10(most / 5))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= most))


def _beside(figure: go.Figure, y: str | float, text: str, **style) -> None:
    """A number right of the plot, in the row y."""
    at = {"x": 1, "xref": "paper", "xanchor": "right", "xshift": 74, "yref": "y"}
    figure.add_annotation(**{**at, "y": y, "text": text, "showarrow": False, **style})
