"""The figures of a dictionary: its components, how well they recover the world's factors, how it was trained.

Tables and arrays in, a plotly figure out. The tables are those of `concepts`, `vocabulary`, `ground_truth` and
`sae_train`.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from plotly.subplots import make_subplots

from clipshift_core.canvas import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    TEMPLATE,
    WIDTH,
    canvas,
    label,
    n_images,
    numbers,
    short,
    whiskers,
)
from clipshift_core.figures_attention import overlay
from clipshift_core.figures_world import _gallery, training_curves
from clipshift_core.sae_quality import DENSE_FROM

BASES = {
    "dictionary": ("Dictionary", PALETTE[0], "circle"),
    "neurons": ("Raw neurons", PALETTE[1], "diamond"),
    "random": ("Random dictionary", PALETTE[6], "x"),
    "pca": ("Principal components", PALETTE[2], "square"),
}
"""Name, colour and symbol of the bases that `ground_truth.compare` is meant for."""
MEASURES = {
    "auroc": "Mean AUROC",
    "f1": "Mean F1",
    "own": "Values with a unit of their own",
    "mixing": "Units that mix",
}
CURVES = {
    "loss": "Loss",
    "nmse": "Normalised MSE",
    "auxiliary": "Auxiliary loss",
    "l0": "Latents on in a row (L0)",
    "n_dead": "Dead latents",
    "dead": "Dead latents",
    "learning_rate": "Learning rate",
}
LEFT = 200
"""Pixels for what is said about a component."""


def component_gallery(
    components: pd.DataFrame,
    pictures: Sequence[UInt8[np.ndarray, "example h w 3"]],
    maps: Sequence[Float[np.ndarray, "example row col"]] | None = None,
    *,
    title: str = "What single components of the dictionary stand for",
) -> go.Figure:
    """One row a component: its label and scores, then the images that activate it most, the strongest first.

    components: columns latent, label, alignment, clarity, frequency. With `maps` a second line shows the same images
    with where the component is on laid over. A component may have fewer examples than the others.
    """
    if len(components) != len(pictures) or (maps is not None and [len(m) for m in maps] != [len(p) for p in pictures]):
        raise ValueError(
            f"{len(components)} components, {len(pictures)} rows of pictures: maps and pictures must match"
        )
    most, lines = max(map(len, pictures)), 1 if maps is None else 2
    cell = min((WIDTH - 20 - LEFT) / most, 130)
    left, pitch = round(LEFT / cell, 4), lines + max(0, 104 - lines * cell) / cell + 0.12
    tiles, places, hover = [], [], []
    for i, row in enumerate(components.itertuples()):
        for e, picture in enumerate(pictures[i]):
            tiles.append(picture)
            places.append((round(left + e, 4), round(i * pitch, 4)))
            hover.append(f"{row.label} (latent {row.latent}), example {e + 1}")
            if maps is not None:
                tiles.append(overlay(picture, maps[i][e]))
                places.append((round(left + e, 4), round(i * pitch + 1, 4)))
                hover.append(f"{hover[-1]}: where it is on")
    how = "The images that activate each most, the strongest first"
    if maps is not None:
        how += "; below each where it is on, dark for off, scaled to the image's own maximum"
    figure = _gallery(tiles, places, hover, 1.0, cell, round(cell), title, how)
    bottom = (len(components) - 1) * pitch + max(lines, 104 / cell) - 0.5
    figure.update_yaxes(range=numbers([bottom, -0.5]))
    figure.update_layout(height=round(88 + cell * (bottom + 0.5)))
    for i, row in enumerate(components.itertuples()):
        name = "<br>".join(textwrap.wrap(str(row.label), 22, max_lines=2, placeholder=" …"))
        scores = [f"latent {row.latent}", f"alignment {_known(row.alignment)}", f"clarity {_known(row.clarity)}"]
        scores.append(f"on in {short(100 * row.frequency)} % of images" if row.frequency else "never on")
        figure.add_annotation(
            x=-0.5,
            y=numbers([i * pitch - 0.47])[0],
            text=f"<b>{name}</b><br>" + "<br>".join(scores),
            font={"size": 12},
            align="left",
            xanchor="left",
            yanchor="top",
            showarrow=False,
        )
    return figure


def recovery(summary: pd.DataFrame, *, n_factors: int, level: float = 0.95) -> go.Figure:
    """Each basis under the measures of `ground_truth.Recovery.summary`, one panel a measure, with intervals."""
    bases, measures = list(dict.fromkeys(summary["basis"])), [m for m in MEASURES if m in set(summary["measure"])]
    figure = make_subplots(
        1, len(measures), subplot_titles=[MEASURES[m] for m in measures], shared_yaxes=True, horizontal_spacing=0.05
    )
    figure.update_annotations(font={"size": 15})
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "How well single units recover the factors of the world",
            "subtitle": {
                "text": f"{n_factors} factor values on images that no unit was chosen on; {level:.0%} intervals,"
                " of counts from surely to possibly; dotted: chance"
            },
        },
        height=190 + 46 * len(bases),
        margin={"t": 120, "b": 30, "r": 40},
        showlegend=False,
    )
    for c, measure in enumerate(measures, 1):
        rows = summary[summary["measure"] == measure].set_index("basis").loc[bases].rename(columns={"value": "mean"})
        whole = measure in ("own", "mixing")
        figure.add_scatter(
            x=numbers(rows["mean"]),
            y=[_basis(b)[0] for b in bases],
            mode="markers+text",
            marker={"color": [_basis(b)[1] for b in bases], "symbol": [_basis(b)[2] for b in bases], "size": 11},
            error_x=whiskers(rows, color=INK, thickness=1.5, width=5),
            text=[f"{v:.0f}" if whole else f"{v:.2f}" for v in rows["mean"]],
            textposition="top center",
            textfont={"size": 13},
            customdata=[[a, b] for a, b in zip(numbers(rows["low"]), numbers(rows["high"]), strict=True)],
            hovertemplate="%{y}: %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
            row=1,
            col=c,
        )
        most = float(np.nanmax(rows[["mean", "high"]].to_numpy()))
        if whole:
            figure.update_xaxes(range=numbers([-0.06 * max(most, 5), 1.15 * max(most, 5)]), row=1, col=c)
            figure.update_xaxes(nticks=5, tickformat="d", row=1, col=c)
        else:
            least = min(_range(rows["mean"])[0], 0.46) if measure == "auroc" else -0.03
            figure.update_xaxes(range=numbers([least, 1.04]), dtick=0.25, row=1, col=c)
        if measure == "auroc":
            figure.add_vline(x=0.5, line={"color": INK, "width": 1.5, "dash": "dot"}, row=1, col=c)
    figure.update_yaxes(range=[len(bases) - 0.5, -0.7], type="category", showgrid=False)
    return figure


def recovery_by_factor(factors: pd.DataFrame, measure: str = "auroc", *, level: float = 0.95) -> go.Figure:
    """Every factor value under every basis, grouped by factor, the best of the first basis on top of each group.

    factors: `ground_truth.Recovery.factors`. The first basis is drawn with its intervals. Names in bold have a unit of
    their own in it.
    """
    if measure not in ("auroc", "f1"):
        raise ValueError(f"measure {measure!r}: 'auroc' or 'f1' is accepted")
    bases, main = list(dict.fromkeys(factors["basis"])), factors[factors["basis"] == factors["basis"].iloc[0]]
    groups = [g.sort_values(measure, ascending=False, kind="stable") for _, g in main.groupby("factor", sort=False)]
    columns = _columns(groups)
    longest = max(sum(len(g) + 1 for g in column) for column in columns)
    name = "AUROC" if measure == "auroc" else "F1"
    figure = make_subplots(1, len(columns), horizontal_spacing=0.16)
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Which factors of the world have a unit, by {name} of the best one",
            "subtitle": {
                "text": f"Units chosen on other images; intervals ({level:.0%}) of the {_basis(bases[0])[0].lower()};"
                " bold: a unit of its own there (by AUROC)"
            },
        },
        height=170 + 19 * longest,
        margin={"t": 116, "b": 50},
        legend={"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    )
    at = {}
    for c, column in enumerate(columns, 1):
        ticks, texts, y = [], [], 0
        for group in column:
            where = {"xref": f"x{c if c > 1 else ''} domain", "yref": f"y{c if c > 1 else ''}"}
            figure.add_annotation(
                x=0, y=y, text=f"<b>{label(group['factor'].iloc[0])}</b>", xanchor="right", xshift=-8, showarrow=False,
                font={"size": 13, "color": MUTED}, **where,
            )  # fmt: skip
            for row in group.itertuples():
                y += 1
                at[row.factor, row.value] = c, y
                ticks.append(y)
                texts.append(f"<b>{row.value}</b>" if row.own else str(row.value))
            y += 1
        figure.update_yaxes(
            tickvals=ticks,
            ticktext=texts,
            range=[longest - 0.3, -0.7],
            tickfont={"size": 12},
            gridcolor=GRID,
            row=1,
            col=c,
        )
        figure.update_xaxes(title=f"{name} on images that the unit was not chosen on", row=1, col=c)
        figure.update_xaxes(range=numbers(_range(factors[measure])), row=1, col=c)
        if measure == "auroc":
            figure.add_vline(x=0.5, line={"color": INK, "width": 1.5, "dash": "dot"}, row=1, col=c)
    for basis in reversed(bases):
        for c in range(1, len(columns) + 1):
            rows = factors[factors["basis"] == basis]
            rows = rows[[at[key][0] == c for key in zip(rows["factor"], rows["value"], strict=True)]]
            title, colour, symbol = _basis(basis)
            bounds = rows.rename(columns={measure: "mean", f"{measure}_low": "low", f"{measure}_high": "high"})
            figure.add_scatter(
                x=numbers(rows[measure]),
                y=[at[key][1] for key in zip(rows["factor"], rows["value"], strict=True)],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 10 if basis == bases[0] else 7},
                opacity=1 if basis == bases[0] else 0.75,
                error_x=whiskers(bounds, color=colour, thickness=1.5, width=0) if basis == bases[0] else None,
                text=[f"{row.factor} {row.value}, unit {row.unit}" for row in rows.itertuples()],
                hovertemplate=f"%{{text}}: %{{x:.3g}}<extra>{title}</extra>",
                name=title,
                legendgroup=basis,
                showlegend=c == 1,
                row=1,
                col=c,
            )
    figure.update_layout(legend={"traceorder": "reversed"})
    return figure


def frequency_and_clarity(components: pd.DataFrame) -> go.Figure:
    """Each latent by how often it is on and how alike its examples are; `components` is `concepts.describe`'s table."""
    on = components[components["frequency"] > 0]
    dense = on["frequency"] > DENSE_FROM
    unknown, dead = int(on["clarity"].isna().sum()), len(components) - len(on)
    aside = [f"{dead:,} never on"] if dead else []
    aside += [f"{unknown:,} on in one image alone"] if unknown else []
    figure = canvas(
        "How often a latent is on, and how alike the images are that activate it most",
        f"One point a latent, of {len(components):,}; "
        + (f"not drawn: {', '.join(aside)}" if aside else "all are drawn"),
        height=520,
    )
    for name, rows, colour, symbol in (
        ("sparse", on[~dense], PALETTE[0], "circle"),
        (f"dense: on in more than {DENSE_FROM:.0%} of images", on[dense], PALETTE[1], "diamond"),
    ):
        rows = rows[rows["clarity"].notna()]
        figure.add_scatter(
            x=numbers(rows["frequency"]),
            y=numbers(rows["clarity"]),
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.6},
            text=[f"latent {latent}" for latent in rows["latent"]],
            hovertemplate="%{text}: on in %{x:.3g} of the images, clarity %{y:.3g}<extra></extra>",
            name=f"{name} ({len(rows):,})",
        )
    figure.add_vline(x=DENSE_FROM, line={"color": INK, "width": 1.5, "dash": "dash"})
    ticks = [digit * 10.0**power for power in range(-7, 0) for digit in (1, 2, 5)] + [1.0]
    figure.update_xaxes(
        title="Share of images on which the latent is on (logarithmic)",
        type="log",
        tickvals=numbers(ticks),
        ticktext=[f"{100 * tick:g} %" for tick in ticks],
    )
    figure.update_yaxes(title="Clarity (1 examples alike, 0 unrelated)")
    return figure


def sae_training(history: pd.DataFrame) -> go.Figure:
    """How a dictionary was trained: one panel a column of `sae_train`'s history; a column `model` compares several."""
    figure = training_curves(history, labels=CURVES)
    figure.update_layout(
        title={"text": "How the dictionary was trained", "subtitle": {"text": "One panel a quantity, batch by batch"}}
    )
    figure.update_yaxes(exponentformat="power")
    return figure


def predictions_kept(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Zero-shot accuracy of each task with the activations themselves, and with what dictionaries make of them.

    table: of `sae_quality.predictions`, with a column `dictionary` and the accuracies known.
    """
    figure = canvas(
        "Does the model still name what it sees, from the reconstruction alone?",
        f"Zero-shot accuracy over {n_images(table['n'])}; whiskers: {level:.0%} intervals of the change",
        height=210 + 58 * table["task"].nunique(),
    )
    tasks, groups = list(dict.fromkeys(table["task"])), list(table.groupby("dictionary", sort=False))
    lanes = np.linspace(-0.25, 0.25, len(groups) + 2)[1:-1]
    own = table.drop_duplicates("task")
    for i, row in enumerate(own.itertuples()):
        figure.add_scatter(
            x=numbers([row.accuracy] * 2),
            y=[i - 0.3, i + 0.3],
            mode="lines",
            line={"color": INK, "width": 3},
            name="the model itself",
            showlegend=i == 0,
            hovertemplate=f"{label(row.task)}: %{{x:.4g}}<extra>the model itself</extra>",
        )
    for g, (name, rows) in enumerate(groups):
        after = rows.assign(mean=rows["accuracy_after"])
        after["low"], after["high"] = after["accuracy"] + after["low"], after["accuracy"] + after["high"]
        figure.add_scatter(
            x=numbers(after["mean"]),
            y=numbers(tasks.index(task) + lanes[g] for task in after["task"]),
            mode="markers",
            marker={"color": PALETTE[g], "symbol": ("circle", "diamond", "square")[g % 3], "size": 11},
            error_x=whiskers(after, color=PALETTE[g], thickness=2, width=5),
            name=str(name),
            text=[label(task) for task in after["task"]],
            hovertemplate="%{text}: %{x:.4g}<extra>" + str(name) + "</extra>",
        )
    lowest = float((table["accuracy"] + table["low"].clip(upper=0)).min())
    figure.update_xaxes(title="Zero-shot accuracy", range=numbers([max(0.0, lowest - 0.015), 1.004]))
    figure.update_yaxes(
        tickvals=list(range(len(tasks))), ticktext=[label(task) for task in tasks], range=[len(tasks) - 0.5, -0.5],
        showgrid=False,
    )  # fmt: skip
    return figure


def firing(firing: Mapping[str, Float[np.ndarray, " latent"]]) -> go.Figure:
    """How often the latents of each dictionary are on: latents in falling order of frequency, on two logarithmic axes.

    A curve ends where the latents that are never on begin.
    """
    figure = canvas(
        "How often each latent is on",
        "Latents in falling order; a curve ends where those that are never on begin",
        height=440,
    )
    for i, (name, share) in enumerate(firing.items()):
        on = np.sort(share[share > 0])[::-1]
        at = np.unique(np.geomspace(1, max(1, len(on)), 200).round().astype(int))
        figure.add_scatter(
            x=at.tolist(),
            y=numbers(on[at - 1]) if len(on) else [],
            mode="lines",
            line={"color": PALETTE[i], "width": 2.5, "dash": ("solid", "dash", "dot")[i % 3]},
            name=f"{name}: {len(on):,} of {len(share):,} ever on",
            hovertemplate=f"latent %{{x}} in order: on in %{{y:.3g}} of the rows<extra>{name}</extra>",
        )
    figure.add_hline(y=DENSE_FROM, line={"color": INK, "width": 1.5, "dash": "dot"})
    ticks = [digit * 10.0**power for power in range(-7, 0) for digit in (1, 3)] + [1.0]
    figure.update_xaxes(
        title="Latents, the most frequent first (logarithmic)",
        type="log",
        tickvals=[1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000],
    )
    figure.update_yaxes(
        title="Share of rows (logarithmic)",
        type="log",
        tickvals=numbers(ticks),
        ticktext=[f"{100 * t:g} %" for t in ticks],
    )
    return figure


def _columns(groups: Sequence[pd.DataFrame]) -> list[list[pd.DataFrame]]:
    """The groups in their order, in two columns of about one height; in one where there are few."""
    sizes = [len(group) + 1 for group in groups]
    if sum(sizes) <= 24 or len(groups) == 1:
        return [list(groups)]
    cut = min(range(1, len(groups)), key=lambda i: max(sum(sizes[:i]), sum(sizes[i:])))
    return [list(groups[:cut]), list(groups[cut:])]


def _range(values: pd.Series) -> list[float]:
    return [min(0.45, float(values.min()) - 0.03) if values.min() > 0.2 else -0.03, 1.03]


def _basis(name: str) -> tuple[str, str, str]:
    return BASES.get(name, (label(name), PALETTE[3], "triangle-up"))


def _known(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "unknown"
