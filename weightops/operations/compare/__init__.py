"""What one checkpoint is to another: which tensors changed, how much, and in what way."""

from __future__ import annotations

from weightops.operations.compare.alignment import Alignment, align
from weightops.operations.compare.entries import Entries, Entry
from weightops.operations.compare.operation import compare
from weightops.operations.compare.pairing import Mismatch, Pair
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
    "Alignment",
    "CompareOptions",
    "Comparison",
    "ConfigChange",
    "Entries",
    "Entry",
    "Finding",
    "Lone",
    "Mismatch",
    "Pair",
    "TensorChange",
    "TokenizerChange",
    "align",
    "compare",
]
