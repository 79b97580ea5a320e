"""What `quantize --json` prints."""

from __future__ import annotations

from typing import Any

import msgspec

from weightops.io.strict_json import as_json
from weightops.quantization.options import ModuleReport
from weightops.quantization.run import Estimate
from weightops.recipes.execute import Result
from weightops.recipes.report import WriteDocument, write_document


class QuantizeDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-quantize/1"):
    """What `quantize --json` prints: what the run takes, and when it is done what it wrote and what layers lost.

    After a dry run `output` and `bits_per_weight` are null, and there are no `modules`.
    """

    estimate: Estimate
    output: WriteDocument | None
    bits_per_weight: float | None
    modules: tuple[ModuleReport, ...]


def quantize_json(
    estimate: Estimate,
    result: Result | None,
    modules: tuple[ModuleReport, ...],
    bits_per_weight: float,
    workers: int | None,
) -> dict[str, Any]:
    """A document of schema `weightops-quantize/1` on what `weightops.api.Quantization` holds."""
    return as_json(
        QuantizeDocument(
            estimate=estimate,
            output=write_document(result, workers) if result else None,
            bits_per_weight=bits_per_weight if result else None,
            modules=modules,
        )
    )
