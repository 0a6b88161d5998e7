"""Google's Conceptual Captions: its table of captions and links, and the shards that its images become.

The table (Train_GCC-training.tsv, 3.3 million lines) has no header: a caption, a tab and a URL a line. A link's rank is
a hash of (seed, URL), as an image's is in `manifests`: a larger sample holds the smaller one, wherever lines stand.

A folder that `Store` fills:
    fetch.json       which listing and seed it is of
    00000.tar        KEY.jpg (the bytes as they came), KEY.txt (caption), KEY.json (url, sha256) of 1,000 images in the
                     order of rank; KEY is the start of the URL's sha256, so names do not hang on the order of lines
    00000.parquet    what became of every link tried for that shard, without a gap, so that a killed run goes on where
                     the last whole shard ends
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import UInt64
from numpy.typing import NDArray

PER_SHARD = 1000
"""Images of one shard."""
MAX_LINE = 2**16
"""Longest line that is read, in bytes."""

FETCHED, DEAD = "fetched", "dead"
OUTCOMES = (
    *(FETCHED, "same bytes", DEAD, "http error", "timed out", "unreachable", "refused", "redirects"),
    *("wrong type", "too large", "truncated", "not decodable"),
)
"""What can become of a link; "dead" is 404, 410 or a host that does not exist, "refused" an address not public."""
COLUMNS = ("url", "key", "outcome", "reason", "status", "bytes", "seconds", "sha256")

_STATE, _NUMBER = "fetch.json", "[0-9]" * 5
_URL = re.compile(rb"https?://[^\x00-\x20\x7f/?#\\]+[^\x00-\x20\x7f]*", re.IGNORECASE)
_BLOCK = tarfile.BLOCKSIZE


class FetchError(ValueError):
    """A listing or a folder that cannot be used, or a network that is not there: what, where, what to do."""


class Link(NamedTuple):
    """One line of the table."""

    caption: str
    url: str

    @property
    def key(self) -> str:
        """The name of its image in the shards."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:16]


class Outcome(NamedTuple):
    """What became of a link."""

    link: Link
    kind: str
    """one of OUTCOMES"""
    reason: str = ""
    status: int | None = None
    seconds: float = 0.0
    n_bytes: int = 0
    data: bytes = b""
    suffix: str = ""


# The table ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The links of a table in the order of their rank; the texts stay in the file (16 bytes a link in memory)."""

    path: Path
    offsets: UInt64[NDArray, " link"]
    """Where each link's line begins."""
    set_aside: pd.DataFrame
    """line (from 1) and reason of what cannot be used."""

    def __len__(self) -> int:
        return len(self.offsets)

    def links(self, start: int = 0) -> Iterator[Link]:
        """From rank `start` on. Raises FetchError if the file has changed meanwhile."""
        with reading(self.path), self.path.open("rb") as file:
            for offset in self.offsets[start:].tolist():
                file.seek(offset)
                found = _parsed(file.readline(MAX_LINE))
                if isinstance(found, str):
                    raise FetchError(f"{self.path}: has changed while it was read; start again")
                yield Link(found[0].decode().strip(), found[1].decode())


def read(path: Path, *, seed: int) -> Listing:
    """List and rank a table; a first line "caption<TAB>url" is passed over, as are blank lines.

    Set aside are lines with another number of columns than two, without a caption, not in UTF-8, whose second column
    is no http(s) URL, and repetitions of a URL. Raises FetchError if no line is left, or the file cannot be read.
    """
    prefix, at = f"{seed}/".encode(), 0
    ranks, offsets, numbers = array("Q"), array("Q"), array("Q")
    aside: list[tuple[int, str]] = []
    sha256 = hashlib.sha256
    with reading(path), path.open("rb") as file:
        for number, (offset, line) in enumerate(_lines(file), 1):
            found = _parsed(line)
            if not isinstance(found, str):
                ranks.append(int.from_bytes(sha256(prefix + found[1]).digest()[:8], "big"))
                offsets.append(offset)
                numbers.append(number)
            elif found and not (number == 1 and line.lower().split() == [b"caption", b"url"]):
                aside.append((number, found))
    order = np.argsort(np.frombuffer(ranks, np.uint64), kind="stable")
    ranked, where = np.frombuffer(ranks, np.uint64)[order], np.frombuffer(offsets, np.uint64)[order]
    kept = np.ones(len(order), bool)
    with reading(path), path.open("rb") as file:
        urls = {}
        for at in np.flatnonzero(ranked[1:] == ranked[:-1]) + 1:  # equal URLs have equal ranks
            for i in (at - 1, at):
                file.seek(int(where[i]))
                urls[i] = _parsed(file.readline(MAX_LINE))[1]
            if urls[at] == urls[at - 1]:
                kept[at] = False
                aside.append((numbers[order[at]], "a URL that an earlier line has"))
    if not kept.any():
        why = f"; line {aside[0][0]}: {aside[0][1]}" if aside else ""
        raise FetchError(f"{path}: no line is a caption, a tab and a http(s) URL{why}")
    table = pd.DataFrame(aside, columns=["line", "reason"]).astype({"line": "int64", "reason": "str"})
    return Listing(path, where[kept], table.sort_values("line", ignore_index=True, kind="stable"))


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line and where it begins; of one that is too long only its first MAX_LINE bytes."""
    at = len(b"\xef\xbb\xbf") if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(at)
    while line := file.readline(MAX_LINE):
        yield at, line
        at += len(line)
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
            at += len(line)


def _parsed(line: bytes) -> tuple[bytes, bytes] | str:
    """Caption and URL of a line, or why it has none; "" for a blank one."""
    caption, tab, url = line.partition(b"\t")
    url = url.strip()
    if not tab or b"\t" in url:
        columns = line.count(b"\t") + 1
        return f"{columns} column{'s' * (columns > 1)}, not 2" if line.strip() else ""
    if len(line) == MAX_LINE and not line.endswith(b"\n"):
        return f"longer than {MAX_LINE:,} bytes"
    if not _URL.fullmatch(url):
        return "its second column is no http(s) URL" if line.strip() else ""
    if not line.isascii():
        try:
            line.decode()
        except UnicodeDecodeError:
            return "not valid UTF-8"
    return (caption, url) if caption.strip() else "no caption"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FetchError(f"{path}: cannot be read: {error.strerror or error}") from None


# The folder ---------------------------------------------------------------------------------------------------------


class Store:
    """A folder of shards that grows by one outcome after the other, in the order of rank. One at a time.

    What a killed run left beside the tables is put right first. Raises FetchError for what cannot be.
    """

    def __init__(self, folder: Path):
        self.folder, self.tables = folder, tables_of(folder)
        for number, table in enumerate(self.tables):
            shard = folder / f"{number:05d}.tar"
            if table.attrs["end"] > (shard.stat().st_size if shard.exists() else 0):
                raise FetchError(
                    f"{shard}: shorter than {shard.stem}.parquet says, or gone; delete the .parquet from this number "
                    "on, and they are fetched again"
                )
        for shard, end in unfinished(folder).items():
            with writing(shard):
                if not end:
                    shard.unlink()
                    continue
                with shard.open("r+b") as file:
                    file.truncate(end)
                    file.seek(end)
                    file.write(bytes(_size(end) - end))
        known = pd.concat(self.tables)[["key", "sha256"]].dropna() if self.tables else pd.DataFrame()
        self.first = dict(zip(known["sha256"], known["key"], strict=True)) if len(known) else {}
        """The key of each content that is there."""
        self.n_tried = sum(map(len, self.tables))
        self.rows: list[tuple] = []
        self.file: IO[bytes] | None = None
        self.in_shard = 0

    @property
    def n_images(self) -> int:
        return len(self.first)

    def add(self, outcome: Outcome) -> str:
        """Write down an outcome, its image too if no other has the same bytes; returns what it counts as."""
        link, kind, reason, digest = outcome.link, outcome.kind, outcome.reason, None
        if self.file is None:
            self._open()
        if kind == FETCHED:
            digest = hashlib.sha256(outcome.data).hexdigest()
            if digest in self.first:
                kind, reason, digest = "same bytes", f"the same bytes as {self.first[digest]}", None
        seconds = round(outcome.seconds, 3)
        row = (link.url, link.key, kind, reason, outcome.status, outcome.n_bytes, seconds, digest)
        self.rows.append(row)
        self.n_tried += 1
        if digest is not None:
            self.first[digest] = link.key
            about = json.dumps({"url": link.url, "sha256": digest})
            with writing(self._partial("tar")):
                self._member(f"{link.key}.{outcome.suffix}", outcome.data)
                self._member(f"{link.key}.txt", link.caption.encode())
                self._member(f"{link.key}.json", about.encode())
            self.in_shard += 1
            if self.in_shard == PER_SHARD:
                self.commit()
        return kind

    def commit(self) -> None:
        """Give the shard at hand its name. A table counts only with its shard, so the shard goes first."""
        if self.file is None:
            return
        number = self._number
        with writing(self._partial("tar")):
            end = self.file.tell()
            self.file.write(bytes(_size(end) - end))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        table = pd.DataFrame(self.rows, columns=list(COLUMNS)).astype({"status": "Int64", "sha256": "str"})
        table.attrs = {"end": end}
        with writing(self._partial("parquet")):
            table.to_parquet(self._partial("parquet"), index=False)
        for suffix in ("tar", "parquet"):
            with writing(self.folder / f"{number:05d}.{suffix}"):
                if suffix == "tar" and not end:  # the last links of a listing gave nothing
                    self._partial(suffix).unlink()
                else:
                    self._partial(suffix).replace(self.folder / f"{number:05d}.{suffix}")
        self.tables.append(table)
        self.file, self.rows, self.in_shard = None, [], 0

    def abandon(self) -> None:
        """Drop the shard at hand."""
        if self.file is not None:
            with suppress(OSError):  # a full disk objects again to what is still to be written
                self.file.close()
            with suppress(OSError):
                self._partial("tar").unlink(missing_ok=True)

    def _open(self) -> None:
        """Begin a shard, or go on with a last one that is not full: what it holds is its start."""
        partial, end = self._partial("tar"), 0
        if self.tables and (self.tables[-1]["outcome"] == FETCHED).sum() < PER_SHARD:
            table = self.tables.pop()
            self.rows = list(table.astype(object).where(table.notna(), None).itertuples(index=False, name=None))
            self.in_shard, end = int((table["outcome"] == FETCHED).sum()), table.attrs["end"]
            partial = self._partial("tar")
        with writing(partial):
            if end:
                shutil.copyfile(self.folder / f"{self._number:05d}.tar", partial)
                os.truncate(partial, end)
            self.file = partial.open("ab" if end else "wb")

    @property
    def _number(self) -> int:
        return len(self.tables)

    def _partial(self, suffix: str) -> Path:
        return self.folder / f".{self._number:05d}.{suffix}.partial"

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.file.write(info.tobuf(tarfile.USTAR_FORMAT))
        self.file.write(data)
        self.file.write(bytes(-len(data) % _BLOCK))


def tables_of(folder: Path) -> list[pd.DataFrame]:
    """The outcomes of each shard; attrs["end"] is where its last member ends (0: it has none)."""
    tables = []
    for number, path in enumerate(sorted(folder.glob(f"{_NUMBER}.parquet"))):
        try:
            if path.stem != f"{number:05d}":
                raise ValueError(f"{number:05d}.parquet, which goes before it, is not there")
            table = pd.read_parquet(path)
            table.attrs.setdefault("end", 0)
            tables.append(table[list(COLUMNS)])
        except (OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise FetchError(f"{path}: cannot be used ({said}); delete it and those after it to fetch again") from None
    return tables


def unfinished(folder: Path) -> dict[Path, int]:
    """Shards longer than their table says, or without one, as a kill between two renames leaves them; their `end`."""
    ends = {f"{number:05d}": table.attrs["end"] for number, table in enumerate(tables_of(folder))}
    shards = {shard: ends.get(shard.stem, 0) for shard in folder.glob(f"{_NUMBER}.tar")}
    return {shard: end for shard, end in shards.items() if shard.stat().st_size != _size(end)}


def _size(end: int) -> int:
    """How long a .tar is whose last member ends there: two empty blocks, and full records."""
    return -(-(end + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE if end else 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk objects to into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise FetchError(f"{path}: cannot be written: {error.strerror or error}") from None


def claim(folder: Path, listing: Path, seed: int | None) -> dict:
    """What `folder` was begun with, after checking that it is this listing and seed.

    Raises FetchError for a folder of another listing or seed, or one with shards that were not fetched here.
    """
    with reading(listing), listing.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    state = state_of(folder)
    if not state and any(folder.glob("*.tar")):
        raise FetchError(f"{folder}: holds shards that were not fetched here; give an empty folder")
    if state and state["sha256"] != digest:
        raise FetchError(f"{folder}: holds what was fetched from another listing ({state['listing']}); give another")
    if state and state["seed"] != seed:
        raise FetchError(f"{folder}: was fetched with seed {state['seed']}, not {seed}; give another folder")
    return state or {"listing": listing.name, "sha256": digest, "seed": seed}


def record(folder: Path, state: dict) -> None:
    """Write down what a folder is of."""
    partial = folder / f".{_STATE}.partial"
    with writing(folder / _STATE):
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
        partial.replace(folder / _STATE)


def state_of(folder: Path) -> dict:
    """What `record` wrote; {} for a new folder."""
    path = folder / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise FetchError(f"{path}: cannot be read: {error}") from None
    if state != {} and not (isinstance(state, dict) and {"listing", "sha256", "seed", "n_links"} <= state.keys()):
        raise FetchError(f"{path}: is not what was written there; fetch into an empty folder")
    return state
