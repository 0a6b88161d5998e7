"""What holds for every source file, read as text."""

import ast

import pytest

from clipshift_core.profiles import ROOT

SOURCES = sorted([*(ROOT / "clipshift_core").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")])


def unstable_sorts(source):
    """Lines that sort by one key without saying how ties fall.

    numpy's and pandas' default is a quicksort, in which equal values change places with the width of the processor's
    vectors (findings/ties-by-processor.sh). By several keys pandas sorts stably.
    """
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        keys = node.args[0] if node.args and node.func.attr == "sort_values" else None
        several = isinstance(keys, ast.List) and len(keys.elts) > 1
        is_stable = said.get("kind") == "'stable'" or said.get("stable") == "True"
        if node.func.attr in ("sort_values", "argsort") and not several and not is_stable:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_ties_fall_the_same_on_every_processor(path):
    assert list(unstable_sorts(path.read_text())) == []


@pytest.mark.parametrize(
    "call", ["t.sort_values('a')", "np.argsort(x)", "x.argsort()", "np.argsort([2, 1])", "t.sort_values(['a'])"]
)
def test_an_unstable_sort_is_seen(call):
    assert list(unstable_sorts(f"y = 1\nz = {call}.head(3)")) == [2]


@pytest.mark.parametrize(
    "call", ["t.sort_values('a', kind='stable')", "x.argsort(stable=True)", "t.sort_values(['a', 'b'])", "sorted(x)"]
)
def test_a_stable_one_is_not(call):
    assert list(unstable_sorts(call)) == []


def unreadable_shapes(source):
    """Lines with a jaxtyping annotation of numpy's ArrayLike.

    With numpy 2.5, that is on Python 3.12 and later, it raises TypeError when the module is imported
    (findings/arraylike-in-jaxtyping.sh).
    """
    for node in ast.walk(ast.parse(source)):
        inside = node.slice.elts if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) else []
        if len(inside) == 2 and "ArrayLike" in ast.unparse(inside[0]) and isinstance(inside[1], ast.Constant):
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_shapes_are_read_on_every_python(path):
    assert list(unreadable_shapes(path.read_text())) == []


def test_an_unreadable_shape_is_seen():
    source = "def f(a: ArrayLike, b: dict[str, ArrayLike],\n      c: dict[str, Float[ArrayLike, ' image']]): ..."
    assert list(unreadable_shapes(source)) == [2]
