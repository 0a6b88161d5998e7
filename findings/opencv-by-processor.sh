#!/bin/sh
# albumentations 2.0.8 with OpenCV 5: the same seed draws other pixels on a processor without AVX2.
#
# One would guess that a seeded augmentation of a uint8 image has the same pixels everywhere, at least among x86-64
# processors, where OpenCV chooses its code at run time. So it is for noise, flips and dropout. ColorJitter, which goes
# through floating-point hue and saturation, and what resamples (Affine, Perspective) differ in one or two samples of ten
# thousand, by one grey level or two, so that a hash of the views, or a metric to six digits, is another one.
# A processor with AVX2 is held to less by OpenCV's own variable.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q albumentations==2.0.8 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat >draw.py <<'PY'
import sys

import albumentations as A
import numpy as np

rng = np.random.default_rng(0)
areas = rng.integers(0, 200, (16, 8, 8, 3)).repeat(28, 1).repeat(28, 2)
images = (areas + rng.integers(0, 56, areas.shape)).astype(np.uint8)
transforms = {
    "ColorJitter": A.ColorJitter(0.2, 0.2, 0.2, 0.2, p=1),
    "Affine": A.Affine(rotate=(-15, 15), scale=(0.9, 1.1), p=1),
    "Perspective": A.Perspective((0.05, 0.1), p=1),
    "GaussNoise": A.GaussNoise((0.44, 0.88), p=1),
    "HorizontalFlip": A.HorizontalFlip(p=1),
    "CoarseDropout": A.CoarseDropout((6, 8), (16, 16), (16, 16), p=1),
}
drawn = {}
for name, transform in transforms.items():
    transform.set_random_seed(0)
    drawn[name] = np.stack([transform(image=image)["image"] for image in images])
np.savez(sys.argv[1], **drawn)
PY
if ! grep -q avx2 /proc/cpuinfo; then
    echo "this processor has no AVX2: there is nothing to compare"
    exit 0
fi
export NO_ALBUMENTATIONS_UPDATE=1
venv/bin/python draw.py as_it_is.npz
OPENCV_CPU_DISABLE=SSE4.2,AVX,FP16,AVX2,AVX512-SKX venv/bin/python draw.py without_avx2.npz
venv/bin/pip list 2>/dev/null | grep -E '^(albumentations|opencv-python-headless) '
venv/bin/python - <<'PY'
import sys

import numpy as np

differs = set()
here, there = np.load("as_it_is.npz"), np.load("without_avx2.npz")
for name in here:
    off = np.abs(here[name].astype(int) - there[name])
    print(f"{name:16}{(off > 0).sum():7} of {off.size:,} samples differ, by {off.max()} at most")
    differs |= {name} if off.any() else set()
sys.exit(differs != {"ColorJitter", "Affine", "Perspective"})
PY
