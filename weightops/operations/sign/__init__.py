"""Sign the files of a model, so that others can tell that they come from who says so."""

from __future__ import annotations

from weightops.operations.sign.operation import sign
from weightops.operations.sign.report import SignDocument, Signed

__all__ = ["SignDocument", "Signed", "sign"]
