"""The table of images of a run: what a source holds, which of it is used, what is not and why.

Sources: a folder of images (captions in a .txt beside an image, or in a captions.csv with the columns file
and caption); an uncompressed .tar shard in the web-dataset layout; a folder of such shards (members of one
name belong together: NNN.jpg, NNN.txt its caption, NNN.json its factors). An image's rank in the sample is a
hash of (seed, image id): images added elsewhere do not reshuffle the others, and a larger sample holds the
smaller one.
"""

import csv
import hashlib
import io
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from clipshift_core import images

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".heic", ".heif"),
)
"""Names that are listed as images; HEIC so that its owner reads why it is set aside."""

MAX_BYTES = 2**29
"""Largest file that is read (512 MiB)."""

COLUMNS = ("image_id", "path", "offset", "size", "sha256", "width", "height", "caption")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class SourceError(ValueError):
    """A source that cannot be used, or that has changed since it was listed."""


@dataclass(frozen=True)
class Manifest:
    """Which images a run uses, and what was left out."""

    images: pd.DataFrame
    """One row an image, sorted by image_id: image_id (unique, stable), path (relative to the source, or the
    shard's name), offset and size (bytes of that file), sha256 of those bytes, width and height (pixels,
    upright), caption (may be missing), and the factors that a shard's .json members carry."""
    set_aside: pd.DataFrame
    """image_id, path and reason of what was looked at and cannot be used."""
    n_listed: int
    """How many images the source names."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images' ids, contents, captions and factors: equal wherever the files lie."""
        rows = self.images.drop(columns=["path", "offset"]).to_json(orient="records", lines=True)
        return hashlib.sha256(rows.encode()).hexdigest()

    @property
    def summary(self) -> str:
        """What was listed, used, set aside and not drawn, for a person."""
        used, aside = len(self.images), len(self.set_aside)
        parts = {"listed": self.n_listed, "used": used, "set aside": aside}
        parts["not drawn"] = self.n_listed - used - aside
        return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)

    def save(self, folder: Path) -> None:
        """Write manifest.parquet and set_aside.parquet into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in (("manifest", self.images), ("set_aside", self.set_aside)):
            table = table.copy()
            table.attrs = {"n_listed": self.n_listed}
            partial = folder / f".{name}.parquet.partial"
            table.to_parquet(partial, index=False)
            partial.replace(folder / f"{name}.parquet")  # a killed run leaves a whole file or none

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read what `save` wrote."""
        used, aside = (pd.read_parquet(folder / f"{name}.parquet") for name in ("manifest", "set_aside"))
        n_listed = used.attrs.pop("n_listed")
        aside.attrs.pop("n_listed")
        return cls(used, aside, n_listed)


def build(source: Path, *, n_images: int | None, seed: int) -> Manifest:
    """List a source, draw `n_images` of it (None: all), and check each by decoding it once.

    Images are looked at in the order of their rank until `n_images` are good, so that a small sample of a
    large source is quick; what was not reached is neither used nor set aside. Set aside is what cannot be
    read, and what repeats the bytes of an image of lower rank. Fewer good images than asked for is no error;
    none is. Raises SourceError in one line.
    """
    source = Path(source)
    if n_images is not None and n_images < 1:
        raise SourceError(f"n_images {n_images}: 1 or more is accepted, or None for all")
    listed, aside = _list(source)
    n_listed = len(listed) + len(aside)
    ranked = sorted(listed, key=lambda item: hashlib.sha256(f"{seed}/{item.image_id}".encode()).digest())
    rows, first = [], {}
    for item, checked in _checked(ranked, source):
        if isinstance(checked, str):
            aside.append(_aside(item.image_id, item.path, checked))
        elif checked["sha256"] in first:
            aside.append(_aside(item.image_id, item.path, f"the same bytes as {first[checked['sha256']]}"))
        else:
            first[checked["sha256"]] = item.image_id
            rows.append(checked)
            if len(rows) == n_images:
                break
    if not rows:
        why = f"; the first: {aside[0]['path']}: {aside[0]['reason']}" if aside else ""
        looked_for = "" if n_listed else f" (looked for names that end in {' '.join(SUFFIXES)})"
        raise SourceError(f"{source}: no image to use among {n_listed:,} listed{looked_for}{why}")
    return Manifest(_table(rows), _aside_table(aside), n_listed)


def read(row: Any, base: Path) -> bytes:
    """The bytes of one image. row: of `Manifest.images`, as Series, mapping or named tuple; base: the source.

    Raises SourceError if the file has become shorter, OSError if it is gone.
    """
    row = row._asdict() if hasattr(row, "_asdict") else row  # a Series' own .size is something else
    return _read(Path(base), row["path"], int(row["offset"]), int(row["size"]))


class _Listed(NamedTuple):
    """An image that a source names, before any of its bytes are read."""

    names: tuple[str, ...]
    """candidates for its id, from short to unmistakable"""
    path: str
    offset: int = 0
    size: int | None = None
    """None: the whole file"""
    caption: Callable[[], str | None] = lambda: None
    factors: Callable[[], dict] = dict
    image_id: str = ""


def _list(source: Path) -> tuple[list[_Listed], list[dict]]:
    """Everything a source names as an image, with ids; and what of it cannot even be listed."""
    if not source.exists():
        raise SourceError(f"{source}: no such folder or .tar shard")
    if source.is_file():
        if not source.name.lower().endswith(_SHARDS):
            raise SourceError(f"{source}: a folder of images, a .tar shard or a folder of shards is accepted")
        paths, aside, folder = [source.name], [], source.parent
    else:
        paths, aside = _walk(source)
        folder = source
    shards = [path for path in paths if path.lower().endswith(_SHARDS)]
    pictures = [path for path in paths if path.lower().endswith(SUFFIXES)]
    if shards and pictures:
        raise SourceError(f"{source}: holds shards ({shards[0]}) and images ({pictures[0]}); split the two")
    listed = [] if shards else _list_folder(source, pictures, set(paths))
    for path in shards:
        members, broken = _list_shard(folder / path, path)
        listed += members
        aside += broken
    return _with_ids(listed), aside


def _walk(source: Path) -> tuple[list[str], list[dict]]:
    """Relative posix paths of all regular files, sorted; each folder once, however many links lead to it.

    Hidden names are passed over, among them the ._NAME.jpg that macOS leaves, which are no images.
    """
    found, aside, visited = [], [], set()

    def closed(error: OSError) -> None:
        path = os.path.relpath(error.filename, source)
        aside.append(_aside(path, path, f"the folder cannot be opened: {error.strerror}"))

    for folder, subfolders, files in os.walk(source, onerror=closed, followlinks=True):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((info.st_dev, info.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = os.path.relpath(folder, source).replace(os.sep, "/")
        for name in files:
            path = name if inside == "." else f"{inside}/{name}"
            if name.startswith("."):
                continue
            reason = _no_file(source / path) if _is_utf8(path) else "its name is not valid UTF-8"
            if reason is None:
                found.append(path)
            elif name.lower().endswith((*SUFFIXES, *_SHARDS)):
                aside.append(_aside(path, path, reason))
    return sorted(found), aside


def _no_file(path: Path) -> str | None:
    """Why a name is no file that can be read, if so. (Opening a pipe called x.jpg would wait for ever.)"""
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except OSError as error:
        return "a link that leads nowhere" if path.is_symlink() else f"cannot be opened: {error.strerror}"


def _list_folder(source: Path, pictures: list[str], paths: set[str]) -> list[_Listed]:
    table = _captions_csv(source / "captions.csv", pictures) if "captions.csv" in paths else {}
    listed = []
    for path in pictures:
        stem = os.path.splitext(path)[0]
        item = _Listed((stem, path), path)
        if path in table:
            item = item._replace(caption=lambda caption=table[path]: caption)
        elif f"{stem}.txt" in paths:
            item = item._replace(caption=lambda file=source / f"{stem}.txt": _text(file.read_bytes()))
        listed.append(item)
    return listed


def _captions_csv(file: Path, pictures: list[str]) -> dict[str, str | None]:
    try:
        text = file.read_bytes().decode("utf-8-sig", "replace")
    except OSError as error:
        raise SourceError(f"{file}: cannot be opened: {error.strerror}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise SourceError(f"{file}: has the columns {reader.fieldnames}; file and caption are needed")
        rows = [(row["file"] or "", row["caption"] or "") for row in reader]
    except csv.Error as error:
        raise SourceError(f"{file}: line {reader.line_num}: {error}") from None
    table = {PurePosixPath(name.replace("\\", "/")).as_posix(): _tidy(caption) for name, caption in rows}
    if pictures and table and not table.keys() & set(pictures):
        raise SourceError(f"{file}: names none of the images; it has {next(iter(table))}, not {pictures[0]}")
    return table


def _list_shard(file: Path, path: str) -> tuple[list[_Listed], list[dict]]:
    """The images of one shard; of one that ends early, those before the break."""
    _refuse_compressed(file)
    members, listed, aside = {}, [], []
    try:
        with tarfile.open(file, mode="r:") as tar:
            for member in tar:  # a name that comes twice: the later one counts, as when unpacking
                members[member.name.removeprefix("./")] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = f"the shard is damaged or ends early ({error}): {len(members):,} members are used"
        aside.append(_aside(path, path, reason))
    shard = os.path.splitext(path)[0]
    for name, member in members.items():
        key, suffix = os.path.splitext(name)
        if suffix.lower() not in SUFFIXES or name.rpartition("/")[2].startswith("."):
            continue
        if not _is_utf8(name) or not member.isreg() or member.issparse():
            aside.append(_aside(name, path, "its name is not valid UTF-8, or it is a link or sparse"))
            continue
        item = _Listed((key, f"{shard}/{key}", f"{shard}/{name}"), path, member.offset_data, member.size)
        if f"{key}.txt" in members:
            item = item._replace(caption=_member(file, members[f"{key}.txt"], _text))
        if f"{key}.json" in members:
            item = item._replace(factors=_member(file, members[f"{key}.json"], _factors))
        listed.append(item)
    return listed, aside


def _member(file: Path, member: tarfile.TarInfo, parse: Callable[[bytes], Any]) -> Callable[[], Any]:
    return lambda: parse(_read(file, file.name, member.offset_data, member.size))


def _refuse_compressed(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(6)
    except OSError as error:
        raise SourceError(f"{file}: cannot be opened: {error.strerror}") from None
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind or not file.name.lower().endswith(".tar"):
        raise SourceError(f"{file}: a shard compressed by {kind or 'its name'}; unpack it to a plain .tar first")


def _with_ids(listed: list[_Listed]) -> list[_Listed]:
    """Give each image the shortest of its names that no other image has."""
    depth = [0] * len(listed)
    while True:
        ids = [item.names[at] for item, at in zip(listed, depth, strict=True)]
        count = Counter(ids)
        clashes = [i for i, name in enumerate(ids) if count[name] > 1 and depth[i] < len(listed[i].names) - 1]
        if not clashes:
            return [item._replace(image_id=name) for item, name in zip(listed, ids, strict=True)]
        for i in clashes:
            depth[i] += 1


def _checked(ranked: list[_Listed], source: Path) -> Iterator[tuple[_Listed, dict | str]]:
    """Each image with its row, or the reason against it, in order; decoded by threads, a few ahead."""
    workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(ranked), 32):
            few = ranked[start : start + 32]
            yield from zip(few, list(pool.map(lambda item: _check(item, source), few)), strict=True)


def _check(item: _Listed, source: Path) -> dict | str:
    """The row of one image, or why it cannot be used."""
    try:
        data = _read(source, item.path, item.offset, item.size)
        height, width, _ = images.decode(data).shape
        factors, caption = item.factors(), item.caption()
    except (images.Unreadable, SourceError) as error:
        return str(error)
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    if caption is None and isinstance(in_json := factors.get("caption"), str):
        caption = _tidy(in_json)
    digest = hashlib.sha256(data).hexdigest()
    row = (item.image_id, item.path, item.offset, len(data), digest, width, height, caption)
    return dict(zip(COLUMNS, row, strict=True)) | {k: v for k, v in factors.items() if k not in COLUMNS}


def _read(source: Path, path: str, offset: int, size: int | None) -> bytes:
    """Bytes of a file of the source; a source that is a file itself stands for its folder."""
    file = (source.parent if source.is_file() else source) / path
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size if size is None else size
        if size > MAX_BYTES:
            raise SourceError(f"{size:,} bytes; at most {MAX_BYTES:,} are read")
        opened.seek(offset)
        data = opened.read(size)
    if len(data) < size:
        raise SourceError(f"{path} ends early: {len(data):,} of {size:,} bytes at {offset:,}")
    return data


def _text(data: bytes) -> str | None:
    return _tidy(data.decode("utf-8-sig", "replace"))


def _tidy(caption: str) -> str | None:
    return " ".join(_printable(caption).split()) or None


def _factors(data: bytes) -> dict:
    """A shard's .json as flat columns: what is nested stays json text."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"its .json of factors cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise SourceError(f"its .json of factors is a {type(parsed).__name__}, not an object")
    return {_printable(name): _scalar(value) for name, value in parsed.items()}


def _scalar(value: Any) -> str | bool | int | float | None:
    if isinstance(value, str):
        return _printable(value)
    nested = isinstance(value, list | dict) or (isinstance(value, int) and abs(value) >= 2**63)
    return json.dumps(value, sort_keys=True) if nested else value


def _table(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table sorted by image_id; a factor that is a number here and text there becomes text."""
    rows = sorted(rows, key=lambda row: row["image_id"])
    table = pd.DataFrame([[row[name] for name in COLUMNS] for row in rows], columns=list(COLUMNS))
    for name in dict.fromkeys(name for row in rows for name in row if name not in COLUMNS):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        if kinds:  # a factor that none of these images has is left out
            table[name] = pd.Series(values, dtype="boolean" if kinds == {bool} else None)
    return table.astype({"caption": "str"})


def _aside(image_id: str, path: str, reason: str) -> dict[str, str]:
    return {"image_id": _printable(image_id), "path": _printable(path), "reason": reason}


def _aside_table(aside: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(aside, columns=["image_id", "path", "reason"], dtype="str")
    return table.sort_values(["image_id", "path"], ignore_index=True)


def _is_utf8(name: str) -> bool:
    return _printable(name) == name


def _printable(text: str) -> str:
    """Text that every file format takes: half characters, which names and json may hold, written as \\udcNN."""
    return text.encode("utf-8", "backslashreplace").decode()
