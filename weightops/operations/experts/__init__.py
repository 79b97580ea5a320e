"""Mixtures of experts: stacked or apart, fewer of them, or made of dense models."""

from __future__ import annotations

from weightops.operations.experts.arrange import arranged
from weightops.operations.experts.dense import with_names
from weightops.operations.experts.keep import Keep, parse_keep
from weightops.operations.experts.operation import experts
from weightops.operations.experts.use import By, ExpertUse, LayerUse

__all__ = ["By", "ExpertUse", "Keep", "LayerUse", "arranged", "experts", "parse_keep", "with_names"]
