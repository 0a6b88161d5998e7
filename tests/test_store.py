"""The store: what is on disk is complete or not there, however a run ended, and reads back labelled."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from clipshift_core import store
from clipshift_core.store import Array, Store, StoreError

N, CHUNK, FEATURES = 23, 4, 5
VIEWS = ("original", "noise", "blur")
IDS = [f"image {i} é" for i in range(N)]


def opened(folder: Path, made_from: dict | None = None, chunk: int = CHUNK) -> Store:
    arrays = {
        "embedding": Array(("image", "view", "feature")),
        "rank": Array(("image", "augmentation"), "int16"),
    }
    sizes = {"image": IDS, "view": VIEWS, "augmentation": VIEWS[1:], "feature": FEATURES}
    return store.open_store(folder, "test", made_from or {"seed": 0}, arrays=arrays, sizes=sizes, chunk=chunk)


def values(span: slice) -> dict[str, np.ndarray]:
    every = np.arange(N * 3 * FEATURES, dtype=np.float32).reshape(N, 3, FEATURES)
    return {"embedding": every[span], "rank": (every[:, 1:, 0] % 97).astype(np.int16)[span]}


def fill(held: Store) -> Store:
    for index in held.missing():
        held.write(index, values(held.span(index)))
    return held


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_reads_back_labelled_and_lazily(tmp_path):
    dataset = fill(opened(tmp_path)).dataset()
    assert dataset.embedding.dims == ("image", "view", "feature") and dataset["rank"].dtype == np.int16
    assert dataset["rank"].dims == ("image", "augmentation")
    assert not dataset.embedding.variable._in_memory
    assert list(dataset.image.values) == IDS and tuple(dataset.view.values) == VIEWS
    every = values(slice(None))
    np.testing.assert_array_equal(dataset.embedding, every["embedding"])
    np.testing.assert_array_equal(dataset["rank"], every["rank"])
    np.testing.assert_array_equal(dataset.embedding.sel(image=IDS[7], view="blur"), every["embedding"][7, 2])
    assert dataset.attrs["made_from"] == {"seed": 0} and dataset.attrs["key"] == store.digest({"seed": 0})


def test_any_zarr_reader_opens_it(tmp_path):
    held = fill(opened(tmp_path))
    group = zarr.open_group(held.path, mode="r")
    assert group["embedding"].metadata.zarr_format == 3
    assert group["embedding"].metadata.dimension_names == ("image", "view", "feature")
    # the layout of the docstring: uncompressed little-endian floats, the last chunk padded
    raw = np.fromfile(held.path / "embedding/c/5/0/0", "<f4").reshape(CHUNK, 3, FEATURES)
    np.testing.assert_array_equal(raw[:3], values(slice(20, 23))["embedding"])
    assert np.isnan(raw[3]).all()


def test_same_key_goes_on_other_key_lives_elsewhere(tmp_path):
    first = opened(tmp_path)
    first.write(2, values(first.span(2)))
    again = opened(tmp_path, chunk=9)
    assert again.path == first.path and again.missing() == [0, 1, 3, 4, 5], "it keeps its own chunk"
    before = contents(first.path)
    other = opened(tmp_path, {"seed": 1})
    assert other.path != first.path and other.missing() == list(range(6)) and contents(first.path) == before
    assert fill(again).missing() == []


def test_incomplete_is_refused(tmp_path):
    held = opened(tmp_path)
    held.write(0, values(held.span(0)))
    with pytest.raises(StoreError, match=f"{held.path}.*5 of 6 chunks"):
        held.dataset()


@pytest.mark.parametrize("damage", ["torn data", "no marker", "torn marker", "data lost", "temporary file"])
def test_only_what_is_complete_counts(tmp_path, damage):
    whole = contents(fill(opened(tmp_path / "whole")).path)
    held = fill(opened(tmp_path / "killed"))
    data, marker = held.path / "embedding/c/3/0/0", held.path / "done/c/3"
    match damage:
        case "torn data":  # as a writer without atomic renames leaves it: data cut off, no marker yet
            data.write_bytes(data.read_bytes()[:17])
            marker.unlink()
        case "no marker":
            marker.unlink()
        case "torn marker":
            marker.write_bytes(b"")
        case "data lost":
            data.unlink()
        case "temporary file":
            marker.unlink()
            data.with_suffix(".0123.partial").write_bytes(b"half of it")
    again = opened(tmp_path / "killed")
    assert again.missing() == [3] and not data.exists()
    assert contents(fill(again).path) == whole


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_store
held = test_store.opened(test_store.Path(sys.argv[1]))
for index in held.missing():
    held.write(index, test_store.values(held.span(index)))
    print(index, flush=True)
    time.sleep(0.01)
"""


def test_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    whole = contents(fill(opened(tmp_path / "whole")).path)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "killed"), str(Path(__file__).parent)]
    seen = []
    for lines in (1, 2, 1):  # kill -9 after so many chunks, wherever the writer then is
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            seen += [int(writer.stdout.readline()) for _ in range(lines)]
            writer.send_signal(signal.SIGKILL)
    assert seen == sorted(seen) and len(set(seen)) == 4, "a chunk that was reported done is not done again"
    held = opened(tmp_path / "killed")
    assert 0 < len(held.missing()) < held.n_chunks
    assert contents(fill(held).path) == whole


def test_a_kill_while_it_is_created_leaves_nothing_that_counts(tmp_path):
    whole = contents(fill(opened(tmp_path / "whole")).path)
    path = opened(tmp_path / "killed").path
    (path / "embedding/zarr.json").unlink()
    path.rename(path.with_suffix(".creating"))
    assert contents(fill(opened(tmp_path / "killed")).path) == whole
    assert [f.name for f in (tmp_path / "killed").iterdir()] == [path.name]


def test_a_full_disk_names_the_store(tmp_path):
    """A file-size limit refuses the write in the same way as a full disk: OSError in the middle of it."""
    held = opened(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes; a chunk of embeddings has 240
    try:
        with pytest.raises(StoreError, match=f"{held.path}: cannot be written"):
            held.write(0, values(held.span(0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert opened(tmp_path).missing() == list(range(6))
    assert contents(fill(opened(tmp_path)).path) == contents(fill(opened(tmp_path / "whole")).path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file/arrays/test-.*Not a directory"):
        opened(tmp_path / "file" / "arrays")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(StoreError, match=f"{tmp_path}.*Permission denied"):
        opened(tmp_path)


def test_a_folder_that_is_no_store_or_holds_another_key_is_refused(tmp_path):
    held = opened(tmp_path)
    held.group.attrs["key"] = "f" * 64
    with pytest.raises(StoreError, match=f"{held.path}: holds key ffff"):
        opened(tmp_path)
    (held.path / "zarr.json").unlink()
    with pytest.raises(StoreError, match=f"{held.path}: is no store"):
        opened(tmp_path)


@pytest.mark.parametrize("wrong", [{}, {"embedding": np.zeros((3, 3, 5), "f4")}, {"other": np.zeros(4)}])
def test_wrong_shapes_are_refused_before_anything_is_written(tmp_path, wrong):
    held = opened(tmp_path)
    before = contents(held.path)
    with pytest.raises(StoreError, match="accepted are"):
        held.write(0, wrong)
    assert contents(held.path) == before


def test_zeros_and_nan_are_written_like_any_value(tmp_path):
    held = opened(tmp_path)
    for index in held.missing():
        part = values(held.span(index))
        held.write(index, {name: np.zeros_like(x) for name, x in part.items()})
    assert opened(tmp_path).missing() == []
    assert isinstance(held.dataset(), xr.Dataset) and float(held.dataset()["rank"].sum()) == 0


def test_what_another_is_writing_is_not_cleared_away(tmp_path):
    """A reader opens the store between a chunk and its marker: it waits, and the chunk stays."""
    held, waited = opened(tmp_path), []
    reader = threading.Thread(target=lambda: waited.append(opened(tmp_path).missing()))
    with store._held(held.path, fcntl.LOCK_SH):  # as in the middle of `write`
        data = held.path / "embedding/c/3/0/0"
        data.parent.mkdir(parents=True)
        data.write_bytes(b"half of it")
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and data.exists()
    reader.join()
    assert waited == [list(range(6))] and not data.exists()
