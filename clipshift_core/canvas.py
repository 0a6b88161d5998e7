"""How every figure looks, and how it leaves the notebook: colours, names, layout, renderer, export with provenance.

One colour and one marker for each augmentation, and one reading order (the published one), in every figure. The nine
colours were searched for the largest smallest distance under normal, protan, deutan and tritan vision: no pair is
closer than 14 (CIEDE2000) under any of them, no colour closer than 2.1 : 1 in contrast to white. Colour is never
the only cue: rows are labelled directly, and points differ in their marker.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import kaleido
import numpy as np
import pandas as pd
import plotly
import plotly.graph_objects as go
import plotly.io as pio
from choreographer.browsers.chromium import Chromium
from PIL import Image, ImageFile, PngImagePlugin

from clipshift_core.files import write

WIDTH = 960
"""Width of every figure in CSS pixels: what a README shows without shrinking the text below 12 px."""

INK, MUTED, GRID = "#222222", "#6B6B6B", "#E3E3E3"
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
"""Colours for things that are not augmentations (clusters, models): Okabe and Ito's, dark enough for lines."""


class Look(NamedTuple):
    """How one view is named and drawn."""

    label: str
    colour: str
    symbol: str


LOOKS = {
    "original": Look("Original", INK, "circle"),
    "noise": Look("Gaussian noise", "#FD9749", "star"),
    "blur": Look("Gaussian blur", "#612806", "square"),
    "color_jitter": Look("Colour jitter", "#C69FFA", "diamond"),
    "shift_scale_rotate": Look("Shift-scale-rotate", "#0073D1", "triangle-up"),
    "horizontal_flip": Look("Horizontal flip", "#42C4AF", "triangle-left"),
    "elastic": Look("Elastic", "#004C41", "pentagon"),
    "perspective": Look("Perspective", "#7B7417", "hourglass"),
    "random_brightness_contrast": Look("Brightness-contrast", "#521F76", "cross"),
    "coarse_dropout": Look("Coarse dropout", "#B36670", "x"),
}
"""The original and the nine augmentations, in the reading order of every figure."""

ORDER = tuple(LOOKS)
LABELS = {name: look.label for name, look in LOOKS.items()}
COLOURS = {name: look.colour for name, look in LOOKS.items()}
SYMBOLS = {name: look.symbol for name, look in LOOKS.items()}


class Metric(NamedTuple):
    """How one metric is named on an axis, and which way it points."""

    label: str
    unit: str
    moved_if_larger: bool
    bounds: tuple[float, float]
    of: str = "embedding"
    """What it compares."""

    @property
    def axis(self) -> str:
        """The title of an axis."""
        return f"{self.label} ({self.unit})"

    @property
    def inline(self) -> str:
        """The name within a sentence."""
        return self.label if self.label.startswith(("L2", "SSIM")) else self.label[0].lower() + self.label[1:]


METRICS = {
    "l2": Metric("L2 distance", "units of the embedding", True, (0, float("inf"))),
    "l2_normalised": Metric("L2 distance of unit vectors", "0 same, 2 opposite", True, (0, 2)),
    "cosine": Metric("Cosine similarity", "1 same, 0 unrelated", False, (-1, 1)),
    "cosine_distance": Metric("Cosine distance", "0 same, 1 unrelated", True, (0, 2)),
    "attention": Metric("Attention similarity", "1 same, 0.5 opposite", False, (0.5, 1), "attention"),
    "patch": Metric("Patch similarity", "1 same, 0.5 opposite", False, (0.5, 1), "pixels"),
    "patch_published": Metric(
        "Patch similarity as published", "1 same, 0.996 least possible", False, (0.996, 1), "pixels"
    ),
    "edge": Metric("Edge preservation", "1 same, 0 opposite", False, (0, 1), "pixels"),
    "detail": Metric("Detail preservation", "1 same, 0 lost", False, (0, 1), "pixels"),
    "ssim": Metric("SSIM", "1 same, 0 unrelated", False, (-1, 1), "pixels"),
    "mse": Metric("Mean squared error", "squared grey levels", True, (0, 255.0**2), "pixels"),
}
"""In the reading order: of the embedding, then attention, then pixels."""

SIMILARITIES = ("cosine", "attention", "patch", "edge", "detail")
"""The five that paper A's radar, bars and heatmap compare, in its order."""

CONFIG = {"displaylogo": False, "showSendToCloud": False}
"""Of every shown figure: no advertisement, and no button that sends a reader's data away."""

AXIS = {
    "automargin": True,
    "gridcolor": GRID,
    "zeroline": False,
    "ticks": "",
    "ticklabelstandoff": 6,
    "title": {"font": {"size": 14}, "standoff": 12},
}

TEMPLATE = go.layout.Template(
    layout={
        "width": WIDTH,
        "font": {"family": "Open Sans, Liberation Sans, Arial, sans-serif", "size": 14, "color": INK},
        "title": {
            "x": 0.015,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 16},
            "font": {"size": 19},
            "subtitle": {"font": {"size": 14, "color": MUTED}},
        },
        "margin": {"l": 40, "r": 30, "t": 100, "b": 50},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [look.colour for look in LOOKS.values()][1:],
        "legend": {
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 13},
        },
        "xaxis": AXIS,
        "yaxis": AXIS,
        "hoverlabel": {"font": {"size": 13}},
    }
)


def canvas(title: str, subtitle: str, *, height: int, **layout) -> go.Figure:
    """An empty figure of the house: title saying what is shown, subtitle saying how to read it, height in px."""
    figure = go.Figure()
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}}, height=height, **layout
    )
    return figure


def label(name: str) -> str:
    """The human name of a view or metric; a name of the user's own keeps its words."""
    if name in METRICS:
        return METRICS[name].label
    words = str(name).replace("_", " ")
    return LABELS.get(name, words[:1].upper() + words[1:])


def metric_spec(name: str) -> Metric:
    """How to name and draw a metric; one that is not ours is taken for a similarity of at most 1."""
    return METRICS.get(name, Metric(label(name), "1 same", False, (-np.inf, np.inf)))


def in_order(names: Iterable[str]) -> list[str]:
    """The distinct names in the reading order; names that are not ours follow in the order given."""
    names = list(dict.fromkeys(names))
    return [name for name in ORDER if name in names] + [name for name in names if name not in LOOKS]


def numbers(values: Iterable[float]) -> list[float | None]:
    """Plain numbers at 6 significant digits (None where NaN): figures stay small and compare equal across machines."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in map(float, values)]


def plain(text: str) -> str:
    """A user's text for a figure: plotly would obey the tags in it."""
    return html.escape(text, quote=False)


def short(value: float) -> str:
    """A number for a label: 3 significant digits, trailing zeros kept, so that a column of them lines up.

    4 decimals from 0.995 on, where similarities differ in what they lack to 1.
    """
    return f"{value:.4f}" if 0.995 <= value < 1.0005 and value != 1 else f"{value:#.3g}".rstrip(".")


def n_images(n: Sequence[int]) -> str:
    """ "200 images", or "180 to 200 images" where the groups differ."""
    low, high = min(n), max(n)
    return f"{low:,} image{'s' * (low != 1)}" if low == high else f"{low:,} to {high:,} images"


def whiskers(rows: pd.DataFrame, **style) -> dict:
    """Asymmetric error bars from mean, low, high; none where the interval is unknown."""
    if rows["low"].isna().all():
        return {"visible": False}
    return {
        "type": "data",
        "array": numbers((rows["high"] - rows["mean"]).fillna(0)),
        "arrayminus": numbers((rows["mean"] - rows["low"]).fillna(0)),
        "symmetric": False,
        **style,
    }


_STARTING = threading.Lock()


def data_uri(image: np.ndarray, size: int) -> str:
    """A uint8 RGB image (h, w, 3) as a JPEG of `size` pixels on its longer side, fit for a figure."""
    picture = Image.fromarray(np.asarray(image, dtype=np.uint8))
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 3 * size**2)  # an optimised JPEG is written whole
    picture.save(buffer, "JPEG", quality=78, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def browser() -> str | None:
    """The browser that draws the PNGs, started and tried once a process; None, with one note on stderr, without it.

    It takes seconds to start: `warm_up` has that done beside other work, for which this then waits.
    """
    with _STARTING:
        return _browser()


def warm_up() -> None:
    """Start the browser in a thread of its own."""
    threading.Thread(target=browser, daemon=True, name="browser").start()


def find_browser() -> tuple[str, str]:
    """The path of a browser, not yet tried, and what is wrong where there is none: one of the two is empty."""
    path = os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False)
    if not path:
        return "", "no Chrome or Chromium was found (install one, or set BROWSER_PATH)"
    if not os.access(path, os.X_OK):
        return "", f"BROWSER_PATH={path} is not an executable file"
    return path, ""


@cache
def _browser() -> str | None:
    path, problem = find_browser()
    problem = problem or _start_drawing(path)
    if problem:
        print(f"Figures stay interactive only, without PNG: {problem}.", file=sys.stderr)
        return None
    pio.defaults.headers = {}  # only maps fetch anything; a server that is given headers warns at every figure
    return path


def _start_drawing(path: str, timeout: float = 120.0) -> str | None:
    """Start kaleido's drawing server and draw one empty figure with it; says what went wrong, if anything did.

    A figure costs 0.2 s with the server and 2 s without. Where its browser cannot start, the server dies and every
    caller waits for ever, so the first call is made from a thread of its own while we watch both.
    """
    errors: list[BaseException] = []
    hook = threading.excepthook

    def failed(arguments: threading.ExceptHookArgs) -> None:
        others = arguments.thread in before  # theirs are no concern of ours
        hook(arguments) if others else errors.append(arguments.exc_value)

    before = set(threading.enumerate())
    threading.excepthook = failed
    try:
        # no formula is set in a figure, and fetching MathJax would need a network
        kaleido.start_sync_server(silence_warnings=True, mathjax=False)
        # By name: the server's browser starts threads of its own at once, so that comparing lists of threads may
        # find one of those. Where a later kaleido has no such name, only the timeout is left to tell.
        server = getattr(getattr(kaleido, "_global_server", None), "_thread", threading.main_thread())
        options = {"format": "png", "width": 20, "height": 20}
        first = threading.Thread(
            target=kaleido.calc_fig_sync, args=(go.Figure().to_dict(), options), daemon=True, name="first figure"
        )
        first.start()
        end = time.monotonic() + timeout
        while first.is_alive() and server.is_alive() and time.monotonic() < end:
            first.join(0.05)
        if not first.is_alive() and not errors:
            return None
        if not server.is_alive():
            server.join()
            kaleido.stop_sync_server(silence_warnings=True)
    finally:
        threading.excepthook = hook
    why = (
        f"{type(errors[0]).__name__}: {' '.join(map(str, errors[0].args[:1]))}"
        if errors
        else f"no answer in {timeout:g} s"
    )
    return f"{path} did not draw ({why})"


def use_renderer() -> str:
    """Set how notebooks show figures: interactive, with a PNG beside it for GitHub where a browser can draw one."""
    pio.renderers["plotly_mimetype"].config = CONFIG
    pio.renderers.default = "plotly_mimetype+png" if browser() else "plotly_mimetype"
    return pio.renderers.default


def export(
    figure: go.Figure,
    name: str,
    directory: str | Path,
    *,
    alt: str,
    provenance: Mapping[str, object],
) -> list[Path]:
    """Write NAME.html, NAME.png (where a browser is there) and NAME.json into the directory; returns the paths written.

    The page loads `plotly.min.js` from its own folder (one shared copy, written here), so that it opens offline and
    each page stays small. The provenance (commit, notebook, profile, digest are required) stands in the .json
    only, together with title, alt text and a hash of what is drawn: page and picture change only if the figure does.
    Raises ValueError for a name without its notebook number, a missing alt text or a missing provenance key.
    """
    if not re.fullmatch(r"\d\d-[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"figure name {name!r}: expected NN-some-words, such as 02-l2-by-augmentation")
    if len(alt.split()) < 4:
        raise ValueError(f"figure {name}: the alt text must say in words what is shown, got {alt!r}")
    missing = [key for key in ("commit", "notebook", "profile", "digest") if key not in provenance]
    if missing:
        raise ValueError(f"figure {name}: the provenance lacks {', '.join(missing)}")
    directory = Path(directory)
    title = figure.layout.title.text or name
    files = {f"{name}.html": _page(figure, name, title, alt).encode()}
    if browser():
        files[f"{name}.png"] = _png(figure, title, alt)
    record = {
        **provenance,
        "name": name,
        "title": title,
        "alt": alt,
        "data_sha256": data_sha256(figure),
        "plotly": plotly.__version__,
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    files[f"{name}.json"] = (json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n").encode()
    if not browser():
        (directory / f"{name}.png").unlink(missing_ok=True)  # an earlier run's would contradict the page beside it
    write({directory / file: content for file, content in files.items()})
    _share_plotlyjs(directory)
    return [directory / file for file in files]


def data_sha256(figure: go.Figure) -> str:
    """Hash of what is drawn (traces and embedded images), whatever the layout around it."""
    drawn = figure.to_plotly_json()
    drawn = {"data": drawn["data"], "images": drawn["layout"].get("images", [])}
    text = json.dumps(drawn, sort_keys=True, cls=plotly.utils.PlotlyJSONEncoder)
    return hashlib.sha256(text.encode()).hexdigest()


def _page(figure: go.Figure, name: str, title: str, alt: str) -> str:
    body = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config=CONFIG,
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<title>{html.escape(title)}</title>\n<script src="plotly.min.js"></script>\n</head>\n'
        f'<body style="margin: 0 auto; max-width: {WIDTH}px; font: 15px/1.5 sans-serif; color: {INK}">\n'
        f'<figure style="margin: 0">\n<div role="img" aria-label="{html.escape(alt)}">\n{body}\n</div>\n'
        f"<figcaption>{html.escape(alt)}</figcaption>\n</figure>\n</body>\n</html>\n"
    )


def _png(figure: go.Figure, title: str, alt: str) -> bytes:
    """The figure at scale 2, or 1 where it is a gallery of small images, with title and alt text inside the file."""
    scale = 1 if figure.layout.images else 2
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Title", title)
    text.add_itxt("Description", alt)
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(figure.to_image("png", scale=scale))) as picture:
        picture.convert("RGB").save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def _share_plotlyjs(directory: Path) -> None:
    script, path = plotly.offline.get_plotlyjs().encode(), directory / "plotly.min.js"
    if not path.is_file() or path.stat().st_size != len(script) or path.read_bytes() != script:
        path.write_bytes(script)
