#!/bin/sh
# Builds .venv from requirements.lock; `make setup` calls it, and does nothing when the lock has not changed.
#
#   PYTHON         the interpreter to use; empty takes the first of python3, python3.13, ... that fits
#   TORCH_BACKEND  empty installs torch as locked (Linux: with CUDA); cpu, cu130, ... is handed to uv's
#                  --torch-backend and remembered. Those builds come from another index, so torch and torchvision
#                  are then held by version only; everything else keeps its hash. locked goes back.
set -u
cd "$(dirname "$0")" || exit 1
PYTHON=${PYTHON:-} TORCH_BACKEND=${TORCH_BACKEND:-}
venv=.venv
uv_version=0.13.8
quiet=-q
[ -t 2 ] && quiet="" # a terminal shows what is being fetched

fail() {
    echo "setup: $*" >&2
    exit 1
}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

fits() {
    case $(version "$1") in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac
}

# what the environment was built from: a line each for the lock, the backend and the project's own metadata
lock=$(cksum <requirements.lock) || fail "requirements.lock is missing; get it back with: git checkout requirements.lock"
project=$(cksum <pyproject.toml) || fail "pyproject.toml is missing; get it back with: git checkout pyproject.toml"
was_lock="" was_backend="" was_project=""
if [ -f $venv/built-from ] && [ -x $venv/bin/uv ] && fits $venv/bin/python; then
    { read -r was_lock; read -r was_backend; read -r was_project; } <$venv/built-from
    if [ -n "$PYTHON" ] && [ "$(version "$PYTHON")" != "$(version $venv/bin/python)" ]; then was_lock=""; fi
fi
backend=${TORCH_BACKEND:-${was_backend:-locked}}
if [ "$lock $backend $project" = "$was_lock $was_backend $was_project" ]; then exit 0; fi

# can it be built here?
command -v git >/dev/null || fail "git is missing: install it (each run records the commit it came from)"
python=$PYTHON
if [ -n "$python" ]; then
    command -v "$python" >/dev/null || fail "PYTHON=$python: no such command"
    fits "$python" || fail "PYTHON=$python is Python $(version "$python"): 3.11, 3.12 or 3.13 is needed"
else
    for candidate in python3 python3.13 python3.12 python3.11; do
        if fits $candidate; then python=$candidate && break; fi
    done
    if [ -z "$python" ]; then
        found=$(version python3)
        fail "needs Python 3.11, 3.12 or 3.13, found ${found:-none}: install one, or name it with make PYTHON=..."
    fi
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv or ensurepip: install it (Debian, Ubuntu: apt install python3-venv)"

if [ "$lock $backend" != "$was_lock $was_backend" ]; then
    case $backend in cpu) needed=4 ;; *) needed=8 ;; esac
    [ -n "$was_lock" ] || rm -rf $venv # half built
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    if [ -z "$was_lock" ] && [ "$free" -lt $needed ]; then
        fail "$free GB free here, $needed GB needed (with TORCH_BACKEND=cpu 4): make room, or clone to a larger disk"
    fi
    echo "setup: building $venv with $python ($(version "$python")), torch: $backend"
    "$python" -m venv --clear $venv || fail "$python -m venv failed, see above"
    $venv/bin/python -m pip --disable-pip-version-check install -q --retries 1 "uv==$uv_version" 2>$venv/pip.log ||
        fail "pip cannot fetch uv: no network, or no way to the package index (details: $venv/pip.log)"
    if [ "$backend" = locked ]; then
        $venv/bin/uv pip install $quiet --python $venv/bin/python --require-hashes -r requirements.lock
    else
        awk '
            /^[a-z]/ { cuda = /^(nvidia-|cuda-|triton==)/; torch = /^torch(vision)?==/ }
            cuda || (torch && /^ /) { next }
            torch { sub(/ *\\$/, "") }
            { print }
        ' requirements.lock >$venv/backend.lock
        $venv/bin/uv pip install $quiet --python $venv/bin/python --torch-backend "$backend" -r $venv/backend.lock
    fi || fail "installing failed, uv says why above: most often no network or a full disk; make setup tries again"
fi
$venv/bin/uv pip install $quiet --python $venv/bin/python --no-deps -e . || fail "installing clipshift itself failed, see above"
printf '%s\n' "$lock" "$backend" "$project" >$venv/built-from
