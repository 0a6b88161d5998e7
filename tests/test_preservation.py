"""The kernels against a plain numpy reading of paper A, one image at a time, and against scikit-image."""

from functools import cache

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from clipshift_core import pairs, preservation


def plain_patch(a: np.ndarray, b: np.ndarray, wraps: bool) -> float:
    height, width = a.shape[0] // 4, a.shape[1] // 4
    scores = []
    for row, col in np.ndindex(4, 4):
        at = slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)
        p, q = (a[at], b[at]) if wraps else (a[at].astype(float), b[at].astype(float))
        scores.append(1 / (1 + np.mean((p - q) ** 2) / 255**2))
    return float(np.mean(scores))


def grey(a: np.ndarray) -> np.ndarray:
    return 0.299 * a[..., 0] + 0.587 * a[..., 1] + 0.114 * a[..., 2]


def plain_edge(a: np.ndarray, b: np.ndarray) -> float:
    maps = []
    for image in (a, b):
        down, across = np.gradient(grey(image))
        edge = (np.abs(across) + np.abs(down)) / 2
        maps.append(edge / edge.max() if edge.max() > 0 else edge)
    return float(1 - np.mean(np.abs(maps[0] - maps[1])))


def plain_detail(a: np.ndarray, b: np.ndarray) -> float:
    """NaN (here: the mean of nothing) is the published answer where no patch of the original has detail."""
    height, width = a.shape[0] // 8, a.shape[1] // 8
    ratios = []
    for row, col in np.ndindex(8, 8):
        at = slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)
        original, view = grey(a[at]).std(), grey(b[at]).std()
        if original >= 1e-6:
            ratios.append(np.exp(-abs(np.log(view / original))) if view >= 1e-6 else 0.0)
    return float(np.mean(ratios)) if ratios else float("nan")


def plain_attention(a: np.ndarray, b: np.ndarray) -> float:
    a, b = ((m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else np.zeros_like(m) for m in (a, b))
    return float(1 / (1 + np.mean((a - b) ** 2)))


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(structural_similarity(a, b, channel_axis=-1))


def plain_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float("inf") if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b))


ORACLES = {
    "published": (
        lambda o, v: preservation.patch_similarity(o, v, kernel="published"),
        lambda a, b: plain_patch(a, b, wraps=True),
    ),
    "corrected": (preservation.patch_similarity, lambda a, b: plain_patch(a, b, wraps=False)),
    "edge": (preservation.edge_preservation, plain_edge),
    "detail": (preservation.detail_preservation, plain_detail),
    "ssim": (preservation.ssim, plain_ssim),
    "psnr": (preservation.psnr, plain_psnr),
}
JOINT = {"patch": "corrected", "patch_published": "published", "edge": "edge", "detail": "detail", "ssim": "ssim"}
"""What `of_pixels` calls the oracles; its mse is squared in grey levels and has a test of its own."""


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch) -> str:
    """Both of the ways to compare pixels, on a CPU."""
    monkeypatch.setattr(preservation, "_COMPILED", {"cpu"} if request.param == "compiled" else set())
    return request.param


def gallery(height: int, width: int) -> np.ndarray:
    """Images that stress the conventions: constant, black, white, one pixel, one-pixel patterns, smooth, random."""
    rng = np.random.default_rng(0)
    shape = (height, width, 3)
    row, col = np.mgrid[:height, :width]
    one = np.zeros(shape, np.uint8)
    one[0, 0] = 255
    faint = np.full(shape, 254, np.uint8)
    faint[height // 2, width // 2, 2] = 255
    columns = np.repeat((col % 2 * 255)[..., None], 3, axis=2)
    board = np.repeat(((row + col) % 2 * 255)[..., None], 3, axis=2)
    smooth = np.stack([row * 255 // height, col * 255 // width, (row + col) * 127 // max(height, width)], axis=2)
    noise = rng.integers(0, 256, shape)
    near = np.clip(smooth + rng.integers(-9, 10, shape), 0, 255)
    half = np.where((col < width // 2)[..., None], noise, 130)
    flat = [np.broadcast_to(np.uint8(colour), shape) for colour in (0, 255, (7, 201, 93), (253, 254, 251))]
    images = [*flat, one, faint, columns, board, smooth, noise, near, half]
    return np.stack([image.astype(np.uint8) for image in images])


def every_pair(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image as the original of all of them, itself included."""
    pixels = torch.from_numpy(images)
    return pixels, pixels[None].expand(len(images), *images.shape)


@cache
def plainly(name: str, size: tuple[int, int]) -> np.ndarray:
    images = gallery(*size)
    return np.array([[ORACLES[name][1](a, b) for b in images] for a in images])


@pytest.mark.parametrize("size", [(32, 48), (97, 61), (43, 21), (16, 16)])
@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_plain_version_for_every_pair(name, size, way):
    result = ORACLES[name][0](*every_pair(gallery(*size))).numpy()
    expected = plainly(name, size)
    undefined = np.isnan(expected)
    # the published formula is undefined for originals without any detail, and nowhere else
    assert undefined.any(axis=1).nonzero()[0].tolist() == ([0, 1, 2, 3] if name == "detail" else [])
    np.testing.assert_allclose(result[~undefined], expected[~undefined], rtol=0, atol=1e-5)
    assert not np.isnan(result).any()
    if name != "psnr":
        np.testing.assert_allclose(result.diagonal(), 1, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 48), (97, 61), (43, 21), (16, 16), (8, 200)])
def test_all_at_once_are_each_by_itself_and_the_plain_versions(size, way):
    original, views = every_pair(gallery(*size))
    found = preservation.of_pixels(original, views)
    assert list(found) == list(preservation.OF_PIXELS) == [*JOINT, "mse"]
    for name, kernel in preservation.OF_PIXELS.items():
        assert found[name].dtype == torch.float32 and found[name].shape == views.shape[:2]
        assert torch.equal(found[name], kernel(original, views)), name
    for name, oracle in JOINT.items():
        expected = plainly(oracle, size)
        defined = ~np.isnan(expected)
        np.testing.assert_allclose(found[name].numpy()[defined], expected[defined], rtol=0, atol=1e-5, err_msg=name)
    squares = (views.double() - original[:, None].double()).square().mean((2, 3, 4))
    np.testing.assert_allclose(found["mse"].numpy(), squares.numpy(), rtol=1e-6)


def test_both_ways_give_the_same_number(monkeypatch):
    """To 1e-6, where neither of them has rounded more than its last quotients; 45 rows are not whole strips of 32."""
    rng = np.random.default_rng(2)
    smooth = gallery(45, 70)[8].astype(int)
    images = np.clip(smooth + rng.integers(-40, 41, (6, 1, 1, 3)) + rng.integers(-3, 4, (6, *smooth.shape)), 0, 255)
    pixels = torch.from_numpy(images.astype(np.uint8))
    fast = preservation.of_pixels(pixels[:1], pixels[None, 1:])
    monkeypatch.setattr(preservation, "_COMPILED", set())
    for name, scores in preservation.of_pixels(pixels[:1], pixels[None, 1:]).items():
        torch.testing.assert_close(fast[name], scores, rtol=1e-6, atol=1e-6, msg=name)


def test_a_kernel_that_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch):
    def nowhere(self):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", nowhere)
    assert pairs.compiled(lambda a, b: a / b)(1.0, 0.0) == np.inf


def test_published_patch_similarity_cannot_fall_below_0_996(way):
    """All 256 differences at once, then the worst one in every pixel: black against white reads as nearly equal."""
    differences = np.arange(256, dtype=np.uint8)
    worst = int((differences * differences).max())
    assert worst == 249
    floor = 1 / (1 + worst / 255**2)
    assert 0.996 < floor < 0.9962
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 8, 8, 3)
    views = levels.unflatten(0, (1, 256))
    published = preservation.patch_similarity(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), views, "published")[0]
    assert published.min().item() == pytest.approx(floor, abs=1e-7)
    assert published[255].item() == pytest.approx(1 / (1 + 1 / 255**2), abs=1e-7)  # 255 wraps to -1
    assert published[[0, 16, 240]].tolist() == [1, 1, 1]  # 16 squared is 256, hence 0
    corrected = preservation.patch_similarity(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), views)[0]
    assert corrected[255].item() == 0.5 == corrected.min().item()


@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(1, 256))
@settings(deadline=None, max_examples=30)
def test_published_floor_holds_for_any_pixels(seed, low, span):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(low, min(256, low + span), (2, 9, 13, 3), dtype=np.uint8))
    assert preservation.patch_similarity(images[:1], images[None, 1:], "published").item() >= 65025 / 65274 - 1e-7


def test_rows_and_columns_left_over_are_not_read(way):
    original = torch.from_numpy(gallery(97, 97)[9:10])
    view = original[None].clone()
    view[..., 96, :, :] = 0
    view[..., :, 96, :] = 0
    for kernel in ("published", "corrected"):
        assert preservation.patch_similarity(original, view, kernel).item() == 1
    assert preservation.detail_preservation(original, view).item() == 1
    assert preservation.mse(original, view).item() > 0


def test_conventions_where_the_formula_is_undefined(way):
    images = torch.from_numpy(gallery(32, 48))
    black, white, one, board = (images[i : i + 1] for i in (0, 1, 4, 7))
    assert preservation.edge_preservation(black, white[None]).item() == 1
    edge_of_one = plain_edge(black[0].numpy(), one[0].numpy())
    assert preservation.edge_preservation(black, one[None]).item() == pytest.approx(edge_of_one, abs=1e-6) != 1
    assert preservation.detail_preservation(black, white[None]).item() == 1
    assert preservation.detail_preservation(black, board[None]).item() == 0
    assert preservation.detail_preservation(board, black[None]).item() == 0
    assert preservation.detail_preservation(black, one[None]).item() == pytest.approx(63 / 64)
    assert preservation.psnr(black, black[None]).item() == float("inf")
    assert preservation.psnr(black, white[None]).item() == 0


def test_every_flat_colour_is_flat(way):
    """In rounded grey some of these would have edges of 1e-14, normalised to edges of 1."""
    colours = np.random.default_rng(1).integers(0, 256, (300, 1, 1, 3), dtype=np.uint8)
    pixels = torch.from_numpy(np.broadcast_to(colours, (300, 17, 19, 3)).copy())
    grey_view = torch.full((300, 1, 17, 19, 3), 128, dtype=torch.uint8)
    for kernel in (preservation.edge_preservation, preservation.detail_preservation):
        assert (kernel(pixels, grey_view) == 1).all()


def attention_maps() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 21, 30, generator=rng)
    maps[1] = 0
    maps[2] = 0.3
    maps[3] = 0
    maps[3, 4, 5] = 1e-3
    maps[4] = maps[0] * 0.01 + 5
    return maps


def test_attention_similarity():
    maps = attention_maps()
    result = preservation.attention_similarity(maps, maps[None].expand(6, *maps.shape)).numpy()
    expected = [[plain_attention(a, b) for b in maps.double().numpy()] for a in maps.double().numpy()]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    assert result[1, 2] == 1 == result[2, 2]
    normalised = (maps[:1] - maps[0].min()) / (maps[0].max() - maps[0].min())
    again = preservation.attention_similarity(normalised, maps[None, 5:])
    assert again.item() == pytest.approx(result[0, 5], abs=1e-6)
    assert preservation.attention_similarity(maps[:1].bfloat16(), maps[None, 5:]).dtype == torch.float32


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (21, 30), (10, 7), (3, 200)])
def test_attention_similarity_of_resized_maps_without_making_them(size):
    """Against torch and OpenCV, which make them; where these cannot be normalised, rounding had made them uneven."""
    maps = torch.cat([attention_maps(), torch.rand(2, 21, 30, generator=torch.Generator().manual_seed(1))])
    result = preservation.attention_similarity(maps, maps[None].expand(8, *maps.shape), size).numpy()
    by_torch = F.interpolate(maps[None].double(), size, mode="bilinear")[0].numpy()
    by_opencv = [cv2.resize(m, size[::-1], interpolation=cv2.INTER_LINEAR) for m in maps.double().numpy()]
    for resized in (by_torch, by_opencv):
        flat = [np.broadcast_to(m.mean(), m.shape) if np.ptp(m) < 1e-6 else m for m in resized]
        expected = [[plain_attention(a, b) for b in flat] for a in flat]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    assert (result.diagonal() == 1).all() and result[1, 2] == 1


@pytest.mark.parametrize("grid", [(7, 7), (1, 1), (2, 5), (14, 14)])
def test_extremes_of_a_resized_map_lie_where_they_are_looked_for(grid):
    """A single peak or pit anywhere: a wrong extreme would move every value."""
    maps = torch.eye(grid[0] * grid[1]).unflatten(1, grid)
    maps = torch.cat([maps, -maps, torch.rand(50, *grid)])
    for size in ((224, 224), (97, 31)):
        resized = F.interpolate(maps[None], size, mode="bilinear")[0]
        ends = maps.flatten(1) @ preservation._resized(grid, size, maps.device).ends.T
        torch.testing.assert_close(ends.amax(1), resized.amax((1, 2)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ends.amin(1), resized.amin((1, 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [1, 5000, 2**26])
@pytest.mark.parametrize("name", ORACLES)
def test_blocks_and_memory_layout_change_nothing(name, block, monkeypatch, way):
    """One view at a time, some, all; views as a slice of a larger array, as the pass has them."""
    kernel, _ = ORACLES[name]
    images = torch.from_numpy(gallery(24, 17))
    batch = torch.stack([images, images.flip(0), images.flip(1), images.flip(2)], dim=1)
    whole = kernel(batch[:, 0].contiguous(), batch[:, 1:].contiguous())
    monkeypatch.setattr(preservation, "_BLOCK", block)
    before = batch.clone()
    torch.testing.assert_close(kernel(batch[:, 0], batch[:, 1:]), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("name", ORACLES)
def test_no_images_and_no_views(name, way):
    kernel, _ = ORACLES[name]
    pixels = torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)
    assert kernel(pixels[:0, 0], pixels[:0]).shape == (0, 3)
    assert kernel(pixels[:, 0], pixels[:, :0]).shape == (2, 0)


def test_refuses_what_it_cannot_compare(way):
    pixels = torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8 .image, height, width, 3. and"):
        preservation.edge_preservation(pixels[:, 0].float(), pixels)
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\)"):
        preservation.ssim(pixels[:1, 0], pixels)
    with pytest.raises(ValueError, match="published, corrected"):
        preservation.patch_similarity(pixels[:, 0], pixels, "fixed")
    with pytest.raises(ValueError, match="row, col"):
        preservation.attention_similarity(torch.zeros(2, 7, 7), torch.zeros(2, 3, 14, 14))
    sides = {"ssim": 7, "patch_similarity": 4, "detail_preservation": 8, "edge_preservation": 2, "of_pixels": 8}
    for kernel, side in sides.items():
        with pytest.raises(ValueError, match=f"at least {side} a side"):
            getattr(preservation, kernel)(pixels[:, 0, : side - 1], pixels[:, :, : side - 1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ORACLES)
def test_same_on_cuda(name):
    kernel, _ = ORACLES[name]
    original, views = every_pair(gallery(97, 61))
    torch.testing.assert_close(kernel(original.cuda(), views.cuda()).cpu(), kernel(original, views), rtol=0, atol=1e-5)
    joint = preservation.of_pixels(original.cuda(), views.cuda())
    assert all(scores.is_cuda for scores in joint.values())
