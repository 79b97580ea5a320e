"""Adapters under the names of other programs."""

from __future__ import annotations

from weightops.operations.convert_adapter.operation import Program, convert_adapter

__all__ = ["Program", "convert_adapter"]
