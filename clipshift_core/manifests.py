"""The table of images of a run: what a source holds, which of it is used, what is not and why.

What a source may be, and where captions and factors come from, is in `sources` and `captions`. An image's rank in the
sample is a hash of (seed, image id): images added elsewhere do not reshuffle the others, and a larger sample holds the
smaller one.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from clipshift_core import files, images, sources
from clipshift_core.captions import captioned
from clipshift_core.sources import MAX_BYTES, SUFFIXES, Listed, SourceError

__all__ = ["COLUMNS", "MAX_BYTES", "SUFFIXES", "Manifest", "SourceError", "build", "read"]

COLUMNS = ("image_id", "path", "offset", "size", "sha256", "width", "height", "caption")
MOST_FACTORS = 1000
"""Columns that factors may take; those that the most images have are kept."""


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
        """Write manifest.parquet and set_aside.parquet into `folder`. Raises SourceError where the disk refuses."""
        made = {}
        for name, table in (("manifest", self.images), ("set_aside", self.set_aside)):
            table = table.copy()
            table.attrs = {"n_listed": self.n_listed}
            table.to_parquet(buffer := io.BytesIO(), index=False)
            made[folder / f"{name}.parquet"] = buffer.getvalue()
        try:
            files.write(made)
        except OSError as error:
            raise SourceError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read what `save` wrote."""
        used, aside = (pd.read_parquet(folder / f"{name}.parquet") for name in ("manifest", "set_aside"))
        n_listed = used.attrs.pop("n_listed")
        aside.attrs.pop("n_listed")
        return cls(used, aside, n_listed)


def build(source: Path, *, n_images: int | None, seed: int, captions: Path | None = None) -> Manifest:
    """List a source, draw `n_images` of it (None: all), and check each by decoding it once.

    captions: a CSV with the columns file and caption, which wins over what lies in the source. file: the image's path
    in the source or its name in the shard, with or without its suffix, or its image_id.

    Images are looked at in the order of their rank until `n_images` are good, so that a small sample of a
    large source is quick; what was not reached is neither used nor set aside. Set aside is what cannot be
    read, and what repeats the bytes of an image of lower rank. Fewer good images than asked for is no error;
    none is. Raises SourceError in one line.
    """
    source = Path(source)
    if n_images is not None and n_images < 1:
        raise SourceError(f"n_images {n_images}: 1 or more is accepted, or None for all")
    listed, aside = sources.listing(source)
    listed = captioned(listed, source, captions)
    n_listed = len(listed) + len(aside)
    ranked = sorted(listed, key=lambda item: hashlib.sha256(f"{seed}/{item.image_id}".encode()).digest())
    rows, first = [], {}
    for item, checked in _checked(ranked, source):
        if isinstance(checked, str):
            aside.append(sources.aside_row(item.image_id, item.path, checked))
        elif checked["sha256"] in first:
            aside.append(sources.aside_row(item.image_id, item.path, f"the same bytes as {first[checked['sha256']]}"))
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
    return sources.read_bytes(Path(base), row["path"], int(row["offset"]), int(row["size"]))


def _checked(ranked: list[Listed], source: Path) -> Iterator[tuple[Listed, dict | str]]:
    """Each image with its row, or the reason against it, in order; decoded by threads, a few ahead."""
    workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(ranked), 32):
            few = ranked[start : start + 32]
            yield from zip(few, list(pool.map(lambda item: _check(item, source), few)), strict=True)


def _check(item: Listed, source: Path) -> dict | str:
    """The row of one image, or why it cannot be used."""
    try:
        data = sources.read_bytes(source, item.path, item.offset, item.size)
        height, width, _ = images.decode(data).shape
        factors, caption = item.factors(), item.caption()
    except (images.Unreadable, SourceError) as error:
        return str(error)
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    except MemoryError:
        return "takes more memory than there is"
    if caption is None and isinstance(in_json := factors.get("caption"), str):
        caption = sources.tidy(in_json)
    digest = hashlib.sha256(data).hexdigest()
    row = (item.image_id, item.path, item.offset, len(data), digest, width, height, caption)
    return dict(zip(COLUMNS, row, strict=True)) | {k: v for k, v in factors.items() if k not in COLUMNS}


def _table(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table sorted by image_id; a factor that is a number here and text there becomes text."""
    rows = sorted(rows, key=lambda row: row["image_id"])
    table = pd.DataFrame([[row[name] for name in COLUMNS] for row in rows], columns=list(COLUMNS))
    count, factors = Counter(name for row in rows for name in row if name not in COLUMNS), {}
    kept = dict(count.most_common(MOST_FACTORS))
    for name in filter(kept.__contains__, count):  # as they first come
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        if kinds:  # a factor that none of these images has is left out
            factors[name] = pd.Series(values, dtype="boolean" if kinds == {bool} else None)
    return pd.concat([table.astype({"caption": "str"}), pd.DataFrame(factors, index=table.index)], axis=1)


def _aside_table(aside: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(aside, columns=["image_id", "path", "reason"], dtype="str")
    return table.sort_values(["image_id", "path"], ignore_index=True)
