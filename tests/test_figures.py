"""Every figure: the numbers it was given, the house's colours and order, text that fits; and what export writes."""

import base64
import hashlib
import io
import itertools
import json
import os

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from PIL import Image, ImageFont
from skimage.color import deltaE_ciede2000, rgb2lab

from clipshift_core import augment, canvas, figures, stats

NINE = list(figures.ORDER[1:])
RESAMPLING = {"n_resamples": 200, "seed": 0}
PROVENANCE = {"commit": "0123abc", "notebook": "02", "profile": "demo", "digest": "ff"}
ALT = "Bars of the mean L2 distance for each of the nine augmentations."


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Twenty images under the nine, in shuffled order of augmentations, noise furthest."""
    rng = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(rng.permutation(NINE)):
        l2 = rng.gamma(9, (9 if name == "noise" else 1 + 0.3 * i) / 9, 20)
        rows += [
            {
                "image_id": f"scene-{k}",
                "augmentation": name,
                "l2": v,
                "l2_normalised": v / 10,
                "cosine": 1 - v * v / 200,
            }
            for k, v in enumerate(l2)
        ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def everything(table, images) -> dict[str, go.Figure]:
    """Each figure once, and the hard cases: one image, nothing separated, missing levels, several models."""
    distance = _distance()
    one = table[table["image_id"] == "scene-0"]
    steps = np.arange(0, 400, 10)
    history = pd.DataFrame({"step": steps, "loss": np.exp(-steps / 100), "accuracy": np.where(steps % 50, np.nan, 0.5)})
    scores = pd.DataFrame(
        {
            "task": ["kind", "colour"],
            "mean": [0.9, 0.5],
            "low": [0.88, 0.4],
            "high": [0.92, 0.6],
            "n": 50,
            "chance": 0.1,
        }
    )
    two = [frame.assign(model=name) for name in ("small", "large") for frame in (scores,)]
    factors = pd.DataFrame({"kind": list("aabbbc"), "second": ["x", None, "", "x", "x", None]})
    return {
        "l2_bars": figures.l2_bars(stats.bootstrap_table(table, "l2", **RESAMPLING)),
        "one_image_bars": figures.l2_bars(stats.bootstrap_table(one, "l2", **RESAMPLING)),
        "metric_density": figures.metric_density(table, "cosine"),
        "one_image_density": figures.metric_density(one, "l2"),
        "ranking": figures.ranking(stats.ranking(table, "l2", **RESAMPLING)),
        "one_image_ranking": figures.ranking(stats.ranking(one, "l2", **RESAMPLING)),
        "cosine_heatmap": figures.cosine_heatmap(table, 12),
        "metric_heatmap": figures.metric_heatmap(table, ["l2", "l2_normalised", "cosine"]),
        "pairwise_heatmap": figures.pairwise_heatmap(distance, list(figures.ORDER)),
        "dendrogram": figures.dendrogram(stats.ward(distance), list(figures.ORDER)),
        "zero_shot_bars": figures.zero_shot_bars(scores),
        "zero_shot_two": figures.zero_shot_bars(pd.concat(two)),
        "training_curves": figures.training_curves(history, labels={"loss": "Loss (nats)"}),
        "factor_counts": figures.factor_counts(factors, ["kind", "second"]),
        "image_grid": figures.image_grid(images, [f"a picture of noise {i}" for i in range(7)], title="Noise"),
        "views_grid": figures.views_grid([[im] * 10 for im in images[:2]], augment.VIEWS),
    }


def _distance() -> np.ndarray:
    """Ten points on a line: two groups and noise far away."""
    place = np.array([0, 9, 0.1, 0.3, 2, 0.6, 1.0, 2.3, 0.7, 2.9])
    return np.abs(place[:, None] - place)


# the house's colours, names and order


def test_order_and_names_are_those_of_the_augmentations():
    assert tuple(figures.ORDER) == tuple(augment.VIEWS)
    assert len(set(figures.LABELS.values())) == len(set(canvas.SYMBOLS.values())) == 10
    assert canvas.in_order(["elastic", "mine", "noise", "original"]) == ["original", "noise", "elastic", "mine"]


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _linear(colours: list[str]) -> np.ndarray:
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("vision", VISION)
def test_no_two_augmentations_look_alike(vision):
    light = np.clip(_linear([figures.COLOURS[n] for n in NINE]) @ np.array(VISION[vision]).T, 0, 1)
    seen = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen)
    closest = min(float(deltaE_ciede2000(a, b)) for a, b in itertools.combinations(lab, 2))
    assert closest > (29 if vision == "normal" else 14)


def test_every_colour_stands_out_from_white():
    luminance = _linear([figures.COLOURS[n] for n in NINE]) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() > 2.1


# what every figure keeps to


def _walk(value, path=""):
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner, path)


def test_numbers_are_plain_rounded_lists(everything):
    for name, figure in everything.items():
        for path, value in _walk(figure.to_plotly_json()["data"]):
            assert not isinstance(value, np.ndarray | np.generic), f"{name}{path} would be written as bdata"
            if isinstance(value, float) and not path.endswith(".colorscale"):
                assert value == float(f"{value:.6g}"), f"{name}{path}"
        assert "bdata" not in figure.to_json()


def test_every_figure_fits_the_page_and_says_what_it_shows(everything):
    for name, figure in everything.items():
        layout = figure.layout
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1400, name
        for text, size in ((layout.title.text, 19), (layout.title.subtitle.text, 14)):
            width = ImageFont.load_default(size).getlength(text)
            assert width < canvas.WIDTH - 30, f"{name}: {text!r} is {width:.0f} px wide"
        assert len(layout.title.text) >= 5, name


def test_every_visible_value_axis_has_a_title_with_its_unit(everything):
    for name in ("l2_bars", "metric_density", "ranking"):
        assert "(" in everything[name].layout.xaxis.title.text
    assert everything["zero_shot_bars"].layout.yaxis.title.text == "Accuracy (%)"
    assert "units of 1 − cosine" in everything["dendrogram"].layout.xaxis.title.text
    assert everything["factor_counts"].layout.xaxis2.title.text == "Images"
    assert everything["training_curves"].layout.xaxis2.title.text == "Training step"


def test_published_order_whatever_the_order_of_the_table(everything):
    expected = [figures.LABELS[n] for n in NINE]
    assert list(everything["l2_bars"].data[0].y) == expected
    assert list(everything["metric_density"].layout.yaxis.ticktext) == expected
    assert list(everything["cosine_heatmap"].data[0].y) == expected
    assert list(everything["pairwise_heatmap"].data[0].x) == ["Original", *expected]


def test_one_colour_for_an_augmentation_everywhere(everything):
    expected = [figures.COLOURS[n] for n in NINE]
    assert list(everything["l2_bars"].data[0].marker.line.color) == expected
    assert [t.line.color for t in everything["metric_density"].data[::2]] == expected
    ranked = everything["ranking"].data[0]
    names = {figures.LABELS[n]: n for n in NINE}
    assert [figures.COLOURS[names[y.split("  ")[1]]] for y in ranked.y] == list(ranked.marker.line.color)
    assert [canvas.SYMBOLS[names[y.split("  ")[1]]] for y in ranked.y] == list(ranked.marker.symbol)


# the numbers of each


def test_bars_hold_mean_std_and_interval(table, everything):
    bar, dot = everything["l2_bars"].data[0], everything["l2_bars"].data[2]
    for i, name in enumerate(NINE):
        values = table.loc[table["augmentation"] == name, "l2"]
        interval = stats.bootstrap_mean(values, **RESAMPLING)
        assert bar.x[i] == dot.x[i] == pytest.approx(values.mean(), rel=1e-5)
        assert bar.error_x.array[i] == pytest.approx(values.std(), rel=1e-5)
        assert dot.x[i] + dot.error_x.array[i] == pytest.approx(interval.high, rel=1e-5)
        assert dot.x[i] - dot.error_x.arrayminus[i] == pytest.approx(interval.low, rel=1e-5)


def test_an_unknown_interval_is_not_drawn(everything):
    assert everything["one_image_bars"].data[2].error_x.visible is False
    assert everything["one_image_ranking"].data[1].error_x.visible is False
    texts = [a.text for a in everything["one_image_ranking"].layout.annotations]
    assert sum("interval unknown" in t for t in texts) == 9
    assert "1 image " in everything["one_image_ranking"].layout.title.subtitle.text


def test_ridges_are_the_density_at_one_height(table, everything):
    for row, name in enumerate(NINE):
        ridge, median = everything["metric_density"].data[2 * row : 2 * row + 2]
        values = table.loc[table["augmentation"] == name, "cosine"].to_numpy()
        x, y = np.array(ridge.x[:120]), np.array(ridge.y[:120]) + row
        assert x.max() <= 1 and y.max() == pytest.approx(0.88, abs=1e-4)
        expected = stats.density(values, np.linspace(x[0], x[-1], 120))
        np.testing.assert_allclose(y, 0.88 * expected / expected.max(), atol=2e-3)
        assert median.x == pytest.approx((np.median(values),) * 2, rel=1e-5)


def test_ranking_marks_neighbours_that_are_not_separated(table):
    ranked = stats.ranking(table, "l2", **RESAMPLING)
    figure = figures.ranking(ranked)
    assert [y.split("  ")[0] for y in figure.data[0].y] == [str(i) for i in range(1, 10)]
    assert list(figure.data[0].x) == pytest.approx(ranked["mean"].tolist(), rel=1e-5)
    apart = ranked["separated"].tolist()[:-1]
    brackets = [(s.y0, s.y1) for s in figure.layout.shapes]
    assert [round((a + b) / 2 - 0.5) for a, b in brackets] == [i for i, s in enumerate(apart) if not s]
    assert 0 < len(brackets) < 8
    ranked["separated"] = True
    assert "all neighbours separated" in figures.ranking(ranked).layout.title.subtitle.text


def test_heatmap_of_images_takes_the_first_and_sorts_them(table, everything):
    heat = everything["cosine_heatmap"].data[0]
    ids = list(heat.customdata[0])
    assert sorted(ids) == sorted(table["image_id"].drop_duplicates()[:12])
    wide = table.pivot(index="image_id", columns="augmentation", values="cosine")[NINE]
    np.testing.assert_allclose(np.array(heat.z).T, wide.loc[ids], rtol=1e-5)
    assert np.all(np.diff(np.array(heat.z).mean(axis=0)) >= -1e-6)


def test_metric_heatmap_colours_movement_and_writes_means(table, everything):
    heat = everything["metric_heatmap"].data[0]
    means = table.groupby("augmentation")[["l2", "l2_normalised", "cosine"]].mean().sort_values("l2", ascending=False)
    assert list(heat.y) == [figures.LABELS[n] for n in means.index] and heat.y[0] == "Gaussian noise"
    np.testing.assert_allclose(np.array(heat.text, dtype=float), means, rtol=6e-3)
    # most moved is 1 in every column, whether the metric rises or falls with movement
    assert [max(column) for column in zip(*heat.z, strict=True)] == [1, 1, 1]
    assert list(heat.z[0]) == [1, 1, 1]


def test_pairwise_heatmap_sorts_rows_and_columns_together():
    distance, shuffled = _distance(), np.random.default_rng(0).permutation(10)
    names = [figures.ORDER[i] for i in shuffled]
    z = figures.pairwise_heatmap(distance[np.ix_(shuffled, shuffled)], names).data[0].z
    for i, j in itertools.product(range(10), repeat=2):
        assert z[i][j] is None if i == j else z[i][j] == pytest.approx(distance[i, j])


def test_dendrogram_draws_each_merge_in_the_colour_of_its_cluster():
    linkage = stats.ward(_distance())
    figure = figures.dendrogram(linkage, list(figures.ORDER))
    links = [t for t in figure.data if t.mode == "lines"]
    assert sorted(t.x[1] for t in links) == pytest.approx(sorted(linkage[:, 2]), rel=1e-5)
    cut = stats.cut_height(linkage)
    assert figure.layout.shapes[0].x0 == pytest.approx(cut, rel=1e-5)
    leaves = {label: t.marker.color for t in figure.data if t.mode == "markers" for label in t.text}
    at = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert len(leaves) == 10 and set(at.values()) == set(leaves)
    assert len(set(leaves.values())) == len(set(stats.clusters(linkage)))
    for link in links:
        feet = [y for x, y in zip(link.x, link.y, strict=True) if x == 0]
        for foot in feet:
            assert link.line.color == (leaves[at[foot]] if link.x[1] <= cut else "#8A8A8A")
    cluster = dict(zip(figures.ORDER, stats.clusters(linkage), strict=True))
    for a, b in itertools.combinations(figures.ORDER, 2):
        assert (leaves[figures.LABELS[a]] == leaves[figures.LABELS[b]]) == (cluster[a] == cluster[b])


def test_zero_shot_bars_and_chance(everything):
    figure = everything["zero_shot_bars"]
    assert list(figure.data[0].y) == [90, 50] and list(figure.data[0].error_y.array) == pytest.approx([2, 10])
    assert [s.y0 for s in figure.layout.shapes] == [10, 10]
    two = everything["zero_shot_two"]
    assert [t.name for t in two.data] == ["small", "large", "chance"] and len(two.layout.shapes) == 2


def test_training_curves_skip_what_was_not_measured(everything):
    loss, accuracy = everything["training_curves"].data
    assert len(loss.x) == 40 and list(accuracy.x) == list(range(0, 400, 50))
    assert everything["training_curves"].layout.annotations[0].text == "Loss (nats)"


def test_factor_counts_are_counts(everything):
    kind, second = everything["factor_counts"].data
    assert dict(zip(kind.y, kind.x, strict=True)) == {"b": 3, "a": 2, "c": 1} and kind.y[0] == "b"
    assert dict(zip(second.y, second.x, strict=True)) == {"x": 3, "(none)": 3}


def _pixels(source: str) -> np.ndarray:
    kind, data = source.split(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_galleries_place_each_image_above_its_caption():
    colours = np.zeros((5, 40, 40, 3), np.uint8)
    colours[np.arange(5), :, :, np.arange(5) % 3] = 200
    figure = figures.image_grid(colours, [f"tile {i}" for i in range(5)], columns=3, title="Tiles", size=16)
    assert [(p.x, round(p.y) > 0) for p in figure.layout.images] == [(i % 3, i >= 3) for i in range(5)]
    for i, placed in enumerate(figure.layout.images):
        pixels = _pixels(placed.source)
        assert pixels.shape == (16, 16, 3) and pixels.mean(axis=(0, 1)).argmax() == i % 3
        caption = figure.layout.annotations[i]
        assert caption.text == f"tile {i}" and caption.x == placed.x and caption.y > placed.y
    with pytest.raises(ValueError, match="5 images but 1 captions"):
        figures.image_grid(colours, ["one"], title="Tiles")


def test_views_are_sorted_into_the_reading_order():
    names = list(reversed(augment.VIEWS))
    image = np.array([np.full((8, 8, 3), 20 * augment.VIEWS.index(n), np.uint8) for n in names])
    figure = figures.views_grid([image, image], names)
    grey = [_pixels(p.source).mean() for p in figure.layout.images]
    assert np.abs(np.array(grey) - np.tile(20 * np.arange(10), 2)).max() < 3
    assert figure.layout.annotations[0].text == "Original"


def test_galleries_stay_small(images):
    figure = figures.views_grid(
        np.random.default_rng(0).integers(0, 256, (5, 10, 224, 224, 3), np.uint8), augment.VIEWS
    )
    assert len(figure.to_json()) < 1_000_000  # the worst case: fifty images of pure noise


# export


@pytest.fixture
def no_browser(monkeypatch):
    canvas._browser.cache_clear()
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")
    yield
    canvas._browser.cache_clear()


def test_without_a_browser_html_and_record_and_one_note(everything, tmp_path, no_browser, capsys):
    (tmp_path / "02-l2-bars.png").write_bytes(b"of an earlier run")
    figure = everything["l2_bars"]
    before = figure.to_json()
    for name in ("02-l2-bars", "02-again"):
        paths = figures.export(figure, name, tmp_path, alt=ALT, provenance=PROVENANCE)
        assert [p.name for p in paths] == [f"{name}.html", f"{name}.json"]
    assert not (tmp_path / "02-l2-bars.png").exists()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("without PNG") == 1 and "/nowhere/chromium" in printed.err
    assert figure.to_json() == before
    page = (tmp_path / "02-l2-bars.html").read_text()
    assert '<script src="plotly.min.js"></script>' in page and (tmp_path / "plotly.min.js").stat().st_size > 1e6
    assert len(page) < 50_000 and "https://" not in page.replace("https://plot.ly", "")
    assert f'aria-label="{ALT}"' in page and f"<figcaption>{ALT}</figcaption>" in page
    assert '"showSendToCloud": false' in page


def test_record_holds_where_the_figure_came_from(everything, tmp_path, no_browser):
    html, record = figures.export(everything["l2_bars"], "02-l2", tmp_path, alt=ALT, provenance=PROVENANCE)
    read = json.loads(record.read_text())
    assert read.items() >= PROVENANCE.items()
    assert read["alt"] == ALT and read["title"] == everything["l2_bars"].layout.title.text
    assert read["files"] == {"02-l2.html": hashlib.sha256(html.read_bytes()).hexdigest()}
    assert read["data_sha256"] == canvas.data_sha256(everything["l2_bars"])
    first = html.read_bytes()
    figures.export(everything["l2_bars"], "02-l2", tmp_path, alt=ALT, provenance={**PROVENANCE, "commit": "another"})
    assert html.read_bytes() == first, "a page must change only if its figure does"


def test_data_hash_follows_the_data_not_the_layout(everything):
    for name in ("l2_bars", "image_grid"):
        figure = go.Figure(everything[name])
        digest = canvas.data_sha256(figure)
        figure.update_layout(title_text="Another title")
        assert canvas.data_sha256(figure) == digest
        figure.data[0].x = [v + 0.01 for v in figure.data[0].x]
        assert canvas.data_sha256(figure) != digest
    figure = go.Figure(everything["image_grid"])
    figure.layout.images[0].source += "AA"
    assert canvas.data_sha256(figure) != canvas.data_sha256(everything["image_grid"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "l2-bars"}, "02-l2-by-augmentation"),
        ({"name": "02-L2 bars"}, "02-l2-by-augmentation"),
        ({"name": "../02-bars"}, "02-l2-by-augmentation"),
        ({"alt": ""}, "alt text"),
        ({"provenance": {"commit": "1", "profile": "demo"}}, "notebook, digest"),
    ],
)
def test_export_refuses_what_could_not_be_traced(everything, tmp_path, change, message):
    arguments = {"name": "02-bars", "alt": ALT, "provenance": PROVENANCE} | change
    with pytest.raises(ValueError, match=message):
        figures.export(everything["l2_bars"], arguments.pop("name"), tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_renderer_falls_back_to_the_mimetype(no_browser, monkeypatch):
    monkeypatch.setattr(pio.renderers, "default", pio.renderers.default)
    assert figures.use_renderer() == "plotly_mimetype"


def test_a_browser_that_cannot_start_is_no_browser(tmp_path, monkeypatch, capsys):
    """kaleido's own server would wait for it for ever."""
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert os.access(broken, os.X_OK)
    canvas.kaleido.stop_sync_server(silence_warnings=True)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    canvas._browser.cache_clear()
    assert canvas.browser() is None
    assert "did not draw (BrowserFailedError" in capsys.readouterr().err
    canvas._browser.cache_clear()


@pytest.mark.browser
def test_with_a_browser_a_picture_with_its_alt_text(everything, tmp_path, monkeypatch):
    if canvas.browser() is None and os.environ.get("CI") != "true":
        pytest.skip("there is a browser, but it does not draw")
    monkeypatch.setattr(pio.renderers, "default", pio.renderers.default)
    assert figures.use_renderer() == "plotly_mimetype+png"
    paths = figures.export(everything["l2_bars"], "02-l2", tmp_path, alt=ALT, provenance=PROVENANCE)
    assert [p.suffix for p in paths] == [".html", ".png", ".json"]
    with Image.open(paths[1]) as picture:
        assert picture.width == 2 * canvas.WIDTH
        assert picture.info["Description"] == ALT
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (colours == 255).all(axis=1).mean() > 0.5
    noise = [int(figures.COLOURS["noise"][i : i + 2], 16) for i in (1, 3, 5)]
    assert (colours == noise).all(axis=1).any()
    record = json.loads(paths[2].read_text())
    assert record["files"]["02-l2.png"] == hashlib.sha256(paths[1].read_bytes()).hexdigest()


def test_labels_of_names_that_are_not_ours():
    assert canvas.label("random_brightness_contrast") == "Brightness-contrast"
    assert canvas.label("object_kind") == "Object kind" and canvas.label("cosine") == "Cosine similarity"
    assert canvas.short(4.5) == "4.50" and canvas.short(123.0) == "123" and canvas.short(0.08) == "0.0800"
    assert canvas.numbers([1 / 3, float("nan"), np.float32(2)]) == [0.333333, None, 2.0]


def test_noise_fits_into_a_page():
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(canvas.data_uri(noise, 224).partition(",")[2]))))
    assert shown.shape == (224, 224, 3) and np.abs(shown.astype(float) - noise).mean() < 30
