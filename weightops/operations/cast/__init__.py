"""Weights in another dtype, and what is lost."""

from __future__ import annotations

from weightops.operations.cast.operation import DTYPES, cast

__all__ = ["DTYPES", "cast"]
