"""Guards over the committed notebooks, and the proof that their comparison (conftest.py, nbval) can fail."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jupytext
import nbformat
import numpy as np
import papermill
import pytest

from clipshift_core import publish, reproduce
from clipshift_core.profiles import ROOT
from clipshift_core.publish import WIDGET, clean
from clipshift_core.series import KERNELSPEC, PARAMETERS, parameters_of

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
EXECUTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_FUNCTION = 5
LARGEST = 1500 * 1024
ABSOLUTE_PATH = re.compile(r"(?<![\w/:.])/(home|Users|root|tmp|opt|mnt|usr|var|private|work)/\w")

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
each_executed = pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.name)


def code_cells(node):
    return [cell for cell in node.cells if cell.cell_type == "code"]


def outline(node):
    """What the two halves of a pair must share."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in node.cells]


def strings(value):
    """All text in an output, images and packed arrays left out: base64 has slashes, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("image/") and key != "bdata":
                yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def long_functions(source):
    """Names of the functions with more than five lines (magics and shell lines are no Python, so no function)."""
    plain = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
    functions = [
        node for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [node.name for node in functions if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION]


def test_notebooks_come_in_pairs():
    assert [path.stem for path in SOURCES] == [path.stem for path in EXECUTED]


@each_executed
def test_pair_has_the_same_cells(path):
    written = jupytext.read(path.with_suffix(".py"), fmt="py:percent")
    assert outline(nbformat.read(path, as_version=4)) == outline(written)


@each_executed
def test_every_cell_was_run_in_order_without_error(path):
    cells = [cell for cell in code_cells(nbformat.read(path, as_version=4)) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # null is never compared
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any(cell.outputs for cell in cells)


@each_executed
def test_carries_no_noise(path):
    node = nbformat.read(path, as_version=4)
    assert "widgets" not in node.metadata and "papermill" not in node.metadata
    assert all(set(cell.metadata) <= {"tags"} for cell in node.cells)
    outputs = [output for cell in code_cells(node) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr" or WIDGET in output.get("data", {})]
    assert not [text[:200] for text in strings(outputs) if ABSOLUTE_PATH.search(text)]
    assert path.stat().st_size < LARGEST


@each_executed
def test_figures_have_their_pictures(path):
    """They are left out of the comparison, and GitHub shows nothing else."""
    outputs = [output for cell in code_cells(nbformat.read(path, as_version=4)) for output in cell.outputs]
    shown = [output.get("data", {}) for output in outputs]
    assert all("image/png" in data for data in shown if PLOTLY in data)
    figures = list((ROOT / "figures").glob(f"{path.name[:2]}-*.html"))
    assert all(figure.with_suffix(".png").is_file() for figure in figures)
    assert sum("image/png" in data for data in shown) == len(figures)


@each_source
def test_parameters_are_the_two_and_literal(path):
    defaults = parameters_of(jupytext.read(path, fmt="py:percent"), path.name)
    assert defaults == {"profile": "demo", "overrides": {}} and set(defaults) == set(PARAMETERS)


@each_source
def test_defines_no_long_function(path):
    cells = code_cells(jupytext.read(path, fmt="py:percent"))
    assert [name for cell in cells for name in long_functions(cell.source)] == []


def test_long_functions_are_seen():
    short, long = ("def f():\n" + "    x = 1\n" * n for n in (4, 5))
    assert long_functions(short) == [] and long_functions("%matplotlib inline\n" + long) == ["f"]


@pytest.mark.parametrize("text", ["/home/someone/x.png", "saved to '/tmp/x'"])
def test_absolute_paths_are_seen(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/page", "runs/tmp/x", "1/2", "data/home/x"])
def test_other_slashes_are_no_paths(text):
    assert not ABSOLUTE_PATH.search(text)


def test_clean_leaves_sources_counts_and_outputs_only():
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="noise"),
        nbformat.v4.new_output("stream", name="stdout", text="read /here/it/is/data/x.tar"),
        nbformat.v4.new_output("display_data", {WIDGET: {"model_id": "1"}, "text/plain": "HBox()"}),
    ]
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=outputs)
    cell.metadata = nbformat.from_dict({"papermill": {"duration": 1}, "execution": {}, "tags": ["parameters"]})
    node = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {}})
    cleaned = clean(node, "/here/it/is")
    nbformat.validate(cleaned)
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    assert cleaned.cells[0].metadata == {"tags": ["parameters"]} and cleaned.cells[0].execution_count == 1
    assert [output.text for output in cleaned.cells[0].outputs] == ["read data/x.tar"]


def test_nothing_is_published_without_its_pictures(monkeypatch, capsys):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")
    monkeypatch.setattr(publish, "run", lambda *_, **__: pytest.fail("run for nothing"))
    assert publish.main([]) == 1
    assert capsys.readouterr().err == "nothing was renewed: BROWSER_PATH=/nowhere/chromium is not an executable file\n"


def test_nothing_is_published_of_a_run_that_no_browser_drew(monkeypatch, capsys):
    stamps = {"02_embedding_shifts": {"products": ["figures/02-ranking.html", "figures/02-ranking.json"]}}
    monkeypatch.setenv("BROWSER_PATH", sys.executable)  # found, and no browser
    monkeypatch.setattr(publish, "run", lambda *_, **__: reproduce.Run(None, stamps, []))
    for what in ("publish_figures", "publish_notebooks"):
        monkeypatch.setattr(publish, what, lambda *_: pytest.fail("published"))
    assert publish.main([]) == 1 and reproduce.UNDRAWN in capsys.readouterr().err


# The proof: a small notebook is run, one thing in each cell's committed output (or source) is changed, and nbval
# has to tell the changes that matter from those that do not.

SETUP = """
import sys, time
import numpy as np, pandas as pd, plotly.graph_objects as go, plotly.io
plotly.io.renderers.default = "plotly_mimetype"
def figure(seed=7, title="Shift", largest=1):
    y = np.append(np.random.default_rng(seed).normal(size=9), largest)
    return go.Figure(go.Scatter(y=y), {"title": {"text": title}})
def figure_of(y):
    return go.Figure(go.Scatter(y=y))
def warn():
    print("late", file=sys.stderr)
def numbers(word="mean"):
    print(word, 0.1234567890123456)
"""
PLOTLY = "application/vnd.plotly.v1+json"


def replaced(old, new):
    """A change of text in a cell's outputs."""

    def change(cell):
        text = json.dumps(cell.outputs)
        assert old in text
        cell.outputs = nbformat.from_dict(json.loads(text.replace(old, new)))

    return change


def moved(by):
    """A change of one point of a figure, inside plotly's base64."""

    def change(cell):
        (figure,) = (output["data"][PLOTLY] for output in cell.outputs if PLOTLY in output.get("data", {}))
        packed = figure["data"][0]["y"]
        values = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"]).copy()
        values[3] += by
        packed["bdata"] = base64.b64encode(values.tobytes()).decode()

    return change


def reseeded(cell):
    assert "seed=1" in cell.source
    cell.source = cell.source.replace("seed=1", "seed=2")


def unchanged(cell):
    pass


def silent(cell):
    """As committed: nothing of stderr is."""
    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def drawn(cell):
    """As committed where there was a browser: a picture beside each figure."""
    for output in cell.outputs:
        if PLOTLY in output.get("data", {}):
            output["data"]["image/png"] = PICTURE


def sheets(cell):
    """As committed where there was a browser: two pictures, as notebook 13 shows its sheets."""
    cell.outputs = [*(nbformat.v4.new_output("display_data", {"image/png": PICTURE}) for _ in range(2)), *cell.outputs]


def both(*changes):
    """One change after another."""

    def change(cell):
        for each in changes:
            each(cell)

    return change


PICTURE = base64.b64encode(b"drawn by a browser").decode()
NEAR, FAR = replaced("0.1234567890123456", "0.1234567890123451"), replaced("0.1234567890123456", "0.1235567890123456")
"""A number as another processor may compute it, and a wrong one."""
WARNED = {
    "in front": "warn(); numbers(); display(figure())",
    "in the middle": "numbers(); warn(); display(figure()); numbers('median')",
    "between two lines of text": "numbers(); warn(); numbers('median'); display(figure())",
    "at the end": "numbers(); display(figure()); warn()",
    "everywhere": "warn(); numbers(); warn(); display(figure()); warn()",
}
"""Cells that warn on stderr where the machine that executed the committed notebook did not."""

TABLE = 'pd.DataFrame({"l2": [1.2345, 2.5]})'
MUST_FAIL = {
    "a printed digit": ('print(f"mean {0.43214:.4f}")', replaced("0.4321", "0.4322")),
    "a table digit": (TABLE, replaced("1.2345", "1.2346")),
    "a table's fifth decimal": ('pd.DataFrame({"cosine": [0.023984]})', replaced("0.023984", "0.023994")),
    "a sign": ('print("moved by -1.25")', replaced("-1.25", "+1.25")),
    "a count": ('print("of 200000 images")', replaced("200000", "200001")),
    "a word beside a number": ('print("mean 0.25")', replaced("mean", "median")),
    "a title": ("figure()", replaced("Shift", "Shaft")),
    "a figure point moved by 0.01": ("figure()", moved(0.01)),
    "a figure point moved by 1e-3 of the largest": ("figure(largest=50)", moved(0.05)),
    "a count in a figure": ("figure_of([3, 100000])", replaced("100000", "100001")),
    "a seed": ("figure(seed=1)", reseeded),
    "an output gone": ("print(1)", lambda cell: cell.update(outputs=[])),
    "an output more": ("numbers()", lambda cell: cell.outputs.append(cell.outputs[0])),
    "a figure gone, a picture there": ("figure()", both(lambda cell: cell.update(outputs=[]), sheets)),
    "a figure point moved by 0.01 beside its picture": ("figure()", both(drawn, moved(0.01))),
    "a title beside its picture": ("figure()", both(drawn, replaced("Shift", "Shaft"))),
    "a figure point moved by 0.01 after two pictures": ("figure()", both(moved(0.01), sheets)),
    "a line of text after two pictures": ("numbers()", both(FAR, sheets)),
    "words beside a picture": (
        "display({'image/png': 'x', 'text/plain': 'mean 0.9'}, raw=True)",
        replaced("0.9", "0.1"),
    ),
    "a sentence in place of two pictures": ("print('Left out.')", both(lambda cell: cell.update(outputs=[]), sheets)),
}
MUST_FAIL |= {f"a digit, warned {where}": (source, both(silent, FAR)) for where, source in WARNED.items()}
MUST_FAIL |= {f"a figure, warned {where}": (source, both(silent, moved(0.01))) for where, source in WARNED.items()}
MUST_PASS = {
    "nothing": (TABLE, unchanged),
    "elapsed time": ('print(f"took {time.perf_counter():.3f} s")', replaced("took ", "took 1")),
    "an address": ("object()", replaced("0x", "0x1")),
    "the 16th digit": ("print(0.1234567890123456)", replaced("0.1234567890123456", "0.1234567890123451")),
    "a table's sixth decimal": ('pd.DataFrame({"cosine": [0.023984]})', replaced("0.023984", "0.023983")),
    "a figure point moved by 1e-9": ("figure()", moved(1e-9)),
    "a figure point moved by 2e-4 of the largest": ("figure(largest=50)", moved(0.01)),
    "standard error": ("warn()", silent),
    "a widget": (f"display({{{WIDGET!r}: {{}}, 'text/plain': 'HBox()'}}, raw=True)", lambda cell: cell.outputs.clear()),
    "pictures that no browser drew": ("figure()", both(moved(1e-9), drawn, sheets)),
    "pictures that a browser drew here alone": (
        "display({'image/png': 'x'}, raw=True)",
        lambda cell: cell.outputs.clear(),
    ),
}
MUST_PASS |= {f"warned {where}": (source, both(silent, NEAR, moved(1e-9))) for where, source in WARNED.items()}


def test_nbval_fails_for_what_matters_and_only_then(tmp_path):
    cases = MUST_FAIL | MUST_PASS
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *(source for source, _ in cases.values()))]
    node = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC})
    nbformat.write(node, tmp_path / "tiny.ipynb")
    node = papermill.execute_notebook(tmp_path / "tiny.ipynb", tmp_path / "tiny.ipynb", progress_bar=False)
    for cell, (_, change) in zip(node.cells[1:], cases.values(), strict=True):
        change(cell)
    nbformat.write(node, tmp_path / "tiny.ipynb")
    shutil.copy(ROOT / "conftest.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--junitxml=report.xml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    report = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    failed = [case.find("failure") is not None for case in report]
    assert len(failed) == 1 + len(cases), done.stdout
    verdicts = dict(zip(cases, failed[1:], strict=True))
    wrong = [case for case, failed in verdicts.items() if failed != (case in MUST_FAIL)]
    assert not failed[0] and not wrong, done.stdout
