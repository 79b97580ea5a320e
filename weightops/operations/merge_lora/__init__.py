"""Adapters merged into a base."""

from __future__ import annotations

from weightops.operations.merge_lora.operation import merge_lora

__all__ = ["merge_lora"]
