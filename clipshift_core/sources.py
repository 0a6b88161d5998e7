"""What a source names as images, before any pixel is read: the files of a folder, or the members of shards.

A folder: captions in a .txt beside an image, or in a captions.csv (see `captions`). An uncompressed .tar shard in the
web-dataset layout, or a folder of such shards: members of one name belong together (NNN.jpg, NNN.txt its caption,
NNN.json its factors). Nothing is ever unpacked to the disk.
"""

import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".heic", ".heif"),
)
"""Names that are listed as images; HEIC so that its owner reads why it is set aside."""

MAX_BYTES = 2**29
"""Largest file that is read (512 MiB)."""
MAX_FACTORS = 2**20
"""Largest .json of factors, and largest header of a shard's member (1 MiB)."""
MAX_CAPTION = 10_000
"""Characters of a caption that are kept; CLIP reads about 300."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class SourceError(ValueError):
    """A source that cannot be used, or that has changed since it was listed; in one line, whatever it is called."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Listed(NamedTuple):
    """An image that a source names, before any of its bytes are read."""

    names: tuple[str, ...]
    """candidates for its id, from short to unmistakable"""
    name: str
    """its own: relative to the source, or to the shard"""
    path: str
    offset: int = 0
    size: int | None = None
    """None: the whole file"""
    caption: Callable[[], str | None] = lambda: None
    factors: Callable[[], dict] = dict
    image_id: str = ""


def listing(source: Path) -> tuple[list[Listed], list[dict[str, str]]]:
    """Everything a source names as an image, with ids; and what of it cannot even be listed (`set_aside` rows)."""
    if not source.exists():
        raise SourceError(f"{source}: no such folder or .tar shard")
    if source.is_file():
        if not source.name.lower().endswith(_SHARDS):
            raise SourceError(f"{source}: a folder of images, a .tar shard or a folder of shards is accepted")
        paths, aside, folder = [source.name], [], source.parent
    else:
        paths, aside = walk(source)
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


def read_bytes(source: Path, path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a file of the source; a source that is a file itself stands for its folder.

    Raises SourceError for more than `MAX_BYTES`, for what is no file, or ends early; OSError if it cannot be opened.
    """
    file = (source.parent if source.is_file() else source) / path
    with _opened(file) as opened:
        size = os.fstat(opened.fileno()).st_size if size is None else size
        if size > MAX_BYTES:
            raise SourceError(f"{size:,} bytes; at most {MAX_BYTES:,} are read")
        opened.seek(offset)
        data = opened.read(size)
    if len(data) < size:
        raise SourceError(f"{path} ends early: {len(data):,} of {size:,} bytes at {offset:,}")
    return data


def aside_row(image_id: str, path: str, reason: str) -> dict[str, str]:
    return {"image_id": printable(image_id), "path": printable(path), "reason": _CONTROL.sub(" ", reason)}


def printable(text: str) -> str:
    """Text that every table and terminal takes: half characters as \\udcNN, control characters as \\xNN."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def tidy(caption: str) -> str | None:
    """A caption as one line without control characters (a terminal would obey them), at most `MAX_CAPTION` long."""
    text = caption[: 4 * MAX_CAPTION].encode("utf-8", "backslashreplace").decode()
    return " ".join(_CONTROL.sub(" ", text).split())[:MAX_CAPTION].strip() or None


# Folders -------------------------------------------------------------------------------------------------------------


def walk(source: Path) -> tuple[list[str], list[dict]]:
    """Relative posix paths of all regular files, sorted; each folder once, however many links lead to it.

    Hidden names are passed over, among them the ._NAME.jpg that macOS leaves, which are no images. Links are followed,
    but not to a folder around the source: that would list the whole disk.
    """
    found, aside, visited = [], [], set()
    around = {_place(folder) for folder in source.resolve().parents}

    def closed(error: OSError) -> None:
        path = os.path.relpath(error.filename, source)
        aside.append(aside_row(path, path, f"the folder cannot be opened: {error.strerror}"))

    for folder, subfolders, files in os.walk(source, onerror=closed, followlinks=True):
        inside = os.path.relpath(folder, source).replace(os.sep, "/")
        place = _place(Path(folder))
        if place in around:
            aside.append(aside_row(inside, inside, "a link to a folder that the source lies in"))
        if place in around | visited or place is None:
            subfolders.clear()
            continue
        visited.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = name if inside == "." else f"{inside}/{name}"
            if name.startswith("."):
                continue
            reason = _no_file(source / path) if _is_utf8(path) else "its name is not valid UTF-8"
            if reason is None:
                found.append(path)
            elif name.lower().endswith((*SUFFIXES, *_SHARDS)):
                aside.append(aside_row(path, path, reason))
    return sorted(found), aside


def _place(folder: Path) -> tuple[int, int] | None:
    """Which folder it is, under whatever name; None if it is gone."""
    try:
        info = folder.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _no_file(path: Path) -> str | None:
    """Why a name is no file that can be read, if so. (Opening a pipe called x.jpg would wait for ever.)"""
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except OSError as error:
        return "a link that leads nowhere" if path.is_symlink() else f"cannot be opened: {error.strerror}"


def _list_folder(source: Path, pictures: list[str], paths: set[str]) -> list[Listed]:
    listed = []
    for path in pictures:
        stem = os.path.splitext(path)[0]
        item = Listed((stem, path), path, path)
        if f"{stem}.txt" in paths:
            item = item._replace(caption=lambda file=source / f"{stem}.txt": _text_beside(file))
        listed.append(item)
    return listed


def _text_beside(file: Path) -> str | None:
    with _opened(file) as opened:
        return _text(opened.read(4 * MAX_CAPTION))  # bytes of the longest caption


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    """A file opened without waiting, should it have become a pipe; SourceError for what is no file."""
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise SourceError("not a regular file")
        yield opened


# Shards --------------------------------------------------------------------------------------------------------------


class _Headers(io.FileIO):
    """A shard as tarfile may read it: headers alone, of which a damaged one may claim to be as long as the disk."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_FACTORS:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def _list_shard(file: Path, path: str) -> tuple[list[Listed], list[dict]]:
    """The images of one shard; of one that ends early, those before the break."""
    _refuse_compressed(file)
    members, listed, aside = {}, [], []
    try:
        with _Headers(file) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            end = -1
            for member in tar:  # a name that comes twice: the later one counts, as when unpacking
                if member.size < 0 or member.offset < end or tar.offset > 2**62:  # else round in circles for ever
                    raise tarfile.ReadError(f"a member of {member.size:,} bytes")
                end = member.offset_data
                members[member.name.removeprefix("./")] = member
    except Exception as error:  # on damaged bytes tarfile raises nearly any type, such as OverflowError
        said = " ".join(str(error).split())[:120] or type(error).__name__
        reason = f"the shard is damaged or ends early ({said}): {len(members):,} members are used"
        aside.append(aside_row(path, path, reason))
    shard = os.path.splitext(path)[0]
    for name, member in members.items():
        key, suffix = os.path.splitext(name)
        if suffix.lower() not in SUFFIXES or name.rpartition("/")[2].startswith("."):
            continue
        if not _is_utf8(name) or not member.isreg() or member.issparse():
            aside.append(aside_row(_within(name), path, "its name is not valid UTF-8, or it is a link or sparse"))
            continue
        names = (_within(key), f"{shard}/{_within(key)}", f"{shard}/{_within(name)}")
        item = Listed(names, name, path, member.offset_data, member.size)
        if f"{key}.txt" in members:
            item = item._replace(caption=_member(file, members[f"{key}.txt"], _text))
        if f"{key}.json" in members:
            item = item._replace(factors=_member(file, members[f"{key}.json"], _factors))
        listed.append(item)
    return listed, aside


def _within(name: str) -> str:
    """A member's name without what would lead out of a folder: "../../a" and "/a" are "a"."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", "..")) or "unnamed"


def _member(file: Path, member: tarfile.TarInfo, parse: Callable[[bytes], Any]) -> Callable[[], Any]:
    size = min(member.size, 4 * MAX_CAPTION) if parse is _text else member.size

    def parsed() -> Any:
        if size > MAX_FACTORS:
            raise SourceError(f"its .json of factors has {size:,} bytes; at most {MAX_FACTORS:,} are read")
        return parse(read_bytes(file, file.name, member.offset_data, size))

    return parsed


def _refuse_compressed(file: Path) -> None:
    try:
        with _opened(file) as opened:
            start = opened.read(6)
    except OSError as error:
        raise SourceError(f"{file}: cannot be opened: {error.strerror}") from None
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind or not file.name.lower().endswith(".tar"):
        raise SourceError(f"{file}: a shard compressed by {kind or 'its name'}; unpack it to a plain .tar first")


def _text(data: bytes) -> str | None:
    return tidy(data.decode("utf-8-sig", "replace"))


def _factors(data: bytes) -> dict:
    """A shard's .json as flat columns: what is nested stays json text, and what is not finite is missing."""
    try:
        parsed = json.loads(data)
        if not isinstance(parsed, dict):
            raise SourceError(f"its .json of factors is a {type(parsed).__name__}, not an object")
        return {printable(name): _scalar(value) for name, value in parsed.items()}
    except SourceError:
        raise
    except (ValueError, RecursionError) as error:
        raise SourceError(f"its .json of factors cannot be read: {error}") from None


def _scalar(value: Any) -> str | bool | int | float | None:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    nested = isinstance(value, list | dict) or (isinstance(value, int) and abs(value) >= 2**63)
    return json.dumps(value, sort_keys=True) if nested else value


# Ids -----------------------------------------------------------------------------------------------------------------


def _with_ids(listed: list[Listed]) -> list[Listed]:
    """Give each image the shortest of its names that no other image has."""
    names = [[*map(printable, item.names), _unmistakable(item)] for item in listed]
    depth = [0] * len(listed)
    while True:
        ids = [some[at] for some, at in zip(names, depth, strict=True)]
        count = Counter(ids)
        clashes = [i for i, name in enumerate(ids) if count[name] > 1 and depth[i] < len(names[i]) - 1]
        if not clashes:
            return [item._replace(image_id=name) for item, name in zip(listed, ids, strict=True)]
        for i in clashes:
            depth[i] += 1


def _unmistakable(item: Listed) -> str:
    """For names that differ in what cannot be shown, or in what leads out of a folder."""
    told_by = hashlib.sha256(f"{item.path}\n{item.name}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{printable(item.names[-1])} {told_by}"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
