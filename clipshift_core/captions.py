"""Captions that a table gives: a CSV with the columns file and caption, as people's programs write it.

file names an image in any way that tells it from the others: its path in the source or its name in a shard, with or
without suffix or ./ before it, or its image_id.
"""

import csv
import io
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath

from clipshift_core import sources
from clipshift_core.sources import Listed, SourceError


def captioned(listed: list[Listed], source: Path, given: Path | None) -> list[Listed]:
    """The images with the captions of the source's captions.csv, and over those of a table that the user gives."""
    beside = source / "captions.csv"
    if any(item.offset for item in listed) or not beside.is_file():
        beside = None
    for file in (beside, given):
        listed = _by_table(listed, file) if file else listed
    return listed


def _by_table(listed: list[Listed], file: Path) -> list[Listed]:
    """The images with the captions of one table; those that it does not name keep what they have."""
    wholes = [(item.name, f"{os.path.splitext(item.path)[0]}/{item.name}") for item in listed]
    shorts = [(item.image_id, os.path.splitext(item.name)[0], *item.names) for item in listed]
    finders = []
    for spelt in (str, _spelt):
        for names in (wholes, shorts):
            finder: dict[str, set[int]] = defaultdict(set)
            for i, some in enumerate(names):
                for name in some:
                    finder[spelt(name)].add(i)
            finders.append((spelt, finder))
    captions, table = {}, _rows(file)
    for name, caption in table:
        found = next((finder[key] for spelt, finder in finders if (key := spelt(name)) in finder), set())
        if len(found) > 1:
            some = ", ".join(listed[i].image_id for i in sorted(found)[:2])
            raise SourceError(
                f"{file}: {sources.printable(name)} names {len(found):,} images ({some}); say which, in full"
            )
        captions |= dict.fromkeys(found, caption)
    if listed and table and not captions:
        has, not_ = (
            sources.printable(table[0][0]),
            listed[0].image_id if listed[0].offset else sources.printable(listed[0].name),
        )
        raise SourceError(f"{file}: names none of the images; it has {has}, not {not_}")
    return [
        item._replace(caption=lambda caption=captions[i]: caption) if i in captions else item
        for i, item in enumerate(listed)
    ]


def _spelt(name: str) -> str:
    """A name as others may spell it: with backslashes, with ./ before it, with accents apart (as macOS does)."""
    return unicodedata.normalize("NFC", PurePosixPath(name.strip().replace("\\", "/")).as_posix())


def _rows(file: Path) -> list[tuple[str, str | None]]:
    """The rows (file, caption) of a CSV as people's programs write it: by comma, semicolon or tab; UTF-8 or UTF-16."""
    try:
        data = sources.read_bytes(file.parent, file.name)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, SourceError) as error:
        raise SourceError(f"{file}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SourceError(f'{file}: line {line} is not UTF-8; save it as "CSV UTF-8"') from None
    if "\0" in text:
        raise SourceError(f'{file}: is no text, or UTF-16 without its mark; save it as "CSV UTF-8"')
    text = re.sub(r"\Asep=.\r?\n", "", text)  # a line that only Excel reads
    first = re.split(r"[\r\n]", text[:10_000].lstrip(), maxsplit=1)[0]
    by = next((sign for sign in ",;\t" if _header(first.replace('"', "").split(sign))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=by)
    try:
        rows = (row for row in reader if any(row))
        names = next(rows, None)
        if (at := _header(names or [])) is None:
            raise SourceError(f"{file}: has the columns {names and names[:20]}; file and caption are needed")
        table = []
        for row in rows:
            if any(row[len(names) :]):
                raise SourceError(
                    f"{file}: line {reader.line_num} has {len(row)} fields, its header {len(names)}; "
                    f'put a caption that has "{by}" in it between quotation marks'
                )
            name, caption = ("".join(row[i : i + 1]) for i in at)
            table.append((name, sources.tidy(caption)))
    except csv.Error as error:
        raise SourceError(f"{file}: line {reader.line_num}: {error}") from None
    return table


def _header(names: list[str]) -> tuple[int, int] | None:
    """Where the columns file and caption are."""
    names = [name.strip().lower() for name in names]
    return (names.index("file"), names.index("caption")) if {"file", "caption"} <= set(names) else None
