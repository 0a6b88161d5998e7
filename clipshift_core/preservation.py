"""What of an image's pixels, and of its attention map, a view keeps: kernels over (image, view), on any device.

An image is uint8 RGB (image, height, width, 3), its views (image, view, height, width, 3); every kernel gives
float32 (image, view). All but `mse` and `psnr` are similarities, 1 for a view that equals its original. The five of
paper A (2503.23495) are `patch_similarity`, `edge_preservation`, `detail_preservation` and `attention_similarity`
here and the cosine in `metrics`; `ssim`, `psnr` and `mse` are for comparison.

No kernel yields NaN. What each says where the published formula has 0 / 0 stands in its docstring. That a thing is
constant is decided exactly: pixels stay integers (grey in thousandths of a level) up to the last quotient, or else
the rounding of a flat image would be normalised into edges and details.

Each kernel is written down in torch, for any device. On a CPU compiled kernels do the same from the bytes themselves,
in a tenth of the time (`pairs`), and `of_pixels` gives all that the one pass stores at once. Work is done in blocks
that stay in a cache, so that memory does not grow with the number of images.
"""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

Kernel = Literal["published", "corrected"]
Images = UInt8[Tensor, "image height width 3"]
Views = UInt8[Tensor, "image view height width 3"]
Scores = Float32[Tensor, "image view"]

PATCH_GRID = 4
DETAIL_GRID = 8
FLAT = 1e-6
"""Standard deviation, in grey levels, below which a patch has no detail."""
GREY = (299, 587, 114)
SSIM_WINDOW = 7
"""Side of the uniform window: the default of scikit-image's structural_similarity."""
IN_WINDOW = SSIM_WINDOW**2
C1 = IN_WINDOW**2 * (0.01 * 255) ** 2
C2 = IN_WINDOW * (IN_WINDOW - 1) * (0.03 * 255) ** 2
"""SSIM's C1 and C2, as they stand beside products of window sums and beside variances times 49 x 48."""

_BLOCK = 2**21
_BLOCK_ELSEWHERE = 2**25
"""Values in one block: on a CPU what its caches hold, elsewhere what fills a GPU (`ssim` has a dozen such arrays)."""
_COMPILED = {"cpu"}
"""Kinds of device whose pixels `pairs` compares; the torch kernels take all others."""


def patch_similarity(original: Images, views: Views, kernel: Kernel = "corrected") -> Scores:
    """Mean over a 4 x 4 grid of 1 / (1 + MSE / 255^2), the MSE over a patch's pixels and channels; 0.5 to 1.

    `published`: the difference and its square are uint8 and wrap modulo 256, as in paper A's code. No square is above
    249 modulo 256, so the value cannot fall below 1 / (1 + 249 / 255^2) = 0.99618, whatever the images.
    `corrected`: the same formula without the wrap. Source: paper A, metric 5.

    A patch is floor(height / 4) x floor(width / 4) pixels; rows and columns left over at the end are not read.
    Raises ValueError for another kernel, or an image of less than 4 pixels a side.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r}: one of {', '.join(get_args(Kernel))} is accepted")
    _check(original, views, least=PATCH_GRID)

    def block(x: Tensor, y: Tensor) -> Tensor:
        if kernel == "corrected":
            x, y = x.float(), y.float()
        difference = y - x
        patches = _patches(difference * difference, PATCH_GRID, channels=3)
        return alike(patches.sum((3, 5)).float() / (patches.shape[3] * patches.shape[5]))

    return _scores("patch" if kernel == "corrected" else "patch_published", block, original, views)


def edge_preservation(original: Images, views: Views) -> Scores:
    """1 - mean |edge(original) - edge(view)|, 0 to 1, with edge = (|dg/dx| + |dg/dy|) / 2 over its own maximum.

    g = 0.299 R + 0.587 G + 0.114 B. Differences are central, one-sided in the outermost rows and columns (as
    numpy.gradient takes them). Source: paper A, metric 6.

    An image without any edge has no maximum to divide by: its edge map is 0. Two such images score 1, whatever their
    greys; against another image it scores 1 - the mean of the other's edge map, as if it had been 0 / 1.
    Raises ValueError for an image of less than 2 pixels a side.
    """
    _check(original, views, least=2)

    def edges(pixels: Tensor) -> Tensor:
        down, across = torch.gradient(_grey(pixels), dim=(-2, -1))
        edge = down.abs_().add_(across.abs_())  # the half and the thousandths cancel
        peak = edge.amax((-2, -1), keepdim=True)
        return edge.div_(torch.where(peak > 0, peak, 1.0))

    return _scores("edge", lambda x, y: 1 - (edges(x) - edges(y)).abs_().mean((-2, -1)), original, views)


def detail_preservation(original: Images, views: Views) -> Scores:
    """Mean over an 8 x 8 grid of exp(-|log(std_view / std_original)|) = the smaller std over the larger; 0 to 1.

    std is the population deviation of grey (see `edge_preservation`) in a patch of floor(height / 8) x
    floor(width / 8) pixels; rows and columns left over at the end are not read. Patches that are flat in the
    original (std < 1e-6) are left out. Source: paper A, metric 7.

    A patch with detail whose view is flat counts 0, the limit of the formula. Where *every* patch of the original is
    flat, nothing would be left to average: then all count, 1 where the view is flat too and 0 where it is not, so
    that a blank image is unchanged by a view that leaves it blank. Raises ValueError below 8 pixels a side.
    """
    _check(original, views, least=DETAIL_GRID)

    def deviation(pixels: Tensor) -> Tensor:
        # Sums of integers in float64 are exact, and n S2 and S1^2 of a constant are one number, rounded alike
        patches = _patches(_grey(pixels), DETAIL_GRID).double()
        total = patches.sum((3, 5))
        return deviation_of(total, patches.square_().sum((3, 5)), n=patches.shape[3] * patches.shape[5])

    return _scores("detail", lambda x, y: detail_kept(deviation(x), deviation(y)), original, views)


def attention_similarity(
    original: Float[Tensor, "image row col"],
    views: Float[Tensor, "image view row col"],
    size: tuple[int, int] | None = None,
) -> Scores:
    """1 / (1 + MSE) of two attention maps, each min-max normalised to 0..1; 0.5 to 1. Source: paper A, metric 4.

    size: (height, width) that both are resized to first, bilinearly with half-pixel centres (torch's `interpolate`,
    OpenCV's INTER_LINEAR), as the published maps are from the patch grid to the image; the value depends on it.
    None: as they are. The large maps are never made: see `_resized`.

    A constant map attends nowhere more than elsewhere: it is normalised to 0 everywhere. Two such maps score 1.
    Raises ValueError for maps that do not belong together.
    """
    if original.ndim != 3 or views.ndim != 4 or original.shape != views.shape[:1] + views.shape[2:]:
        raise ValueError(
            f"maps of {tuple(original.shape)} and {tuple(views.shape)}: "
            "(image, row, col) and (image, view, row, col) are accepted"
        )
    height, width = size or original.shape[1:]
    ends, gram = _resized(tuple(original.shape[1:]), (height, width), original.device)

    def normalised(maps: Tensor) -> Tensor:
        # Resizing is linear and keeps constants, so that the small map can be normalised by the large one's extremes.
        maps = maps.flatten(2).float()
        maps = maps - maps.amin(2, keepdim=True)  # which makes a constant map 0, and 0 stays 0 when resized
        large = maps if ends is None else maps @ ends.T
        low, high = large.amin(2, keepdim=True), large.amax(2, keepdim=True)
        return (maps - low) / torch.where(high > low, high - low, 1.0)

    def block(x: Tensor, y: Tensor) -> Tensor:
        apart = normalised(x) - normalised(y)
        squares = apart * (apart if gram is None else apart @ gram)
        return 1 / (1 + squares.sum(2).clamp_min(0) / (height * width))

    return _by_block(block, original, views)


class _Resized(NamedTuple):
    """A bilinear resize A of flattened maps m, of which |A m|^2 and the extremes of A m are wanted, A m itself not."""

    ends: Float[Tensor, "end node"] | None
    """The rows of A that can be extremes: between its nodes A m is linear along each axis, so its extremes lie where
    a sample is the first or the last between two nodes on both. None: A is the identity, as is the other."""
    gram: Float[Tensor, "node node"] | None
    """A^T A, since |A m|^2 = m . A^T A m."""


def _resized(shape: tuple[int, int], size: tuple[int, int], device: torch.device) -> _Resized:
    if shape == size:
        return _Resized(None, None)
    ends, grams = [], []
    for n, to in zip(shape, size, strict=True):
        weights = F.interpolate(torch.eye(n, device=device)[None], to, mode="linear")[0].T
        nodes = weights > 0
        changes = (nodes[1:] != nodes[:-1]).any(1)
        edge = changes.new_ones(1)
        ends.append(weights[torch.cat([edge, changes]) | torch.cat([changes, edge])])
        grams.append(weights.T @ weights)
    return _Resized(torch.kron(*ends), torch.kron(*grams))


def mse(original: Images, views: Views) -> Scores:
    """Mean squared difference over pixels and channels, in squared grey levels; 0 to 65025."""
    _check(original, views)
    return _scores("mse", lambda x, y: (x.float() - y.float()).square_().mean((-3, -2, -1)), original, views)


def psnr(original: Images, views: Views) -> Scores:
    """Peak signal-to-noise ratio 10 log10(255^2 / MSE) in dB, as scikit-image's peak_signal_noise_ratio.

    Infinite for a view that equals its original: use `mse` where values are averaged.
    """
    return 10 * torch.log10(255**2 / mse(original, views))


def ssim(original: Images, views: Views) -> Scores:
    """Structural similarity, -1 to 1: scikit-image's structural_similarity(channel_axis=-1, data_range=255).

    Its defaults: a uniform window of 7 x 7 pixels, sample covariances (over 48), C1 = (0.01 x 255)^2,
    C2 = (0.03 x 255)^2, the mean over all windows that lie within the image and over the three channels.
    (Wang et al. 2004 use a Gaussian window; their values differ.) C1 and C2 keep the quotient defined for any pixels.

    Window sums, and variances times 49 x 48, are exact integers. Raises ValueError below 7 pixels a side.
    """
    _check(original, views, least=SSIM_WINDOW)

    def block(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.flatten(-2).int(), y.flatten(-2).int()
        sum_x, sum_y, sum_xy = _window_sums(x), _window_sums(y), _window_sums(x * y)
        squares = _window_sums(x * x) + _window_sums(y * y)
        product, means = sum_x * sum_y, sum_x * sum_x + sum_y * sum_y
        covariance, variances = IN_WINDOW * sum_xy - product, IN_WINDOW * squares - means
        return ((2 * product + C1) * (2 * covariance + C2) / ((means + C1) * (variances + C2))).mean((2, 3))

    return _scores("ssim", block, original, views)


OF_PIXELS: dict[str, Callable[[Images, Views], Scores]] = {
    "patch": patch_similarity,
    "patch_published": partial(patch_similarity, kernel="published"),
    "edge": edge_preservation,
    "detail": detail_preservation,
    "ssim": ssim,
    "mse": mse,
}


def of_pixels(original: Images, views: Views) -> dict[str, Scores]:
    """Every metric of `OF_PIXELS`, each the same as by itself: on a CPU what several need of a pair is made once.

    Raises ValueError for an image of less than 8 pixels a side.
    """
    _check(original, views, least=DETAIL_GRID)
    if views.device.type in _COMPILED:
        return _compiled(OF_PIXELS, original, views)
    return {name: kernel(original, views) for name, kernel in OF_PIXELS.items()}


def _scores(name: str, block: Callable[[Tensor, Tensor], Tensor], original: Images, views: Views) -> Scores:
    if views.device.type in _COMPILED:
        return _compiled([name], original, views)[name]
    return _by_block(block, original, views)


def _compiled(names: Collection[str], original: Images, views: Views) -> dict[str, Scores]:
    from clipshift_core.pairs import (
        Pairs,  # numba takes half a second to import, and few that import this compare pixels
    )

    out = {name: torch.empty(views.shape[:2]) for name in names}

    def compare(i: int) -> None:
        pairs = Pairs(original[i].numpy(), views[i].numpy())
        for name in names:
            out[name][i] = torch.as_tensor(getattr(pairs, name)())

    # The kernels let go of the interpreter, so that images are compared side by side.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(compare, range(len(views))))
    return out


def _window_sums(x: Tensor) -> Tensor:
    """Sums over all 7 x 7 windows of interleaved RGB (..., height, width * 3): 7 = 4 + 2 + 1, four sums an axis."""
    for dim, step in ((-2, 1), (-1, 3)):
        size = x.shape[dim] - 6 * step
        two = x.narrow(dim, 0, size + 5 * step) + x.narrow(dim, step, size + 5 * step)
        four = two.narrow(dim, 0, size) + two.narrow(dim, 2 * step, size)
        x = four.add_(two.narrow(dim, 4 * step, size)).add_(x.narrow(dim, 6 * step, size))
    return x


def _grey(pixels: UInt8[Tensor, "... height width 3"]) -> Float32[Tensor, "... height width"]:
    """299 R + 587 G + 114 B: grey in thousandths of a level, exact (below 2^24, and no matrix product)."""
    (red, green, blue), (of_red, of_green, of_blue) = pixels.unbind(-1), GREY
    return red.float().mul_(of_red).add_(green, alpha=of_green).add_(blue, alpha=of_blue)


def _patches(x: Tensor, grid: int, *, channels: int = 0) -> Tensor:
    """(image, view, height, width[, 3]) as (image, view, grid, patch height, grid, patch width [* 3])."""
    height, width = x.shape[2] // grid, x.shape[3] // grid
    x = x[:, :, : grid * height, : grid * width]
    return x.reshape(*x.shape[:2], grid, height, grid, width * max(channels, 1))


def _check(original: Images, views: Views, *, least: int = 1) -> None:
    belong = original.ndim == 4 and views.ndim == 5 and original.shape == views.shape[:1] + views.shape[2:]
    if not belong or original.shape[-1] != 3 or original.dtype != torch.uint8 or views.dtype != torch.uint8:
        raise ValueError(
            f"pixels of {original.dtype} {tuple(original.shape)} and {views.dtype} {tuple(views.shape)}: "
            "uint8 (image, height, width, 3) and (image, view, height, width, 3) are accepted"
        )
    if min(original.shape[1:3]) < least:
        raise ValueError(f"image of {original.shape[1]} x {original.shape[2]} pixels: at least {least} a side")


def _by_block(kernel: Callable[[Tensor, Tensor], Tensor], original: Tensor, views: Tensor) -> Scores:
    """kernel(original (image, 1, ...), views (image, view, ...)) block by block, as (image, view)."""
    n_images, n_views = views.shape[:2]
    n = max(1, _limit(views) // max(1, original[0].numel())) if n_images else 1
    view_step = min(n, max(1, n_views))
    image_step = max(1, n // view_step)
    out = torch.empty(n_images, n_views, dtype=torch.float32, device=views.device)
    for i in range(0, n_images, image_step):
        images = slice(i, i + image_step)
        for v in range(0, n_views, view_step):
            part = slice(v, v + view_step)
            out[images, part] = kernel(original[images, None], views[images, part])
    return out


def _limit(x: Tensor) -> int:
    return _BLOCK if x.device.type == "cpu" else _BLOCK_ELSEWHERE


def alike(mse: Float[Tensor, "... row col"]) -> Float[Tensor, "..."]:
    """The mean over patches of 1 / (1 + MSE / 255^2)."""
    return (1 / (1 + mse / 255**2)).mean((-2, -1))


def deviation_of(total: Tensor, squares: Tensor, *, n: int) -> Float64[Tensor, "..."]:
    """Standard deviation in grey levels from the sums over n greys in thousandths."""
    return (squares * n - total.square()).clamp_min(0).sqrt() / (1000 * n)


def detail_kept(x: Float64[Tensor, "image 1 row col"], y: Float64[Tensor, "image view row col"]) -> Tensor:
    """The mean ratio of deviations over the patches that count, (image, view)."""
    flat_x, flat_y = x < FLAT, y < FLAT
    kept = ~flat_x | flat_x.all(-1, keepdim=True).all(-2, keepdim=True)
    larger = torch.maximum(x, y)
    ratio = torch.where(flat_x & flat_y, 1.0, torch.minimum(x, y) / torch.where(larger > 0, larger, 1.0))
    return (ratio * kept).sum((2, 3)) / kept.sum((2, 3))
