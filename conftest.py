"""How the committed notebooks are compared with a fresh run (nbval), how tests are shared out to workers, and which
of them a machine is asked to pass.

It lies at the root because it holds for `notebooks/` and for `tests/`. Another processor computes other last digits:
`tests/matrix.py` tries the comparison on those that this one can be held to, with a browser and without.
"""

import base64
import functools
import io
import math
import os
import re

import nbformat
import numpy as np
import pytest
from nbval.plugin import IPyNbCell
from PIL import Image
from xdist.scheduler import LoadFileScheduling

WIDGET = "application/vnd.jupyter.widget-view+json"
DRAWN = {"image/png", "image/jpeg", "image/svg+xml", "application/pdf"}
"""Kinds of output that a browser draws where there is one: of figures, whose numbers are compared, and of the sheets of
notebook 13, which are made of such pictures."""

RELATIVE, ABSOLUTE = 1e-5, 1.5e-6
"""How far a number may be from the committed one; pandas shows six decimals, of which the last may turn. A tolerance
and not a rounding: rounded values differ wherever two near numbers happen to lie on the two sides of a half. Whole
numbers are counts, and have to be equal."""
OF_LARGEST = 5e-4
"""The same in an array of a figure, of its largest number: half of one in a thousand pixels. Another processor rounds a
small difference of large numbers otherwise, and puts two latents that are all but equal in the other order."""

SANITISED = (
    (r"0x[0-9a-fA-F]{6,}", "ADDRESS"),
    (r"\b[0-9a-f]{40}\b", "COMMIT"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?", "TIME"),
    (r"\b\d+(\.\d+)? ?(ms|s|sec|seconds|min|minutes)\b", "ELAPSED"),
    (r"\b\d+(\.\d+)? (images|views)( per second|/s)", "SPEED"),
)
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*\.\d+(?:e[-+]?\d+)?")


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        item.compare_outputs = functools.partial(_compare, item.compare_outputs)


def pytest_collection_modifyitems(items):
    """What takes minutes goes first, else one worker has it alone at the end: the notebooks, then whole series.

    (xdist keeps this order with --no-loadscope-reorder alone.)
    """
    long = (".ipynb::", "test_series.py::", "test_rehearsal.py::")
    items.sort(key=lambda item: not any(name in item.nodeid for name in long))


def pytest_runtest_setup(item):
    """What needs a browser is skipped where there is none. CI has one, unless it hides it by a false BROWSER_PATH."""
    if item.get_closest_marker("browser"):
        from clipshift_core import canvas  # seconds, which a run of the notebooks alone need not wait

        problem = canvas.find_browser()[1]
        if problem and os.environ.get("CI") == "true" and not os.environ.get("BROWSER_PATH"):
            pytest.fail(problem)
        if problem:
            pytest.skip(problem)


def pytest_terminal_summary(terminalreporter):
    """What tests have to say of the machine, by `record_property("machine", ...)`."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    said = [value for report in reports for name, value in report.user_properties if name == "machine"]
    if said:
        terminalreporter.section("this machine")
        terminalreporter.write("".join(f"{line}\n" for line in dict.fromkeys(said)))


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
    return exact([nbformat.from_dict(output) for output in _settle(test, ref)], ref, skip_compare)


def _comparable(outputs):
    """The outputs that are compared, without what changes from run to run.

    What is left out goes first, on both sides: outputs are paired by their order, and another machine warns on stderr
    where this one does not, or has no browser.
    """
    kept = []
    for output in outputs:
        data = output.get("data", {})
        shown = {kind: value for kind, value in data.items() if kind not in DRAWN}
        is_picture = bool(data) and not shown
        if output.get("name") != "stderr" and WIDGET not in data and not is_picture:
            kept.append(nbformat.from_dict(_plain(output | {"data": shown} if data else output)))
    return kept


def _plain(value):
    """Without what changes from run to run: times and addresses in text; plotly's packed arrays are unpacked."""
    if isinstance(value, str):
        if value.startswith("data:image/"):
            return value  # base64 holds what looks like a time ("+4s/"); `_settle` compares the pictures
        for pattern, replacement in SANITISED:
            value = re.sub(pattern, replacement, value)
        return value
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        if "bdata" in value:
            array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            return {"values": array.tolist(), "shape": value.get("shape")}
        return {key: _plain(inner) for key, inner in value.items() if key not in ("template", "uid")}
    return value


def _settle(new, old, scale=0.0):
    """`new`, with each number and each embedded picture that is close to its counterpart in `old` replaced by it.

    scale: the largest number of the array that both stand in.
    """
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _settle(inner, old.get(key)) for key, inner in new.items()}
    if isinstance(new, list) and isinstance(old, list):
        scale = max(scale, _largest(old))
        settled = [_settle(*pair, scale) for pair in zip(new, old, strict=False)]
        return settled + new[len(old) :]  # what there is more of is nbval's to report
    if isinstance(new, str) and isinstance(old, str):
        alike = _look_alike if new.startswith("data:image/") and old.startswith("data:image/") else _read_alike
        return old if alike(new, old) else new
    return old if _is_number(new) and _is_number(old) and _close(new, old, scale) else new


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _largest(value):
    """The largest finite number of a list, by its size, lists within it included."""
    if isinstance(value, list):
        return max(map(_largest, value), default=0.0)
    return abs(value) if _is_number(value) and math.isfinite(value) else 0.0


def _close(new, old, scale=0.0):
    if isinstance(new, int) and isinstance(old, int):
        return new == old
    return math.isclose(new, old, rel_tol=RELATIVE, abs_tol=max(ABSOLUTE, OF_LARGEST * scale))


def _read_alike(new, old):
    """Two texts that differ in nothing but decimals, and in these by little."""
    if new == old or NUMBER.sub("", new) != NUMBER.sub("", old):
        return new == old
    pairs = zip(NUMBER.findall(new), NUMBER.findall(old), strict=False)
    return all(_close(*(float(text.replace(",", "").replace("−", "-")) for text in pair)) for pair in pairs)


def _look_alike(new, old):
    """Two embedded pictures, as data addresses, of one size and at most one level apart on average: another processor
    may round a pixel the other way, and a JPEG's bytes then differ throughout."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in (new, old)]
    pixels = [np.asarray(picture.convert("RGB"), dtype=float) for picture in pictures]
    return pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() <= 1
