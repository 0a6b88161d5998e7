"""What of an image's pixels, and of its attention map, a view keeps: kernels over (image, view), on any device.

An image is uint8 RGB (image, height, width, 3), its views (image, view, height, width, 3); every kernel gives
float32 (image, view). All but `mse` and `psnr` are similarities, 1 for a view that equals its original. The five of
paper A (2503.23495) are `patch_similarity`, `edge_preservation`, `detail_preservation` and `attention_similarity`
here and the cosine in `metrics`; `ssim`, `psnr` and `mse` are for comparison.

No kernel yields NaN. What each says where the published formula has 0 / 0 stands in its docstring. That a thing is
constant is decided exactly: pixels stay integers (grey in thousandths of a level) up to the last quotient, or else
the rounding of a flat image would be normalised into edges and details.

Work is done in blocks that stay in a processor's cache, so that memory does not grow with the number of images.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

Kernel = Literal["published", "corrected"]
Images = UInt8[Tensor, "image height width 3"]
Views = UInt8[Tensor, "image view height width 3"]
Scores = Float32[Tensor, "image view"]

PATCH_GRID = 4
DETAIL_GRID = 8
FLAT = 1e-6
"""Standard deviation, in grey levels, below which a patch has no detail."""
SSIM_WINDOW = 7
"""Side of the uniform window: the default of scikit-image's structural_similarity."""

_BLOCK = 2**21
_BLOCK_ELSEWHERE = 2**26
"""Values in one block: on a CPU what its caches hold, elsewhere what fills a GPU."""
_PLANES = 6
"""`ssim` keeps about as many arrays of a block at once, and takes its rows in as many parts."""


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
        mse = patches.sum((3, 5)).float() / (patches.shape[3] * patches.shape[5])
        return (1 / (1 + mse / 255**2)).mean((2, 3))

    return _by_block(block, original, views)


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

    return _by_block(lambda x, y: 1 - (edges(x) - edges(y)).abs_().mean((-2, -1)), original, views)


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
        n = patches.shape[3] * patches.shape[5]
        total, squares = patches.sum((3, 5)), patches.square_().sum((3, 5))
        return (squares * n - total.square()).clamp_min(0).sqrt() / (1000 * n)

    def block(x: Tensor, y: Tensor) -> Tensor:
        x, y = deviation(x), deviation(y)
        flat_x, flat_y = x < FLAT, y < FLAT
        kept = ~flat_x | flat_x.all(-1, keepdim=True).all(-2, keepdim=True)
        larger = torch.maximum(x, y)
        ratio = torch.where(flat_x & flat_y, 1.0, torch.minimum(x, y) / torch.where(larger > 0, larger, 1.0))
        return (ratio * kept).sum((2, 3)) / kept.sum((2, 3))

    return _by_block(block, original, views)


def attention_similarity(
    original: Float[Tensor, "image row col"], views: Float[Tensor, "image view row col"]
) -> Scores:
    """1 / (1 + MSE) of two attention maps, each min-max normalised to 0..1; 0.5 to 1.

    The published maps are first resized from the patch grid to the image, which is the caller's part: the value
    depends on it. Maps that are normalised already are not changed. Source: paper A, metric 4.

    A constant map attends nowhere more than elsewhere: it is normalised to 0 everywhere. Two such maps score 1.
    Raises ValueError for maps that do not belong together.
    """
    if original.ndim != 3 or views.ndim != 4 or original.shape != views.shape[:1] + views.shape[2:]:
        raise ValueError(
            f"maps of {tuple(original.shape)} and {tuple(views.shape)}: "
            "(image, row, col) and (image, view, row, col) are accepted"
        )

    def normalised(maps: Tensor) -> Tensor:
        maps = maps.float()
        low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
        return (maps - low) / torch.where(high > low, high - low, 1.0)

    def block(x: Tensor, y: Tensor) -> Tensor:
        return 1 / (1 + (normalised(x) - normalised(y)).square_().mean((-2, -1)))

    return _by_block(block, original, views)


def mse(original: Images, views: Views) -> Scores:
    """Mean squared difference over pixels and channels, in squared grey levels; 0 to 65025."""
    _check(original, views)
    return _by_block(lambda x, y: (x.float() - y.float()).square_().mean((-3, -2, -1)), original, views)


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
    n = SSIM_WINDOW**2
    c1, c2 = n**2 * (0.01 * 255) ** 2, n * (n - 1) * (0.03 * 255) ** 2

    def quarters(x: Tensor, y: Tensor) -> Tensor:
        sum_x, sum_y = _window_sums(x.short()).int(), _window_sums(y.short()).int()  # 49 x 255 fits, at half the cost
        x, y = x.int(), y.int()
        sum_xy = _window_sums(x * y)
        # products with itself: torch's square of integers is a power, thirty times as slow
        squares = _window_sums(y.mul_(y)).add_(_window_sums(x.mul_(x)))
        product = sum_x * sum_y
        means = sum_y.mul_(sum_y).add_(sum_x.mul_(sum_x))
        minus_covariance = product.sub(sum_xy, alpha=n)
        minus_variances = means.sub(squares, alpha=n)
        # numerator over 4 and denominator, both negated: a quarter of the similarity at each window
        top = product.float().add_(c1 / 2).mul_(minus_covariance.float().sub_(c2 / 2))
        return top.div_(means.float().add_(c1).mul_(minus_variances.float().sub_(c2)))

    def block(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.flatten(-2), y.flatten(-2)
        height, width = y.shape[2] - SSIM_WINDOW + 1, y.shape[3] - 3 * (SSIM_WINDOW - 1)
        total = torch.zeros(y.shape[:2], device=y.device)
        rows = max(SSIM_WINDOW, _limit(y) // _PLANES // max(1, y[:, :, 0].numel()))
        for row in range(0, height, rows):
            strip = slice(row, min(row + rows, height) + SSIM_WINDOW - 1)
            total += quarters(x[:, :, strip], y[:, :, strip]).sum((2, 3))
        return total * 4 / (height * width)

    return _by_block(block, original, views)


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
    red, green, blue = pixels.unbind(-1)
    return red.float().mul_(299).add_(green, alpha=587).add_(blue, alpha=114)


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
