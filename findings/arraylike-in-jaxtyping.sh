#!/bin/sh
# jaxtyping 0.3.11 with numpy 2.5: Float[ArrayLike, " image"] works with numpy 2.4 and raises TypeError with 2.5.
#
# One would guess that numpy.typing.ArrayLike stays what it was, a union that jaxtyping goes through member by member.
# Since 2.5, which is for Python 3.12 and later, one of the members is an alias with arguments, which jaxtyping takes for
# a class: a module with such an annotation no longer imports. One universal lock has numpy 2.4 on Python 3.11 and 2.5 on
# 3.12, so that a package can pass all its tests on the one and fail on the other. NDArray and ndarray work with both.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python=""
for candidate in python3.12 python3.13 python3.14 python3; do
    if $candidate -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then python=$candidate && break; fi
done
[ -n "$python" ] || { echo "numpy 2.5 needs Python 3.12 or later: there is nothing to compare" && exit 0; }
cat >annotate.py <<'PY'
import importlib.metadata as metadata

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

print(*(f"{name} {metadata.version(name)}" for name in ("jaxtyping", "numpy")), end=": ")
for name, kind in {"ArrayLike": ArrayLike, "NDArray": NDArray, "ndarray": np.ndarray}.items():
    try:
        Float[kind, " image"]
        print(name, "works", end="  ")
    except TypeError as error:
        print(name, f"TypeError ({error})", end="  ")
print()
PY
for numpy in 2.4.6 2.5.5; do
    $python -m venv "venv$numpy"
    "venv$numpy/bin/pip" install -q "numpy==$numpy" jaxtyping==0.3.11
    "venv$numpy/bin/python" annotate.py | tee "said$numpy"
done
grep -q "ArrayLike works" said2.4.6 && grep -q "ArrayLike TypeError" said2.5.5 && grep -q "NDArray works" said2.5.5
