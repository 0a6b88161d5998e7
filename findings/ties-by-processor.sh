#!/bin/sh
# numpy 2.4.6 with pandas 3.1.1: which of several equal values comes first depends on the processor.
#
# One would guess that an unstable sort is at least the same sort everywhere: same version, same array, same order.
# numpy's default has a version for each width of the processor's vectors, chosen at run time, and each leaves equal
# values in an order of its own. pandas' sort_values by one key inherits that. A notebook that names the latent most
# often among the strongest, or the first row of a table sorted by counts, names another one on another machine, while
# every number in it is right. kind="stable" is the same on all. A processor is held to less by numpy's own variable.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 pandas==3.1.1
cat >sort.py <<'PY'
import numpy as np
import pandas as pd

counts = pd.Series([3, 1, 6, 2, 6, 1, 6, 4, 2, 6, 1, 3, 6, 2, 1, 4, 6, 2, 3, 6] * 2)
print("default", list(counts.sort_values(ascending=False).index[:6]), np.argsort(counts.to_numpy())[:6].tolist())
print("stable ", list(counts.sort_values(ascending=False, kind="stable").index[:6]), end=" ")
print(np.argsort(counts.to_numpy(), kind="stable")[:6].tolist())
PY
venv/bin/pip list 2>/dev/null | grep -E '^(numpy|pandas) '
if ! grep -q avx2 /proc/cpuinfo; then
    echo "this processor has no AVX2: there is nothing to compare"
    exit 0
fi
echo "as it is:" && venv/bin/python sort.py | tee as_it_is
echo "without AVX2:" && NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR" venv/bin/python sort.py | tee less
[ "$(grep default as_it_is)" != "$(grep default less)" ] && [ "$(grep stable as_it_is)" = "$(grep stable less)" ]
