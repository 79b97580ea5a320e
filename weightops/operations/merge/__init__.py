"""Models merged into one, as mergekit's files say."""

from __future__ import annotations

from weightops.operations.merge.document import parse_stages
from weightops.operations.merge.operation import explain, merge
from weightops.operations.merge.references import Reference, reference
from weightops.operations.merge.stage import Stage

__all__ = ["Reference", "Stage", "explain", "merge", "parse_stages", "reference"]
