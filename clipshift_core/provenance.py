"""What a run read and what it ran on: the digests of its input files, and the record of it in run.json."""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from . import profiles
from .profiles import Profile

PACKAGES = (
    *("clipshift", "torch", "torchvision", "open_clip_torch", "transformers", "albumentations"),
    *("opencv-python-headless", "pillow", "resvg-py", "numpy", "scipy", "pandas", "zarr", "xarray"),
    *("safetensors", "plotly", "papermill", "ipykernel"),
)
"""The distributions whose versions a record names: those that can change a number or a figure."""

HASH_LIMIT = 256 * 2**20
"""Bytes of input up to which contents are hashed; above, names, sizes and times stand for them."""


def inputs(profile: Profile) -> dict[str, dict]:
    """Digests of the files that a run reads: images, model, classes, and what the repository ships."""
    roots = {"images": profile.source_path, "shipped": profiles.ROOT / "data"}
    if profile.model_dir:
        roots["model"] = profile.model_dir
    roots |= {f"model {name}": profiles.ROOT / name for name in profile.models if (profiles.ROOT / name).is_dir()}
    if profile.classes:
        roots["classes"] = profiles.ROOT / profile.classes
    return {name: digest(root) for name, root in roots.items()}


def digest(root: Path) -> dict:
    """sha256 over a file, or over all files below a folder; if they are large, over their sizes and times."""
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    n_bytes = sum(path.stat().st_size for path in files)
    if n_bytes <= HASH_LIMIT:
        of, facts = "names and contents", sha256
    else:
        of, facts = "names, sizes and times", _size_and_time
    total = hashlib.sha256(json.dumps([(str(path.relative_to(root)), facts(path)) for path in files]).encode())
    return {"sha256": total.hexdigest(), "of": of, "files": len(files), "bytes": n_bytes}


def sha256(path: Path) -> str:
    """sha256 (hex) of one file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(profile: Profile) -> dict:
    """Everything about a run of this profile that is not in its results: code, versions, weights, device."""
    status = _git("status", "--porcelain")
    weights = sorted(profile.model_dir.glob("*.safetensors")) if profile.model_dir else []
    return {
        "profile": asdict(profile),
        "digest": profile.digest,
        "commit": commit(),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seeds": {"profile": profile.seed},
        "weights": {path.name: sha256(path) for path in weights} or f"{profile.model} {profile.pretrained}",
        "device": _device(profile.device),
    }


def commit() -> str | None:
    """The commit that is checked out, or None where this is no clone."""
    return _git("rev-parse", "HEAD")


def write_json(path: Path, value: dict) -> None:
    """Write to the side and rename, so that a kill leaves the old file or the new one."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _size_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _git(*arguments: str) -> str | None:
    """git's answer, or None where this is no clone or git is missing."""
    command = ["git", *arguments]
    try:
        answer = subprocess.run(command, cwd=profiles.ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _device(wanted: str) -> str:
    import torch  # seconds to import: only where a run has taken place

    if wanted != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {os.cpu_count()} cores, {platform.machine()}"
