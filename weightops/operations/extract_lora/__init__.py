"""The adapter that takes one checkpoint to another."""

from __future__ import annotations

from weightops.operations.extract_lora.operation import extract_lora

__all__ = ["extract_lora"]
