"""What one checkpoint is to another: which tensors changed, how much, and in what way."""

from __future__ import annotations

from weightops.operations.compare.operation import compare
from weightops.operations.compare.report import (
    KINDS,
    CompareOptions,
    Comparison,
    ConfigChange,
    Finding,
    Lone,
    TensorChange,
    TokenizerChange,
)

__all__ = [
    "KINDS",
    "CompareOptions",
    "Comparison",
    "ConfigChange",
    "Finding",
    "Lone",
    "TensorChange",
    "TokenizerChange",
    "compare",
]
