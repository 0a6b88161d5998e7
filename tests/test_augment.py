import math
import os
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.data
import skimage.transform
import torch
import torchvision.transforms.v2.functional as F
from processors import OPENCV_WITHOUT_AVX2

from clipshift_core import augment
from clipshift_core.augment import AUGMENTATIONS, VIEWS, random_state, view, views
from clipshift_core.images import resize

SIZE = 224
SEEDS = range(6)
PHOTO = resize(np.ascontiguousarray(skimage.data.astronaut()), SIZE)
PHOTO.flags.writeable = False  # writing to the input would raise in every test here
GREY = np.full((SIZE, SIZE, 3), 128, np.uint8)


def drawn(name, seed, image=PHOTO, image_id="x"):
    return augment._draw(image, name, random_state(seed, image_id, name))[1]


def error(a, b):
    return np.abs(a.astype(float) - b)


def published(name, seed, image=PHOTO):
    """The class that the paper names, with its parameters, through albumentations' own call."""
    row = AUGMENTATIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ShiftScaleRotate's advice
        transform = getattr(A, row.transform)(**row.parameters, p=1)
    transform.set_random_seed(random_state(seed, "x", name))
    return transform(image=image)["image"]


# What is published


def test_the_nine_are_those_of_the_paper():
    assert {name: (row.transform, row.parameters) for name, row in AUGMENTATIONS.items()} == {
        "noise": ("GaussNoise", {"std_range": (0.44, 0.88)}),
        "blur": ("GaussianBlur", {"blur_limit": (3, 7)}),
        "color_jitter": ("ColorJitter", {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2}),
        "shift_scale_rotate": (
            "ShiftScaleRotate",
            {"shift_limit": 0.0625, "scale_limit": 0.1, "rotate_limit": 15},
        ),
        "horizontal_flip": ("HorizontalFlip", {}),
        "elastic": ("ElasticTransform", {"alpha": 30, "sigma": 60}),
        "perspective": ("Perspective", {"scale": (0.05, 0.1)}),
        "random_brightness_contrast": (
            "RandomBrightnessContrast",
            {"brightness_limit": 0.2, "contrast_limit": 0.2},
        ),
        "coarse_dropout": (
            "CoarseDropout",
            {
                "num_holes_range": (6, 8),
                "hole_height_range": (16, 16),
                "hole_width_range": (16, 16),
                "fill": "random",
            },
        ),
    }
    assert ("original", *AUGMENTATIONS) == VIEWS


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name not in ("noise", "elastic")])
@pytest.mark.parametrize("image", [PHOTO, PHOTO[:150, 20:200]], ids=["square", "oblong"])
def test_views_are_the_pixels_of_the_published_class(name, image):
    for seed in SEEDS:
        np.testing.assert_array_equal(
            view(image, name, seed=seed, image_id="x"), published(name, seed, image=np.ascontiguousarray(image))
        )


@pytest.mark.parametrize("shape", [(224, 224), (97, 160), (8, 8)])
def test_elastic_by_matrix_products_is_the_published_elastic(shape):
    image = np.ascontiguousarray(resize(PHOTO, 304)[: shape[0], : shape[1]])
    assert augment._blur_agrees(*shape, 30, 60)
    for seed in SEEDS:
        off = error(view(image, "elastic", seed=seed, image_id="x"), published("elastic", seed, image))
        assert off.max() <= 1
        assert (off > 0).mean() < 1e-4
    assert not augment._blur_agrees(600, 600, 30, 60)  # there albumentations' own is used


def test_elastic_falls_back_to_albumentations(monkeypatch):
    monkeypatch.setattr(augment, "_blur_agrees", lambda *_: False)
    np.testing.assert_array_equal(view(PHOTO, "elastic", seed=0, image_id="x"), published("elastic", 0))


# Independent oracles: is albumentations itself right, on the OpenCV that is installed?


def test_horizontal_flip():
    np.testing.assert_array_equal(view(PHOTO, "horizontal_flip", seed=0, image_id="x"), PHOTO[:, ::-1])


def test_noise_is_gaussian_with_a_deviation_in_the_published_range():
    deviations = []
    for seed in range(30):
        field = drawn("noise", seed)["noise_map"]
        deviations.append(field.std() / 255)
        ours = view(GREY, "noise", seed=seed, image_id="x")
        expected = np.clip(128 + np.trunc(field), 0, 255)  # albumentations adds whole steps
        assert (error(ours, expected) > 0).mean() < 1e-4
    assert min(deviations) > 0.44 * 0.995
    assert max(deviations) < 0.88 * 1.005
    assert scipy.stats.kstest(deviations, scipy.stats.uniform(0.44, 0.44).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(field.ravel()[::7] / field.std(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(field.reshape(-1, 3).T) - np.eye(3)).max() < 0.02


def test_noise_has_the_distribution_of_the_published_class():
    share = np.mean([published("noise", seed, GREY) == 0 for seed in range(30)])
    ours = np.mean([view(GREY, "noise", seed=seed, image_id="x") == 0 for seed in range(30)])
    assert abs(share - ours) < 0.03


def test_blur():
    sigmas, widths = [], []
    for seed in range(30):
        kernel = drawn("blur", seed)["kernel"]
        x = np.arange(len(kernel)) - len(kernel) // 2
        widths.append(len(kernel))
        sigmas.append(math.sqrt(-0.5 / math.log(kernel[x == 1][0] / kernel[x == 0][0])))
        oracle = scipy.ndimage.gaussian_filter(
            PHOTO.astype(float), sigmas[-1], mode="mirror", radius=(len(kernel) // 2,) * 2, axes=(0, 1)
        )
        assert error(view(PHOTO, "blur", seed=seed, image_id="x"), oracle).max() <= 1.1
    assert set(widths) == {3, 5, 7}
    assert 0.5 <= min(sigmas) < 1
    assert 2.5 < max(sigmas) <= 3


def test_color_jitter():
    for seed in SEEDS:
        params = drawn("color_jitter", seed)
        oracle = torch.from_numpy(PHOTO.copy()).permute(2, 0, 1).float() / 255
        steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
        factors = [params[key] for key in ("brightness", "contrast", "saturation", "hue")]
        assert all(0.8 <= factor <= 1.2 for factor in factors[:3])
        assert -0.2 <= factors[3] <= 0.2
        for step in params["order"]:
            oracle = steps[step](oracle, factors[step])
        off = error(view(PHOTO, "color_jitter", seed=seed, image_id="x"), oracle.permute(1, 2, 0).numpy() * 255)
        assert off.mean() < 2.5  # 8 bits between the steps, hue in steps of 2 degrees, rounding down
        assert np.quantile(off, 0.99) < 12


def test_random_brightness_contrast():
    for seed in range(12):
        params = drawn("random_brightness_contrast", seed)
        alpha, beta = params["alpha"], params["beta"]
        assert 0.8 <= alpha <= 1.2
        assert abs(beta) <= 0.2 * 255
        oracle = np.clip(alpha * PHOTO.astype(float) + beta, 0, 255)
        off = oracle - view(PHOTO, "random_brightness_contrast", seed=seed, image_id="x")
        assert off.min() > -1e-3  # rounded down
        assert off.max() < 1


def warped(matrix):
    """PHOTO through a matrix of pixel coordinates, by scikit-image; black outside."""
    inverse = skimage.transform.ProjectiveTransform(np.linalg.inv(matrix))
    return skimage.transform.warp(PHOTO.astype(float), inverse, order=1, mode="constant", preserve_range=True)


def inside(matrix, margin=2):
    """Output pixels whose source lies inside by a margin: at the border the two libraries blend differently."""
    y, x = np.mgrid[:SIZE, :SIZE]
    source = np.linalg.inv(matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    at = source[:2] / source[2]
    return ((at >= margin) & (at <= SIZE - 1 - margin)).all(axis=0).reshape(SIZE, SIZE)


def test_shift_scale_rotate():
    angles, shifts = [], []
    centre = np.array([SIZE - 1, SIZE - 1]) / 2
    for seed in range(40):
        params = drawn("shift_scale_rotate", seed)
        matrix = params["matrix"]
        scale = np.linalg.norm(matrix[:2, :2], axis=0)
        angles.append(math.degrees(math.atan2(matrix[0, 1] / scale[1], matrix[0, 0] / scale[0])))
        shifts.append(matrix[:2] @ [*centre, 1] - centre)
        assert (scale >= 0.9).all() and (scale <= 1.1).all()
        if seed < 6:
            ours = view(PHOTO, "shift_scale_rotate", seed=seed, image_id="x")
            off = error(ours, warped(matrix))[inside(matrix)]
            assert off.mean() < 0.6
            assert np.quantile(off, 0.999) < 4
            assert (ours[~inside(matrix, margin=-2)] == 0).all()
    assert np.abs(angles).max() <= 15
    assert np.std(angles) > 5
    assert np.abs(shifts).max() <= 14
    assert np.std(shifts) > 4


def test_perspective():
    for seed in range(8):
        params = drawn("perspective", seed)
        # 2.0.8 zooms once more by size / side after the corners have been stretched to the image
        again = np.diag([SIZE / params["max_width"], SIZE / params["max_height"], 1])
        matrix = again @ params["matrix"]
        ours = view(PHOTO, "perspective", seed=seed, image_id="x")
        off = error(ours, warped(matrix))[inside(matrix)]
        assert off.mean() < 0.6
        assert np.quantile(off, 0.999) < 4
        corners = np.linalg.inv(params["matrix"]) @ np.array([[0, SIZE, SIZE, 0], [0, 0, SIZE, SIZE], [1] * 4])
        moved = np.abs(corners[:2] / corners[2] - np.array([[0, SIZE, SIZE, 0], [0, 0, SIZE, SIZE]])) / SIZE
        assert moved.max() < 0.32
        assert 0.01 < moved.mean() < 0.15


def test_elastic_moves_a_pixel_by_about_a_fifth():
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    moved = []
    for seed in range(8):
        params = drawn("elastic", seed)
        moved += [np.abs(params["map_x"] - x).mean(), np.abs(params["map_y"] - y).mean()]
        channel = scipy.ndimage.map_coordinates(
            PHOTO[..., 1].astype(float), [params["map_y"], params["map_x"]], order=1, mode="constant"
        )
        off = error(view(PHOTO, "elastic", seed=seed, image_id="x")[..., 1], channel)[9:-9, 9:-9]
        assert off.mean() < 0.6
        assert off.max() < 4
    assert 0.15 < np.mean(moved) < 0.22  # along each axis


def test_coarse_dropout():
    fills, counts = [], []
    for seed in range(40):
        holes = drawn("coarse_dropout", seed)["holes"]
        counts.append(len(holes))
        assert (holes[:, 2:] - holes[:, :2] == 16).all()
        mask = np.zeros((SIZE, SIZE), bool)
        for x0, y0, x1, y1 in holes:
            assert x0 >= 0 and y0 >= 0 and x1 <= SIZE and y1 <= SIZE
            mask[y0:y1, x0:x1] = True
        ours = view(PHOTO, "coarse_dropout", seed=seed, image_id="x")
        np.testing.assert_array_equal(ours[~mask], PHOTO[~mask])
        fills.append(ours[mask].ravel())
    assert set(counts) == {6, 7, 8}
    assert scipy.stats.chisquare(np.bincount(np.concatenate(fills), minlength=256)).pvalue > 1e-3


# A view is a pure function of (image, name, seed, image id, severity)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_differ_between_seeds_and_images_and_are_repeated(name):
    one = view(PHOTO, name, seed=1, image_id="a")
    np.testing.assert_array_equal(one, view(PHOTO.copy(), name, seed=1, image_id="a"))
    others = [view(PHOTO, name, seed=2, image_id="a"), view(PHOTO, name, seed=1, image_id="b")]
    assert all((one != other).any() for other in others) == (name != "horizontal_flip")
    assert one.shape == PHOTO.shape
    assert one.dtype == np.uint8
    assert one.flags.writeable
    assert not np.shares_memory(one, PHOTO)


def test_views_do_not_depend_on_threads_order_or_company():
    jobs = [(name, image_id) for image_id in "abcdef" for name in VIEWS]
    serial = {job: view(PHOTO, job[0], seed=3, image_id=job[1]) for job in jobs}
    shuffled = jobs[:]
    random.Random(0).shuffle(shuffled)
    with ThreadPoolExecutor(4) as pool:
        parallel = dict(
            zip(shuffled, pool.map(lambda job: view(PHOTO, job[0], seed=3, image_id=job[1]), shuffled), strict=True)
        )
    for job in jobs:
        np.testing.assert_array_equal(serial[job], parallel[job], err_msg=str(job))
    stacked = views(PHOTO, seed=3, image_id="b")
    assert stacked.shape == (10, SIZE, SIZE, 3)
    for name, one in zip(VIEWS, stacked, strict=True):
        np.testing.assert_array_equal(one, serial[name, "b"])
    np.testing.assert_array_equal(views(PHOTO, seed=3, image_id="b", names=VIEWS[:4:-1]), stacked[:4:-1])


def test_no_shared_random_state_is_read_or_written():
    def shared():
        return random.random(), np.random.random(), cv2.randu(np.zeros(4, np.float32), 0, 1).tolist()  # noqa: NPY002

    def reset(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        cv2.setRNGSeed(seed)

    reset(1)
    untouched = shared()
    reset(1)
    first = views(PHOTO, seed=0, image_id="x")
    assert shared() == untouched
    reset(2)
    np.testing.assert_array_equal(views(PHOTO, seed=0, image_id="x"), first)


def test_another_process_draws_the_same_and_the_import_is_silent():
    code = (
        "import sys, hashlib, numpy as np\n"
        "from clipshift_core.augment import views\n"
        "image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)\n"
        "print(hashlib.sha256(views(image, seed=5, image_id='x').tobytes()).hexdigest())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment | {"PYTHONHASHSEED": "77", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.stderr == ""
    here = []
    exec(code.replace("print(", "here.append("), {"here": here})
    assert ran.stdout.strip() == here[0]


def test_a_processor_without_avx2_draws_nearly_the_same(tmp_path):
    """OpenCV resamples and turns colours by other instructions there (findings/opencv-by-processor.sh)."""
    code = (
        "import sys, numpy as np\n"
        "from clipshift_core.augment import views\n"
        "photo = np.load(sys.argv[1])\n"
        "np.save(sys.argv[2], np.stack([views(photo, seed=seed, image_id='x') for seed in range(8)]))\n"
    )
    np.save(tmp_path / "photo.npy", PHOTO)
    paths = [str(tmp_path / name) for name in ("photo.npy", "views.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], env=os.environ | OPENCV_WITHOUT_AVX2, check=True)
    there, here = np.load(paths[1]), np.stack([views(PHOTO, seed=seed, image_id="x") for seed in range(8)])
    off = error(there, here)
    assert off.max() <= 2 and (off > 0).mean((0, 2, 3, 4)).max() < 1e-3
    same = [VIEWS.index(name) for name in ("original", "noise", "horizontal_flip", "coarse_dropout")]
    assert off[:, same].max() == 0


def test_the_random_state_is_pinned():
    """A change here changes every view of every run, and must be meant."""
    assert random_state(0, "scene-000", "noise") == 59681853590241781466347565658553113357


# Severity


@pytest.mark.parametrize("name", VIEWS)
def test_severity_0_is_the_image_and_1_the_published_view(name):
    np.testing.assert_array_equal(view(PHOTO, name, seed=0, image_id="x", severity=0), PHOTO)
    np.testing.assert_array_equal(
        view(PHOTO, name, seed=0, image_id="x", severity=1), view(PHOTO, name, seed=0, image_id="x")
    )


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "horizontal_flip"])
def test_distortion_grows_with_severity_and_does_not_jump(name):
    def distortion(severity):
        return np.mean(
            [error(view(PHOTO, name, seed=0, image_id=i, severity=severity), PHOTO).mean() for i in "abcdef"]
        )

    grid = [0.05, 0.25, 0.5, 0.75, 1, 1.5, 2]
    curve = [distortion(severity) for severity in grid]
    assert (np.diff(curve) > 0).all()
    assert distortion(1e-6) < 0.08 * curve[4] + 0.6  # the 8 bit steps of hue and rounding down remain
    near = [distortion(severity) for severity in (0.999, 1.001)]
    np.testing.assert_allclose(near, curve[4], rtol=0.01, atol=0.02)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("severity", [1e-9, 0.3, 3, 20])
def test_any_severity_gives_an_image(name, severity):
    for image in (PHOTO, PHOTO[:40, :33]):
        out = view(image, name, seed=0, image_id="x", severity=severity)
        assert out.shape == image.shape
        assert out.dtype == np.uint8


def test_severity_scales_what_was_drawn():
    half = view(GREY, "noise", seed=0, image_id="x", severity=0.5)
    field = drawn("noise", 0)["noise_map"]
    assert (error(half, np.clip(128 + np.trunc(0.5 * field), 0, 255)) > 0).mean() < 1e-3

    params = drawn("random_brightness_contrast", 0)
    alpha, beta = 1 + 1.5 * (params["alpha"] - 1), 1.5 * params["beta"]
    ours = view(PHOTO, "random_brightness_contrast", seed=0, image_id="x", severity=1.5)
    assert error(ours, np.clip(alpha * PHOTO.astype(float) + beta, 0, 255)).max() < 1

    kernel = drawn("blur", 2)["kernel"]  # the widest, so that half of it is whole taps and a fraction
    sigma = math.sqrt(-0.5 / math.log(kernel[len(kernel) // 2 + 1] / kernel[len(kernel) // 2]))
    ours = view(PHOTO, "blur", seed=2, image_id="x", severity=2)
    oracle = scipy.ndimage.gaussian_filter(
        PHOTO.astype(float), 2 * sigma, mode="mirror", radius=(2 * (len(kernel) // 2),) * 2, axes=(0, 1)
    )
    assert error(ours, oracle).max() <= 1.1

    params = drawn("shift_scale_rotate", 4)
    around = SIZE / 2 - 0.5
    to, back = np.eye(3), np.eye(3)
    to[:2, 2], back[:2, 2] = -around, around
    moved = params["matrix"] @ [around, around, 1] - [around, around, 1]
    back[:2, 2] += 0.5 * moved[:2]
    turn = math.radians(0.5 * params["rotate"])
    rotate = np.array([[math.cos(turn), math.sin(turn), 0], [-math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    scale = np.diag([1 + 0.5 * (params["scale"]["x"] - 1), 1 + 0.5 * (params["scale"]["y"] - 1), 1])
    matrix = back @ rotate @ scale @ to
    ours = view(PHOTO, "shift_scale_rotate", seed=4, image_id="x", severity=0.5)
    assert error(ours, warped(matrix))[inside(matrix)].mean() < 0.6

    y, x = np.mgrid[:SIZE, :SIZE]
    params = drawn("elastic", 0)
    at = [y + 4 * (params["map_y"] - y), x + 4 * (params["map_x"] - x)]
    channel = scipy.ndimage.map_coordinates(PHOTO[..., 0].astype(float), at, order=1)
    ours = view(PHOTO, "elastic", seed=0, image_id="x", severity=4)
    assert error(ours[..., 0], channel)[4:-4, 4:-4].mean() < 0.6


def test_holes_keep_their_centre_and_their_fill():
    holes = drawn("coarse_dropout", 0)["holes"]
    full = view(PHOTO, "coarse_dropout", seed=0, image_id="x")
    half = view(PHOTO, "coarse_dropout", seed=0, image_id="x", severity=0.5)
    twice = view(PHOTO, "coarse_dropout", seed=0, image_id="x", severity=2)
    mask, wide = np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
    for x0, y0, x1, y1 in holes:
        mask[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4] = True
        wide[max(0, y0 - 8) : y1 + 8, max(0, x0 - 8) : x1 + 8] = True
        np.testing.assert_array_equal(twice[y0:y1, x0:x1], full[y0:y1, x0:x1])
    np.testing.assert_array_equal(half, np.where(mask[..., None], full, PHOTO))
    np.testing.assert_array_equal(twice[~wide], PHOTO[~wide])


def test_a_flip_has_no_half():
    for severity, flipped in ((0.49, False), (0.5, True), (7, True)):
        out = view(PHOTO, "horizontal_flip", seed=0, image_id="x", severity=severity)
        np.testing.assert_array_equal(out, PHOTO[:, ::-1] if flipped else PHOTO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nois"}, "unknown view 'nois'; did you mean 'noise'"),
        ({"severity": -0.1}, "severity -0.1"),
        ({"severity": math.nan}, "severity nan"),
        ({"image": PHOTO.astype(np.float32)}, "image of float32"),
        ({"image": PHOTO[..., 0]}, r"image of uint8 \(224, 224\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        view(**({"image": PHOTO, "name": "noise", "seed": 0, "image_id": "x"} | arguments))
