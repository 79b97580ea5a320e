"""What comparing models gives, and its document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from weightops.inference.figures import EvalDocument
from weightops.io.brief import brief
from weightops.io.strict_json import as_json
from weightops.operations.compare import Comparison

if TYPE_CHECKING:
    from weightops.inference.evaluate import Evaluation


class CompareDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-compare/1"):
    """What `compare --json` prints: each model against the first, and `outputs`, what they make of a text, if asked.

    `differs` is whether any of them differs beyond `tolerance`; null without one.
    """

    tolerance: float | None
    strict: bool
    differs: bool | None
    comparisons: tuple[Comparison, ...]
    outputs: EvalDocument | None


@dataclass(frozen=True)
class Comparisons:
    """Models against the first of them: their weights and files, and `outputs`, what they make of a text."""

    comparisons: tuple[Comparison, ...]
    outputs: Evaluation | None = None
    tolerance: float | None = None
    strict: bool = False

    __repr__ = brief

    def _repr_html_(self) -> str:
        parts = [each._repr_html_() for each in self.comparisons]
        return "".join([*parts, *([] if self.outputs is None else [self.outputs._repr_html_()])])

    @property
    def differs(self) -> bool | None:
        """Whether any of them differs beyond the tolerance; None without one."""
        return None if self.tolerance is None else any(each.differs for each in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """A document of schema `weightops-compare/1`."""
        document = CompareDocument(
            tolerance=self.tolerance,
            strict=self.strict,
            differs=self.differs,
            comparisons=self.comparisons,
            outputs=None if self.outputs is None else self.outputs.document,
        )
        return as_json(document)
