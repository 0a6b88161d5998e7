"""What the shift explorer draws: an image beside its view, where the view lies in the population, what latents changed.

A look (`explore_shift.Look`) in, parts of a figure out: `place` draws a part on a figure, `refresh` brings a shown
figure up to date without making it anew.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from clipshift_core.canvas import (
    CONFIG,
    INK,
    LABELS,
    LOOKS,
    METRICS,
    MUTED,
    TEMPLATE,
    data_uri,
    n_images,
    numbers,
    short,
)
from clipshift_core.figures_attention import overlay
from clipshift_core.stats import density

if TYPE_CHECKING:
    from clipshift_core.explore_shift import Look

N_LATENTS = 8
"""Latents that are drawn."""
SIDE = 224
"""Pixels that are kept of each picture."""
COMPARED = {"cosine": 1.0, "l2": 0.0}
"""The metrics that are drawn, and their value for the image itself."""
SMALL = {"font": {"size": 12}, "standoff": 6}
Box = tuple[float, float, float, float]
"""Left, right, bottom and top, as shares of what is drawn on."""


class Part(NamedTuple):
    """One pair of axes and what is drawn on it. `place` draws it, `refresh` brings it up to date."""

    x: dict
    y: dict
    traces: list[dict]
    images: Sequence[dict] = ()
    notes: Sequence[dict] = ()


def pictures(look: "Look") -> list[Part]:
    """The image, its view, and both with where the model looks."""
    seen = (look.original, look.view)
    tiles = [each.picture for each in seen] + [overlay(each.picture, each.attention) for each in seen]
    view, severity = LABELS[look.augmentation], f"severity {look.severity:.1f}"
    unknown = np.isnan(look.original.attention).all()
    titles = ["Original", f"{view},<br>{severity}"]
    titles += ["Attention cannot<br>be read"] * 2 if unknown else ["Attention,<br>original", "Attention,<br>view"]
    places = range(len(tiles))
    hidden = {"visible": False, "fixedrange": True}
    return [
        Part(
            {**hidden, "range": [-0.5, 3.5]},
            {**hidden, "range": [0.5, -0.78]},
            [
                {
                    "type": "scatter", "mode": "markers", "x": list(places), "y": [0] * len(tiles),
                    "marker": {"opacity": 0, "size": 30}, "text": [title.replace("<br>", " ") for title in titles],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            ],
            [
                {
                    "source": data_uri(tile, SIDE), "x": x, "y": 0, "sizex": 0.94, "sizey": 0.94,
                    "xanchor": "center", "yanchor": "middle",
                }
                for x, tile in zip(places, tiles, strict=True)
            ],
            [_note(title, x=x, y=-0.5, yanchor="bottom") for x, title in zip(places, titles, strict=True)],
        )
    ]  # fmt: skip


def densities(look: "Look", population: Mapping[str, Float[np.ndarray, " image"]]) -> list[Part]:
    """Where this view's cosine and L2 lie among the run's images under its augmentation, one part each."""
    parts, colour = [], LOOKS[look.augmentation].colour
    for metric, same in COMPARED.items():
        values, value = population[metric], getattr(look, metric)
        pad = 0.15 * np.ptp(values) + 1e-6
        first, last = np.clip([values.min() - pad, values.max() + pad], *METRICS[metric].bounds)
        grid = np.linspace(first, last, 120)
        height = density(values, grid)
        ends = min(grid[0], value, same), max(grid[-1], value, same)
        room = 0.06 * (ends[1] - ends[0])
        said = f"{LABELS[look.augmentation]} at severity 1,<br>{n_images([len(values)])}; the line is this view"
        parts.append(
            Part(
                {
                    "title": {"text": METRICS[metric].axis, **SMALL},
                    "range": numbers([ends[0] - room, ends[1] + room]), "nticks": 5, "tickfont": {"size": 12},
                },
                {"visible": False, "range": [0, 1.3]},
                [
                    {
                        "type": "scatter", "mode": "lines", "x": numbers(grid), "y": numbers(height / height.max()),
                        "fill": "tozeroy", "line": {"color": colour, "width": 1.5}, "hoverinfo": "skip",
                    },
                    {
                        "type": "scatter", "mode": "lines+text", "x": numbers([value, value]), "y": [0, 1.06],
                        "text": ["", short(value)], "textposition": "top center", "textfont": {"color": INK},
                        "line": {"color": INK, "width": 2.5}, "cliponaxis": False,
                        "hovertemplate": "this view: %{x:.4g}<extra></extra>",
                    },
                ],
                (),
                [
                    _note(
                        said, x=0, xref="x domain", xanchor="left", y=1.04, yref="y domain", yanchor="bottom",
                        align="left",
                    )
                ],
            )
        )  # fmt: skip
    return parts


def bars(look: "Look") -> list[Part]:
    """The latents that changed most: their activation in the image, and below it in the view."""
    rows, colour = look.changed.head(N_LATENTS), LOOKS[look.augmentation].colour
    places = list(range(len(rows)))
    names = [
        f"{textwrap.shorten(text, 16, placeholder=' …')} <span style='color:{MUTED}'>{latent}</span>"
        for text, latent in zip(rows["label"], rows["latent"], strict=True)
    ]
    styles = {"before": {"color": "white", "line": {"color": INK, "width": 1.5}},
              "after": {"color": colour, "line": {"color": colour, "width": 1.5}}}  # fmt: skip
    traces = [
        {
            "type": "bar", "orientation": "h", "y": places, "x": numbers(rows[when]), "width": 0.34, "offset": offset,
            "marker": style, "customdata": [f"{part:+.4f}" for part in rows["part"]],
            "hovertemplate": f"{where}: %{{x:.3g}}<br>part in the change of the cosine with {look.asked}: "
            "%{customdata}<extra></extra>",
        }
        for (when, style), offset, where in zip(styles.items(), (-0.37, 0.01), ("original", "view"), strict=True)
    ]  # fmt: skip
    said = f"Latents that changed most: □ original, <span style='color:{colour}'>■</span> view"
    return [
        Part(
            {"title": {"text": "Activation", **SMALL}, "rangemode": "tozero",
             "tickfont": {"size": 12}},
            {"range": [N_LATENTS - 0.4, -0.6], "tickvals": places, "ticktext": names, "showgrid": False,
             "automargin": False, "tickfont": {"size": 12}},
            traces,
            (),
            [_note(said, x=0, xref="x domain", xanchor="left", y=1.01, yref="y domain", yanchor="bottom")],
        )
    ]  # fmt: skip


def _note(text: str, **where) -> dict:
    return {"text": text, "showarrow": False, "font": {"size": 12}, "xref": "x", "yref": "y", **where}


def widget(parts: Sequence[Part], boxes: Sequence[Box], *, width: int, height: int, margin: dict) -> go.FigureWidget:
    figure = go.FigureWidget(
        layout={"template": TEMPLATE, "width": width, "height": height, "margin": margin, "showlegend": False}
    )
    figure._config = CONFIG | {"displayModeBar": False}
    for number, (part, box) in enumerate(zip(parts, boxes, strict=True), 1):
        place(figure, part, number, box)
    return figure


def place(figure: go.Figure, part: Part, number: int, box: Box) -> None:
    """Draw a part on the figure's axes of this number, in the box (left, right, bottom, top) of shares."""
    x, y = f"x{number if number > 1 else ''}", f"y{number if number > 1 else ''}"
    figure.update_layout(
        {
            x.replace("x", "xaxis"): {**part.x, "domain": box[:2], "anchor": y},
            y.replace("y", "yaxis"): {**part.y, "domain": box[2:], "anchor": x},
        }
    )
    figure.add_traces([{**trace, "xaxis": x, "yaxis": y} for trace in part.traces])
    for image in part.images:
        figure.add_layout_image(image, xref=x, yref=y)
    for note in part.notes:
        refs = {"xref": note["xref"].replace("x", x), "yref": note["yref"].replace("y", y)}
        figure.add_annotation({**note, **refs})


def refresh(figure: go.FigureWidget, parts: Sequence[Part]) -> None:
    """Bring what `_place` drew up to date, in one message to the browser."""
    traces, pictures, notes = iter(figure.data), iter(figure.layout.images), iter(figure.layout.annotations)
    with figure.batch_update():
        for number, part in enumerate(parts, 1):
            name = number if number > 1 else ""
            figure.layout[f"xaxis{name}"].update(part.x)
            figure.layout[f"yaxis{name}"].update(part.y)
            for held, new in ((traces, part.traces), (pictures, part.images)):
                for each in new:
                    next(held).update(each if held is traces else {"source": each["source"]})
            for note in part.notes:
                next(notes).update(text=note["text"])
