"""Adapters merged into a base, and whether they fit it."""

from __future__ import annotations

from weightops.operations.merge_lora.fitting import Fit, fit
from weightops.operations.merge_lora.operation import merge_lora

__all__ = ["Fit", "fit", "merge_lora"]
