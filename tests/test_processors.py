"""What the encoder chooses on this processor and on weaker ones, each in a process of its own."""

import json
import os
import platform
import re
import subprocess
import sys

import pytest
from processors import LEVELS

TOWERS = {"fast": {}, "plain": {"pool_type": "avg"}}
CHOICE = """
import json, sys, timeit
import torch, open_clip
from pathlib import Path
from test_encoder import numpy_views, relative, save_model, shifts, squares, through_openclip
from clipshift_core import encoder as room
from clipshift_core.encoder import Encoder, EncoderError

views = numpy_views(squares(4))
n_views, views = len(views), views.reshape(-1, 64, 64, 3)

def choose(folder, exact, precision):
    try:
        found = Encoder.load(folder, device="cpu", precision=precision)
    except EncoderError as error:
        return {"refused": str(error)}
    embedding = found.encode(views).embedding
    shift, wanted = shifts(embedding, n_views), shifts(exact, n_views)
    return {"precision": found.precision, "vision": found.vision, "claimed": found.precision_error,
            "off": relative(embedding, exact), "shift": float(abs(shift / wanted - 1).max())}

def choices(folder, vision):
    save_model(Path(folder), vision)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        exact = through_openclip(model.eval(), transform, views)
    seen = {precision: choose(folder, exact, precision) for precision in ("fp32", "auto", "mixed")}
    measured, room.bfloat16_gain = room.bfloat16_gain, lambda device: 2.0
    seen["all the same"] = choose(folder, exact, "mixed")
    room.bfloat16_gain = measured
    return seen

def seconds(dtype):
    x, weight = (torch.randn(*shape).to(dtype) for shape in ((1600, 768), (3072, 768)))
    return min(timeit.repeat(lambda: torch.nn.functional.linear(x, weight), repeat=4, number=1))

folder, towers = sys.argv[1], json.loads(sys.argv[2])
seen = {name: choices(f"{folder}/{name}", vision) for name, vision in towers.items()}
gain = seconds(torch.float32) / seconds(torch.bfloat16)
print(json.dumps({"level": torch.backends.cpu.get_cpu_capability(), "gain": gain, "towers": seen}))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_precision_is_chosen_by_what_the_processor_can_do(level, tmp_path, record_property):
    if LEVELS[level] and platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} cannot be held to {level}")
    command = [sys.executable, "-W", "ignore", "-c", CHOICE, str(tmp_path), json.dumps(TOWERS)]
    places = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | LEVELS[level] | {"PYTHONPATH": places}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    gain, faster = seen["gain"], seen["gain"] > 1
    which = f"held to {level}" if LEVELS[level] else "as it is"
    what = f"{gain if faster else 1 / gain:.1f} times as {'fast' if faster else 'slow'} as float32's"
    record_property("machine", f"processor {which} (torch: {seen['level']}): bfloat16 products are {what}")
    assert not (faster and LEVELS[level])  # neither AVX2 nor SSE4.1 has instructions for bfloat16
    for tower, found in seen["towers"].items():
        exact, mixed, forced = found["fp32"], found["mixed"], found["all the same"]
        assert exact == found["auto"] and exact["precision"] == "fp32" and exact["off"] < 1e-5
        assert exact["vision"].startswith(tower)
        # the products are right whether there are instructions for them or not ...
        assert forced["precision"] == "mixed" and forced["vision"] == exact["vision"]
        assert 1e-4 < forced["off"] < 0.1 and forced["claimed"] <= 0.03 and forced["shift"] <= 0.03
        # ... and used where they are faster
        if faster:
            assert mixed == forced
        else:
            said = rf"{tower}: precision 'mixed' is refused: .* takes (.*) times as long as in float32; accepted: fp32"
            assert float(re.fullmatch(said, mixed["refused"])[1]) > 1
