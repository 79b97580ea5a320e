"""Mixtures of experts: stacked or apart, fewer of them, or made of dense models."""

from __future__ import annotations

from weightops.operations.experts.arrange import arranged
from weightops.operations.experts.dense import with_names
from weightops.operations.experts.keep import parse_keep
from weightops.operations.experts.operation import experts

__all__ = ["arranged", "experts", "parse_keep", "with_names"]
