"""Files on a list, as they are found before any is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from weightops.errors import CorruptInput
from weightops.io.paths import inside
from weightops.operations.verify.report import FileResult


def look(folder: Path, name: str, nbytes: int | None, listed: str, shown: str) -> FileResult | tuple[Path, int]:
    """Path and size of a regular file that has the size `nbytes`, or else what is wrong with it.

    `listed` says in words what the list, which `shown` is the name of, has of the file.
    """
    try:
        path = inside(folder, name, shown)
        status = path.stat()
    except CorruptInput as error:
        return FileResult(name, "unreadable", detail=str(error))
    except (FileNotFoundError, NotADirectoryError):
        return FileResult(name, "missing", listed)
    except OSError as error:
        return FileResult(name, "unreadable", detail=str(error.strerror))
    if not stat.S_ISREG(status.st_mode):
        return FileResult(name, "unreadable", detail="not a regular file")
    if nbytes not in (None, status.st_size):
        return FileResult(name, "differs", f"{nbytes} bytes", f"{status.st_size} bytes")
    return path, status.st_size


def in_words(digests: Mapping[str, str]) -> str:
    """Digests as reports have them."""
    return ", ".join(f"{algorithm} {digest}" for algorithm, digest in digests.items())


def decoded(name: str) -> str:
    """A name from the file system as text that can be encoded again, for reports."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
