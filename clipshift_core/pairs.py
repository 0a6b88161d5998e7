"""An image compared with its views on a CPU by OpenCV and numpy, from the bytes: the second way of `preservation`.

What the metrics mean stands there; here are the constants and quotients that both ways share.
"""

from functools import cached_property

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

PATCH_GRID = 4
DETAIL_GRID = 8
FLAT = 1e-6
"""Standard deviation, in grey levels, below which a patch has no detail."""
SSIM_WINDOW = 7
"""Side of the uniform window: the default of scikit-image's structural_similarity."""

GREY = (299, 587, 114)
RIM = SSIM_WINDOW // 2
IN_WINDOW = SSIM_WINDOW**2
C1 = IN_WINDOW**2 * (0.01 * 255) ** 2
C2 = IN_WINDOW * (IN_WINDOW - 1) * (0.03 * 255) ** 2
"""SSIM's C1 and C2, as they stand beside products of window sums and beside variances times 49 x 48."""

ROWS = 32
"""Rows of windows that `Pairs.ssim` takes at once, so that their arrays stay in a cache."""


class Pairs:
    """An image and its views on a CPU. Each metric is a method, named as in `OF_PIXELS`, that gives (view,).

    OpenCV reads the pixels as the bytes that they are, one view at a time. Its own threads change no result.
    """

    def __init__(self, original: UInt8[np.ndarray, "height width 3"], views: UInt8[np.ndarray, "view height width 3"]):
        self.original, self.views = np.ascontiguousarray(original), np.ascontiguousarray(views)
        self.height, self.width = original.shape[:2]

    @cached_property
    def distances(self) -> UInt8[np.ndarray, "view height width 3"]:
        """|view - original|: its square is that of the difference, modulo 256 too."""
        out = np.empty_like(self.views)
        for view, distance in zip(self.views, out, strict=True):
            cv2.absdiff(self.original, view, dst=distance)
        return out

    @cached_property
    def greys(self) -> Float32[np.ndarray, "1+view height width"]:
        """Grey in thousandths, as `_grey`, of the original and of each view."""
        out = np.empty((1 + len(self.views), self.height, self.width), np.float32)
        for pixels, grey in zip((self.original, *self.views), out, strict=True):
            np.matmul(pixels.astype(np.float32), np.array(GREY, np.float32), out=grey)
        return out

    def patch(self) -> Tensor:
        return self._of_patches(np.uint16)

    def patch_published(self) -> Tensor:
        return self._of_patches(np.uint8)  # in which a square wraps

    def _of_patches(self, held_in: type) -> Tensor:
        height, width = self.height // PATCH_GRID, self.width // PATCH_GRID
        rows = np.kron(np.eye(PATCH_GRID, dtype=np.float32), np.ones(height, np.float32))
        sums = np.empty((len(self.views), PATCH_GRID, PATCH_GRID), np.float32)
        for distance, out in zip(self.distances, sums, strict=True):
            squares = np.square(distance[: PATCH_GRID * height, : PATCH_GRID * width], dtype=held_in)
            down = rows @ squares.reshape(PATCH_GRID * height, -1).astype(np.float32)  # whole numbers, so exact
            out[:] = down.reshape(PATCH_GRID, PATCH_GRID, -1).sum(2, dtype=np.float64)
        return alike(torch.from_numpy(sums) / (height * width * 3))

    def mse(self) -> list[float]:
        return [cv2.norm(distance, cv2.NORM_L2SQR) / distance.size for distance in self.distances]

    def edge(self) -> list[float]:
        down, across, of_original, of_view = np.empty((4, self.height, self.width), np.float32)

        def edges(grey: np.ndarray, out: np.ndarray) -> np.ndarray:
            np.add(differences(grey, down), differences(grey.T, across.T).T, out=out)
            return np.divide(out, out.max() or 1, out=out)

        edges(self.greys[0], of_original)
        return [1 - cv2.norm(of_original, edges(grey, of_view), cv2.NORM_L1) / grey.size for grey in self.greys[1:]]

    def detail(self) -> Tensor:
        height, width = self.height // DETAIL_GRID, self.width // DETAIL_GRID
        down, across = (np.kron(np.eye(DETAIL_GRID), np.ones(side)) for side in (height, width))
        sums = np.empty((2, len(self.greys), DETAIL_GRID, DETAIL_GRID))
        for i, grey in enumerate(self.greys):
            used = grey[: DETAIL_GRID * height, : DETAIL_GRID * width].astype(np.float64)
            sums[0, i] = down @ used @ across.T
            sums[1, i] = down @ np.square(used, out=used) @ across.T
        deviation = deviation_of(*torch.from_numpy(sums), n=height * width)
        return detail_kept(deviation[None, :1], deviation[None, 1:])[0]

    def ssim(self) -> list[float]:
        """The quotient as (b1 - d) (b2 - e) / (b1 b2): b1 and b2 are the denominators of luminance and structure, d is
        the squared difference of the window sums, e the variance of the differences times 49 x 48.

        All sums, and all of b2 and e, are exact in int32: c2 is an integer but for 1 in 2 million.
        """
        window = {"ksize": (SSIM_WINDOW, SSIM_WINDOW), "normalize": False}
        shape = self.original.shape
        whole_y, whole_y2, whole_d2 = np.empty(shape, np.uint16), np.empty(shape, np.int32), np.empty(shape, np.int32)

        def sums(pixels: np.ndarray) -> np.ndarray:
            return cv2.boxFilter(pixels, cv2.CV_16U, dst=whole_y, **window)  # 49 x 255 fits

        def sums_of_squares(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
            return cv2.sqrBoxFilter(pixels, cv2.CV_32S, dst=out, **window)

        sum_x = sums(self.original).astype(np.int32)
        squares_x = sum_x * sum_x
        b1_of_x = squares_x.astype(np.float32) + np.float32(C1)
        b2_of_x = sums_of_squares(self.original, whole_y2) * IN_WINDOW - squares_x + round(C2)

        def total(rows: slice) -> float:
            sum_y = whole_y[rows].astype(np.int32)
            squares, d = sum_y * sum_y, np.square(sum_y - sum_x[rows])
            b2, e = IN_WINDOW * whole_y2[rows] - squares + b2_of_x[rows], IN_WINDOW * whole_d2[rows] - d
            b1 = squares.astype(np.float32) + b1_of_x[rows]
            top = (b1 - d.astype(np.float32)) * (b2 - e).astype(np.float32)
            return sum(cv2.sumElems((top / (b1 * b2.astype(np.float32)))[:, RIM:-RIM]))

        end, scores = shape[0] - RIM, []
        for view, distance in zip(self.views, self.distances, strict=True):
            sums(view)
            sums_of_squares(view, whole_y2)
            sums_of_squares(distance, whole_d2)
            strips = (slice(row, min(row + ROWS, end)) for row in range(RIM, end, ROWS))
            scores.append(sum(map(total, strips)) / ((shape[0] - 2 * RIM) * (shape[1] - 2 * RIM) * 3))
        return scores


def differences(grey: Float32[np.ndarray, "row col"], out: np.ndarray) -> Float32[np.ndarray, "row col"]:
    """|dg| along the rows, doubled: central within, one-sided at both ends."""
    np.subtract(grey[2:], grey[:-2], out=out[1:-1])
    for end, inner in ((0, 1), (-1, -2)):
        np.multiply(grey[end] - grey[inner], 2, out=out[end])
    return np.abs(out, out=out)


def alike(mse: Float[Tensor, "... row col"]) -> Float[Tensor, "..."]:
    return (1 / (1 + mse / 255**2)).mean((-2, -1))


def deviation_of(total: Tensor, squares: Tensor, *, n: int) -> Float64[Tensor, "..."]:
    """Standard deviation in grey levels from the sums over n greys in thousandths."""
    return (squares * n - total.square()).clamp_min(0).sqrt() / (1000 * n)


def detail_kept(x: Float64[Tensor, "image 1 row col"], y: Float64[Tensor, "image view row col"]) -> Tensor:
    flat_x, flat_y = x < FLAT, y < FLAT
    kept = ~flat_x | flat_x.all(-1, keepdim=True).all(-2, keepdim=True)
    larger = torch.maximum(x, y)
    ratio = torch.where(flat_x & flat_y, 1.0, torch.minimum(x, y) / torch.where(larger > 0, larger, 1.0))
    return (ratio * kept).sum((2, 3)) / kept.sum((2, 3))
