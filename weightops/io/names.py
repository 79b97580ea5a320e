"""Lists of names: in messages, and by patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from weightops.io.escape import escape


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match one of the glob patterns."""
    patterns = tuple(patterns)
    return {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Some names for an error message, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(escape, names[:limit])) + more
