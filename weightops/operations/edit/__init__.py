"""Tensors edited by steps: the language that other surgery is a plan of."""

from __future__ import annotations

from weightops.operations.edit.document import sources_of_steps
from weightops.operations.edit.operation import edit

__all__ = ["edit", "sources_of_steps"]
