"""What is wrong with a checkpoint, in its values and its files."""

from __future__ import annotations

from weightops.operations.check.architecture import architecture_findings
from weightops.operations.check.files import tokens_without_rows
from weightops.operations.check.operation import check
from weightops.operations.check.report import CODES, CheckDocument, CheckOptions, CheckReport, Finding
from weightops.operations.check.result import held_to_class

__all__ = [
    "CODES",
    "CheckDocument",
    "CheckOptions",
    "CheckReport",
    "Finding",
    "architecture_findings",
    "check",
    "held_to_class",
    "tokens_without_rows",
]
