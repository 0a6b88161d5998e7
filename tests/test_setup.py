"""setup.sh on a machine whose python, git, df and uv are stand-ins: what it refuses, says, builds and repeats."""

import os
import shutil
import subprocess

import pytest

from clipshift_core.profiles import ROOT

# Answers what setup.sh asks of an interpreter; `-m venv` copies it, and a uv that writes down its arguments.
PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3.12}" ;;
    *ensurepip*) exit "${FAKE_NO_VENV:-0}" ;;
    "-m venv "*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$FAKE_BIN/uv" .venv/bin/uv ;;
    *"-m pip"*) exit "${FAKE_NO_NETWORK:-0}" ;;
esac
"""
UV = """#!/bin/sh
echo "$*" >>uv.log
case "$*" in *requirements.lock | *backend.lock) exit "${FAKE_UV_FAILS:-0}" ;; esac
"""
DF = """#!/bin/sh
echo Filesystem 1024-blocks Used Available Capacity Mounted
echo /dev/x 100 1 "${FAKE_FREE_KB:-99999999}" 1% /
"""
LOCK = """numpy==2.0.0 ; python_version >= '3.11' \\
    --hash=sha256:aa
nvidia-cublas==13 ; sys_platform == 'linux' \\
    --hash=sha256:bb
torch==2.15.0 \\
    --hash=sha256:cc \\
    --hash=sha256:dd
torchvision==0.29.2 \\
    --hash=sha256:ee
triton==3.9.0 ; sys_platform == 'linux' \\
    --hash=sha256:ff
zarr==3.1.6 \\
    --hash=sha256:ab
"""
TOOLS = ("sh", "awk", "cat", "cksum", "cp", "dirname", "mkdir", "rm")


class Machine:
    """A clone and a PATH that holds only what is put there."""

    def __init__(self, folder):
        self.clone, self.bin = folder / "clone", folder / "bin"
        self.clone.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "setup.sh", self.clone)
        (self.clone / "requirements.lock").write_text(LOCK)
        (self.clone / "pyproject.toml").write_text("[project]\n")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name, script in {"python3": PYTHON, "uv": UV, "df": DF, "git": "#!/bin/sh\n"}.items():
            self.install(name, script)

    def install(self, name, script):
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def setup(self, **environment):
        variables = {"PATH": str(self.bin), "FAKE_BIN": str(self.bin)} | environment
        return subprocess.run(
            ["sh", "setup.sh"], cwd=self.clone, env=variables, capture_output=True, text=True, check=False
        )

    def installs(self):
        """uv's arguments since the last call."""
        log = self.clone / "uv.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_builds_from_the_lock_with_hashes_then_itself_and_then_nothing(machine):
    assert machine.setup().returncode == 0
    lock, project = machine.installs()
    assert lock.endswith("--require-hashes -r requirements.lock") and project.endswith("--no-deps -e .")
    again = machine.setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "") and machine.installs() == []


def test_a_new_lock_rebuilds_and_new_metadata_only_installs_the_project(machine):
    machine.setup()
    machine.installs()
    (machine.clone / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    machine.setup()
    assert len(machine.installs()) == 1
    (machine.clone / "requirements.lock").write_text(LOCK + "# more\n")
    machine.setup()
    assert len(machine.installs()) == 2


def test_a_backend_drops_what_it_replaces_and_is_remembered(machine):
    assert machine.setup(TORCH_BACKEND="cpu").returncode == 0
    lock, _ = machine.installs()
    assert "--torch-backend cpu" in lock and "--require-hashes" not in lock
    assert (machine.clone / ".venv" / "backend.lock").read_text().splitlines() == [
        "numpy==2.0.0 ; python_version >= '3.11' \\",
        "    --hash=sha256:aa",
        "torch==2.15.0",
        "torchvision==0.29.2",
        "zarr==3.1.6 \\",
        "    --hash=sha256:ab",
    ]
    assert machine.setup().returncode == 0 and machine.installs() == []
    assert machine.setup(TORCH_BACKEND="locked").returncode == 0
    assert "--require-hashes" in machine.installs()[0]


def test_the_real_lock_keeps_every_other_hash_with_a_backend(machine):
    shutil.copy(ROOT / "requirements.lock", machine.clone)
    machine.setup(TORCH_BACKEND="cpu")
    whole = (ROOT / "requirements.lock").read_text()
    kept = (machine.clone / ".venv" / "backend.lock").read_text()
    entries = [entry.splitlines() for entry in kept.replace("\\\n", "").split("\n") if entry]
    bare = [entry[0].split("==")[0] for entry in entries if "--hash" not in entry[0]]
    assert bare == ["torch", "torchvision"]
    dropped = {line.split("==")[0] for line in whole.splitlines() if "==" in line and line not in kept}
    assert {"triton"} < dropped - {"torch", "torchvision"}
    assert all(name.startswith(("nvidia-", "cuda-", "triton", "torch")) for name in dropped)


def test_another_python_rebuilds_only_when_asked_for(machine):
    machine.setup()
    machine.installs()
    older = PYTHON.replace(":-3.12", ":-3.11")
    machine.install("python3.11", older)
    assert machine.setup(PYTHON="python3.11").returncode == 0 and len(machine.installs()) == 2
    assert machine.setup().returncode == 0 and machine.installs() == []


def test_takes_the_first_python_that_fits(machine):
    machine.install("python3", PYTHON.replace(":-3.12", ":-3.9"))
    machine.install("python3.11", PYTHON.replace(":-3.12", ":-3.11"))
    assert "with python3.11 (3.11)" in machine.setup().stdout


@pytest.mark.parametrize(
    "missing, environment, said",
    [
        ("git", {}, "git is missing"),
        ("python3", {}, "needs Python 3.11, 3.12 or 3.13, found none"),
        (None, {"FAKE_VERSION": "3.10"}, "needs Python 3.11, 3.12 or 3.13, found 3.10"),
        (None, {"FAKE_VERSION": "3.14"}, "needs Python 3.11, 3.12 or 3.13, found 3.14"),
        (None, {"PYTHON": "python3", "FAKE_VERSION": "3.10"}, "PYTHON=python3 is Python 3.10"),
        (None, {"PYTHON": "python9"}, "PYTHON=python9: no such command"),
        (None, {"FAKE_NO_VENV": "1"}, "has no venv or ensurepip"),
        (None, {"FAKE_FREE_KB": "5000000"}, "4 GB free here, 8 GB needed"),
        (None, {"FAKE_FREE_KB": "3000000", "TORCH_BACKEND": "cpu"}, "2 GB free here, 4 GB needed"),
        (None, {"FAKE_NO_NETWORK": "1"}, "no network, or no way to the package index"),
        (None, {"FAKE_UV_FAILS": "1"}, "installing failed"),
    ],
)
def test_what_cannot_work_is_one_line(machine, missing, environment, said):
    if missing:
        (machine.bin / missing).unlink()
    done = machine.setup(**environment)
    assert done.returncode == 1
    assert said in done.stderr and done.stderr.startswith("setup: ") and done.stderr.count("\n") == 1


def test_a_failed_install_is_tried_again(machine):
    assert machine.setup(FAKE_UV_FAILS="1").returncode == 1
    machine.installs()
    assert machine.setup().returncode == 0 and len(machine.installs()) == 2


def test_every_target_has_a_line_of_help():
    make = shutil.which("make")
    if not make:
        pytest.skip("make is not installed")
    answer = subprocess.run([make, "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True)
    named = [line.split()[1] for line in answer.stdout.splitlines()]
    targets = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY"))
    assert sorted(named) == sorted(targets.split()[1:]) and all(
        len(line.split()) > 2 for line in answer.stdout.splitlines()
    )
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
