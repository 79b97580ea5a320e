"""Models merged into one, as mergekit's files say."""

from __future__ import annotations

from weightops.operations.merge.document import parse_stage, parse_stages
from weightops.operations.merge.operation import Made, MergePlan, explain, merge
from weightops.operations.merge.proof import MergeProof, prove
from weightops.operations.merge.references import HUB, Reference, References, reference
from weightops.operations.merge.stage import Stage

__all__ = [
    "HUB",
    "Made",
    "MergePlan",
    "MergeProof",
    "Reference",
    "References",
    "Stage",
    "explain",
    "merge",
    "parse_stage",
    "parse_stages",
    "prove",
    "reference",
]
