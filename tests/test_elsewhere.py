"""Files for other places: the dev container and Binder, built from the same lock, and the hooks before a commit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml

from clipshift_core.profiles import ROOT

HOOKS = ROOT / ".pre-commit-config.yaml"
DOCKERFILE = ROOT / ".binder" / "Dockerfile"
DEVCONTAINER = ROOT / ".devcontainer" / "devcontainer.json"
ADDRESS = re.compile(r"://|\b[\w-]+\.(com|org|io|net|dev)\b|--(extra-)?index-url")
"""A host's name, or an option that takes one."""


def hooks():
    (repository,) = yaml.safe_load(HOOKS.read_text())["repos"]
    assert repository["repo"] == "local"
    return {hook["id"]: hook for hook in repository["hooks"]}


def stages():
    """The Dockerfile as name -> instructions, continued lines joined."""
    found, name = {}, ""
    for line in DOCKERFILE.read_text().replace("\\\n", "").splitlines():
        if line.startswith("FROM "):
            name = line.partition(" AS ")[2] or "last"
            found[name] = []
        if line and not line.startswith("#"):
            found[name].append(" ".join(line.split()))
    return found


def targets():
    """The targets of the Makefile."""
    return next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY")).split()[1:]


@pytest.mark.parametrize("path", [HOOKS, DOCKERFILE, DEVCONTAINER], ids=lambda path: path.name)
def test_names_no_host(path):
    assert not ADDRESS.search(path.read_text())


@pytest.mark.parametrize(
    "text", ["https://x/y", "FROM ghcr.io/a/b", "pip install --index-url x", "ruff @ files.some.org"]
)
def test_hosts_are_seen(text):
    assert ADDRESS.search(text)


def test_every_hook_is_a_command_of_the_environment():
    assert set(hooks()) == {"ruff", "notebooks"}
    for hook in hooks().values():
        python, option, module, *_ = shlex.split(hook["entry"])
        assert (hook["language"], python, option) == ("system", ".venv/bin/python", "-m")
        subprocess.run([sys.executable, "-m", module, "--version"], check=True, capture_output=True)


def test_binder_and_the_dev_container_build_from_the_lock():
    # `make setup` is setup.sh, which test_setup.py holds to the lock and its hashes
    assert "make setup TORCH_BACKEND=cpu" in stages()["last"][-2] and stages()["last"][0] == "FROM tools"
    assert "chromium" in stages()["tools"][1] and "pip" not in DOCKERFILE.read_text().partition("FROM")[2]
    image = stages()["tools"][0].split()[1]
    assert re.fullmatch(r"python:3\.1[123]-slim-\w+", image)  # Debian's, of a version that setup.sh takes
    container = json.loads(DEVCONTAINER.read_text())
    build = container["build"]
    assert (DEVCONTAINER.parent / build["dockerfile"]).resolve() == DOCKERFILE and build["target"] in stages()
    make, target = container["postCreateCommand"].split()
    assert make == "make" and target in targets() and "lab" in targets()
    assert f"NB_USER={container['remoteUser']}" in DOCKERFILE.read_text()
    # repo2docker reads either folder, and refuses two
    assert not (ROOT / "binder").exists()


@pytest.fixture
def clone(tmp_path):
    """As much of the repository as the hooks need, with two of the notebooks."""
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "clipshift_core", tmp_path / "clipshift_core", ignore=leave)
    for folder in ("tests", "notebooks"):
        (tmp_path / folder).mkdir()
    for name in ("conftest.py", "pyproject.toml", "tests/test_notebooks.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for path in first_two():  # paired anew: whether the real ones are pairs is not asked here
        copy = shutil.copy(path, tmp_path / "notebooks")
        jupytext.write(nbformat.read(path, as_version=4), Path(copy).with_suffix(".py"), fmt="py:percent")
    (tmp_path / "figures").symlink_to(ROOT / "figures")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def first_two() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))[:2]


def run(hook, clone, *files):
    command = [*shlex.split(hooks()[hook]["entry"]), *files]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)


def test_notebooks_that_are_noisy_or_no_pair_are_refused(clone):
    assert run("notebooks", clone).returncode == 0
    first, second = (clone / "notebooks" / path.name for path in first_two())
    noisy = nbformat.read(first, as_version=4)
    noisy.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(noisy, first)
    source = second.with_suffix(".py")
    source.write_text(source.read_text() + "\n# %%\n1\n")
    done = run("notebooks", clone)
    failed = re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    assert failed == [f"test_pair_has_the_same_cells[{second.name}]", f"test_carries_no_noise[{first.name}]"]
    assert done.returncode == 1


def test_the_linter_refuses_what_make_test_refuses(clone):
    (clone / "clipshift_core" / "wrong.py").write_text("import os\n")
    assert run("ruff", clone, "clipshift_core/canvas.py", "notebooks/00_start_here.py").returncode == 0
    assert "F401" in run("ruff", clone, "clipshift_core/wrong.py").stdout
