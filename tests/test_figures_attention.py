"""The figures of attention: which tile stands where, what colour a map gets, and the numbers under it."""

import base64
import io
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import skimage.data
import torch
from PIL import Image, ImageFont
from plotly.colors import sample_colorscale, unlabel_rgb

from clipshift_core import augment, canvas, images
from clipshift_core.figures_attention import SHARE, attention_overlays, head_maps, overlay, rollout_and_last

NAMES = list(augment.VIEWS)
SHUFFLED = [NAMES[i] for i in (4, 0, 9, 2, 1, 8, 3, 7, 6, 5)]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Three images of ten flat views, each of its own grey, and maps whose one peak walks over the 4 x 3 patches."""
    grey = 20 * np.arange(10) + 5 * np.arange(3)[:, None]
    pictures = np.broadcast_to(grey[..., None, None, None], (3, 10, 40, 30, 3)).astype(np.uint8)
    maps = np.full((3, 10, 4, 3), 0.01)
    maps.reshape(3, 10, 12)[:, np.arange(10), np.arange(10)] = 0.2
    return {"pictures": pictures, "maps": maps, "similarity": 1 - np.arange(27).reshape(3, 9) / 100}


@pytest.fixture(scope="module")
def everything(arrays) -> dict[str, go.Figure]:
    pictures, maps = arrays["pictures"], arrays["maps"]
    heads = np.random.default_rng(0).random((10, 16, 7, 7))
    return {
        "overlays": attention_overlays(pictures, maps, NAMES, list("abc"), similarity=arrays["similarity"]),
        "bare": attention_overlays(pictures[:2], maps[:2], NAMES),
        "heads": head_maps(pictures[0, :4], maps[0, :4, None].repeat(5, 1), NAMES[:4]),
        "many_heads": head_maps(pictures[0], heads, NAMES),
        "rollout": rollout_and_last(pictures[:, 0], maps[:, 0], maps[:, 1]),
        "one_image": rollout_and_last(pictures[:1, 0], maps[:1, 0], maps[:1, 1]),
    }


def _pixels(placed: go.layout.Image) -> np.ndarray:
    data = placed.source.removeprefix("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=int)


def _peak(placed: go.layout.Image, shape: tuple[int, int]) -> int:
    """Number of the brightest patch."""
    light = _pixels(placed).sum(axis=2)
    row, column = np.argwhere(light == light.max()).mean(axis=0) / light.shape * shape
    return int(row) * shape[1] + int(column)


# the blend


def test_least_and_most_attention_have_the_two_ends_of_the_colour_map():
    """Inferno runs from #000004 to #FCFFA4 = (252, 255, 164); 0.6 of it over black is (0, 0, 2) and (151, 153, 98)."""
    assert SHARE == 0.6
    peak = np.zeros((5, 5))
    peak[1, 3] = 1e-3
    blend = overlay(np.zeros((50, 50, 3), np.uint8), peak).astype(int)
    # bicubic resizing overshoots below 0 beside the peak, and there is the least
    assert blend.reshape(-1, 3).min(axis=0).tolist() == [0, 0, 2]
    assert blend[15, 35].tolist() == [151, 153, 98]
    # a constant map is 0 everywhere; over white 0.4 x 255 = 102 is added
    assert np.ptp(overlay(np.full((9, 9, 3), 255, np.uint8), np.full((3, 3), 0.1)).reshape(-1, 3), axis=0).max() == 0
    assert overlay(np.full((9, 9, 3), 255, np.uint8), np.full((3, 3), 0.1))[4, 4].tolist() == [102, 102, 104]


def test_blend_is_a_bicubic_map_in_the_colours_plotly_gives_it():
    rng = np.random.default_rng(1)
    picture, attention = rng.integers(0, 256, (60, 48, 3), dtype=np.uint8), rng.random((6, 4)).astype(np.float32)
    # with antialias, torch takes the same cubic (a = -0.5) as PIL
    heat = torch.nn.functional.interpolate(
        torch.from_numpy(attention)[None, None], (60, 48), mode="bicubic", antialias=True
    )[0, 0].numpy()
    heat = (heat - heat.min()) / np.ptp(heat)
    colours = np.array([unlabel_rgb(c) for c in sample_colorscale("Inferno", heat.ravel().clip(0, 1))])
    grey = picture @ [0.299, 0.587, 0.114]
    expected = 0.6 * colours.reshape(60, 48, 3) + 0.4 * grey[..., None]
    assert np.abs(overlay(picture, attention) - expected).max() < 1.5


def test_scale_and_offset_of_a_map_do_not_matter():
    picture, attention = np.zeros((30, 30, 3), np.uint8), np.random.default_rng(2).random((7, 7))
    once = overlay(picture, attention).astype(int)
    for scaled in (1e-9 * attention, 1e6 + 7 * attention):
        assert np.abs(overlay(picture, scaled) - once).max() <= 1


def test_an_unknown_map_leaves_the_picture_alone(arrays):
    maps = arrays["maps"].copy()
    maps[1, 3, 2, 1] = np.nan
    similarity = arrays["similarity"].copy()
    similarity[1, 2] = np.nan
    figure = attention_overlays(arrays["pictures"], maps, NAMES, similarity=similarity)
    tiles = figure.layout.images
    assert tiles[2 * (10 + 3)].source == tiles[2 * (10 + 3) + 1].source
    texts = [a.text for a in figure.layout.annotations]
    assert texts.count("unknown") == 1 and "NaN" not in figure.to_json()


# what stands where


def test_each_view_stands_above_its_own_attention(arrays):
    at = [NAMES.index(name) for name in SHUFFLED]
    figure = attention_overlays(arrays["pictures"][:, at], arrays["maps"][:, at], SHUFFLED)
    tiles = figure.layout.images
    assert len(tiles) == 60
    for i in range(3):
        for x in range(10):
            view, blend = tiles[2 * (10 * i + x) : 2 * (10 * i + x) + 2]
            assert view.x == blend.x == x and blend.y == view.y + 1
            assert abs(_pixels(view).mean() - (20 * x + 5 * i)) < 2, "reading order, whatever the order of the names"
            assert _peak(blend, (4, 3)) == x
    assert tiles[0].y < tiles[20].y - 2 < tiles[40].y - 4, "one block of two lines an image"


def test_the_number_under_a_map_is_the_one_given(arrays, everything):
    numbers = [a for a in everything["overlays"].layout.annotations if re.fullmatch(r"[\d.]+", a.text)]
    tiles = everything["overlays"].layout.images
    assert len(numbers) == 27
    for i, expected in enumerate(arrays["similarity"]):
        for view, (number, value) in enumerate(zip(numbers[9 * i : 9 * i + 9], expected, strict=True), start=1):
            assert float(number.text) == pytest.approx(value, abs=5e-4)
            assert number.x == view and 0.4 < number.y - tiles[2 * (10 * i + view) + 1].y < 0.5
    assert not any(re.fullmatch(r"[\d.]+", a.text) for a in everything["bare"].layout.annotations)


def test_every_view_is_named_in_order(everything):
    for name in ("overlays", "bare"):
        header = [a for a in everything[name].layout.annotations if a.y == -0.5 and a.yanchor == "bottom"]
        header = sorted((a for a in header if len(a.text) > 1), key=lambda a: a.x)
        spoken = [a.text.replace("-<br>", "-").replace("<br>", " ") for a in header]
        assert spoken == [canvas.LABELS[n] for n in NAMES]
    assert [a.text for a in everything["overlays"].layout.annotations if a.xanchor == "left"] == ["a", "b", "c"]


def test_heads_stand_in_order_after_view_and_mean():
    """Head h attends to patch h alone; the mean over heads of head 3 with thrice the weight peaks there."""
    maps = np.zeros((2, 4, 2, 2))
    maps.reshape(2, 4, 4)[:, np.arange(4), np.arange(4)] = [1, 1, 1, 3]
    pictures = np.full((2, 32, 32, 3), 50, np.uint8)
    figure = head_maps(pictures, maps, ["blur", "original"])
    tiles = figure.layout.images
    assert len(tiles) == 12 and [t.y for t in tiles] == [0] * 6 + [1] * 6
    for row in (tiles[:6], tiles[6:]):
        assert np.all(np.diff([t.x for t in row]) == pytest.approx(1))
        assert [_peak(t, (2, 2)) for t in row[1:]] == [3, 0, 1, 2, 3]
    texts = [a.text for a in figure.layout.annotations]
    assert texts == ["View", "Mean", "Head 0", "Head 1", "Head 2", "Head 3", "Original", "Gaussian blur"]


def test_rollout_stands_below_the_last_block(everything):
    tiles = everything["rollout"].layout.images
    assert [t.y for t in tiles] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [_peak(t, (4, 3)) for t in tiles[3:]] == [0, 0, 0, 1, 1, 1]
    assert [a.text for a in everything["rollout"].layout.annotations] == ["Original", "Last block", "Rollout"]


# what every figure keeps to


def test_every_figure_fits_the_page_and_says_what_its_colours_mean(everything):
    for name, figure in everything.items():
        layout, bar = figure.layout, figure.data[0].marker.colorbar
        assert layout.template.layout.width == canvas.WIDTH and 200 < layout.height < 1400, name
        title = ImageFont.load_default(19).getlength(layout.title.text)
        assert title < canvas.WIDTH - bar.len - 60, f"{name}: the title runs into the colour bar"
        assert ImageFont.load_default(14).getlength(layout.title.subtitle.text) < canvas.WIDTH - 30, name
        assert bar.ticktext == ("0, least", "1, most") and bar.tickvals == (0, 1)
        right = max(tile.x for tile in layout.images) + 0.5
        assert right <= layout.xaxis.range[1] + 1e-3, f"{name}: tiles are cut off"
        lowest = max([t.y + 0.47 for t in layout.images] + [a.y + 0.05 for a in layout.annotations])
        assert lowest < layout.yaxis.range[0], f"{name}: text is cut off"


def test_the_colour_bar_shows_what_is_seen_over_grey(everything):
    """0.6 x (0, 0, 4) + 0.4 x 128 = (51, 51, 53), and 0.6 x (252, 255, 164) + 51 = (202, 204, 149), cut off."""
    scale = everything["overlays"].data[0].marker.colorscale
    assert scale[0] == (0, "rgb(51, 51, 53)") and scale[-1] == (1, "rgb(202, 204, 149)")


def test_real_views_of_photographs_stay_small_and_come_out_alike():
    photos = [images.resize(getattr(skimage.data, n)(), 224) for n in ("astronaut", "coffee", "chelsea")]
    pictures = np.array([augment.views(p, seed=0, image_id=str(i)) for i, p in enumerate(photos)])
    maps = np.random.default_rng(3).random((3, 10, 7, 7))
    figure = attention_overlays(pictures, maps, NAMES)
    assert len(figure.to_json()) < 500_000
    assert canvas.data_sha256(figure) == canvas.data_sha256(attention_overlays(pictures, maps, NAMES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": NAMES[:9]}, "9 names"),
        ({"similarity": np.ones((3, 10))}, r"\(3, 10\)"),
        ({"maps": np.ones((3, 9, 4, 3))}, r"\(3, 9, 4, 3\)"),
        ({"maps": np.ones((3, 10, 12))}, "do not belong"),
    ],
)
def test_what_does_not_belong_together_is_refused(arrays, change, message):
    given = {"names": NAMES, **arrays, **change}
    with pytest.raises(ValueError, match=message):
        attention_overlays(given["pictures"], given["maps"], given["names"], similarity=given["similarity"])
