"""The series of notebooks as written: NN_name.py files in py:percent form, each with one cell of parameters."""

import ast
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat

PARAMETERS = ("profile", "overrides")
"""What every notebook takes, in its cell that is tagged `parameters`."""

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class RunError(Exception):
    """A run that cannot start or cannot go on; the message is all that the user needs to see."""


@dataclass(frozen=True)
class Notebook:
    """One notebook of the series, as written in its .py."""

    path: Path
    text: str
    node: nbformat.NotebookNode
    defaults: dict
    """The parameters and their values in the tagged cell."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def code(self) -> list[str]:
        return [cell.source for cell in self.node.cells if cell.cell_type == "code"]


def read_series(folder: Path) -> list[Notebook]:
    """The notebooks of a folder in their order. Raises RunError for none, or for one that cannot be run."""
    paths = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not paths:
        raise RunError(f"{folder}: no notebook NN_name.py there")
    series = [read_notebook(path) for path in paths]
    for notebook in series:
        if set(notebook.defaults) != set(PARAMETERS):
            raise RunError(
                f"{notebook.path.name}: its parameters are {sorted(notebook.defaults)}; "
                f"must be {sorted(PARAMETERS)}, with every other choice in the profile"
            )
    return series


def read_notebook(path: Path) -> Notebook:
    """Read a py:percent notebook. Raises RunError where its parameters cell is missing or not plain."""
    text = path.read_text(encoding="utf-8")
    node = jupytext.reads(text, fmt="py:percent")
    node.metadata = nbformat.NotebookNode(kernelspec=KERNELSPEC)
    for index, cell in enumerate(node.cells):
        cell["id"] = f"{path.stem}-{index}"  # jupytext draws ids at random
    return Notebook(path, text, node, parameters_of(node, path.name))


def parameters_of(node: nbformat.NotebookNode, name: str) -> dict:
    """The names and values in the cell tagged `parameters`.

    Only assignments of literals are allowed there: papermill lays its values after this cell, so anything
    derived in it would keep the old ones. Raises RunError.
    """
    tagged = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise RunError(f"{name}: has {len(tagged)} cells tagged 'parameters'; must have one")
    values = {}
    try:
        for statement in ast.parse(tagged[0].source).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                values[target.id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"{name}: the parameters cell may only assign literals to names ({tagged[0].source!r})"
        ) from error
    return values
