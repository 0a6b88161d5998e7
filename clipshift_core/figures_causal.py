"""The figures of the causal truth and of repair: what planted cues really raise, and what suppressing latents does.

Tables in, a plotly figure out: those of `causal.rises`, `causal.remaining` and `suppression.outcome_table`.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.canvas import INK, MUTED, PALETTE, n_images, numbers, whiskers
from clipshift_core.figures_attribution import BOUNDS, ZERO, MethodLook, _bounds, _room
from clipshift_core.figures_preservation import _panels

SYMBOLS = ("circle", "square", "diamond", "cross")
"""The mark of each model, beside its colour."""
LEFT_OVER = {"best": "without its best latent", "found": "without all that are listed"}
"""What remains of a rise: the column that `_rows` gives it, and its name. The second is a ring, which may lie
about the first."""
ROW, ROW_OF_SEVERAL = 24, 38
"""Pixels from row to row of the planted reliances, with one model and with several."""
SET_LOOKS = {
    "nothing": MethodLook("nothing", INK, "circle", "solid"),
    "random": MethodLook("random latents", "#939393", "x", "solid"),
    "found": MethodLook("found latents", "#C54100", "diamond", "solid"),
    "looked at": MethodLook("best candidates", "#F78C00", "triangle-up", "solid"),
    "true": MethodLook("true latents", "#0072B2", "square", "solid"),
}
"""What is suppressed, in the reading order."""
SCENES = {
    "misled": "Misled by a cue",
    "misleading": "With a cue of others",
    "without cue": "The same, no cue",
    "ordinary": "As drawn",
}
"""The kinds of scenes in the reading order, as a panel names them."""


def rises(planted: pd.DataFrame, removed: pd.DataFrame, remaining: pd.DataFrame | None = None) -> go.Figure:
    """How far each planted cue alone raises its word, and the share of that which remains without some latents.

    planted and removed: of `causal.Rises`; remaining: of `causal.remaining`, with the latents deleted that were found.
    A column model in all of them tells models apart. On the right is what remains of a rise that counts without the
    latent that carries most of it, where one carries enough to be named, and without all that were found.
    """
    rows = _rows(planted, removed, remaining)
    models = list(dict.fromkeys(rows["model"]))
    pitch = ROW if len(models) < 2 else ROW_OF_SEVERAL
    ticks = {y: f"<b>{kind[:1].upper()}{kind[1:]}</b>" for kind, y in zip(rows["kind"], rows["head"], strict=True)}
    ticks |= {y: f"{word}: {cue}" for word, cue, y in zip(rows["word"], rows["cue"], rows["row"], strict=True)}
    figure = _panels(
        "What a planted cue alone does to its word, and through which latents",
        "Mean over neutral scenes, 95% interval; hollow: no rise that counts; no filled mark on the right: no latent"
        " carries a fifth",
        1, 2, height=210 + pitch * max(len(ticks), 6), shared_yaxes=True, horizontal_spacing=0.04,
        column_widths=[0.58, 0.42], titles=["Rise of the cosine to the word's text", "Share of the rise that remains"],
    )  # fmt: skip
    for m, model in enumerate(models):
        own, colour, symbol = rows[rows["model"] == model], PALETTE[m % len(PALETTE)], SYMBOLS[m % len(SYMBOLS)]
        y = numbers(own["row"] + 0.42 * (m - (len(models) - 1) / 2))
        names = [f"{word}: {cue}" for word, cue in zip(own["word"], own["cue"], strict=True)]
        marks = [symbol if causal else f"{symbol}-open" for causal in own["causal"]]
        figure.add_scatter(
            x=numbers(own["rise"]), y=y, mode="markers", marker=_mark(colour, marks), name=model, text=names,
            error_x=whiskers(own.rename(columns={"rise": "mean"}), color=colour, thickness=2, width=4),
            customdata=_bounds(own), hovertemplate="%{text}: %{x:.3g} " + BOUNDS + f"<extra>{model}</extra>",
            showlegend=len(models) > 1, row=1, col=1,
        )  # fmt: skip
        for column, said in LEFT_OVER.items():
            figure.add_scatter(
                x=numbers(own[column]), y=y, mode="markers", marker=_left_over(column, colour, symbol), name=said,
                text=names, hovertemplate=f"%{{text}} {said}: %{{x:.0%}} of the rise<extra>{model}</extra>",
                showlegend=False, row=1, col=2,
            )  # fmt: skip
    for column, said in LEFT_OVER.items():
        if column == "best" or remaining is not None:
            key = PALETTE[0] if len(models) < 2 else MUTED
            mark = _left_over(column, key, SYMBOLS[0])
            figure.add_scatter(
                x=[None], y=[None], mode="markers", marker=mark, name=said, hoverinfo="skip", row=1, col=2
            )
    bounds = rows.rename(columns={"rise": "mean"})
    figure.update_xaxes(title="Cosine with the cue minus cosine without", row=1, col=1, **_room(bounds, True), **ZERO)
    left = rows[list(LEFT_OVER)].to_numpy(dtype=float)
    low, high = min(0.0, np.nanmin(left, initial=0.0)), max(1.0, np.nanmax(left, initial=1.0))
    figure.update_xaxes(title="Of the rise with all latents", row=1, col=2, range=numbers([low - 0.05, high + 0.05]),
                        tickformat=".0%", nticks=6, **ZERO)  # fmt: skip
    figure.update_yaxes(
        range=[max(ticks, default=0) + 0.7, -0.7], tickvals=numbers(ticks), ticktext=list(ticks.values())
    )
    legend = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "yref": "paper"}
    figure.update_layout(showlegend=True, legend=legend | {"y": 1 + 34 / (pitch * max(len(ticks), 6))})
    figure.update_layout(margin={"t": 150, "b": 60})
    return figure


def suppression(outcomes: pd.DataFrame) -> go.Figure:
    """The share that is predicted right as latents are suppressed, with intervals: a panel for each kind of scenes.

    outcomes: of `suppression.outcome_table`, with the sets of `SET_LOOKS` or others, which keep their names.
    """
    kinds = _known(SCENES, outcomes["scenes"])
    names = _known(SET_LOOKS, outcomes["suppressed"])
    looks = {name: SET_LOOKS.get(name, MethodLook(name, "#7A6A00", "pentagon", "solid")) for name in names}
    n = {kind: int(outcomes.loc[outcomes["scenes"] == kind, "n"].iloc[0]) for kind in kinds}
    figure = _panels(
        "Does suppressing the latents that a class leans on repair its predictions?",
        "Share predicted right, 95% interval; in brackets the points gained or lost, bold where sure"
        + ("; misled scenes: all wrong by choice" if "misled" in kinds else ""),
        1, max(len(kinds), 1), height=220 + 64 * max(len(names), 1), shared_yaxes=True, horizontal_spacing=0.03,
        titles=[f"{SCENES.get(kind, kind)}<br><span style='font-size:12px'>{n_images([each])}</span>"
                for kind, each in n.items()],
    )  # fmt: skip
    for c, kind in enumerate(kinds, 1):
        rows = outcomes[outcomes["scenes"] == kind].set_index("suppressed").reindex(names)
        rows["mean"] = rows["accuracy"]
        for name, look in looks.items():
            row = rows.loc[[name]]
            figure.add_scatter(
                x=numbers(row["mean"]), y=[look.label], mode="markers+text", text=[_said(row.iloc[0], name)],
                textposition="top center", textfont={"size": 12, "color": INK}, cliponaxis=False,
                marker=_mark(look.colour, look.symbol), error_x=whiskers(row, color=look.colour, thickness=2, width=5),
                customdata=_bounds(row), hovertemplate="%{y}: %{x:.3f} " + BOUNDS + "<extra></extra>",
                showlegend=False, row=1, col=c,
            )  # fmt: skip
        figure.update_xaxes(title="Share right", tickformat=".0%", row=1, col=c, **_around(rows))
    order = {"categoryorder": "array", "categoryarray": [look.label for look in looks.values()]}
    figure.update_yaxes(type="category", range=[len(names) - 0.5, -0.8], **order)
    figure.update_layout(margin={"t": 140, "b": 60})
    return figure


def _rows(planted: pd.DataFrame, removed: pd.DataFrame, remaining: pd.DataFrame | None) -> pd.DataFrame:
    """The planted rows with their places (head of the kind, row) and the shares that remain (best, found).

    Shares are NaN where the rise does not count, nothing was found out, or no latent was named.
    """
    planted, removed = (table if "model" in table else table.assign(model="") for table in (planted, removed))
    at = ["model", "word", "family", "cue"]
    best = 1 - removed.rename(columns={"value": "cue"}).groupby(at)["share"].max().rename("best")
    rows = planted.merge(best.reset_index(), on=at, how="left").assign(found=np.nan)
    rows["causal"] = rows["causal"].eq(True)
    if remaining is not None:
        left = remaining if "model" in remaining else remaining.assign(model="")
        rows["found"] = rows[at].merge(left[[*at, "remains"]], on=at, how="left")["remains"] / rows["rise"]
    rows.loc[~rows["causal"], ["best", "found"]] = np.nan
    row, head, places = 0, {}, {}
    for kind in dict.fromkeys(rows["kind"]):
        head[kind] = row
        for name in dict.fromkeys(map(tuple, rows.loc[rows["kind"] == kind, ["word", "cue"]].to_numpy())):
            places[kind, *name] = row = row + 1
        row += 1
    names = zip(rows["kind"], rows["word"], rows["cue"], strict=True)
    return rows.assign(head=rows["kind"].map(head), row=[places[name] for name in names])


def _said(row: pd.Series, name: str) -> str:
    """The share right in words, and the difference from nothing suppressed, bold where its interval leaves out 0."""
    if pd.isna(row["mean"]):
        return "unknown"
    text = f"{row['mean']:.1%}"
    if name == "nothing" or pd.isna(row["difference"]):
        return text
    difference = f"{100 * row['difference']:+.1f}".replace("-", "\u2212")
    sure = row["difference_low"] > 0 or row["difference_high"] < 0
    return f"{text} (<b>{difference}</b>)" if sure else f"{text} ({difference})"


def _around(rows: pd.DataFrame) -> dict:
    """The range of a panel: its intervals, and room for the texts."""
    known = rows[["mean", "low", "high"]].to_numpy(dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return {"range": [0, 1]}
    pad = 0.45 * max(np.ptp(known), 0.02)
    return {"range": numbers([known.min() - pad, known.max() + pad]), "nticks": 4}


def _known(order: dict, names: pd.Series) -> list[str]:
    """The distinct names in the order; others follow in the order given."""
    names = list(dict.fromkeys(names))
    return [name for name in order if name in names] + [name for name in names if name not in order]


def _left_over(column: str, colour: str, symbol: str) -> dict:
    """The marker of what remains: the model's own, or a ring of its shape."""
    ring = {"size": 16, "line": {"color": colour, "width": 1.5}}
    return _mark(colour, symbol) if column == "best" else _mark(colour, f"{symbol}-open") | ring


def _mark(colour: str, symbol: str | list[str]) -> dict:
    return {"color": colour, "symbol": symbol, "size": 10, "line": {"color": colour, "width": 2}}
