"""How the committed notebooks are compared with a fresh run (nbval), and how tests are shared out to workers.

It lies at the root because it holds for `notebooks/` and for `tests/`.
"""

import base64
import functools
import io
import math
import re

import nbformat
import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image
from xdist.scheduler import LoadFileScheduling

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
NEVER_COMPARED = ("stderr", "image/svg+xml", "application/pdf")  # png and jpeg nbval leaves out itself

RELATIVE, ABSOLUTE = 1e-5, 1e-7
"""How far a number of a figure may be from the committed one. A tolerance and not a rounding: rounded values
differ wherever two near numbers happen to lie on the two sides of a half."""

SANITISED = (
    (r"0x[0-9a-fA-F]{6,}", "ADDRESS"),
    (r"\b[0-9a-f]{40}\b", "COMMIT"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?", "TIME"),
    (r"\b\d+(\.\d+)? ?(ms|s|sec|seconds|min|minutes)\b", "ELAPSED"),
    (r"\b\d+(\.\d+)? (images|views)( per second|/s)", "SPEED"),
)
LONG_NUMBER = re.compile(r"-?\d+\.\d{10,}(e[-+]?\d+)?")


def pytest_collectstart(collector):
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += NEVER_COMPARED


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        item.compare_outputs = functools.partial(_compare, item.compare_outputs)


def pytest_collection_modifyitems(items):
    """What takes minutes goes first, else one worker has it alone at the end: the notebooks, then whole series.

    (xdist keeps this order with --no-loadscope-reorder alone.)
    """
    long = (".ipynb::", "test_series.py::", "test_rehearsal.py::")
    items.sort(key=lambda item: not any(name in item.nodeid for name in long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A test file stays on one worker (--dist loadfile), and so do all notebooks together, because the later ones
    read what the earlier ones left in the run's folder. (Marks for --dist loadgroup do nothing in pytest 9.2 with
    xdist 3.8.)"""

    class FilesAndSeries(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "notebooks" if ".ipynb::" in nodeid else super()._split_scope(nodeid)

    return FilesAndSeries(config, log) if config.getoption("dist") == "loadfile" else None


def _compare(exact, test, ref, skip_compare=None):
    """nbval's own comparison, after both sides were made comparable and close numbers equal."""
    test, ref = _comparable(test), _comparable(ref)
    figures = [[out["data"] for out in side if PLOTLY in out.get("data", {})] for side in (test, ref)]
    for new, old in zip(*figures, strict=False):  # a missing figure is nbval's to report
        new[PLOTLY] = _settle(new[PLOTLY], old[PLOTLY])
    return exact(test, ref, skip_compare)


def _comparable(outputs):
    kept = [output for output in outputs if WIDGET not in output.get("data", {})]
    return [nbformat.from_dict(_plain(output)) for output in kept]


def _plain(value):
    """Without what changes from run to run: times and addresses in text; plotly's packed arrays are unpacked."""
    if isinstance(value, str):
        if value.startswith("data:image/"):
            return value  # base64 holds what looks like a time ("+4s/"); `_settle` compares the pictures
        for pattern, replacement in SANITISED:
            value = re.sub(pattern, replacement, value)
        return LONG_NUMBER.sub(lambda number: f"{float(number[0]):.9g}", value)
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        if "bdata" in value:
            array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            return {"values": array.tolist(), "shape": value.get("shape")}
        return {key: _plain(inner) for key, inner in value.items() if key not in ("template", "uid")}
    return value


def _settle(new, old):
    """`new`, with each number and each embedded picture that is close to its counterpart in `old` replaced by it."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _settle(inner, old.get(key)) for key, inner in new.items()}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [_settle(*pair) for pair in zip(new, old, strict=True)]
    if isinstance(new, str) and isinstance(old, str) and new.startswith("data:image/"):
        return old if _look_alike(new, old) else new
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (new, old))
    return old if numbers and math.isclose(new, old, rel_tol=RELATIVE, abs_tol=ABSOLUTE) else new


def _look_alike(new, old):
    """Two embedded pictures, as data addresses, of one size and at most one level apart on average: another processor
    may round a pixel the other way, and a JPEG's bytes then differ throughout."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in (new, old)]
    pixels = [np.asarray(picture.convert("RGB"), dtype=float) for picture in pictures]
    return pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() <= 1
