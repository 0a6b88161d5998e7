"""What `make refresh` commits: the executed demo notebooks, free of noise, and their figures.

python -m clipshift_core.publish
"""

import argparse
import base64
import io
import logging
import shutil
import sys
from pathlib import Path

import nbformat
from PIL import Image
from rich.console import Console

from . import canvas, profiles
from .profiles import ProfileError
from .reproduce import UNDRAWN, Run, run, summarise
from .series import KERNELSPEC, RunError

WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(node: nbformat.NotebookNode, root: Path) -> nbformat.NotebookNode:
    """An executed notebook as it is committed: sources, counts and outputs, and nothing of when and where.

    Removed are timings, papermill's and widgets' metadata, stderr and widget outputs; paths below `root` become
    relative to it; pictures keep 256 colours (figures/ has them whole).
    """
    cells = []
    for cell in node.cells:
        tags = cell.metadata.get("tags", [])
        cleaned = nbformat.NotebookNode(cell | {"metadata": {"tags": tags} if tags else {}})
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if not _noise(output)]
            cleaned["outputs"] = [_relative(_small(output), f"{root}/") for output in kept]
        cells.append(cleaned)
    metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    return nbformat.from_dict({**node, "metadata": metadata, "cells": cells})


def publish_notebooks(result: Run, folder: Path) -> list[Path]:
    """Write a run's notebooks, cleaned, beside their .py; return the paths."""
    written = [folder / f"{name}.ipynb" for name in result.stamps]
    for path in written:
        node = nbformat.read(result.profile.run_dir / "notebooks" / path.name, as_version=4)
        nbformat.write(clean(node, profiles.ROOT), path)
    return written


def publish_figures(result: Run, folder: Path) -> list[Path]:
    """Copy a run's figures and delete those (NN-name.*) that it did not make; return the paths."""
    folder.mkdir(exist_ok=True)
    products = [product for stamp in result.stamps.values() for product in stamp["products"]]
    made = [Path(product) for product in products if Path(product).parent == Path("figures")]
    written = [folder / path.name for path in made]
    for stale in set(folder.glob("[0-9][0-9]-*")) - set(written):
        stale.unlink()
    for path, target in zip(made, written, strict=True):
        shutil.copyfile(result.profile.run_dir / path, target)
    return written


def _noise(output: nbformat.NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def _small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "image/png" not in output.get("data", {}):
        return output
    picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return output | {"data": output["data"] | {"image/png": base64.b64encode(buffer.getvalue()).decode()}}


def _relative(value, root: str):
    if isinstance(value, str):
        return value.replace(root, "")
    if isinstance(value, dict):
        return {key: _relative(inner, root) for key, inner in value.items()}
    return [_relative(inner, root) for inner in value] if isinstance(value, list) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="clipshift_core.publish", description="Renew what is committed.")
    parser.add_argument("--figures-only", action="store_true", help="leave the notebooks as they are")
    chosen = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 110)
    if problem := canvas.find_browser()[1]:  # what is committed has a picture of every figure
        print(f"nothing was renewed: {problem}", file=sys.stderr)
        return 1
    try:
        result = run("demo", console=console)
    except (ProfileError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    if result.undrawn:  # found, but it does not draw; or the run is of a time without one
        print(f"nothing was renewed. {UNDRAWN}", file=sys.stderr)
        return 1
    summarise(result, console)
    written = publish_figures(result, profiles.ROOT / "figures")
    if not chosen.figures_only:
        written += publish_notebooks(result, profiles.ROOT / "notebooks")
    console.print(f"refreshed {len(written)} files in notebooks/ and figures/", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
