"""Modules and flags that some systems have."""

from __future__ import annotations

import importlib
import os
from typing import Any


def module(name: str) -> Any:
    """A module of the standard library, None on systems without it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def flag(name: str) -> int:
    """A flag of `os.open`, 0 on systems without it."""
    return getattr(os, name, 0)
