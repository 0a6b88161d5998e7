"""The nine augmentations of paper A, with the published parameters as data, and at any severity.

A view depends on (seed, image id, augmentation) alone: each is drawn from a random state that a hash of the
three gives, so batch, worker, order and thread do not matter. The transforms are albumentations 2.0.8's own.
They are used in two steps: their parameters are drawn as published, then `severity` scales what was drawn, so
that one image keeps its draw along a dose-response curve. At severity 1 nothing is scaled.

Two are replaced by an equal: `shift_scale_rotate` is `Affine`, which `ShiftScaleRotate` only wraps (with a
warning); elastic's displacement field is blurred by matrix products (same field, a twentieth of the time).
One draws differently: `GaussNoise` seeds OpenCV's shared generator with 16 bits, that is with one of 65,536
fields for all images; ours comes from the view's own generator, with the same distribution.

Worth knowing of the published class `Perspective` in 2.0.8: with `keep_size` it stretches the drawn
quadrilateral to the image *and then* zooms by size / side once more. The paper's pixels have that too, so
ours do.
"""

import copy
import difflib
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before the import, which else asks the network

import albumentations as A  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import Float32, Float64, UInt8  # noqa: E402
from scipy.special import ndtri  # noqa: E402

Image = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Augmentation:
    """One row of paper A's table."""

    transform: str
    """albumentations class, as published"""
    parameters: dict
    """its published parameters; all else is the class's default"""
    dose: str
    """what severity multiplies"""


AUGMENTATIONS = {
    "noise": Augmentation("GaussNoise", {"std_range": (0.44, 0.88)}, "the noise, hence its deviation"),
    "blur": Augmentation("GaussianBlur", {"blur_limit": (3, 7)}, "the kernel's sigma and width"),
    "color_jitter": Augmentation(
        "ColorJitter",
        {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2},
        "each factor's distance from 1, and the turn of the hue",
    ),
    "shift_scale_rotate": Augmentation(
        "ShiftScaleRotate",
        {"shift_limit": 0.0625, "scale_limit": 0.1, "rotate_limit": 15},
        "shift, angle, and each scale's distance from 1",
    ),
    "horizontal_flip": Augmentation("HorizontalFlip", {}, "nothing: flipped from severity 0.5 on"),
    "elastic": Augmentation("ElasticTransform", {"alpha": 30, "sigma": 60}, "the displacement of every pixel"),
    "perspective": Augmentation("Perspective", {"scale": (0.05, 0.1)}, "the displacement of the four corners"),
    "random_brightness_contrast": Augmentation(
        "RandomBrightnessContrast",
        {"brightness_limit": 0.2, "contrast_limit": 0.2},
        "the brightness added and the contrast's distance from 1",
    ),
    "coarse_dropout": Augmentation(
        "CoarseDropout",
        {
            "num_holes_range": (6, 8),
            "hole_height_range": (16, 16),
            "hole_width_range": (16, 16),
            "fill": "random",
        },
        "the side of each hole, about its centre",
    ),
}
"""The nine, in the paper's order."""

VIEWS = ("original", *AUGMENTATIONS)


def view(image: Image, name: str, *, seed: int, image_id: str, severity: float = 1.0) -> Image:
    """One view of an image: a pure function of its arguments; `image` is not written to.

    severity: 0 is the image itself, exactly; 1 the published parameters; between and beyond, what was drawn
    is scaled (`Augmentation.dose`), with the same draw at every severity. A flip has no half: it is done from
    0.5 on. Raises ValueError for an unknown name, a negative severity, or pixels that are not uint8 RGB.
    """
    if name not in VIEWS:
        close = difflib.get_close_matches(str(name), VIEWS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown view {name!r}{hint} Accepted: {', '.join(VIEWS)}")
    if not (severity >= 0 and math.isfinite(severity)):
        raise ValueError(f"severity {severity!r}: a number of 0 (the image itself) or more is accepted")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image of {image.dtype} {image.shape}: uint8 (height, width, 3) is accepted")
    if name == "original" or severity == 0:
        return image.copy()
    image = np.ascontiguousarray(image)
    transform, drawn = _draw(image, name, random_state(seed, image_id, name))
    if severity == 1:
        return np.ascontiguousarray(transform.apply(image, **drawn))
    return np.ascontiguousarray(_at_severity(image, name, transform, drawn, severity))


def views(
    image: Image, *, seed: int, image_id: str, names: Sequence[str] = VIEWS
) -> UInt8[np.ndarray, "view height width 3"]:
    """The views of one image in the order of `names`, at the published severity."""
    out = np.empty((len(names), *image.shape), np.uint8)
    for slot, name in zip(out, names, strict=True):
        slot[...] = view(image, name, seed=seed, image_id=image_id)
    return out


def random_state(seed: int, image_id: str, name: str) -> int:
    """128 bits that depend on the three alone (SHA-256, not `hash`, which differs between processes)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{image_id}".encode("utf-8", "surrogateescape")).digest()[:16])


_NORMAL = ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)
"""Quantiles of the normal distribution. Drawing among them is four times as fast as a normal generator and
bit for bit the same on any machine; they end at 4.2 deviations, 470 grey levels for the weakest noise."""


class _Noise(A.GaussNoise):
    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        std = self.py_random.uniform(*self.std_range)
        field = _NORMAL.take(self.random_generator.integers(0, 2**16, params["shape"], np.uint16))
        return {"noise_map": np.multiply(field, np.float32(std * 255), out=field)}


class _Elastic(A.ElasticTransform):
    """albumentations' elastic transform with its broad Gaussian blur done as matrix products.

    The displacements agree with its own to 1e-5 pixels (OpenCV's float32 blur is the less exact of the two),
    so a pixel value in 100,000 differs, by 1. If they do not agree on this installation, its own are used.
    """

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        if not _blur_agrees(height, width, self.alpha, self.sigma):
            return super().get_params_dependent_on_data(params, data)
        return self.maps(height, width)

    def maps(self, height: int, width: int) -> dict[str, Float32[np.ndarray, "height width"]]:
        field = self.random_generator.standard_normal((2, height, width), dtype=np.float32)
        field /= np.abs(field).max()
        rows, left, right = _broad_blur(height, width, self.sigma)
        blurred = rows @ (field.reshape(-1, width).astype(np.float64) @ left) @ right
        moved = blurred.reshape(field.shape).astype(np.float32) * np.float32(self.alpha)
        moved[0] += np.arange(width, dtype=np.float32)
        moved[1] += np.arange(height, dtype=np.float32)[:, None]
        return {"map_x": moved[0], "map_y": moved[1]}


@lru_cache(maxsize=8)
def _broad_blur(height: int, width: int, sigma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The separable blur of both fields, stacked as albumentations stacks them: rows @ fields @ left @ right.

    So broad a Gaussian hardly varies along a row: at 224 pixels and sigma 60 its matrix has rank 11 to 1e-8,
    so that the product costs 9 million operations rather than 135. In float64, so that BLAS's order of
    summation, which differs between machines, does not reach the pixels.
    """
    columns = _gaussian_matrix(width, sigma).T
    u, s, vt = np.linalg.svd(columns)
    rank = int((s > s[0] * 1e-8).sum())
    factors = _gaussian_matrix(2 * height, sigma), u[:, :rank] * s[:rank], vt[:rank]
    return tuple(np.ascontiguousarray(factor) for factor in factors)


def _gaussian_matrix(n: int, sigma: float) -> np.ndarray:
    """cv2.GaussianBlur of n float32 samples as a matrix (n, n): 4 sigma each side, border repeated."""
    kernel = cv2.getGaussianKernel(round(sigma * 8 + 1) | 1, sigma, cv2.CV_64F)[:, 0]
    reach = np.arange(len(kernel)) - len(kernel) // 2
    matrix = np.zeros((n, n))
    for row, source in enumerate(np.clip(np.arange(n)[:, None] + reach, 0, n - 1)):
        np.add.at(matrix[row], source, kernel)
    return matrix


@lru_cache(maxsize=64)
def _blur_agrees(height: int, width: int, alpha: float, sigma: float) -> bool:
    """Whether `_Elastic.maps` gives albumentations' own displacements here, tried once per image size."""
    if max(height, width) > 512:  # the matrices grow with the square, and no encoder of today asks for more
        return False
    ours, own = _Elastic(alpha=alpha, sigma=sigma, p=1), A.ElasticTransform(alpha=alpha, sigma=sigma, p=1)
    ours.set_random_seed(0)
    own.set_random_seed(0)
    ours, own = ours.maps(height, width), own.get_params_dependent_on_data({"shape": (height, width, 3)}, {})
    return all(np.abs(ours[key] - own[key]).max() < 1e-3 for key in ("map_x", "map_y"))


def _build(name: str) -> A.BasicTransform:
    published = AUGMENTATIONS[name]
    match published.transform, published.parameters:
        case "GaussNoise", parameters:
            return _Noise(**parameters, p=1)
        case "ElasticTransform", parameters:
            return _Elastic(**parameters, p=1)
        case "ShiftScaleRotate", {"shift_limit": shift, "scale_limit": scale, "rotate_limit": rotate}:
            return A.Affine(
                translate_percent={"x": (-shift, shift), "y": (-shift, shift)},
                scale=(1 - scale, 1 + scale),
                rotate=(-rotate, rotate),
                p=1,
            )
        case transform, parameters:
            return getattr(A, transform)(**parameters, p=1)


_TRANSFORMS = {name: _build(name) for name in AUGMENTATIONS}


def _draw(image: Image, name: str, state: int) -> tuple[A.BasicTransform, dict]:
    """A transform with its own random state, and what it draws: the steps of its `__call__`."""
    transform = copy.copy(_TRANSFORMS[name])  # a transform carries its state, so threads must not share one
    transform.set_random_seed(state)
    data = {"image": image}
    params = transform.update_transform_params(params=transform.get_params(), data=data)
    return transform, params | transform.get_params_dependent_on_data(params=params, data=data)


def _at_severity(image: Image, name: str, transform: A.BasicTransform, drawn: dict, severity: float) -> Image:
    """The transform applied with what it drew scaled by severity."""
    height, width = image.shape[:2]
    match name:
        case "noise":
            scaled = {"noise_map": drawn["noise_map"] * np.float32(severity)}
        case "blur":
            scaled = {"kernel": _scaled_kernel(drawn["kernel"], severity)}
        case "color_jitter":
            factors = ("brightness", "contrast", "saturation")
            scaled = {key: _from_one(drawn[key], severity) for key in factors}
            scaled["hue"] = drawn["hue"] * severity
        case "shift_scale_rotate":
            scaled = {"matrix": _scaled_affine(drawn, severity, np.array([width - 1, height - 1]) / 2)}
        case "horizontal_flip":
            return transform.apply(image, **drawn) if severity >= 0.5 else image.copy()
        case "elastic":
            x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
            by = np.float32(severity)
            scaled = {"map_x": x + by * (drawn["map_x"] - x), "map_y": y + by * (drawn["map_y"] - y)}
        case "perspective":
            scaled = _scaled_perspective(drawn, severity, width, height)
        case "random_brightness_contrast":
            scaled = {"alpha": _from_one(drawn["alpha"], severity), "beta": drawn["beta"] * severity}
        case "coarse_dropout":
            return _scaled_dropout(image, transform, drawn, severity)
    return transform.apply(image, **(drawn | scaled))


def _from_one(factor: float, severity: float) -> float:
    return max(0.0, 1 + severity * (factor - 1))


def _scaled_kernel(kernel: Float64[np.ndarray, " taps"], severity: float) -> np.ndarray:
    """The Gaussian taps drawn, with sigma and half-width times severity.

    The outermost tap enters with the fraction of it that the half-width reaches: blur grows without steps.
    """
    half = len(kernel) // 2
    sigma = math.sqrt(-0.5 / math.log(kernel[half + 1] / kernel[half]))
    reach = half * severity
    x = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    taps = np.exp(-0.5 * (x / (sigma * severity)) ** 2) * np.clip(reach + 1 - np.abs(x), 0, 1)
    return taps / taps.sum()


def _scaled_affine(drawn: dict, severity: float, centre: np.ndarray) -> np.ndarray:
    """Matrix (3, 3) of centre + shift + R(angle) diag(scale) (p - centre), each part scaled."""
    shift = severity * (drawn["matrix"][:2] @ [*centre, 1] - centre)
    angle = math.radians(severity * drawn["rotate"])
    cos, sin = math.cos(angle), math.sin(angle)
    # not below a twentieth: far beyond severity 1 a scale of 0 would have no inverse
    scale = [max(0.05, _from_one(drawn["scale"][axis], severity)) for axis in "xy"]
    linear = np.array([[cos, sin], [-sin, cos]]) * scale
    return np.vstack([np.column_stack([linear, centre + shift - linear @ centre]), [0, 0, 1]])


def _scaled_perspective(drawn: dict, severity: float, width: int, height: int) -> dict:
    """The four corners moved by severity times what was drawn, at most to just short of the middle."""
    size = np.array([width, height])
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    points = cv2.perspectiveTransform(corners[None].astype(float), np.linalg.inv(drawn["matrix"]))[0]
    moved = corners + np.clip(severity * (points - corners), -0.49 * size, 0.49 * size)
    # albumentations rounds the sides down to whole pixels; here by the share `severity`: no jump at 0 or 1
    lost = np.array(_sides(points)) - [drawn["max_width"], drawn["max_height"]]
    max_width, max_height = _sides(moved) - severity * np.clip(lost, 0, 1)
    matrix = cv2.getPerspectiveTransform(moved.astype(np.float32), corners.astype(np.float32))
    return {"matrix": matrix, "max_width": max_width, "max_height": max_height}


def _sides(points: np.ndarray) -> np.ndarray:
    """Longer of the horizontal, of the vertical sides of a quadrilateral, clockwise from the top left."""
    top, right, bottom, left = np.linalg.norm(points - np.roll(points, -1, axis=0), axis=1)
    return np.array([max(top, bottom), max(right, left)])


def _scaled_dropout(image: Image, transform: A.BasicTransform, drawn: dict, severity: float) -> Image:
    """Each hole shrunk or grown about its centre, with the published fill wherever a published hole is."""
    holes, (height, width) = drawn["holes"], image.shape[:2]
    centre, half = (holes[:, :2] + holes[:, 2:]) / 2, severity * (holes[:, 2:] - holes[:, :2]) / 2
    resized = np.rint(np.hstack([centre - half, centre + half])).astype(int)
    resized = np.clip(resized, 0, [width, height, width, height])
    published = transform.apply(image, **drawn)
    out = image.copy() if severity < 1 else transform.apply(image, **(drawn | {"holes": resized}))
    for x0, y0, x1, y1 in resized if severity < 1 else holes:
        out[y0:y1, x0:x1] = published[y0:y1, x0:x1]
    return out
