"""Labelled arrays on disk, written chunk by chunk, keyed by what made them, resumable.

On disk a store is a plain zarr v3 group, `<stage>-<first 12 of the key>.zarr`, that any zarr reader opens:

    zarr.json       attributes: stage, made_from, key (sha256 of the canonical json of `made_from`)
    <coordinate>/   one string array per labelled dimension
    <array>/        uncompressed little-endian, chunked along the first dimension alone, chunk i in c/i/0/...
    done/           uint8 along "chunk": c/i exists and is 1 once chunk i of every array is durable

Nothing in it depends on when or how often it was written, so that its bytes are the same however often a run
was killed. The done markers alone count: a chunk without its marker is removed and written again. Several processes
may write one store at once: what is removed is never what another is writing.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

DONE = "done"


class StoreError(RuntimeError):
    """A store that cannot be created, written or trusted; the message names its path."""


@dataclass(frozen=True)
class Array:
    """One array of a store: its dimensions, of which the first is the chunked one, and its type."""

    dims: tuple[str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Store:
    """An opened store; made by `open_store`."""

    path: Path
    group: zarr.Group
    layout: Mapping[str, zarr.Array]
    """The arrays, and the done markers as the last of them."""

    @property
    def n_chunks(self) -> int:
        return self.layout[DONE].shape[0]

    def span(self, index: int) -> slice:
        """The part of the first dimension that chunk `index` covers."""
        first = next(iter(self.layout.values()))
        return slice(index * first.chunks[0], min((index + 1) * first.chunks[0], first.shape[0]))

    def missing(self) -> list[int]:
        """The chunks that are not completely on disk, in order.

        Complete: marked, and every file as long as its chunk, for a marker knows of no file lost since.
        """
        lengths = {name: math.prod(x.chunks) * x.dtype.itemsize for name, x in self.layout.items()}
        return [
            index
            for index in range(self.n_chunks)
            if any(_size(self._file(name, index)) != length for name, length in lengths.items())
        ]

    def write(self, index: int, values: Mapping[str, NDArray]) -> None:
        """Write chunk `index` of every array, make it durable, then mark it as done.

        values: for each array a part with `span(index)` as its first dimension. Raises StoreError if names or
        shapes differ, or if the disk refuses (full, read-only).
        """
        span = self.span(index)
        given = {name: np.shape(part) for name, part in values.items()}
        accepted = {name: (span.stop - span.start, *x.shape[1:]) for name, x in self.layout.items() if name != DONE}
        if given != accepted:
            raise StoreError(f"{self.path}: chunk {index} given with shapes {given}; accepted are {accepted}")
        with _named(self.path), _held(self.path, fcntl.LOCK_SH):
            for name, part in values.items():
                self.layout[name][span] = part
                _sync(self._file(name, index))
            self.layout[DONE][index] = 1
            _sync(self._file(DONE, index))

    def dataset(self) -> xr.Dataset:
        """The whole store, opened lazily, with its coordinates. Raises StoreError if it is incomplete."""
        missing = self.missing()
        if missing:
            raise StoreError(f"{self.path}: {len(missing)} of {self.n_chunks} chunks are missing; go on with the run")
        return xr.open_zarr(self.path, consolidated=False, chunks=None).drop_vars(DONE)

    def clear(self) -> None:
        """Remove what a kill may have left: chunks without a marker, and a writer's temporary files."""
        with _held(self.path, fcntl.LOCK_EX):  # waits for the chunks that others are writing
            whole = set(range(self.n_chunks)).difference(self.missing())
            kept = {self._file(name, index) for name in self.layout for index in whole}
            for name in self.layout:
                for file in (self.path / name / "c").rglob("*"):
                    if file.is_file() and file not in kept:
                        file.unlink()

    def _file(self, name: str, index: int) -> Path:
        return self.path / name / "c" / "/".join([str(index)] + ["0"] * (self.layout[name].ndim - 1))


def digest(made_from: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical json of what makes a store."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def open_store(
    folder: Path,
    stage: str,
    made_from: Mapping[str, Any],
    *,
    arrays: Mapping[str, Array],
    sizes: Mapping[str, int | Sequence[str]],
    chunk: int,
) -> Store:
    """The store of `stage` made from `made_from` (JSON values): opened to go on, or created at its full size.

    Another key is another path, so what an earlier choice made is neither mixed in nor lost. sizes: for each
    dimension its length, or its labels. chunk: entries of the first dimension that are written at a time; a
    store that is already there keeps its own. Raises StoreError, naming the path, where the disk refuses, and
    for a folder of that name that holds another key or is no store.
    """
    key = digest(made_from)
    path = folder / f"{stage}-{key[:12]}.zarr"
    with _named(path):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            attributes = {"stage": stage, "key": key, "made_from": dict(made_from)}
            with _held(folder, fcntl.LOCK_EX):
                if not path.exists():  # another process may just have made it
                    _create(path, attributes, arrays, sizes, chunk)
        try:
            group = zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)
            with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros counts too
                store = Store(path, group, {name: group[name] for name in (*arrays, DONE)})
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise StoreError(f"{path}: is no store of {stage} ({error}); delete it to make it anew") from error
        held = group.attrs.get("key")
        if held != key:
            raise StoreError(f"{path}: holds key {held}, this run has {key}; delete it to make it anew")
        if store.missing():
            store.clear()
    return store


def _create(
    path: Path,
    attributes: dict[str, Any],
    arrays: Mapping[str, Array],
    sizes: Mapping[str, int | Sequence[str]],
    chunk: int,
) -> None:
    """Make the empty store beside its place and rename it, so that it is there whole or not at all."""
    aside = path.with_suffix(".creating")
    shutil.rmtree(aside, ignore_errors=True)
    lengths = {dim: size if isinstance(size, int) else len(size) for dim, size in sizes.items()}
    (along,) = {array.dims[0] for array in arrays.values()}
    chunk = min(chunk, lengths[along])
    group = zarr.create_group(aside, zarr_format=3, attributes=attributes)
    for dim, labels in sizes.items():
        if not isinstance(labels, int):
            held = group.create_array(dim, shape=len(labels), dtype=str, dimension_names=[dim], compressors=None)
            held[:] = np.array(labels, dtype=object)
    for name, array in arrays.items():
        dtype, shape = np.dtype(array.dtype), [lengths[dim] for dim in array.dims]
        _empty(group, name, shape, [chunk, *shape[1:]], dtype, array.dims)
    n_chunks = math.ceil(lengths[along] / chunk)
    _empty(group, DONE, [n_chunks], [1], np.dtype("uint8"), ["chunk"])
    aside.rename(path)


def _empty(
    group: zarr.Group,
    name: str,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: np.dtype,
    dims: Sequence[str],
) -> None:
    """An array without chunks; a float that was not written reads as NaN."""
    group.create_array(
        name,
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        dimension_names=list(dims),
        compressors=None,
        fill_value=math.nan if dtype.kind == "f" else 0,
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the disk's refusal into an error that names the store."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot be written or read: {error.strerror or error}") from error


@contextmanager
def _held(folder: Path, kind: int) -> Iterator[None]:
    """Hold a folder, alone or with others (flock), until the block or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that knows no locks
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return -1
