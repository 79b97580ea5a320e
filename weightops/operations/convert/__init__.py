"""A model in another layout, or an adapter."""

from __future__ import annotations

from weightops.operations.convert.operation import READERS, WRITERS, convert

__all__ = ["READERS", "WRITERS", "convert"]
