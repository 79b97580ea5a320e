"""Where the kinds of things that a document names are known: a process that reads it has imported few of them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable

from weightops.errors import CorruptInput
from weightops.io.escape import escape

_MODULES = re.compile(r"weightops\.(ops|formats|recipes)(\.[a-z][a-z0-9_]*)+", re.ASCII)
"""Those that may be named: importing one of them does nothing else, whoever wrote the document."""


def modules_of(values: Iterable[object]) -> tuple[str, ...]:
    """The modules that know the kinds of these ops and documents, sorted."""
    return tuple(sorted({type(value).__module__ for value in values}))


def import_kinds(modules: Iterable[str]) -> None:
    """Import what `modules_of` gave in another process; raises `CorruptInput`."""
    for name in modules:
        try:
            if _MODULES.fullmatch(name) is None:
                raise ImportError
            importlib.import_module(name)
        except ImportError:
            raise CorruptInput(f"{escape(name)} is no module of this version of weightops") from None
