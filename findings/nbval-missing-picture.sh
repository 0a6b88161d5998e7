#!/bin/sh
# nbval 0.11.0: a picture that no longer appears passes the comparison.
#
# One would guess that a cell whose committed output is a picture fails when the new run shows nothing. nbval leaves
# image/png out before it counts outputs, so that nothing of such a cell is left to compare, and it passes. The plotly
# renderer "png" writes just such outputs. With a text/plain beside it, as IPython's display writes one, the same picture
# is found missing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q nbval==0.11.0 pytest==9.1.1 ipykernel==7.1.0 nbformat==5.10.4
venv/bin/python - <<'PY'
import nbformat.v4 as v4

pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
pictures = {"alone": {"image/png": pixel}, "with text": {"image/png": pixel, "text/plain": "<Image>"}}
cells = [
    v4.new_code_cell("pass", execution_count=n, outputs=[v4.new_output("display_data", data)])
    for n, data in enumerate(pictures.values(), 1)
]
kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
open("gone.ipynb", "w").write(v4.writes(v4.new_notebook(cells=cells, metadata=kernel)))
PY
venv/bin/python -m pytest -q --nbval gone.ipynb >said 2>&1 || true
venv/bin/pip list 2>/dev/null | grep -iE '^(nbval|pytest|ipykernel) '
grep -E "passed|failed|Missing" said
grep -q "1 failed, 1 passed" said && grep -q "Cell 1" said && ! grep -q "Cell 0" said
