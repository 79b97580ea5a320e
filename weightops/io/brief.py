"""Objects in one line, as a person at a prompt or in a notebook wants to see them."""

from __future__ import annotations

from enum import Enum
from pathlib import PurePath

_MAX_CHARS = 60


def brief(self: object) -> str:
    """`Name(field=value, ...)`, for `__repr__`: short values as they are, collections by their size, objects by name.

    What is empty is left out.
    """
    names = [name for name in getattr(type(self), "__annotations__", {}) if not name.startswith("_")]
    values = {name: getattr(self, name, None) for name in names}
    shown = [f"{name}={_shown(value)}" for name, value in values.items() if value not in (None, "", (), {}, [])]
    return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool | int | float | Enum):
        return repr(value)
    if isinstance(value, str | PurePath):
        text = repr(str(value))
        return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 4]}...'"
    if isinstance(value, dict | list | tuple | set | frozenset):
        return f"<{len(value)}>"
    return str(value) if "__str__" in vars(type(value)) else f"{type(value).__name__}(...)"
