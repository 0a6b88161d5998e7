"""What the benchmarks share: contestants that are processes of their own, asked in turn, and the record on disk."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
"""Freed memory stays with the process, rather than being mapped and zeroed again; as the runner has it for kernels."""


def start(script: str, *arguments: object, environment: dict[str, str] = ALLOCATOR) -> subprocess.Popen:
    """`script --worker arguments`, with the environment it would have: the allocator's settings only if given."""
    threads = {"OMP_NUM_THREADS": str(n_threads()), "OPENBLAS_NUM_THREADS": "1"}
    inherited = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    return subprocess.Popen(
        [sys.executable, script, "--worker", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=inherited | threads | environment,
    )


def ask(worker: subprocess.Popen) -> dict:
    """A line in, a line of json out."""
    worker.stdin.write("go\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit("a contestant of the benchmark ended early; its error is above")
    return json.loads(answer)


def n_threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())


def record(name: str, result: dict, load: float) -> None:
    """Write runs/NAME.json with the machine in it; `load` is that before the start."""
    machine = {"threads": n_threads(), "cores": os.cpu_count(), "load_before": load, "machine": platform.machine()}
    path = ROOT / "runs" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result | machine | {"python": platform.python_version()}, indent=2) + "\n")
    if load > 0.5:
        print(f"the machine was busy before the start (load {load:.1f}): only the ratios mean something")
    print(f"written: {path.relative_to(ROOT)}")
