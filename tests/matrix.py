"""`make test` as other machines run it: weaker processors, with a browser and without, with warnings and without.

    .venv/bin/python tests/matrix.py [--levels default AVX2 SSE4.1] [--only notebooks] [--keep FOLDER]

Left alone it compares the committed notebooks twelve times, in about an hour on 2 cores: by hand or by night. With
`--only ""` each run is the whole suite. Every level has a clone of the last commit to itself, where its first run
computes from nothing and the others read what that one stored. Prints a row a run and what failed in it; exits with 1
if anything did.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processors import LEVELS

from clipshift_core import canvas
from clipshift_core.profiles import ROOT

HELD = """
import numba, threadpoolctl, torch, numpy
blas = {pool.get("architecture") for pool in threadpoolctl.threadpool_info()} - {None}
print(f"torch {torch.backends.cpu.get_cpu_capability()}, BLAS {' '.join(sorted(blas))}, numba {numba.config.CPU_NAME}")
"""
STARTUP = """
import sys
def warn(*_):
    print("Warning: what another machine has to say", file=sys.stderr, flush=True)
    open({noted!r}, "a").write("x")
for event in ("pre_run_cell", "post_run_cell"):
    get_ipython().events.register(event, warn)
"""
"""What a kernel that warns is started with: it does so before and after every cell, and notes it."""


def clone(folder: Path) -> Path:
    """The last commit, as a user gets it, with this environment."""
    subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test(clone: Path, only: str, environment: dict[str, str], log: Path) -> tuple[dict[str, int], float]:
    """Counts by outcome, and seconds, of one `make test`."""
    began = time.monotonic()
    environment = os.environ | environment | {"PYTHONPATH": str(clone)}
    with log.open("w") as out:
        done = subprocess.run(["make", "test", f"ONLY={only}"], cwd=clone, env=environment, stdout=out, stderr=out)
    last = re.findall(r"^.* in [\d.]+s.*$", log.read_text(), re.MULTILINE)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", (last or [""])[-1])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    # 1 as well where it did not get as far as testing: the log says why
    return counts | {"failed": failed or int(done.returncode != 0)}, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--only", default="notebooks", help="what `make test` is asked for")
    parser.add_argument("--keep", type=Path, help="where the clones and logs are left")
    chosen = parser.parse_args()
    folder = (chosen.keep or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    own = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "requirements.lock", "pyproject.toml"], cwd=ROOT)
    if own.returncode:
        parser.error(
            "commit requirements.lock and pyproject.toml first: a clone has others, and would set them up here"
        )
    browsers = {"yes": {}, "no": {"BROWSER_PATH": str(folder / "hidden")}}
    if problem := canvas.find_browser()[1]:
        print(f"no run with a browser: {problem}")
        del browsers["yes"]
    print(f"{'level':10}{'browser':9}{'warnings':9}{'passed':>9}{'failed':>9}{'skipped':>9}{'seconds':>9}", flush=True)
    failed = 0
    for level in chosen.levels:
        at = clone(folder / level)
        print(f"# {level}: ", end="", flush=True)
        subprocess.run([sys.executable, "-c", HELD], env=os.environ | LEVELS[level], check=True)
        for (browser, hidden), warns in itertools.product(browsers.items(), ("no", "yes")):
            name = f"{level}-browser-{browser}-warnings-{warns}"
            noted = folder / f"{name}.noted"
            startup = folder / name / "profile_default" / "startup"
            startup.mkdir(parents=True)
            if warns == "yes":
                (startup / "warn.py").write_text(STARTUP.format(noted=str(noted)))
            environment = LEVELS[level] | hidden | {"IPYTHONDIR": str(folder / name)}
            counts, seconds = test(at, chosen.only, environment, log := folder / f"{name}.log")
            row = "".join(f"{counts.get(kind, 0):9}" for kind in ("passed", "failed", "skipped"))
            print(f"{level:10}{browser:9}{warns:9}{row}{seconds:9.0f}", flush=True)
            failed += counts["failed"]
            for line in re.findall(r"^(?:FAILED|ERROR) .*$", log.read_text(), re.MULTILINE):
                print(f"    {line}", flush=True)
            if noted.exists() != (warns == "yes"):
                failed += 1
                print("    the kernels did not do as this row says", flush=True)
    print(f"logs: {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
