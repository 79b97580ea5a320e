"""Tensors edited by steps: the language that other surgery is a plan of."""

from __future__ import annotations

from weightops.operations.edit.llama import as_llama
from weightops.operations.edit.operation import edit

__all__ = ["as_llama", "edit"]
