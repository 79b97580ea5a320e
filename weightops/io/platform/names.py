"""Which names a system can hold, and which of them it takes for one.

Windows' rules are those of "Naming Files, Paths, and Namespaces" in its documentation. Whether names that differ only
in case are one is a matter of the file system, or even of the folder: it is found out from what is there.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from weightops.io.platform.optional import module

_IS_WINDOWS = os.name == "nt"
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE)
_MAX_CHARS = 259
"""Of a path on Windows, unless it has been told to take longer ones."""
_winreg = module("winreg")


def why_refused(name: str) -> str | None:
    """Why this system cannot hold a file of this name, which has slashes between its parts; None if it can."""
    if not _IS_WINDOWS:
        return None
    for part in name.split("/"):
        if found := re.search(r'[<>:"|?*\\\x00-\x1f]', part):
            return f"Windows has no {found[0]} in names"
        if part.endswith((".", " ")):
            return "Windows has no names that end in a full stop or a space"
        if _DEVICE.fullmatch(part):
            return "Windows keeps that name for a device"
    return None


def is_too_long(path: Path) -> bool:
    """Whether this system cannot have a file at this path because of its length."""
    return _IS_WINDOWS and len(os.path.abspath(path)) > _MAX_CHARS and not _takes_long_paths()


def _takes_long_paths() -> bool:
    if _winreg is None:
        return False
    try:
        with _winreg.OpenKey(_winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(_winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False


def folds_case(folder: Path) -> bool:
    """Whether names in a folder, or in what will be one, are the same if they differ only in case."""
    there = Path(os.path.realpath(folder))
    while not os.path.isdir(there) and there != there.parent:
        there = there.parent
    try:
        with os.scandir(there) as found:
            other = next((there / swapped for entry in found if (swapped := _swapped(entry.name))), None)
        if other is not None:
            # What has such a name of its own is another entry.
            return os.path.lexists(other) and other.name not in os.listdir(there)
        other = there.with_name(_swapped(there.name)) if _swapped(there.name) else None
        if other is not None and there.parent.stat().st_dev == there.stat().st_dev:
            return os.path.lexists(other) and os.path.samefile(other, there)
    except OSError:
        pass
    return _IS_WINDOWS


def _swapped(name: str) -> str:
    """The name with small letters for capitals and the other way round; empty if it has none."""
    return name.swapcase() if name.isascii() and name.swapcase() != name else ""


def folded(name: str) -> str:
    """What is the same for names that a file system may take for one: by case, or by how accents are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def taken_for_one(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of the names, or of the folders on their way, that are one where case makes no difference; the first such."""
    seen: dict[str, str] = {}
    for name in names:
        for part in accumulate(name.split("/"), "{}/{}".format):
            other = seen.setdefault(folded(part), part)
            if other != part:
                return other, part
    return None


def place_of(path: Path) -> tuple[object, ...]:
    """Equal for paths that lead, or will lead once they are made, to one place, however they are written."""
    there = Path(os.path.realpath(path))
    rest: list[str] = []
    while not os.path.exists(there) and there != there.parent:
        rest.insert(0, there.name)
        there = there.parent
    try:
        status = os.stat(there)
    except OSError:
        return (str(there), *rest)
    return (status.st_dev, status.st_ino, *(map(folded, rest) if rest and folds_case(there) else rest))
