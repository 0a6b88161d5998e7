#!/bin/sh
# torch 2.15.0: on a CPU without instructions for bfloat16, autocast to bfloat16 is two to four times slower than float32,
# and with AVX-512 torch calls bfloat16 supported all the same.
#
# One would guess that `torch.autocast("cpu", torch.bfloat16)` costs nothing where the processor cannot profit, and that
# `torch.ops.mkldnn._is_mkldnn_bf16_supported()` tells the two kinds of processor apart. A CLIP tower is nearly all
# matrix products; the one timed here is a ViT-B's on 32 images. With AVX-512 but without AVX512_BF16 the answer is
# "supported", and the product takes twice as long as in float32 and more. With AVX2 the answer is "not supported",
# autocast goes on without a warning, and the product takes four times as long. A processor that has more is held to
# these two by oneDNN's and torch's own variables.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q uv==0.13.8
venv/bin/uv pip install -q --python venv/bin/python torch==2.15.0 numpy==2.4.6
cat >time.py <<'PY'
import sys
from timeit import repeat

import torch

layer, x = torch.nn.Linear(768, 3072), torch.randn(1600, 768)


def run(mixed):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        layer(x)


plain, mixed = (min(repeat(lambda: run(on), repeat=6, number=1)) for on in (False, True))
supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(f"{sys.argv[1]:24} torch {torch.__version__}, bfloat16 supported: {supported!s:6}", end="")
print(f"float32 {1e3 * plain:.0f} ms, autocast {1e3 * mixed:.0f} ms, {mixed / plain:.1f} times")
sys.exit(not (mixed > 1.3 * plain and supported == (sys.argv[1] != "AVX2")))
PY
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 venv/bin/python time.py "AVX2"
if grep -q avx512bw /proc/cpuinfo; then
    ONEDNN_MAX_CPU_ISA=AVX512_CORE venv/bin/python time.py "AVX-512 without bfloat16"
fi
