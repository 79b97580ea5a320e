"""Another vocabulary for a model: rows, tokens, ids and templates, which move together."""

from __future__ import annotations

from weightops.operations.vocab.operation import vocab
from weightops.operations.vocab.transplant import Method

__all__ = ["Method", "vocab"]
