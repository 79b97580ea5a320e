"""What is told of a quantise run: beside the weights in the output, and with `--json`."""

from __future__ import annotations

import msgspec

from weightops.quantization.options import ModuleReport, Options

NAME = "quantize_report.json"


class QuantizeReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-quantize-report/1"):
    """`quantize_report.json`, which lies in the output: what became of each layer, and how it was done."""

    modules: tuple[ModuleReport, ...]
    options: Options
