"""What `compare --json` prints."""

from __future__ import annotations

import msgspec

from weightops.inference.answers import AnswersReport
from weightops.inference.figures import EvalDocument
from weightops.operations.compare import Comparison


class CompareDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-compare/1"):
    """What `compare --json` prints: each model against the first.

    If asked, `outputs` is what they make of a text, and `answers` what they answer to prompts.

    `differs` is whether any of them differs beyond `tolerance`; null without one.
    """

    tolerance: float | None
    strict: bool
    differs: bool | None
    comparisons: tuple[Comparison, ...]
    outputs: EvalDocument | None
    answers: AnswersReport | None = None
