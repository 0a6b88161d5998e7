"""Activations of a vision tower: encoded once, kept on disk, read back in shuffled batches however many there are.

A stage "activations" of the store, for one model, layer, kind of token and set of images: `activation`, float32,
(image, width) for class tokens and (image, token, width) for spatial ones, at most 16 MiB a chunk. A row is one token's
activation. Readers map the chunks' files into memory, a window of some of them at a time.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from clipshift_core import images, lesions, manifests, scenes, store
from clipshift_core.manifests import Manifest
from clipshift_core.progress import note

if TYPE_CHECKING:  # OpenCLIP takes seconds to import, and nothing of it is called by name here
    from clipshift_core.encoder import Encoder

CODE_VERSION = 1
"""Raised by hand whenever the same inputs would give other numbers."""
TOKENS = ("class", "spatial")
"""The class token (the mean over tokens in a tower without one); the patches' tokens, row by row of the image."""
CHUNK_BYTES, CHUNK_IMAGES = 2**24, 1024
"""A chunk holds as many images as fit into both."""


class ActivationError(RuntimeError):
    """Activations that cannot be made or read as asked: the value, and what would be accepted."""


@dataclass(frozen=True)
class Origin:
    """Which activations: what a dictionary that was learned from them is good for."""

    model: str
    weights_hash: str
    layer: int
    """Block after which the residual stream is read, from 0."""
    token: str
    """One of `TOKENS`."""
    data: str
    """Key of the stored activations."""


@dataclass(frozen=True)
class Source:
    """Images to be encoded, read a few at a time; made by one of the classmethods."""

    ids: Sequence[str]
    made_from: dict[str, Any]
    """All that the pixels depend on."""
    read: Callable[[int], UInt8[np.ndarray, "size size 3"]]
    """The pixels of image i, all of one size; called from threads."""

    @classmethod
    def of_manifest(cls, manifest: Manifest, base: Path, size: int) -> "Source":
        """The images of a manifest, whose paths start from `base`, decoded and resized, not augmented."""

        def read(i: int) -> UInt8[np.ndarray, "size size 3"]:
            row = manifest.images.iloc[i].to_dict()
            try:
                data = manifests.read(row, base)
                if hashlib.sha256(data).hexdigest() != row["sha256"]:
                    raise images.Unreadable("its bytes have changed")
                return images.resize(images.decode(data), size)
            except (images.Unreadable, manifests.SourceError, OSError) as error:
                raise ActivationError(
                    f"image {row['image_id']} ({row['path']} of {base}): {error}. It was good when the manifest was "
                    "made; restore it, or make the manifest again"
                ) from error

        return cls(list(manifest.images["image_id"]), {"manifest": manifest.digest, "size": size}, read)

    @classmethod
    def of_scenes(cls, seeds: range, size: int) -> "Source":
        """Scenes of the embedded world, drawn as they are read (about 4 ms each at 96 pixels)."""
        made_from = {
            "seeds": [seeds.start, seeds.stop, seeds.step],
            "size": size,
            "resvg": metadata.version("resvg-py"),
        }
        return cls([str(seed) for seed in seeds], made_from, lambda i: _drawn(scenes.sample(seeds[i]), size))

    @classmethod
    def of_drawings(cls, drawings: Sequence[scenes.Scene] | Sequence[lesions.Lesion], size: int) -> "Source":
        """Any scenes, or any lesions (about 8 ms each at 96 pixels), one or more, drawn as they are read."""
        made_from = {
            "drawings": hashlib.sha256(repr(list(drawings)).encode()).hexdigest(),
            "size": size,
            "resvg": metadata.version("resvg-py"),
        }
        return cls([f"{i:06d}" for i in range(len(drawings))], made_from, lambda i: _drawn(drawings[i], size))


@lru_cache(maxsize=8192)  # some 200 MB at 96 pixels: a second model looks at the same pictures
def _drawn(drawing: scenes.Scene | lesions.Lesion, size: int) -> UInt8[np.ndarray, "size size 3"]:
    pixels = (lesions if isinstance(drawing, lesions.Lesion) else scenes).render(drawing, size)
    pixels.setflags(write=False)
    return pixels


def activations_of(
    batches: Iterable[UInt8[np.ndarray, "image size size 3"]], encoder: "Encoder", layer: int, token: str
) -> Iterator[Float[Tensor, "image ..."]]:
    """For each batch of images its activations, (image, width) or (image, token, width), float32, on the CPU."""
    if token not in TOKENS:
        raise ActivationError(f"token {token!r} is unknown; accepted: {', '.join(TOKENS)}")
    point = f"{'token' if token == 'class' else 'residual'}.{layer}"
    for batch in batches:
        found = encoder.encode(batch, capture=[point]).captured[point]
        # Patches come last, behind the class token and whatever else a tower puts in front.
        yield found if token == "class" else found[:, -int(np.prod(encoder.grid)) :]


@dataclass(frozen=True)
class Activations:
    """Stored activations; made by `stored`."""

    held: store.Store
    origin: Origin

    @property
    def width(self) -> int:
        return self.held.layout["activation"].shape[-1]

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.held.layout["activation"].shape[:-1]))

    def dataset(self) -> xr.Dataset:
        """All of it, opened lazily, with the images' ids."""
        return self.held.dataset()

    def chunk(self, index: int) -> Float32[np.ndarray, "row width"]:
        """The rows of one chunk, mapped from its file."""
        shape = self.held.layout["activation"].chunks
        span = self.held.span(index)
        file = self.held.path / "activation" / "c" / "/".join([str(index)] + ["0"] * (len(shape) - 1))
        return np.memmap(file, "<f4", "r", shape=shape)[: span.stop - span.start].reshape(-1, self.width)

    def in_order(self, batch_size: int = 4096) -> Iterator[Float[Tensor, "row width"]]:
        """All rows once, image by image; no batch reaches across a chunk."""
        for index in range(self.held.n_chunks):
            rows = self.chunk(index)
            for start in range(0, len(rows), batch_size):
                yield torch.from_numpy(np.array(rows[start : start + batch_size]))

    def batches(
        self, first: int = 0, *, batch_size: int, seed: int, window: int = 8
    ) -> Iterator[Float[Tensor, "row width"]]:
        """Batches without end, from step `first` on, of equal size; what is left at the end of an epoch is dropped.

        Each epoch has the chunks in another order, and the rows within `window` consecutive ones in another order: a
        function of (seed, epoch) alone, so that batch `first` is the same whether or not the earlier ones were read.
        Memory holds two windows.
        """
        per_epoch = self.n_rows // batch_size
        if not per_epoch:
            raise ActivationError(f"batch_size {batch_size}: there are {self.n_rows} rows in {self.held.path}")
        epoch, place = divmod(first, per_epoch)
        while True:
            yield from self._epoch(epoch, place * batch_size, batch_size, seed, window)
            epoch, place = epoch + 1, 0

    def _epoch(
        self, epoch: int, skip: int, batch_size: int, seed: int, window: int
    ) -> Iterator[Float[Tensor, "row width"]]:
        order = np.random.default_rng([seed, epoch, *b"chunks"]).permutation(self.held.n_chunks)
        rest = np.empty((0, self.width), np.float32)
        for number, first in enumerate(range(0, len(order), window)):
            parts = [self.chunk(index) for index in order[first : first + window]]
            within = np.random.default_rng([seed, epoch, number, *b"rows"]).permutation(sum(map(len, parts)))
            if skip >= len(within):
                skip -= len(within)
                continue
            rows = np.concatenate(parts)[within[skip:]]
            skip, rows = 0, np.concatenate([rest, rows])
            n_whole = len(rows) // batch_size * batch_size
            yield from torch.from_numpy(rows[:n_whole]).split(batch_size) if n_whole else ()
            rest = rows[n_whole:]


def stored(
    source: Source,
    encoder: "Encoder",
    layer: int,
    token: str,
    folder: Path,
    *,
    batch_size: int = 64,
    workers: int | None = None,
) -> Activations:
    """The activations of a source after block `layer` (from 0, or from the end with a minus), on disk in `folder`.

    Read if they are there, gone on with if a run was killed. batch_size: images in one forward pass. workers: reading
    threads, by default one per core; neither changes a result beyond rounding. Raises ActivationError for an image that
    cannot be read, StoreError where the disk refuses.
    """
    if not -encoder.n_blocks <= layer < encoder.n_blocks:
        raise ActivationError(f"layer {layer}: {encoder.name} has blocks 0 to {encoder.n_blocks - 1}")
    if not len(source.ids):
        raise ActivationError("the source has no images")
    layer %= encoder.n_blocks
    key = {
        "code": CODE_VERSION,
        "images": source.made_from,
        "weights": encoder.weights_hash,
        "precision": str(encoder.precision),
        "device": torch.device(encoder.device).type,
        "layer": layer,
        "token": token,
    }
    blank = np.zeros((1, encoder.image_size, encoder.image_size, 3), np.uint8)
    (one,) = activations_of([blank], encoder, layer, token)  # for its shape
    held = store.open_store(
        folder,
        "activations",
        key,
        arrays={"activation": store.Array(("image", "token", "width") if token == "spatial" else ("image", "width"))},
        sizes={"image": list(source.ids), "width": one.shape[-1]} | ({"token": one.shape[1]} if one.ndim == 3 else {}),
        chunk=max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (4 * one[0].numel()))),
    )
    for index, values in _encoded(source, held, held.missing(), encoder, layer, token, batch_size, workers):
        held.write(index, {"activation": values})
    return Activations(held, Origin(encoder.name, encoder.weights_hash, layer, token, store.digest(key)))


def _encoded(
    source: Source,
    held: store.Store,
    missing: list[int],
    encoder: "Encoder",
    layer: int,
    token: str,
    batch_size: int,
    workers: int | None,
) -> Iterator[tuple[int, Float32[np.ndarray, "image ..."]]]:
    """The missing chunks in order; the next images are read while a batch is encoded."""
    spans = {index: range(held.span(index).start, held.span(index).stop) for index in missing}
    jobs = [(index, span[i : i + batch_size]) for index, span in spans.items() for i in range(0, len(span), batch_size)]
    with ThreadPoolExecutor(workers) as pool:

        def read() -> Iterator[UInt8[np.ndarray, "image size size 3"]]:
            waiting: deque[Iterator] = deque()
            for _, part in jobs:
                waiting.append(pool.map(source.read, part))
                if len(waiting) > 1:
                    yield np.stack(list(waiting.popleft()))
            yield from (np.stack(list(reading)) for reading in waiting)

        parts: list[np.ndarray] = []
        for (index, part), found in zip(jobs, activations_of(read(), encoder, layer, token), strict=True):
            note(f"activations of images {part[-1] + 1} of {len(source.ids)}")
            parts.append(found.numpy())
            if part[-1] == spans[index][-1]:
                yield index, np.concatenate(parts)
                parts = []
