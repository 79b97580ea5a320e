"""Weights in another dtype, and what is lost."""

from __future__ import annotations

from weightops.operations.cast.operation import DTYPES, cast
from weightops.operations.cast.schemes import Scheme

__all__ = ["DTYPES", "Scheme", "cast"]
