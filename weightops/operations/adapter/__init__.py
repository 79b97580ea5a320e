"""Adapters made of adapters: several combined, other ranks, other programs' names."""

from __future__ import annotations

from weightops.operations.adapter.combine import combine_adapters
from weightops.operations.adapter.convert import Program, convert_adapter
from weightops.operations.adapter.resize import Measure, resize_adapter

__all__ = ["Measure", "Program", "combine_adapters", "convert_adapter", "resize_adapter"]
