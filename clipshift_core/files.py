"""Files that are there whole or not at all, whatever kills the writer or fills the disk."""

import os
from collections.abc import Mapping
from pathlib import Path


def write(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together to the side, then rename them all: until then the old ones stay.

    Several processes may write the same files at once. Raises OSError that names the file.
    """
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, data in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside[path].write_bytes(data)
            except OSError as error:  # a full disk names no file
                raise OSError(error.errno, error.strerror, str(path)) from error
        for path, partial in aside.items():
            partial.replace(path)
    finally:
        for partial in aside.values():
            partial.unlink(missing_ok=True)
