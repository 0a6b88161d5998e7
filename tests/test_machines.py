"""What is chosen on this machine and on weaker ones: precisions by processors, tests by whether there is a browser."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from processors import LEVELS

from clipshift_core.profiles import ROOT

PROCESSORS = LEVELS | {"AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}
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


@pytest.mark.parametrize("level", PROCESSORS)
def test_precision_is_chosen_by_what_the_processor_can_do(level, tmp_path, record_property):
    if PROCESSORS[level] and platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} cannot be held to {level}")
    command = [sys.executable, "-W", "ignore", "-c", CHOICE, str(tmp_path), json.dumps(TOWERS)]
    places = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | PROCESSORS[level] | {"PYTHONPATH": places}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    gain, which = seen["gain"], f"held to {level}" if PROCESSORS[level] else "as it is"
    what = f"{gain:.1f} times as fast" if gain > 1 else f"{1 / gain:.1f} times as slow"
    record_property("machine", f"processor {which} (torch: {seen['level']}): bfloat16 products are {what} as float32's")
    if PROCESSORS[level]:
        assert gain < 1  # none of these has instructions for bfloat16
    for tower, found in seen["towers"].items():
        exact, mixed, forced = found["fp32"], found["mixed"], found["all the same"]
        assert exact == found["auto"] and exact["precision"] == "fp32" and exact["off"] < 1e-5
        assert exact["vision"].startswith(tower)
        # the products are right whether there are instructions for them or not ...
        assert forced["precision"] == "mixed" and forced["vision"] == exact["vision"]
        assert 1e-4 < forced["off"] < 0.1 and forced["claimed"] <= 0.03 and forced["shift"] <= 0.03
        # ... and used where they are faster; near 1 the two measurements may disagree
        if gain > 1.3:
            assert mixed == forced
        if gain < 0.7:
            said = rf"{tower}: precision 'mixed' is refused: .* takes (.*) times as long as in float32; accepted: fp32"
            assert float(re.fullmatch(said, mixed["refused"])[1]) >= 1


MARKED = """
import os
import pytest

if os.environ.get("NONE_THERE"):
    from clipshift_core import canvas
    canvas.find_browser = lambda: ("", "no browser was found")

@pytest.mark.browser
def test_drawing():
    pass

def test_level(record_property):
    record_property("machine", "a weak processor: slower")
"""


@pytest.mark.parametrize(
    "machine, counts, said",
    [
        ({"BROWSER_PATH": "there"}, "2 passed", ""),
        ({"BROWSER_PATH": "hidden"}, "1 passed, 1 skipped", "BROWSER_PATH=hidden is not an executable file"),
        ({"BROWSER_PATH": "hidden", "CI": "true"}, "1 passed, 1 skipped", "BROWSER_PATH=hidden is not"),
        ({"NONE_THERE": "1"}, "1 passed, 1 skipped", "no browser was found"),
        ({"NONE_THERE": "1", "CI": "true"}, "1 passed, 1 error", "no browser was found"),
    ],
    ids=["there", "hidden", "hidden in CI", "none", "none in CI"],
)
def test_what_needs_a_browser_is_skipped_without_and_demanded_in_ci(tmp_path, machine, counts, said):
    (tmp_path / "there").write_text("#!/bin/sh\n")
    (tmp_path / "there").chmod(0o755)
    (tmp_path / "test_marked.py").write_text(MARKED)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ours = ("PYTEST", "BROWSER_PATH", "CI")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "test_marked.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment | machine, capture_output=True, text=True)
    assert f"{counts} in" in done.stdout and "a weak processor: slower" in done.stdout and said in done.stdout
    assert done.returncode == ("error" in counts)
