"""An image compared with its views on a CPU by compiled kernels, from the bytes: the second way of `preservation`.

What the metrics mean stands there. Numba compiles on first use, in seconds, and keeps the machine code. Sums are exact
in integers wherever they can be, and the others run along columns in float64, so that no processor's width of vectors
changes a bit. A row is a row of bytes, red, green and blue of each pixel in turn.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from numba import njit
from torch import Tensor

from clipshift_core.preservation import (
    C1,
    C2,
    DETAIL_GRID,
    GREY,
    IN_WINDOW,
    PATCH_GRID,
    SSIM_WINDOW,
    alike,
    detail_kept,
    deviation_of,
)

RED, GREEN, BLUE = (np.int32(part) for part in GREY)
FIRST, SECOND = np.float32(C1), np.int32(round(C2))
"""SSIM's constants; the second is an integer but for 1 in 2 million."""
IN, OUT = np.int32(1), np.int32(-1)
RIM = SSIM_WINDOW - 1
AT_ONCE = 8
"""Views whose column sums `_ssim` carries along together, so that they stay in the cache."""


def compiled(kernel: Callable) -> Callable:
    """A kernel as machine code that lets go of the interpreter and, as numpy, divides by zero without a word."""
    kernel = njit(nogil=True, error_model="numpy")(kernel)
    with suppress(RuntimeError):  # neither the package's folder nor the user's can be written: compiled in each process
        kernel.enable_caching()
    return kernel


class Pairs:
    """An image and its views on a CPU. Each metric is a method, named as in `OF_PIXELS`, that gives (view,)."""

    def __init__(self, original: UInt8[np.ndarray, "height width 3"], views: UInt8[np.ndarray, "view height width 3"]):
        self.height, self.width = original.shape[:2]
        self.original = np.ascontiguousarray(original).reshape(self.height, -1)
        self.views = np.ascontiguousarray(views).reshape(len(views), *self.original.shape)

    @cached_property
    def squares(self) -> tuple[Int64[np.ndarray, "2 view row col"], Int64[np.ndarray, " view"]]:
        """Squared differences summed over patches, whole and modulo 256, and over everything."""
        n = len(self.views)
        found = np.zeros((2, n, PATCH_GRID, PATCH_GRID), np.int64), np.zeros(n, np.int64)
        _squares(self.original, self.views, *found)
        return found

    @cached_property
    def of_grey(self) -> tuple[Float64[np.ndarray, " view"], Int64[np.ndarray, "2 1+view row col"]]:
        """The mean difference of the edge maps; grey and its square, summed over patches of the original and views."""
        n = len(self.views)
        found = np.zeros(n), np.zeros((2, 1 + n, DETAIL_GRID, DETAIL_GRID), np.int64)
        _of_grey(self.original, self.views, *found)
        return found

    def patch(self) -> Tensor:
        return self._of_patches(0)

    def patch_published(self) -> Tensor:
        return self._of_patches(1)

    def _of_patches(self, which: int) -> Tensor:
        n_values = 3 * (self.height // PATCH_GRID) * (self.width // PATCH_GRID)
        return alike(torch.from_numpy(self.squares[0][which]).double() / n_values)

    def mse(self) -> np.ndarray:
        return self.squares[1] / self.original.size

    def edge(self) -> np.ndarray:
        return 1 - self.of_grey[0]

    def detail(self) -> Tensor:
        sums = torch.from_numpy(self.of_grey[1]).double()
        deviation = deviation_of(*sums, n=(self.height // DETAIL_GRID) * (self.width // DETAIL_GRID))
        return detail_kept(deviation[None, :1], deviation[None, 1:])[0]

    def ssim(self) -> np.ndarray:
        found = np.empty(len(self.views))
        for first in range(0, len(found), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            _ssim(self.original, self.views[part], found[part])
        return found


# Numba makes int64 of a sum of two int32, which halves what a vector holds: hence the many casts.


@compiled
def _squares(original, views, of_patches, whole):
    n_rows, n_bytes = original.shape
    height, width = n_rows // PATCH_GRID, n_bytes // (3 * PATCH_GRID) * 3
    columns, wrapped = np.empty(n_bytes, np.int32), np.empty(n_bytes, np.int32)
    for view in range(len(views)):
        for band in range(PATCH_GRID + 1):  # the last is what no patch reads
            columns[:] = wrapped[:] = 0
            for row in range(band * height, (band + 1) * height if band < PATCH_GRID else n_rows):
                x, y = original[row], views[view, row]
                for i in range(n_bytes):
                    difference = np.int32(y[i]) - np.int32(x[i])
                    square = np.int32(difference * difference)
                    columns[i] += square
                    wrapped[i] += square & 255
            whole[view] += columns.sum()
            if band < PATCH_GRID:
                for col in range(PATCH_GRID):
                    of_patches[0, view, band, col] = columns[col * width : (col + 1) * width].sum()
                    of_patches[1, view, band, col] = wrapped[col * width : (col + 1) * width].sum()


@compiled
def _of_grey(original, views, distances, sums):
    n_rows, n_cols = len(original), original.shape[1] // 3
    height, width = n_rows // DETAIL_GRID, n_cols // DETAIL_GRID
    grey, edge = np.empty((n_rows, n_cols), np.int32), np.empty((n_rows, n_cols), np.int32)
    edge_of_original = np.empty((n_rows, n_cols), np.float32)
    columns, squares, distance = np.empty(n_cols, np.int32), np.empty(n_cols, np.int64), np.empty(n_cols)
    for picture in range(1 + len(views)):
        pixels = original if picture == 0 else views[picture - 1]
        for row in range(n_rows):
            _to_grey(pixels[row], grey[row])
        for band in range(DETAIL_GRID):
            columns[:] = squares[:] = 0
            for row in range(band * height, (band + 1) * height):
                of = grey[row]
                for i in range(n_cols):
                    columns[i] += of[i]
                    squares[i] += np.int64(of[i]) * of[i]
            for col in range(DETAIL_GRID):
                sums[0, picture, band, col] = columns[col * width : (col + 1) * width].sum()
                sums[1, picture, band, col] = squares[col * width : (col + 1) * width].sum()
        peak = np.float32(max(_edges(grey, edge), 1))
        distance[:] = 0
        for row in range(n_rows):
            x, y = edge_of_original[row], edge[row]
            if picture == 0:
                x[:] = y / peak
            for i in range(n_cols):
                distance[i] += abs(x[i] - np.float32(y[i]) / peak)
        if picture:
            distances[picture - 1] = distance.sum() / grey.size


@compiled
def _to_grey(pixels, out):
    for i in range(len(out)):
        out[i] = (
            RED * np.int32(pixels[3 * i]) + GREEN * np.int32(pixels[3 * i + 1]) + BLUE * np.int32(pixels[3 * i + 2])
        )


@compiled
def _edges(grey, out):
    """|dg/dx| + |dg/dy|, doubled, central within and one-sided in the outermost rows and columns; its maximum."""
    n_rows, n_cols = grey.shape
    peak = np.int32(0)
    for row in range(n_rows):
        above, here, below, edge = grey[max(row - 1, 0)], grey[row], grey[min(row + 1, n_rows - 1)], out[row]
        times = np.int32(2 if row in (0, n_rows - 1) else 1)
        edge[0], edge[-1] = 2 * abs(here[1] - here[0]), 2 * abs(here[-1] - here[-2])
        for i in range(1, n_cols - 1):
            edge[i] = abs(here[i + 1] - here[i - 1])
        for i in range(n_cols):
            edge[i] += times * abs(below[i] - above[i])
            peak = np.int32(max(peak, edge[i]))
    return peak


@compiled
def _ssim(original, views, means):
    n_rows, n_bytes = original.shape
    n = n_bytes - 3 * RIM
    columns = np.zeros((1 + len(views), 3, n_bytes), np.int32)
    of_x, of_y = np.empty((3, n), np.int32), np.empty((3, n), np.int32)
    totals = np.zeros((len(views), n))
    for row in range(n_rows):
        _slide(columns[0], original, original, row)
        if row >= RIM:
            _windows(columns[0], of_x)
        for view in range(len(views)):
            _slide(columns[1 + view], original, views[view], row)
            if row >= RIM:
                _windows(columns[1 + view], of_y)
                _add_quotients(totals[view], of_x, of_y)
    for view in range(len(views)):
        means[view] = totals[view].sum() / (n * (n_rows - RIM))


@compiled
def _slide(columns, x, y, row):
    """Sums over seven rows of y, its square, and that of y - x: `row` comes in, the one seven rows above goes out."""
    _add(columns, x[row], y[row], IN)
    if row >= SSIM_WINDOW:
        _add(columns, x[row - SSIM_WINDOW], y[row - SSIM_WINDOW], OUT)


@compiled
def _add(columns, x, y, sign):
    of_y, of_squares, of_distances = columns[0], columns[1], columns[2]
    for i in range(len(y)):
        value = np.int32(y[i])
        apart = np.int32(value - np.int32(x[i]))
        of_y[i] += np.int32(sign * value)
        of_squares[i] += np.int32(sign * np.int32(value * value))
        of_distances[i] += np.int32(sign * np.int32(apart * apart))


@compiled
def _windows(columns, out):
    """Sums of seven columns of one colour, `SSIM_WINDOW`, from each on."""
    for which in range(3):
        of, to = columns[which], out[which]
        for i in range(len(to)):
            to[i] = of[i] + of[i + 3] + of[i + 6] + of[i + 9] + of[i + 12] + of[i + 15] + of[i + 18]


@compiled
def _add_quotients(totals, of_x, of_y):
    """SSIM as (b1 - d) (b2 - e) / (b1 b2): b1 and b2 are the denominators of luminance and structure, d is the squared
    difference of the window sums, e the variance of the differences times 49 x 48."""
    sums_x, squares_x, sums_y, squares_y, distances = of_x[0], of_x[1], of_y[0], of_y[1], of_y[2]
    for i in range(len(totals)):
        x, y = sums_x[i], sums_y[i]
        x2, y2, apart = np.int32(x * x), np.int32(y * y), np.int32(y - x)
        d = np.int32(apart * apart)
        e = np.int32(IN_WINDOW * distances[i] - d)
        b1 = np.float32(y2) + (np.float32(x2) + FIRST)
        b2 = np.int32(IN_WINDOW * np.int32(squares_x[i] + squares_y[i]) - x2 - y2 + SECOND)
        totals[i] += (b1 - np.float32(d)) * np.float32(np.int32(b2 - e)) / (b1 * np.float32(b2))
