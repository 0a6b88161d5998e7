"""What a run read and what it ran on: the digests of its input files, and the record of it in run.json."""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from . import files, profiles, sources
from .profiles import Profile

PACKAGES = (
    *("clipshift", "torch", "torchvision", "open_clip_torch", "transformers", "albumentations"),
    *("opencv-python-headless", "pillow", "resvg-py", "numpy", "scipy", "pandas", "zarr", "xarray"),
    *("safetensors", "plotly", "papermill", "ipykernel"),
)
"""The distributions whose versions a record names: those that can change a number or a figure."""

HASH_LIMIT = 256 * 2**20
"""Bytes of input up to which contents are hashed; above, names, sizes and times stand for them."""


FILES = ("fetch", "captions", "classes", "lesions", *profiles.DICTIONARIES)
"""Keys of the profile that name a file or folder which is read."""


def inputs(profile: Profile) -> dict[str, dict]:
    """Digests of the files that a run reads: images, models, lists, and what the repository ships."""
    roots = {"images": profile.source_path, "shipped": profiles.ROOT / "data"}
    for name in (profile.model, *profile.models, *([profile.labeller] if profile.labeller else [])):
        local = [Path(part) for part in profiles.named(name) if part and Path(part).is_absolute()]
        roots |= {f"model {name}": path for path in local}
    roots |= {key: profiles.ROOT / getattr(profile, key) for key in FILES if getattr(profile, key)}
    return {name: digest(root) for name, root in roots.items() if root.exists()}


def digest(root: Path) -> dict:
    """sha256 over a file, or over all files below a folder; if they are large, over their sizes and times.

    The files are those that `sources.walk` finds. One that cannot be read counts by its name.
    """
    paths = {".": root} if root.is_file() else {path: root / path for path in sources.walk(root)[0]}
    n_bytes = sum(size_and_time[0] for size_and_time in map(_size_and_time, paths.values()))
    if n_bytes <= HASH_LIMIT:
        of, facts = "names and contents", _contents
    else:
        of, facts = "names, sizes and times", _size_and_time
    total = hashlib.sha256(json.dumps([(name, facts(path)) for name, path in paths.items()]).encode())
    return {"sha256": total.hexdigest(), "of": of, "files": len(paths), "bytes": n_bytes}


def sha256(path: Path) -> str:
    """sha256 (hex) of one file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(profile: Profile) -> dict:
    """Everything about a run of this profile that is not in its results: code, versions, weights, device."""
    status = _git("status", "--porcelain")
    notes = [json.loads(path.read_text()) for path in sorted((profile.run_dir / "weights").glob("*.json"))]
    return {
        "profile": asdict(profile),
        "digest": profile.digest,
        "commit": commit(),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seeds": {"profile": profile.seed},
        "weights": {note["model"]: note["sha256"] for note in notes},
        "device": _device(profile.device),
    }


def note_weights(profile: Profile, model: str, digest: str) -> None:
    """Keep the digest of a model's weights, as loaded, in the run's folder, for `record`."""
    path = profile.run_dir / "weights" / f"{hashlib.sha256(model.encode()).hexdigest()[:12]}.json"
    write_json(path, {"model": model, "sha256": digest})


def commit() -> str | None:
    """The commit that is checked out, or None where this is no clone."""
    return _git("rev-parse", "HEAD")


def write_json(path: Path, value: dict) -> None:
    """Write to the side and rename, so that a kill leaves the old file or the new one."""
    files.write({path: (json.dumps(value, indent=1) + "\n").encode()})


def _contents(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        return error.strerror or "cannot be read"


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # gone since it was listed
        return 0, 0
    return found.st_size, found.st_mtime_ns


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
