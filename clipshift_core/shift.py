"""The one pass: every image decoded once, ten views drawn, encoded together, compared, stored.

Every metric of a view comes from the same drawn pixels and the same forward pass. Drawing runs ahead of the
encoder in threads (decoding, OpenCV and numpy's generators release the GIL), at most two batches, so that memory
does not grow with the number of images.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
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
from jaxtyping import Float32, UInt8
from threadpoolctl import threadpool_limits

from clipshift_core import augment, images, manifests, metrics, store
from clipshift_core.manifests import Manifest
from clipshift_core.profiles import Profile
from clipshift_core.progress import note

if TYPE_CHECKING:  # OpenCLIP takes seconds to import, and nothing of it is called by name here
    from clipshift_core.encoder import Encoder

CODE_VERSION = 1
"""Raised by hand whenever the same inputs would give other numbers: what older code stored is not read then."""

METRICS = {"l2": metrics.l2, "l2_normalised": metrics.l2_normalised, "cosine": metrics.cosine}
"""Each compares a view's embedding with the original's."""

LAYOUT = {"embedding": store.Array(("image", "view", "feature"))} | {
    name: store.Array(("image", "augmentation")) for name in METRICS
}
AHEAD = 2
"""Batches that are drawn ahead of the one being encoded."""


class PassError(RuntimeError):
    """An image that is gone, damaged or another one than when the manifest was made."""


def _show(done: int, total: int) -> None:
    note(f"images {done} of {total}")


def measure(
    profile: Profile,
    manifest: Manifest,
    encoder: "Encoder",
    *,
    base: Path | None = None,
    progress: Callable[[int, int], None] = _show,
    workers: int | None = None,
) -> xr.Dataset:
    """How far each view of each image moves the embedding, as a lazily opened dataset.

    Variables, all float32: embedding (image, view, feature), unnormalised and projected; l2, l2_normalised and
    cosine (image, augmentation) against the original. A pass that is complete on disk is read, one that was
    interrupted goes on where it stopped.

    base: the folder that the manifest's paths start from, by default the profile's source.
    progress: called with (images on disk, images in all) for each batch; by default the runner shows them.
    workers: drawing threads, by default one per core; their number changes no result.

    Raises PassError for an image that is not what the manifest says, StoreError where the disk refuses.
    """
    arrays = open_arrays(profile, manifest, encoder)
    missing = arrays.missing()
    spans = [arrays.span(index) for index in missing]
    n_images = len(manifest.images)
    n_done = n_images - sum(span.stop - span.start for span in spans)

    def settle(writing: Future | None) -> None:
        nonlocal n_done
        if writing is not None:
            n_done += writing.result()
            progress(n_done, n_images)

    def write(index: int, values: dict[str, np.ndarray]) -> int:
        arrays.write(index, values)
        return len(values["embedding"])

    base = profile.source_path if base is None else base
    # The disk needs tens of milliseconds to make a batch durable, hidden behind the next one's forward pass.
    with _drawn(profile, manifest, base, spans, workers) as batches, ThreadPoolExecutor(1) as writer:
        writing = None
        for index, views in zip(missing, batches, strict=True):
            values = _compare(encoder, views)
            settle(writing)
            writing = writer.submit(write, index, values)
        settle(writing)
    return arrays.dataset()


def table(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per image and augmentation: image_id, augmentation, l2, l2_normalised, cosine."""
    frame = dataset[list(METRICS)].to_dataframe().reset_index().rename(columns={"image": "image_id"})
    return frame[["image_id", "augmentation", *METRICS]]


def open_arrays(profile: Profile, manifest: Manifest, encoder: "Encoder") -> store.Store:
    """The store of this pass, whatever of it is on disk."""
    return store.open_store(
        profile.run_dir / "arrays",
        "shift",
        made_from(profile, manifest, encoder),
        arrays=LAYOUT,
        sizes={
            "image": list(manifest.images["image_id"]),
            "view": augment.VIEWS,
            "augmentation": augment.VIEWS[1:],
            "feature": encoder.dim,
        },
        chunk=profile.batch_size,
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


def _compare(
    encoder: "Encoder", views: UInt8[np.ndarray, "image view height width 3"]
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Embeddings of all views in one forward pass, and each metric of the augmented against the original."""
    n_images, n_views = views.shape[:2]
    embedding = encoder.encode(views.reshape(-1, *views.shape[2:])).embedding.reshape(n_images, n_views, -1)
    shifts = {name: metric(embedding[:, 1:], embedding[:, :1]) for name, metric in METRICS.items()}
    return {name: values.float().numpy() for name, values in ({"embedding": embedding} | shifts).items()}


@contextmanager
def _drawn(
    profile: Profile, manifest: Manifest, base: Path, spans: list[slice], workers: int | None
) -> Iterator[Iterator[UInt8[np.ndarray, "image view height width 3"]]]:
    """The views of each span of images, in order, drawn ahead by threads."""

    def draw(row: dict[str, Any], out: UInt8[np.ndarray, "view height width 3"]) -> None:
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
        out[:] = augment.views(image, seed=profile.seed, image_id=row["image_id"])

    def start(span: slice) -> tuple[np.ndarray, list[Future]]:
        rows = manifest.images[span].to_dict("records")
        out = np.empty((len(rows), len(augment.VIEWS), profile.image_size, profile.image_size, 3), np.uint8)
        return out, [pool.submit(draw, row, views) for row, views in zip(rows, out, strict=True)]

    def batches() -> Iterator[np.ndarray]:
        waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
        for span in spans:
            waiting.append(start(span))
            if len(waiting) > AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())

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


def _finished(views: np.ndarray, drawing: list[Future]) -> np.ndarray:
    for future in drawing:
        future.result()
    return views
