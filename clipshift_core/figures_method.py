"""Paper A's method in one picture, drawn from one image of the run."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8

from clipshift_core.canvas import INK, MUTED, WIDTH, canvas, data_uri, label, numbers
from clipshift_core.figures_attention import overlay

HEIGHT = 520
READ_OFF = (
    ("embedding", "L2 distance, cosine similarity,<br>distance between augmentations"),
    ("attention", "attention similarity"),
    ("pixels", "patch similarity, edge and<br>detail preservation (SSIM, MSE)"),
)
"""What one forward pass gives, and the metrics that compare it, view against original."""


def method(
    views: UInt8[np.ndarray, "view h w 3"],
    embedding: Float[np.ndarray, "view feature"],
    maps: Float[np.ndarray, "view row col"],
    names: tuple[str, ...],
) -> go.Figure:
    """From an image to the metrics: views, one forward pass, what is read off it (paper A, figure 2).

    The original is view 0; it is set against the view whose embedding lies farthest from it. Maps that are not finite
    are left out of the picture.
    """
    figure = canvas(
        "From an image to its shift: everything from one pass",
        "Each view is drawn once; every metric compares its embedding, attention and pixels with the original's",
        height=HEIGHT,
        margin={"l": 0, "r": 0, "t": 90, "b": 0},
        showlegend=False,
    )
    figure.update_xaxes(visible=False, range=[0, WIDTH])
    figure.update_yaxes(visible=False, range=[HEIGHT - 90, 0])
    figure.add_scatter(x=[None], y=[None], mode="markers", hoverinfo="skip")

    def picture(image: np.ndarray, x: float, y: float, size: float) -> None:
        place = {"xref": "x", "yref": "y", "sizex": size, "sizey": size, "sizing": "stretch"}
        figure.add_layout_image(source=data_uri(image, round(2 * size)), x=x, y=y, **place)

    def text(words: str, x: float, y: float, **style) -> None:
        figure.add_annotation(**({"text": words, "x": x, "y": y, "showarrow": False} | style))

    def arrow(x0: float, y0: float, x1: float, y1: float) -> None:
        head = {"arrowhead": 2, "arrowwidth": 1.5, "arrowcolor": MUTED, "axref": "x", "ayref": "y", "showarrow": True}
        text("", x1, y1, ax=x0, ay=y0, **head)

    small = {"font": {"size": 13, "color": MUTED}}
    picture(views[0], 14, 160, 100)
    text("original", 64, 274, **small)
    arrow(120, 210, 144, 210)
    for i in range(1, len(views)):
        picture(views[i], 150 + (i - 1) % 3 * 64, 115 + (i - 1) // 3 * 64, 60)
    text(f"{len(views) - 1} augmentations,<br>each on its own", 244, 330, **small)
    arrow(344, 210, 368, 210)
    figure.add_shape(
        type="rect", x0=374, x1=464, y0=160, y1=260, line={"color": INK, "width": 1.5}, fillcolor="#F4F4F4"
    )
    text("CLIP<br>image<br>encoder", 419, 210)
    text(f"{len(views)} views,<br>one batch", 419, 284, **small)

    far = int(np.linalg.norm(embedding - embedding[0], axis=1).argmax())
    pair, tops = (0, far), (10, 150, 290)
    for (what, compared), top in zip(READ_OFF, tops, strict=True):
        arrow(470, 210, 506, top + 45)
        text(compared, 712, top + 45, xanchor="left", align="left", font={"size": 13})
        text(what, 512, top + 106, xanchor="left", **small)
    for column, view in enumerate(pair):
        x = 512 + 96 * column
        _strip(figure, embedding[pair, :][:, :20], column, x, tops[0])
        has_map = np.isfinite(maps[view]).all()
        picture(overlay(views[view], maps[view]) if has_map else views[view], x, tops[1], 90)
        picture(views[view], x, tops[2], 90)
        text("original" if view == 0 else label(names[view]).lower(), x + 45, tops[2] + 126, **small)
    return figure


def _strip(figure: go.Figure, pair: Float[np.ndarray, "2 feature"], column: int, x: float, top: float) -> None:
    """The first features of one of two embeddings as bars, on the scale of both."""
    scale = 42 / np.abs(pair).max()
    heights = [numbers([0, scale * value])[1] for value in pair[column]]
    for i, height in enumerate(heights):
        left, width = x + i * 90 / len(heights), 90 / len(heights) - 1
        bar = {"x0": left, "x1": left + width, "y0": top + 45, "y1": top + 45 - height}
        figure.add_shape(type="rect", fillcolor=INK if column == 0 else "#D55E00", line={"width": 0}, **bar)
