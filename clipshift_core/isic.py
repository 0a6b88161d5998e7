"""A folder of ISIC photographs and its metadata, made ready for the lesion study. Nothing is fetched.

The folder is what the ISIC Archive (isic-archive.com) gives for a collection: images, however deep in it, and a
metadata.csv with a row an image. The study then runs as on the drawn lesions:

    found = isic.read(folder)  # found.manifest.set_aside says what is left out, and why
    images = isic.images(found, partial(lesion_study.encoded, encoder=encoder), encoder.image_size, seed=0)
    readers = {"probe": lesion_study.probe_reader(images), "text": lesion_study.text_reader(encoder)}
    made = lesion_study.study(images, readers, n_resamples=1000, seed=0)

metadata.csv:   isic_id (or image_name, image_id, image); benign_malignant, or diagnosis_1 of newer exports, of which
                only "benign" and "malignant" count; patient_id and lesion_id if known; fitzpatrick_skin_type, from
                which light_skin (I or II) is made; any further column of 0 and 1 (or true and false) is an artefact.
artefacts.csv:  optional, since the archive says nothing of rulers and patches: the same ids, and a column of 0 and 1
                for each artefact, as published beside studies of them (Bissoto et al. 2020). Images it lacks are kept;
                what they show is then not known.

What a photograph shows was planted by nobody: there is no causal truth here, and labels and artefacts go together as
they happen to. `amplification` of `lesion_study` takes the gap of labels off for that reason.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy.typing import NDArray
from pandas.errors import ParserWarning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit

from clipshift_core import manifests
from clipshift_core.activations import Source
from clipshift_core.lesion_study import READERS, Encode, Images
from clipshift_core.manifests import SUFFIXES, Manifest
from clipshift_core.sources import printable

ID_COLUMNS = ("isic_id", "image_name", "image_id", "image")
LABEL_COLUMNS = ("benign_malignant", "diagnosis_1")
GROUP_COLUMNS = ("patient_id", "lesion_id")
SKIN = "fitzpatrick_skin_type"
NO_ARTEFACTS = ("melanocytic", "concomitant_biopsy", "family_hx_mm", "personal_hx_mm", "target")
"""Columns of the archive and its challenges that hold true and false, and say nothing of what an image shows."""
SHARES = {"test": 0.3, "valid": 0.15}
"""Of the images, as near as their patients allow; the rest is "train"."""
N_TRIES = 200
"""Random splits of which the one is taken whose sizes and shares of malignant are nearest to what is wanted."""

_TAKEN = (*manifests.COLUMNS, *READERS, "malignant", "group", "split")
_LABELS = {"benign": False, "malignant": True}
_BOOLS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_UNKNOWN = ("", "na", "nan", "unknown")
_FITZPATRICK = {name: i for i, name in enumerate(("i", "ii", "iii", "iv", "v", "vi"), 1)} | {
    form.format(i): i for i in range(1, 7) for form in ("{}", "{}.0")
}


class IsicError(ValueError):
    """A folder or a table that cannot be used: the file, the value, and what would be accepted; in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class Isic(NamedTuple):
    """What a folder holds."""

    manifest: Manifest
    """Its images have malignant (bool), group (int: a patient, as far as known) and the artefacts (bool, <NA> where
    not known); image_id is the archive's. Set aside are images and rows that cannot be used."""
    folder: Path
    artefacts: tuple[str, ...]


def read(
    folder: Path, metadata: Path | None = None, *, artefacts: Path | None = None, label: str | None = None
) -> Isic:
    """List a folder, check each image by decoding it once, and match it with its row.

    metadata: by default the folder's metadata.csv, or its only .csv beside artefacts.csv.  artefacts: by default the
    folder's artefacts.csv, if there.  label: a column of 0 and 1 (or benign and malignant) to use in the place of
    `LABEL_COLUMNS`.  Raises IsicError, or SourceError for a folder without an image that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise IsicError(f"{folder}: no such folder; one with images and a metadata.csv is accepted")
    file = Path(metadata) if metadata else _metadata_of(folder)
    more = Path(artefacts) if artefacts else folder / "artefacts.csv"
    rows = _read(file)
    labels, doubts = _labels(rows, file, label)
    no_flags = (*LABEL_COLUMNS, *NO_ARTEFACTS, *([label.lower()] if label else []))
    shown = _skin(rows, file) | _flags(rows, file, no_flags, strict=False)
    if artefacts or more.exists():
        others = _read(more)
        others = others[~others.index.duplicated(keep=False)]
        known = _flags(others, more, no_flags, strict=True)
        shown |= {name: column.reindex(rows.index.unique()) for name, column in known.items()}

    listed = manifests.build(folder, n_images=None, seed=0)
    found = listed.images.assign(image_id=[_key(path) for path in listed.images["path"]])
    aside = listed.set_aside.assign(image_id=[_key(path) for path in listed.set_aside["path"]]).to_dict("records")
    n_files = Counter(found["image_id"])

    def why_not(key: str) -> str | None:
        if n_files[key] > 1:
            return f"{n_files[key]} different files are named {key}"
        return doubts.get(key) if key in rows.index else f"no row in {file.name}"

    reasons = [why_not(key) for key in found["image_id"]]
    unused = zip(found["image_id"], found["path"], reasons, strict=True)
    aside += [{"image_id": key, "path": path, "reason": why} for key, path, why in unused if why]
    without = [key for key in rows.index.unique() if key not in {row["image_id"] for row in aside} | set(n_files)]
    aside += [{"image_id": key, "path": "", "reason": f"no image for its row in {file.name}"} for key in without]
    kept = found[[why is None for why in reasons]].sort_values("image_id", ignore_index=True, kind="stable")
    if kept.empty:
        raise IsicError(f"{file}: names none of the {len(found):,} images that can be used; {_first(aside)}")
    ids = kept["image_id"]
    columns = {name: column.loc[ids].array for name, column in shown.items()}
    kept = kept.assign(malignant=labels.loc[ids].to_numpy(bool), group=_groups(rows.loc[ids]), **columns)
    aside = pd.DataFrame(aside, columns=["image_id", "path", "reason"], dtype="str")
    aside = aside.sort_values(["image_id", "path"], ignore_index=True)
    return Isic(replace(listed, images=kept, set_aside=aside, n_listed=len(kept) + len(aside)), folder, tuple(shown))


def split(table: pd.DataFrame, *, seed: int) -> pd.Series:
    """ "train", "valid" or "test" of each image, no group in two of them. table: columns malignant and group."""
    found = pd.Series("train", index=table.index)
    for name, share in SHARES.items():
        left = np.flatnonzero(found == "train")
        part = table.iloc[left]
        if part["group"].nunique() < 2:
            raise IsicError(_too_few(table))
        wanted = share * len(table) / len(part)
        tries = GroupShuffleSplit(N_TRIES, test_size=min(wanted, 0.5), random_state=seed)
        y = part["malignant"].to_numpy(float)

        def off(some: Int[NDArray, " row"], y: NDArray = y, wanted: float = wanted) -> float:
            return abs(y[some].mean() - y.mean()) + abs(len(some) / len(y) - wanted)

        found.iloc[left[min((some for _, some in tries.split(part, groups=part["group"])), key=off)]] = name
    if (table.groupby(found.to_numpy())["malignant"].nunique().reindex(["train", *SHARES]) < 2).any():
        raise IsicError(_too_few(table))
    return found


def images(found: Isic, encode: Encode, size: int, *, seed: int) -> Images:
    """The folder's images at `size` pixels, split, and embedded by `encode`."""
    table = found.manifest.images
    source = Source.of_manifest(found.manifest, found.folder, size)
    return Images(table.assign(split=split(table, seed=seed)), *encode(source), found.artefacts)


# Tables -------------------------------------------------------------------------------------------------------------


def _metadata_of(folder: Path) -> Path:
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv" and path.name[0] != ".")
    tables = [path for path in tables if path.name != "artefacts.csv"]
    named = [path for path in tables if path.name == "metadata.csv"] or tables
    if len(named) != 1:
        there = ", ".join(path.name for path in named) or "none"
        raise IsicError(f"{folder}: a metadata.csv, or one .csv, is wanted; there are: {there}")
    return named[0]


def _read(file: Path) -> pd.DataFrame:
    """A table of texts, by the id of the image, columns in lower case."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # longer rows than the header: pandas would cut them off
            table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (OSError, ValueError, ParserWarning) as error:  # those of pandas are ValueErrors
        said = " ".join(str(error).split())
        raise IsicError(f"{file}: cannot be read ({said}); a CSV in UTF-8 with a header is accepted") from None
    table = table.fillna("").rename(columns=lambda name: str(name).strip().lower())
    column = next((name for name in ID_COLUMNS if name in table), None)
    if column is None or table.columns.duplicated().any():
        raise IsicError(
            f"{file}: has the columns {', '.join(table.columns)}; each once, and one of {', '.join(ID_COLUMNS)} "
            "to name the images, is accepted"
        )
    table = table.apply(lambda texts: texts.str.strip())
    return table[table[column] != ""].set_index(table.loc[table[column] != "", column].map(_key)).drop(columns=column)


def _key(name: str) -> str:
    """The archive's id of an image, from its file's name or path."""
    name = name.replace("\\", "/").rpartition("/")[2]
    return name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name


def _labels(rows: pd.DataFrame, file: Path, column: str | None) -> tuple[pd.Series, dict[str, str]]:
    """Whether each image is malignant, and for those that it is not known of, why."""
    accepted = _LABELS if column is None else _LABELS | _BOOLS
    columns = [name for name in (LABEL_COLUMNS if column is None else (column.lower(),)) if name in rows]
    if not columns:
        wanted = " or ".join(LABEL_COLUMNS) if column is None else column
        raise IsicError(f"{file}: has no column {wanted} with the labels; it has {', '.join(rows.columns)}")
    found, doubts = {}, {key: f"several rows in {file.name}" for key in rows.index[rows.index.duplicated()]}
    for key, values in zip(rows.index, rows[columns].to_numpy(), strict=True):
        meant = {accepted[value.lower()] for value in values if value.lower() in accepted}
        found[key] = meant == {True}
        if len(meant) != 1 and key not in doubts:
            said = ", ".join(f"{name} {value!r}" for name, value in zip(columns, values, strict=True))
            doubts[key] = f"neither benign nor malignant: {said}" if not meant else f"both benign and malignant: {said}"
    if len(doubts) == len(found):
        raise IsicError(
            f"{file}: no row has a label ({_first([{'image_id': k, 'reason': v} for k, v in doubts.items()])}); "
            f"accepted: {', '.join(accepted)}"
        )
    return pd.Series(found, dtype=bool), doubts


def _flags(rows: pd.DataFrame, file: Path, passed_over: Iterable[str], *, strict: bool) -> dict[str, pd.Series]:
    """Columns of 0 and 1. strict: a column that holds some and something else as well is an error."""
    found = {}
    for name in rows.columns.difference([*passed_over, *GROUP_COLUMNS, SKIN], sort=False):
        lower = rows[name].str.lower()
        said, good = ~lower.isin(_UNKNOWN), lower.isin(_BOOLS)
        if good.any() and (good | ~said).all():
            if name in _TAKEN:
                raise IsicError(f"{file}: an artefact column is called {name!r}, which has a meaning here; rename it")
            found[name] = _boolean(lower, _BOOLS)
        elif strict and good.any():
            key = rows.index[said & ~good][0]
            raise IsicError(f"{file}: {name} of {key} is {rows.loc[key, name]!r}; accepted: 0, 1, true, false, empty")
    return found


def _skin(rows: pd.DataFrame, file: Path) -> dict[str, pd.Series]:
    """light_skin, where the skin's type is known of some image."""
    if SKIN not in rows:
        return {}
    lower = rows[SKIN].str.lower()
    bad = ~lower.isin([*_FITZPATRICK, *_UNKNOWN])
    if bad.any():
        key = rows.index[bad][0]
        raise IsicError(f"{file}: {SKIN} of {key} is {rows[SKIN][bad].iloc[0]!r}; accepted: I to VI, 1 to 6, empty")
    if lower.isin(_UNKNOWN).all():
        return {}
    return {"light_skin": _boolean(lower, {name: kind <= 2 for name, kind in _FITZPATRICK.items()})}


def _boolean(texts: pd.Series, meaning: Mapping[str, bool]) -> pd.Series:
    """The first row of each image counts; an image with several is set aside anyway."""
    found = pd.Series([meaning.get(text, pd.NA) for text in texts], index=texts.index, dtype="boolean")
    return found[~found.index.duplicated()]


def _groups(rows: pd.DataFrame) -> Int[NDArray, " image"]:
    """A number for images that share a patient or a lesion, directly or over others."""
    image, value, first = [], [], 0
    for name in GROUP_COLUMNS:
        if name in rows:
            codes, distinct = pd.factorize(rows[name].replace(list(_UNKNOWN), np.nan))
            image.append(np.flatnonzero(codes >= 0))
            value.append(first + codes[codes >= 0])
            first += len(distinct)
    if not image:
        return np.arange(len(rows))
    i, v = np.concatenate(image), len(rows) + np.concatenate(value)
    size = len(rows) + first
    return connected_components(coo_array((np.ones(len(i)), (i, v)), shape=(size, size)), directed=False)[1][
        : len(rows)
    ]


def _first(aside: list[dict[str, str]]) -> str:
    return f"the first: {aside[0]['image_id']}: {aside[0]['reason']}" if aside else "none is left"


def _too_few(table: pd.DataFrame) -> str:
    by = "patients and lesions" if table["group"].nunique() < len(table) else "images"
    return (
        f"{int(table['malignant'].sum())} malignant and {int((~table['malignant']).sum())} benign images of "
        f"{table['group'].nunique()} {by}: too few for both labels in each of train, valid and test"
    )
