"""The figures of attribution: one prediction taken apart, and how faithful, alike and dear the methods are.

Tables in, a plotly figure out. The tables are those of `faithfulness`; methods are named as in `attribution.METHODS`.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import UInt8
from numpy.typing import NDArray
from plotly.colors import hex_to_rgb

from clipshift_core.canvas import INK, MUTED, WIDTH, canvas, data_uri, n_images, numbers, plain, whiskers
from clipshift_core.figures_preservation import _panels


class MethodLook(NamedTuple):
    """How one method is named and drawn."""

    label: str
    colour: str
    symbol: str
    dash: str


METHOD_LOOKS = {
    "ablation": MethodLook("exact ablation", INK, "star", "solid"),
    "integrated_gradients": MethodLook("integrated gradients", "#C54100", "diamond", "dash"),
    "act_x_grad": MethodLook("act x grad", "#029BDF", "circle", "solid"),
    "act_x_logit_lens": MethodLook("act x logit lens", "#6A1C9C", "triangle-up", "dashdot"),
    "logit_lens": MethodLook("logit lens", "#2B8C55", "square", "dot"),
    "energy": MethodLook("energy", "#F78C00", "triangle-down", "longdash"),
    "random": MethodLook("random", "#939393", "x", "longdashdot"),
}
"""The methods in the reading order of every figure, from what is exact to what knows nothing.

The colours were searched as those of `canvas.LOOKS`: no pair is closer than 13 (CIEDE2000) under normal, protan, deutan
or tritan vision. Symbol and dash tell the methods apart without them.
"""

KINDS = {
    "deletion": ("Deletion", "lower is better"),
    "insertion": ("Insertion", "higher is better"),
}
"""Name of a curve, and which way its area is more faithful."""
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
"""What raises the target, and what lowers it (hatched as well)."""
N_NAMED, N_EXAMPLES = 10, 3
"""Latents that have a bar of their own, and the images beside it."""
PITCH, LABELS_AT, THUMB = 50, 240, 44
"""Pixels from bar to bar, from the left edge to the labels, and of an example."""
BARS_AT = LABELS_AT + 190 + N_EXAMPLES * THUMB
INNER = WIDTH - 40
"""Pixels between its margins."""
ZERO = {"zeroline": True, "zerolinecolor": INK, "zerolinewidth": 1.5}
BOUNDS = "[%{customdata[0]:.4g}, %{customdata[1]:.4g}]"


def method_look(name: str) -> MethodLook:
    """How to draw a method; one that is not ours keeps its words."""
    return METHOD_LOOKS.get(name, MethodLook(str(name).replace("_", " "), "#7A6A00", "pentagon", "dash"))


def in_method_order(names: Iterable[str]) -> list[str]:
    """The distinct names in the reading order; names that are not ours follow in the order given."""
    names = list(dict.fromkeys(names))
    return [name for name in METHOD_LOOKS if name in names] + [name for name in names if name not in METHOD_LOOKS]


def image_taken_apart(
    contributions: pd.DataFrame,
    picture: UInt8[np.ndarray, "h w 3"],
    examples: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    text: str,
    total: float,
    *,
    method: str = "integrated_gradients",
    target: str = "cosine similarity",
    n_named: int = N_NAMED,
) -> go.Figure:
    """One image and one text: what each latent adds to the target, as a waterfall that ends at the total.

    contributions: columns latent, label, value, a row for every latent that is on; examples: for each of these rows
    images that activate the latent most, of which three are shown. The `n_named` largest in absolute value have a bar
    each, the others share one. It begins at `total` minus all of them: with integrated gradients the target without any
    latent, from error and bias alone; with other methods all that does not add up is in it, too.
    """
    if len(contributions) != len(examples):
        raise ValueError(f"{len(contributions)} latents, {len(examples)} rows of examples: one for each is accepted")
    order = np.argsort(-contributions["value"].abs().to_numpy(), kind="stable")
    named, others = contributions.iloc[order[:n_named]], contributions.iloc[order[n_named:]]
    steps = [(str(row.label), f"latent {row.latent}", row.value) for row in named.itertuples()]
    if len(others):
        steps.append((f"all {len(others):,} others", "", others["value"].sum()))
    n_rows, top, bottom = len(steps) + 2, 96, 60
    figure = canvas(
        f"One prediction taken apart: {target} of an image and a text",
        f"By {method_look(method).label}, each bar from where the last one ends: blue raises, hatched orange lowers",
        height=top + bottom + PITCH * max(n_rows, 7), showlegend=False,
        margin={"l": 20, "r": 20, "t": top, "b": bottom},
    )  # fmt: skip
    _waterfall(figure, steps, total)
    figure.update_xaxes(title=target[:1].upper() + target[1:], domain=[BARS_AT / INNER, 1])
    figure.update_yaxes(range=[max(n_rows, 7) - 0.5, -0.5], visible=False)
    tall = (wide := LABELS_AT - 30) * picture.shape[0] / picture.shape[1]
    figure.add_layout_image(_placed(picture, 0, tall / PITCH / 2 - 0.4, wide, tall, 320))
    for y, which in enumerate(order[:n_named], 1):
        for e, example in enumerate(examples[which][:N_EXAMPLES]):
            figure.add_layout_image(_placed(example, LABELS_AT + 180 + THUMB * e, y, THUMB - 4, THUMB - 4, 56))
    caption = "<br>".join(map(plain, textwrap.wrap(text, 28, max_lines=5, placeholder=" …")))
    _write(figure, 0, tall / PITCH - 0.3, f"<i>{caption}</i>", yanchor="top", font={"size": 14})
    rest = "error and bias" if method == "integrated_gradients" else "error, bias, and what does not add up"
    _write(figure, LABELS_AT, 0, f"no latent: {rest}", font={"size": 13})
    for y, (name, latent, _) in enumerate(steps, 1):
        lines = textwrap.wrap(name, 25 if latent else 42, max_lines=2, placeholder=" …")
        small = [f"<span style='font-size:11px;color:{MUTED}'>{latent}</span>"] * bool(latent)
        _write(figure, LABELS_AT, y, "<br>".join([*lines, *small]), font={"size": 13})
    _write(figure, LABELS_AT, n_rows - 1, f"<b>total: {target}</b>", font={"size": 13})
    return figure


def faithfulness_curves(
    table: pd.DataFrame, *, kinds: Sequence[str] = tuple(KINDS), normalised: bool = True, level: float = 0.95
) -> go.Figure:
    """The target as latents are deleted or inserted, one line a method with its interval as a band, a panel a kind.

    table: of `faithfulness.curve_table`. Steps beyond 1 are taken for numbers of latents, others for shares.
    """
    shares = table["step"].max() <= 1
    figure = _panels(
        "How fast the prediction goes, and comes, with the latents in each method's order",
        f"Mean over {_over(table)}; bands: {level:.0%} intervals; a faithful order falls early in deletion,"
        " rises early in insertion",
        1, len(kinds), height=520, shared_yaxes=True, horizontal_spacing=0.05,
        titles=[f"{KINDS[kind][0]}: {'lower' if kind == 'deletion' else 'higher'} is more faithful" for kind in kinds],
    )  # fmt: skip
    for c, kind in enumerate(kinds, 1):
        rows_of = {
            name: rows.sort_values("step", kind="stable")
            for name, rows in table[table["kind"] == kind].groupby("method")
        }
        names = in_method_order(rows_of)
        # bands first, and the most exact method last, on top
        for name in names[::-1]:
            _band(figure, rows_of[name]["step"], rows_of[name], method_look(name).colour, row=1, col=c)
        for name in names[::-1]:
            look, rows = method_look(name), rows_of[name]
            _line(figure, rows["step"], rows["mean"], rows, look, size=7, showlegend=c == 1, row=1, col=c)
        done = "deleted" if kind == "deletion" else "inserted"
        what = f"Share of an image's latents {done}" if shares else f"Number of latents {done}"
        figure.update_xaxes(title=f"{what}, highest score first", row=1, col=c)
        if shares:
            figure.update_xaxes(tickvals=[0, 0.25, 0.5, 0.75, 1], tickformat=".0%", range=[-0.03, 1.03], row=1, col=c)
    units = "1 with all latents, 0 without" if normalised else "its own units"
    figure.update_yaxes(title=f"Target ({units})", row=1, col=1)
    legend = {"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "reversed"}
    figure.update_layout(showlegend=True, legend=legend, margin={"t": 124, "r": 185, "b": 60})
    return figure


def faithfulness_areas(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """The area under the curves of each method, with intervals: a panel for deletion, one for insertion.

    table: of `faithfulness.area_table`.
    """
    left_out = int(table["n_left_out"].max()) if len(table) else 0
    return _dots(
        table.rename(columns={"kind": "panel"}),
        {kind: (f"{name}: {better}", f"Area under the {kind} curve") for kind, (name, better) in KINDS.items()},
        "Whose order of the latents is faithful?",
        f"Mean area over {_over(table)}, with its {level:.0%} interval"
        + (f"; left out: {n_images([left_out])} whose latents do not raise the target" if left_out else ""),
    )


def agreement(table: pd.DataFrame, *, k: int, level: float = 0.95) -> go.Figure:
    """How far each method ranks an image's latents as exact ablation does; table: of `faithfulness.agreement_table`."""
    return _dots(
        table.rename(columns={"measure": "panel"}),
        {
            "rho": ("Ranks of all latents: higher is better", "Spearman's rho (1 same order, 0 unrelated)"),
            "overlap": (f"The {k} largest: higher is better", f"Share of exact ablation's {k} among the method's {k}"),
        },
        "Do the methods agree with exact ablation?",
        f"Mean over {_over(table)}, with its {level:.0%} interval",
    )


def difference_from(table: pd.DataFrame, *, level: float = 0.95) -> go.Figure:
    """Each method's area minus that of one reference on the same images, with the interval of the difference.

    table: of `faithfulness.difference_table` for one reference. A hollow mark is one whose interval holds 0.
    """
    name = _reference(table)
    figure = _dots(
        table.rename(columns={"kind": "panel"}),
        {
            kind: (f"{KINDS[kind][0]}: {side} of 0 beats {name}", f"Area minus that of {name}")
            for kind, side in (("deletion", "left"), ("insertion", "right"))
        },
        f"How much more or less faithful than {name}?",
        f"Mean difference on the same {_over(table)}, with its {level:.0%} interval; hollow: not told apart",
        signed=True,
    )
    figure.add_vline(x=0, line={"color": INK, "width": 1.5}, layer="below")
    return figure


def _waterfall(figure: go.Figure, steps: Sequence[tuple[str, str, float]], total: float) -> None:
    """Bars that end at the total, one a step (name, latent, value), each with its signed value right of it."""
    values = np.array([value for *_, value in steps], dtype=float)
    start = total - values.sum()
    ends = start + np.cumsum(values)
    figure.add_bar(
        y=list(range(1, len(steps) + 1)), x=numbers(values), base=numbers(ends - values), orientation="h",
        width=0.54, marker=_by_sign(values),
        customdata=[f"{name}, {latent}" if latent else name for name, latent, _ in steps],
        hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
    )  # fmt: skip
    reached = np.array([start, *ends])
    joints = [x for at in numbers(reached) for x in (at, at, None)]
    rows = [y for i in range(len(reached)) for y in (i, i + 1, None)]
    figure.add_scatter(x=joints, y=rows, mode="lines", line={"color": MUTED, "width": 1}, hoverinfo="skip")
    marks = {"symbol": "diamond", "size": 13, "color": ["white", INK], "line": {"width": 2, "color": INK}}
    both = {"x": numbers([start, total]), "y": [0, len(steps) + 1]}
    figure.add_scatter(**both, mode="markers", marker=marks, hovertemplate="%{x:.4g}<extra></extra>")
    texts = ["\u00a0\u00a0" + _written([start], "")[0], *_written(values), "\u00a0\u00a0" + _written([total], "")[0]]
    figure.add_scatter(
        x=numbers([start, *np.maximum(ends, ends - values), total]), y=list(range(len(steps) + 2)), mode="text",
        text=[f"\u00a0\u00a0{text}" for text in texts], textposition="middle right",
        textfont={"size": 13, "color": INK}, hoverinfo="skip",
    )  # fmt: skip
    low, high = (np.nanmin(reached), np.nanmax(reached)) if np.isfinite(reached).any() else (0.0, 1.0)
    span = max(high - low, 1e-3)
    figure.update_xaxes(range=numbers([low - 0.07 * span, high + 0.26 * span]), nticks=6)


def _dots(
    table: pd.DataFrame, panels: dict[str, tuple[str, str]], title: str, subtitle: str, *, signed: bool = False
) -> go.Figure:
    """A dot with its interval for each method, in one order, a panel for each value of the column panel.

    panels: title and axis of each. signed: values are differences, hollow where their interval holds 0.
    """
    panels = {name: said for name, said in panels.items() if name in set(table["panel"])}
    names = in_method_order(table["method"])
    figure = _panels(
        title, subtitle, 1, max(len(panels), 1), height=190 + 46 * max(len(names), 1),
        titles=[said for said, _ in panels.values()], shared_yaxes=True, horizontal_spacing=0.05,
    )  # fmt: skip
    for c, (panel, (_, axis)) in enumerate(panels.items(), 1):
        rows = table[table["panel"] == panel].set_index("method").reindex(names)
        open_ = signed & ~((rows["low"] > 0) | (rows["high"] < 0))
        texts = _written(rows["mean"], "+" if signed else "")
        for name, text in zip(names, texts, strict=True):
            look, row = method_look(name), rows.loc[[name]]
            mark = {"color": look.colour, "symbol": f"{look.symbol}{'-open' if open_[name] else ''}", "size": 12}
            figure.add_scatter(
                x=numbers(row["mean"]), y=[look.label], mode="markers+text",
                marker={**mark, "line": {"color": look.colour, "width": 2}},
                error_x=whiskers(row, color=look.colour, thickness=2, width=5), text=[text],
                textposition="top center", textfont={"size": 13, "color": INK}, customdata=_bounds(row),
                name=look.label, hovertemplate="%{y}: %{x:.4g} " + BOUNDS + "<extra></extra>", row=1, col=c,
            )  # fmt: skip
        figure.update_xaxes(title=axis, row=1, col=c, **_room(rows, signed))
    order = {"categoryorder": "array", "categoryarray": [method_look(name).label for name in names]}
    figure.update_yaxes(type="category", range=[len(names) - 0.5, -0.7], **order)
    figure.update_layout(margin={"t": 124, "b": 60})
    return figure


def _reference(table: pd.DataFrame) -> str:
    """The name of the one method that all others are compared with."""
    references = list(dict.fromkeys(table["reference"]))
    if len(references) != 1:
        raise ValueError(f"differences from {len(references)} references ({', '.join(references)}): one is accepted")
    return method_look(references[0]).label


def _room(rows: pd.DataFrame, signed: bool) -> dict:
    """The range of an axis that holds every interval, 0 too where values are differences, and the texts."""
    known = rows[["mean", "low", "high"]].to_numpy(dtype=float)
    known = np.append(known[np.isfinite(known)], [0.0] * signed)
    if not len(known):
        return {"range": [0, 1]}
    pad = 0.1 * max(np.ptp(known), 0.02)
    return {"range": numbers([known.min() - pad, known.max() + pad]), "nticks": 6}


def _line(
    figure: go.Figure, x: pd.Series, y: pd.Series, rows: pd.DataFrame, look: MethodLook, *, size: int, **where
) -> None:
    """A line with a mark at each point; its interval, low and high of `rows`, in the hover."""
    figure.add_scatter(
        x=numbers(x), y=numbers(y), mode="lines+markers",
        line={"color": look.colour, "width": 2.5, "dash": look.dash},
        marker={"color": look.colour, "symbol": look.symbol, "size": size}, customdata=_bounds(rows),
        name=look.label, legendgroup=look.label, cliponaxis=False,
        hovertemplate="%{x:.3g}: %{y:.4g} " + BOUNDS + f"<extra>{look.label}</extra>", **where,
    )  # fmt: skip


def _bounds(rows: pd.DataFrame) -> list[list[float | None]]:
    """low and high of each row, for the hover."""
    return [list(pair) for pair in zip(numbers(rows["low"]), numbers(rows["high"]), strict=True)]


def _band(figure: go.Figure, x: pd.Series, rows: pd.DataFrame, colour: str, **where) -> None:
    """The interval around a line, from low and high; nothing where it is unknown."""
    known = rows[["low", "high"]].notna().all(axis=1).to_numpy()
    x, low, high = (numbers(each.to_numpy()[known]) for each in (x, rows["low"], rows["high"]))
    if x:
        area = {"x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "mode": "lines", "line": {"width": 0}}
        fill = {"fill": "toself", "fillcolor": f"rgba{(*hex_to_rgb(colour), 0.16)}"}
        figure.add_scatter(**area, **fill, hoverinfo="skip", showlegend=False, **where)


def _over(table: pd.DataFrame) -> str:
    return n_images(table["n"]) if len(table) else "no images"


def _by_sign(values: Iterable[float]) -> dict:
    """The marker of bars that raise the target, and, hatched, of those that lower it."""
    signs = [value >= 0 for value in values]
    return _hatched([POSITIVE if up else NEGATIVE for up in signs], ["" if up else "/" for up in signs])


def _hatched(colour: str | list[str], shape: str | list[str]) -> dict:
    """The marker of bars that their hatching tells apart where their colour does not."""
    pattern = {"shape": shape, "bgcolor": "white", "fgcolor": colour, "fillmode": "replace", "size": 6}
    return {"color": colour, "line": {"color": colour, "width": 1.5}, "pattern": pattern}


def _placed(image: NDArray[np.uint8], left: float, y: float, wide: float, tall: float, pixels: int) -> dict:
    """An image of `wide` x `tall` px, its left edge at `left` px, its middle at y (rows); stored with `pixels`."""
    at = {"x": round(left / INNER, 5), "xref": "paper", "y": round(y, 4), "yref": "y"}
    size = {"sizex": round(wide / INNER, 5), "sizey": round(tall / PITCH, 4)}
    return {"source": data_uri(image, pixels), **at, **size, "xanchor": "left", "yanchor": "middle"}


def _write(figure: go.Figure, left: float, y: float, text: str, **style) -> None:
    """Text that begins `left` px from the left edge, at y (rows)."""
    at = {"x": round(left / INNER, 5), "xref": "paper", "y": round(y, 4), "yref": "y"}
    figure.add_annotation(**at, text=text, align="left", xanchor="left", showarrow=False, **style)


def _written(values: Iterable[float], sign: str = "+") -> list[str]:
    """Numbers for labels, with the minus sign of the axes; 3 decimals, or what the largest needs for 3 digits."""
    values = np.array(list(values), dtype=float)
    most = np.abs(values[np.isfinite(values)]).max(initial=0)
    decimals = int(np.clip(2 - np.floor(np.log10(most)), 3, 9)) if most > 0 else 3
    texts = [f"{v:{sign}.{decimals}f}" if np.isfinite(v) else "unknown" for v in values]
    return [text.replace("-", "−") if text.strip("+-0.") else text.strip("+-") for text in texts]
