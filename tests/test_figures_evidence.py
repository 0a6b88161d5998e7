"""The figures of evidence: the numbers they were given, in the right row, and nothing that covers anything else."""

import base64
import io
import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image, ImageFont

from clipshift_core import canvas
from clipshift_core import figures_evidence as figures
from clipshift_core.evidence import KINDS
from clipshift_core.figures_attention import overlay

N = 6


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """One finding of each kind; the fourth has all the longest words."""
    return pd.DataFrame(
        {
            "word": ["snail", "house", "duck", "a rather long class name", "star", "bat"],
            "latent": [340, 491, 17, 29_999, 138, 41],
            "n": [44, 29, 47, 10_000, 42, 35],
            "n_on": [41, 26, 45, 9_999, 36, 13],
            "label": ["below", None, "duck", "an even longer label of ripples and moons", "starfish", "bat"],
            "kind": KINDS,
            "because": ["short"] * 3 + ["in 100%, quite unlike the rest of the images: split 100.0"] + ["short"] * 2,
        },
        index=[5, 3, 1, 0, 8, 9],
    )


@pytest.fixture(scope="module")
def attributions() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.append(rng.normal(0.02 * i, 0.01, 30), np.zeros(4)) for i in range(N)]


def plain(n: int, finding: int, blue: int) -> list[np.ndarray]:
    """Pictures in which finding and number can be read from red and green."""
    return [np.full((32, 32, 3), (30 * finding + 20, 30 * k + 20, blue), np.uint8) for k in range(n)]


@pytest.fixture(scope="module")
def examples() -> list[list[np.ndarray]]:
    return [plain(5, i, 200) for i in range(N)]


@pytest.fixture(scope="module")
def pictures() -> list[list[np.ndarray]]:
    """The fifth finding has one picture, the sixth none."""
    return [plain((4, 4, 4, 4, 1, 0)[i], i, 60) for i in range(N)]


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, (N, 6, 5, 5))


@pytest.fixture(scope="module")
def gallery(table, attributions, examples, pictures, maps) -> go.Figure:
    return figures.findings_gallery(table, attributions, examples, pictures, maps)


def pixels(image) -> np.ndarray:
    data = base64.b64decode(image.source.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def row_of(image) -> int:
    return int(image.y // figures.ROW)


def tiles(figure: go.Figure, row: int) -> list:
    return sorted((image for image in figure.layout.images if row_of(image) == row), key=lambda image: image.x)


def test_each_row_shows_its_own_examples_pictures_and_maps(gallery, pictures, maps):
    for i in range(N):
        shown = tiles(gallery, i)
        n = min(len(pictures[i]), 2)
        assert len(shown) == 4 + 2 * n
        for e, tile in enumerate(shown[:4]):
            assert np.abs(pixels(tile).mean((0, 1)) - (30 * i + 20, 30 * e + 20, 200)).max() < 4
        for p in range(n):
            picture, heat = shown[4 + 2 * p], shown[5 + 2 * p]
            assert np.abs(pixels(picture).mean((0, 1)) - (30 * i + 20, 30 * p + 20, 60)).max() < 4
            wanted = overlay(pictures[i][p], np.clip(maps[i, p], 0, None)).astype(int)
            seen = np.asarray(Image.fromarray(pixels(heat).astype(np.uint8)).resize((32, 32))).astype(int)
            assert np.abs(seen - wanted).mean() < 12


def test_histograms_count_every_image_on_one_scale(gallery, attributions):
    bars = [trace for trace in gallery.data if trace.type == "bar"]
    edges = {tuple(map(tuple, np.array(bar.customdata)[:, 1:])) for bar in bars}
    assert len(bars) == N and len(edges) == 1
    low, high = np.array(edges.pop()).T
    assert np.allclose(low[1:], high[:-1], rtol=1e-4, atol=1e-7) and np.abs(low).min() < 1e-9  # a bin begins at 0
    for bar, values in zip(bars, attributions, strict=True):
        counts = np.array(bar.customdata)[:, 0]
        # edges are rounded to 6 digits in the figure, and 0 is one of them
        wanted = [((values >= a - 1e-9) & (values < b - 1e-9)).sum() for a, b in zip(low, high, strict=True)]
        assert counts.tolist() == wanted and counts.sum() == len(values)
        assert np.allclose(np.array(bar.y) / min(bar.y), counts / counts.max(), atol=1e-4)


def test_a_mark_stands_at_the_mean(gallery, attributions):
    bars = [trace for trace in gallery.data if trace.type == "bar"]
    marks = [trace for trace in gallery.data if trace.type == "scatter"]
    low, high = bars[0].customdata[0][1], bars[0].customdata[-1][2]
    for i, (mark, values) in enumerate(zip(marks, attributions, strict=True)):
        value = low + (mark.x[0] - figures.BARS_AT) / figures.BARS_WIDE * (high - low)
        assert value == pytest.approx(values.mean(), abs=1e-4)
        assert i * figures.ROW < mark.y[0] < (i + 1) * figures.ROW


def test_each_row_says_class_latent_count_kind_and_reason(gallery, table):
    said = [a.text for a in sorted(gallery.layout.annotations, key=lambda a: a.y) if "by latent" in a.text]
    assert len(said) == N
    for text, row in zip(said, table.itertuples(), strict=True):
        assert f"by latent {row.latent}" in text and f"on in {row.n_on:,} of {row.n:,}" in text
        assert f"<b>{row.kind}</b>" in text and str(row.because)[:5] in text
    assert "without a label" in said[1] and "“starfish”" in said[4] and "…" in said[3]
    strips = [shape for shape in gallery.layout.shapes if shape.type == "rect"]
    assert [s.fillcolor for s in strips] == [figures.COLOURS[kind] for kind in KINDS]
    assert len(set(figures.COLOURS.values())) == len(KINDS)


def extent(annotation) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a text in px, by the metrics of a font like the figure's."""
    lines = annotation.text.split("<br>")
    size = annotation.font.size
    wide, tall = 0.0, 0.0
    for line in lines:
        own = 12 if "12px" in line else size
        bare = "".join(part.split(">")[-1] for part in line.split("<"))
        font = ImageFont.load_default(own)
        wide, tall = max(wide, font.getlength(bare)), tall + 1.4 * own
    left = annotation.x - wide * {"left": 0, "center": 0.5, "right": 1}[annotation.xanchor]
    top = annotation.y - tall * {"top": 0, "middle": 0.5, "bottom": 1}[annotation.yanchor]
    return left, left + wide, top, top + tall


def test_no_text_is_cut_off_or_lies_over_another_or_over_a_picture(gallery):
    boxes = [extent(a) for a in gallery.layout.annotations]
    assert all(
        box[1] < figures.BARS_AT
        for box, a in zip(boxes, gallery.layout.annotations, strict=True)
        if "by latent" in a.text
    )
    boxes += [(i.x, i.x + i.sizex, i.y, i.y + i.sizey) for i in gallery.layout.images]
    bottom, top = gallery.layout.yaxis.range
    assert bottom - top + gallery.layout.margin.t + gallery.layout.margin.b == gallery.layout.height
    for left, right, above, below in boxes:
        assert left >= 0 and right <= figures.INNER + 1 and above >= top and below <= bottom
    for a, b in itertools.combinations(boxes, 2):
        assert a[1] <= b[0] + 1 or b[1] <= a[0] + 1 or a[3] <= b[2] + 1 or b[3] <= a[2] + 1, (a, b)


def test_a_gallery_of_ten_stays_small():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (96, 96, 3)).astype(np.uint8) for _ in range(4)]  # the worst that JPEG can meet
    smooth = [np.asarray(Image.fromarray(n).resize((12, 12)).resize((96, 96), Image.Resampling.BICUBIC)) for n in noise]
    row = {"word": "duck", "latent": 1, "n": 9, "n_on": 9, "label": "a", "kind": "other", "because": "b"}
    many = pd.DataFrame([row] * 10)
    figure = figures.findings_gallery(many, [np.ones(9)] * 10, [smooth] * 10, [smooth] * 10, np.ones((10, 4, 5, 5)))
    assert len(figure.to_json()) < 300_000


def test_a_gallery_needs_one_entry_for_each_finding(table, attributions, examples, pictures, maps):
    with pytest.raises(ValueError, match="6 findings"):
        figures.findings_gallery(table, attributions[:5], examples, pictures, maps)
    assert figures.findings_gallery(table[:0], [], [], [], []).layout.width in (None, canvas.WIDTH)


def test_attributions_that_are_all_zero_have_a_histogram():
    edges = figures._edges([np.zeros(3)])
    assert np.isfinite(edges).all() and np.histogram(np.zeros(3), edges)[0].sum() == 3


def test_kinds_are_counted_in_their_order():
    table = pd.DataFrame({"kind": ["other", "artefact", "other", "compound", "riddle"]})
    figure = figures.kinds(table)
    (bar,) = figure.data
    assert dict(zip(bar.y, bar.x, strict=True)) == {
        "typography": 0, "compound": 1, "artefact": 1, "co-occurrence": 0, "polysemy": 0, "other": 2, "riddle": 1,
    }  # fmt: skip
    assert list(bar.y) == [*KINDS, "riddle"] == list(figure.layout.yaxis.categoryarray)
    assert bar.text == ("0", "1", "1", "0", "0", "2", "1")


def test_planted_kinds_stand_beside_the_guess():
    table = pd.DataFrame(
        {
            "kind": ["other", "artefact", "artefact", "artefact", "other"],
            "planted_kind": ["artefact", "artefact", "artefact", "co-occurrence", None],
        }
    )
    bar, heat = figures.kinds(table).data
    assert list(heat.x) == ["artefact", "co-occurrence", figures.NONE] and list(heat.y) == list(bar.y)
    counts = np.array(heat.customdata)
    at = {kind: i for i, kind in enumerate(heat.y)}
    assert counts[at["artefact"]].tolist() == [2, 1, 0] and counts[at["other"]].tolist() == [1, 0, 1]
    assert counts.sum() == 5
    # two of the three that were planted as artefacts
    assert heat.z[at["artefact"]] == pytest.approx((2 / 3, 1, 0), abs=1e-5)
    assert list(heat.text[at["artefact"]]) == ["2", "1", ""]
