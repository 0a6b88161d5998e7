"""The one pass: every image decoded once, ten views drawn, encoded together, compared, stored.

Every metric of a view comes from the same drawn pixels and the same forward pass. Drawing runs ahead of the
encoder in threads (decoding, OpenCV and numpy's generators release the GIL), at most two batches, so that memory
does not grow with the number of images.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Float32, UInt8
from threadpoolctl import threadpool_limits
from torch import Tensor

from clipshift_core import attention, augment, images, manifests, metrics, preservation, store
from clipshift_core.manifests import Manifest
from clipshift_core.profiles import Profile
from clipshift_core.progress import note

if TYPE_CHECKING:  # OpenCLIP takes seconds to import, and nothing of it is called by name here
    from clipshift_core.encoder import Encoder

CODE_VERSION = 2
"""Raised by hand whenever the same inputs would give other numbers: what older code stored is not read then."""

OF_EMBEDDING = {"l2": metrics.l2, "l2_normalised": metrics.l2_normalised, "cosine": metrics.cosine}
"""Each compares a view's embedding with the original's."""

METRICS = (*OF_EMBEDDING, "attention", *preservation.OF_PIXELS)
AHEAD = 2
"""Batches that are drawn ahead of the one being encoded."""


class PassError(RuntimeError):
    """An image that is gone, damaged or another one than when the manifest was made."""


def show(done: int, total: int) -> None:
    note(f"images {done} of {total}")


def measure(
    profile: Profile,
    manifest: Manifest,
    encoder: "Encoder",
    *,
    base: Path | None = None,
    progress: Callable[[int, int], None] = show,
    workers: int | None = None,
) -> xr.Dataset:
    """How far each view of each image moves the embedding, as a lazily opened dataset.

    Variables, all float32, each view against the original unless said otherwise:
    - embedding (image, view, feature), unnormalised and projected;
    - the ten `METRICS` (image, augmentation); attention is NaN for a tower whose attention cannot be read;
    - attention_map (image, view, row, col): the last block's class-token row, mean over heads;
    - block_cosine (image, augmentation, block): cosine of the class tokens after each block;
    - head_attention (image, augmentation, block, head): attention similarity of one head's maps, on the patch grid.
    The last three are there for towers that `attention` can read; blocks that it cannot are NaN.

    A pass that is complete on disk is read, one that was interrupted goes on where it stopped. `open_tokens` has
    the class tokens themselves.

    base: the folder that the manifest's paths start from, by default the profile's source.
    progress: called with (images on disk, images in all) for each batch; by default the runner shows them.
    workers: drawing threads, by default one per core; their number changes no result.

    Raises PassError for an image that is not what the manifest says, StoreError where the disk refuses.
    """
    arrays = open_arrays(profile, manifest, encoder)
    stores = [arrays, *([open_tokens(profile, manifest, encoder)] if encoder.n_blocks else [])]
    missing = [set(each.missing()) for each in stores]
    indices = sorted(set().union(*missing))
    spans = [arrays.span(index) for index in indices]
    n_images = len(manifest.images)
    n_done = n_images - sum(span.stop - span.start for span in spans)

    def settle(writing: Future | None) -> None:
        nonlocal n_done
        if writing is not None:
            n_done += writing.result()
            progress(n_done, n_images)

    def write(index: int, values: dict[str, np.ndarray]) -> int:
        for each, lacking in zip(stores, missing, strict=True):
            if index in lacking:
                span = each.span(index)
                part = {name: values[name][: span.stop - span.start] for name in each.layout if name in values}
                each.write(index, part)
        return len(values["embedding"])

    base = profile.source_path if base is None else base
    points = points_of(encoder)
    # The disk needs tens of milliseconds to make a batch durable, hidden behind the next one's forward pass.
    with drawn(profile, manifest, base, spans, workers) as batches, ThreadPoolExecutor(1) as writer:
        writing = None
        for index, views in zip(indices, batches, strict=True):
            values = compare(encoder, views, points)
            settle(writing)
            writing = writer.submit(write, index, values)
        settle(writing)
    return arrays.dataset()


def table(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per image and augmentation: image_id, augmentation, and the ten `METRICS`."""
    frame = dataset[list(METRICS)].to_dataframe().reset_index().rename(columns={"image": "image_id"})
    return frame[["image_id", "augmentation", *METRICS]]


def open_arrays(profile: Profile, manifest: Manifest, encoder: "Encoder") -> store.Store:
    """The store of this pass, whatever of it is on disk."""
    arrays = {"embedding": store.Array(("image", "view", "feature"))}
    arrays |= {name: store.Array(("image", "augmentation")) for name in METRICS}
    sizes = {
        "image": list(manifest.images["image_id"]),
        "view": augment.VIEWS,
        "augmentation": augment.VIEWS[1:],
        "feature": encoder.dim,
    }
    if "attention.-1" in points_of(encoder):
        arrays["attention_map"] = store.Array(("image", "view", "row", "col"))
        sizes |= {"row": encoder.grid[0], "col": encoder.grid[1]}
    if encoder.n_blocks:
        arrays["block_cosine"] = store.Array(("image", "augmentation", "block"))
        arrays["head_attention"] = store.Array(("image", "augmentation", "block", "head"))
        sizes |= {"block": encoder.n_blocks, "head": encoder.n_heads}
    made = made_from(profile, manifest, encoder)
    return store.open_store(
        profile.run_dir / "arrays", "shift", made, arrays=arrays, sizes=sizes, chunk=profile.batch_size
    )


def open_tokens(profile: Profile, manifest: Manifest, encoder: "Encoder") -> store.Store:
    """The class token of the first `n_layers` images after every block, written by the same pass.

    token (image, view, block, width), float32; the mean over tokens in a tower without a class token.
    """
    chunk = open_arrays(profile, manifest, encoder).span(0).stop
    ids = list(manifest.images["image_id"][: profile.n_layers])
    return store.open_store(
        profile.run_dir / "arrays",
        "tokens",
        made_from(profile, manifest, encoder) | {"images": len(ids), "chunk": chunk},
        arrays={"token": store.Array(("image", "view", "block", "width"))},
        sizes={"image": ids, "view": augment.VIEWS, "block": encoder.n_blocks, "width": encoder.width},
        chunk=chunk,
    )


def made_from(profile: Profile, manifest: Manifest, encoder: "Encoder") -> dict[str, Any]:
    """All that the numbers of this pass depend on, to well within their own tolerance: the key of its store.

    Not in it: batch size, workers, and torch's version, which move the last digits of a float32.
    """
    return {
        "code": CODE_VERSION,
        "seed": profile.seed,
        "image_size": profile.image_size,
        "manifest": manifest.digest,
        "weights": encoder.weights_hash,
        "precision": str(encoder.precision),
        "device": torch.device(encoder.device).type,
        "augmentations": {name: asdict(row) for name, row in augment.AUGMENTATIONS.items()},
        "drawn_by": {name: metadata.version(name) for name in ("albumentations", "opencv-python-headless")},
    }


def compare(
    encoder: "Encoder", views: UInt8[np.ndarray, "image view height width 3"], points: list[str] | None = None
) -> dict[str, Float32[np.ndarray, "..."]]:
    """All that `measure` stores of a batch, from one forward pass; the original is view 0."""
    points = points_of(encoder) if points is None else points
    n_images, n_views = views.shape[:2]
    found = encoder.encode(views.reshape(-1, *views.shape[2:]), capture=points)
    embedding = found.embedding.reshape(n_images, n_views, -1)
    pixels = torch.from_numpy(views).to(encoder.device)
    values = {"embedding": embedding}
    values |= {name: metric(embedding[:, 1:], embedding[:, :1]) for name, metric in OF_EMBEDDING.items()}
    values |= preservation.of_pixels(pixels[:, 0], pixels[:, 1:])
    rows = {point: held.unflatten(0, (n_images, n_views)) for point, held in found.captured.items()}
    values["attention"] = torch.full((n_images, n_views - 1), torch.nan)
    if "attention.-1" in rows:
        maps = attention.to_map(rows["attention.-1"].flatten(0, 1), encoder.grid)
        values["attention_map"] = maps = maps.unflatten(0, (n_images, n_views))
        values["attention"] = preservation.attention_similarity(maps[:, 0], maps[:, 1:], size=views.shape[2:4])
    if encoder.n_blocks:
        token = torch.stack([rows[f"token.{block}"] for block in range(encoder.n_blocks)], 2)
        values |= {"token": token, "block_cosine": metrics.cosine(token[:, 1:], token[:, :1])}
        values["head_attention"] = _head_attention(encoder, rows, n_images, n_views)
    return {name: held.float().cpu().numpy() for name, held in values.items()}


def _head_attention(
    encoder: "Encoder", rows: Mapping[str, Tensor], n_images: int, n_views: int
) -> Float[Tensor, "image augmentation block head"]:
    """Attention similarity of each head of each block; NaN for blocks whose rows are not there."""
    similarity = torch.full((n_images, n_views - 1, encoder.n_blocks, encoder.n_heads), torch.nan)
    there = [block for block in range(encoder.n_blocks) if f"attention.{block}" in rows]
    if there:
        of_all = torch.cat([rows[f"attention.{block}"] for block in there], 2)  # (image, view, block head, token)
        maps = attention.head_maps(of_all.flatten(0, 1), encoder.grid)
        maps = maps.unflatten(0, (n_images, n_views)).transpose(1, 2).flatten(0, 1)
        alike = preservation.attention_similarity(maps[:, 0], maps[:, 1:])
        similarity[:, :, there] = alike.unflatten(0, (n_images, len(there), -1)).permute(0, 3, 1, 2)
    return similarity


def points_of(encoder: "Encoder") -> list[str]:
    """What the pass captures of this encoder."""
    blocks = range(encoder.n_blocks)
    wanted = [*(f"token.{b}" for b in blocks), *(f"attention.{b}" for b in blocks), "attention.-1"]
    return encoder.readable(wanted)


@contextmanager
def drawn(
    profile: Profile,
    manifest: Manifest,
    base: Path,
    spans: list[slice],
    workers: int | None,
    *,
    views: Callable[..., UInt8[np.ndarray, "view height width 3"]] = augment.views,
) -> Iterator[Iterator[UInt8[np.ndarray, "image view height width 3"]]]:
    """The views of each span of images, in order, drawn ahead by threads.

    views: what draws those of one image, called as `augment.views` is.

    Raises PassError for an image that is not what the manifest says.
    """

    def draw(row: dict[str, Any]) -> UInt8[np.ndarray, "view height width 3"]:
        try:
            data = manifests.read(row, base)
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise images.Unreadable("its bytes have changed")
            image = images.resize(images.decode(data), profile.image_size)
        except (images.Unreadable, manifests.SourceError, OSError) as error:
            raise PassError(
                f"image {row['image_id']} ({row['path']} of {base}): {error}. It was good when the manifest was "
                "made; restore it, or make the manifest again"
            ) from error
        return views(image, seed=profile.seed, image_id=row["image_id"])

    def batches() -> Iterator[np.ndarray]:
        waiting: deque[list[Future]] = deque()
        for span in spans:
            waiting.append([pool.submit(draw, row) for row in manifest.images[span].to_dict("records")])
            if len(waiting) > AHEAD:
                yield np.stack([drawing.result() for drawing in waiting.popleft()])
        while waiting:
            yield np.stack([drawing.result() for drawing in waiting.popleft()])

    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="draw")
    try:
        with _one_thread_each():
            yield batches()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """OpenCV and numpy's BLAS start no threads of their own: they would compete with ours and the encoder's.

    Elastic's small matrix products take ten times the processor time when two pools share two cores.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        cv2.setNumThreads(before)
