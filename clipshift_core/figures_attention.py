"""The figures of attention: maps laid over the pictures they were read from. Arrays in, a plotly figure out.

How far attention moves is a metric like any other: `figures.metric_density` and `figures.ranking` draw it.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike
from PIL import Image
from plotly.colors import get_colorscale, hex_to_rgb

from clipshift_core.canvas import MUTED, WIDTH, in_order, label, numbers, plain, short
from clipshift_core.figures_world import _gallery

COLOURS = "Inferno"
"""The colour map of every overlay: even steps look even, in grey print too."""
SHARE = 0.6
"""Share of the colour map in a blend; the rest is the picture in grey, so that every hue means attention."""
LEFT = 120
"""Pixels for the names of rows, where rows are named on the left."""

_SCALE = get_colorscale(COLOURS)
_STOPS = np.array([stop for stop, _ in _SCALE])
_RGB = np.array([hex_to_rgb(colour) for _, colour in _SCALE], dtype=float)
_SEEN = [
    [stop, f"rgb{tuple(map(int, rgb))}"] for stop, rgb in zip(_STOPS, SHARE * _RGB + (1 - SHARE) * 128, strict=True)
]
"""What the eye meets: the colour map blended with a middle grey."""


def attention_overlays(
    pictures: UInt8[np.ndarray, "image view h w 3"],
    maps: Float[np.ndarray, "image view row col"],
    names: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    similarity: ArrayLike | None = None,
) -> go.Figure:
    """Two lines an image: its views, and the same with their attention laid over (paper A, figure 1).

    `names` says which view is where; `similarity` (image, augmentation), in the order of `names` without the original,
    is written under each. Raises ValueError where pictures, maps, names and similarity do not belong together.
    """
    _check(pictures, maps, 2)
    augmented = [name != "original" for name in names]
    if len(names) != maps.shape[1] or similarity is not None and np.shape(similarity) != (len(maps), sum(augmented)):
        raise ValueError(f"{len(names)} names and similarity of shape {np.shape(similarity)} for maps of {maps.shape}")
    values = np.full(maps.shape[:2], np.nan)
    if similarity is not None:
        values[:, augmented] = similarity
    order = [list(names).index(name) for name in in_order(names)]
    cell = (WIDTH - 20) / len(order)
    above, below = 26 * (captions is not None) / cell, (12 + 12 * (similarity is not None)) / cell
    tops = [i * (2 + above + below) + above for i in range(len(pictures))]
    tiles, places, hover = [], [], []
    for i, top in enumerate(tops):
        for x, view in enumerate(order):
            tiles += [pictures[i, view], overlay(pictures[i, view], maps[i, view])]
            places += [(x, top), (x, top + 1)]
            known = f", similarity {short(values[i, view])}" if np.isfinite(values[i, view]) else ""
            hover += [label(names[view]), f"{label(names[view])}, attention{known}"]
    figure = _tiles(
        tiles,
        places,
        hover,
        cell,
        "Where the model looks, in an image and its augmented views",
        "Below each view its attention, each map scaled to run from 0 to 1"
        + ("; the number is its similarity to the original's" if similarity is not None else ""),
        foot=below * cell,
    )
    for x, view in enumerate(order):
        _text(figure, x, -0.5, "<br>".join(textwrap.wrap(label(names[view]), 13)), yanchor="bottom")
    for i, top in enumerate(tops):
        if captions is not None:
            caption = plain(str(captions[i]))
            _text(figure, -0.47, top - 0.5, caption, xanchor="left", yanchor="bottom", font={"color": MUTED})
        for x, view in enumerate(order):
            if similarity is not None and names[view] != "original":
                _text(figure, x, top + 1.47, _value(values[i, view]), yanchor="top")
    return figure


def head_maps(
    pictures: UInt8[np.ndarray, "view h w 3"],
    maps: Float[np.ndarray, "view head row col"],
    names: Sequence[str],
) -> go.Figure:
    """One row a view of one image: the view, the mean over heads, and each head's own map laid over it."""
    _check(pictures, maps[:, 0], 1)
    order = [list(names).index(name) for name in in_order(names)]
    n_heads = maps.shape[1]
    cell = (WIDTH - 20 - LEFT) / (n_heads + 2)
    left = LEFT / cell
    tiles, places, hover = [], [], []
    for y, view in enumerate(order):
        each = [maps[view].mean(axis=0), *maps[view]]
        tiles += [pictures[view], *(overlay(pictures[view], one) for one in each)]
        places += [(left + x, y) for x in range(n_heads + 2)]
        hover += [f"{label(names[view])}{what}" for what in ("", ", mean", *(f", head {h}" for h in range(n_heads)))]
    figure = _tiles(
        tiles,
        places,
        hover,
        cell,
        "What each head attends to",
        "One row a view of one image; the mean is over heads, as published; each map scaled to run from 0 to 1",
    )
    word = "Head " if cell > 55 else "Head<br>"
    for x, text in enumerate(("View", "Mean", *(f"{word}{h}" for h in range(n_heads)))):
        _text(figure, left + x, -0.5, text, yanchor="bottom")
    for y, view in enumerate(order):
        _row_name(figure, y, label(names[view]))
    return figure


def rollout_and_last(
    pictures: UInt8[np.ndarray, "image h w 3"],
    last: Float[np.ndarray, "image row col"],
    rollout: Float[np.ndarray, "image row col"],
) -> go.Figure:
    """One column an image: the picture, the last block's attention, and the rollout through all blocks."""
    _check(pictures, last, 1)
    _check(pictures, rollout, 1)
    cell = min((WIDTH - 20 - LEFT) / len(pictures), 210)
    rows = ("Original", "Last block", "Rollout")
    tiles = [*pictures, *map(overlay, pictures, last), *map(overlay, pictures, rollout)]
    places = [(LEFT / cell + x, y) for y in range(3) for x in range(len(pictures))]
    figure = _tiles(
        tiles,
        places,
        [f"image {x + 1}: {row.lower()}" for row in rows for x in range(len(pictures))],
        cell,
        "Attention of the last block, and rolled out through all blocks",
        "Mean over heads, each map scaled to run from 0 to 1; rollout after Abnar and Zuidema (2020)",
        head=10,
    )
    for y, row in enumerate(rows):
        _row_name(figure, y, row)
    return figure


def overlay(picture: UInt8[np.ndarray, "h w 3"], attention: Float[np.ndarray, "row col"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in grey, blended with its map in `COLOURS`, dark for least and bright for most attention.

    As published, the map is resized to the picture (here bicubic) and then min-max normalised; a constant one is 0
    everywhere. A map that is not finite is unknown: the picture is returned as it is.
    """
    if not np.isfinite(attention).all():
        return picture
    size = picture.shape[1::-1]
    # to a range of 1 before: PIL works in float32, and maps may be of any scale
    attention = (attention - attention.min()) / (np.ptp(attention) or 1.0)
    heat = np.asarray(Image.fromarray(attention.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    heat = (heat - heat.min()) / (np.ptp(heat) or 1.0)
    colour = np.stack([np.interp(heat, _STOPS, channel) for channel in _RGB.T], axis=-1)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return np.round(SHARE * colour + (1 - SHARE) * grey[..., None]).astype(np.uint8)


def _tiles(
    tiles: Sequence[np.ndarray],
    places: Sequence[tuple[float, float]],
    hover: Sequence[str],
    cell: float,
    title: str,
    subtitle: str,
    *,
    head: int = 36,
    foot: float = 0,
) -> go.Figure:
    """Tiles at (column, row) in cells of `cell` px, `foot` px below the last one, and the colour bar top right."""
    figure = _gallery(tiles, places, hover, 1.0, cell, round(cell), title, subtitle, head)
    bottom, top = figure.layout.yaxis.range
    figure.update_yaxes(range=numbers([bottom + foot / cell, top]))
    figure.update_layout(height=figure.layout.height + round(foot))
    figure.data[0].update(
        marker={
            "color": [0.0] * len(places),
            "cmin": 0,
            "cmax": 1,
            "colorscale": _SEEN,
            "colorbar": {
                "orientation": "h",
                "x": 1,
                "xanchor": "right",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "ypad": 14,
                "xpad": 30,
                "lenmode": "pixels",
                "len": 190,
                "thickness": 10,
                "tickvals": [0, 1],
                "ticktext": ["0, least", "1, most"],
            },
        }
    )
    return figure


def _check(pictures: np.ndarray, maps: np.ndarray, n_leading: int) -> None:
    if pictures.shape[:n_leading] != maps.shape[:n_leading] or maps.ndim != n_leading + 2 or pictures.shape[-1] != 3:
        raise ValueError(f"pictures of shape {pictures.shape} and maps of shape {maps.shape} do not belong together")


def _text(figure: go.Figure, x: float, y: float, text: str, **style) -> None:
    font = {"size": 12, **style.pop("font", {})}
    x, y = numbers([x, y])
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, font=font, **style)


def _row_name(figure: go.Figure, y: int, text: str) -> None:
    figure.add_annotation(
        x=-0.5, y=y, text="<br>".join(textwrap.wrap(text, 15)), showarrow=False, xanchor="left", align="left"
    )


def _value(value: float) -> str:
    return short(value) if np.isfinite(value) else "unknown"
