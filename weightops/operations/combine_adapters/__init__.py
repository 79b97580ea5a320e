"""One adapter of several."""

from __future__ import annotations

from weightops.operations.combine_adapters.operation import combine_adapters

__all__ = ["combine_adapters"]
