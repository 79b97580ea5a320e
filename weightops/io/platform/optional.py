"""Modules that some systems have."""

from __future__ import annotations

import importlib
from typing import Any


def module(name: str) -> Any:
    """A module of the standard library, None on systems without it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
