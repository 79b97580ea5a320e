"""A page of what quantise did: settings and sizes, the layers with the largest errors, and heat maps of all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from weightops.cli.meter import human, percent
from weightops.cli.pages import html as html_page
from weightops.cli.pages.heat_map import Cell, Scale, heat_map
from weightops.cli.pages.html import long_text

if TYPE_CHECKING:
    from weightops.api import Quantization
    from weightops.quantization.options import ModuleReport

_LARGEST = 8
"""Layers with the largest errors that are listed above the maps."""
_SHOWN_FALLBACKS = 100
_MEANING = (
    "Error: the squared error of the output of a layer over the calibration data, as a share of the square of that "
    "output. Rounding: what it is with every weight rounded to the nearest."
)
_OF_ROUNDING = Scale("the error of rounding to nearest", middle=1.0, step=1.0)


def page(name: str, modules: Sequence[ModuleReport], facts: Mapping[str, str] | None = None) -> bytes:
    """The page on a model called `name`, in UTF-8, with `facts` (see `facts_of`) on top."""
    parts = [
        html_page.facts({**(facts or {}), **_errors(modules)}),
        f"<p>{_MEANING}</p>",
        html_page.side_by_side(_maps(modules)),
        html_page.side_by_side([_largest(modules), _fallbacks(modules)]),
    ]
    return html_page.page("weightops quantize", name, parts)


def facts_of(done: Quantization) -> dict[str, str]:
    """Settings and sizes of a run that has written something."""
    assert done.result is not None
    assert done.result.manifest is not None
    manifest = done.result.manifest
    settings = manifest.recipe["tensors"]["quantized"]["quantize"]
    method, is_gptq = settings["method"], settings["method"] == "gptq"
    order = "by falling activation" if settings["desc_act"] else "inside groups" if settings["group_aware"] else "given"
    grids = ("symmetric" if settings["sym"] else "asymmetric") + (", best clipping searched" if settings["mse"] else "")
    tokens = max((module.tokens for module in done.modules), default=0)
    weights = sum(module.in_features * module.out_features for module in done.modules)
    found = {
        "source": manifest.sources["source"].name,
        "method": "GPTQ" if is_gptq else "rounding to nearest" if method == "rtn" else method,
        "bits": str(settings["bits"]),
        "group size": str(settings["group_size"]) if settings["group_size"] > 0 else "whole column",
        "grid": grids + (", fixed first" if settings["static_groups"] else ""),
    }
    if is_gptq:
        found |= {"order of columns": order, "calibration": f"{tokens:,} tokens"}
    return found | {
        "format": settings["checkpoint_format"],
        "bits per weight": f"{done.bits_per_weight:.3f}",
        "quantised layers": f"{len(done.modules)}: {human(2 * weights)} in 16 bits, "
        f"{human(done.bits_per_weight * weights / 8)} now",
        "written": human(done.result.plan.total_nbytes),
    }


def _errors(modules: Sequence[ModuleReport]) -> dict[str, str]:
    errors = [module.error for module in modules if module.error is not None]
    ratios = [ratio for module in modules if (ratio := module.error_ratio) is not None]
    fallen = sum(module.fallback is not None for module in modules)
    of_rounding = f", {median(ratios):.2g} times that of rounding" if ratios else ""
    found = {"median error": f"{percent(median(errors))}{of_rounding}"} if errors else {}
    return found | ({"rounded to nearest after all": f"{fallen} of {len(modules)} layers"} if fallen else {})


def _largest(modules: Sequence[ModuleReport]) -> str:
    """The layers that lose most."""
    found = sorted((m for m in modules if m.error is not None), key=lambda m: -(m.error or 0.0))[:_LARGEST]
    rows = []
    for module in found:
        ratio = module.error_ratio
        numbers = (
            percent(module.error or 0.0),
            "" if module.error_rtn is None else percent(module.error_rtn),
            "" if ratio is None else f"{ratio:.2f}",
        )
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f'<tr><th scope="row">{html_page.dotted(module.module)}</th>{cells}</tr>')
    if not rows:
        return '<p class="faint">No errors were measured: rounding needs no calibration data, and had none.</p>'
    table = html_page.listing(("layer", "error", "rounding", "ratio"), rows)
    return f"<section><h2>Largest errors</h2>{table}</section>"


def _fallbacks(modules: Sequence[ModuleReport]) -> str:
    """Layers that GPTQ did not solve, and why."""
    fallen = [module for module in modules if module.fallback]
    rows = [
        f'<tr><th scope="row">{html_page.dotted(module.module)}</th><td>{long_text(module.fallback or "")}</td></tr>'
        for module in fallen[:_SHOWN_FALLBACKS]
    ]
    if not rows:
        return ""
    more = len(fallen) - len(rows)
    rest = f'<p class="faint">and {more} more (quantize_report.json has all)</p>' if more else ""
    table = html_page.scrolled("layers rounded to nearest", html_page.listing(("layer", "why"), rows))
    return f"<section><h2>Rounded to nearest after all</h2>{table}{rest}</section>"


def _maps(modules: Sequence[ModuleReport]) -> list[str]:
    """Errors, and errors over those of rounding, by block and kind of layer."""
    if all(module.error is None for module in modules):
        return []
    errors: dict[str, dict[int, Cell]] = defaultdict(dict)
    ratios: dict[str, dict[int, Cell]] = defaultdict(dict)
    for module in modules:
        number, kind = (module.block, module.kind)
        note = f"rounded to nearest: {module.fallback}" if module.fallback else ""
        errors[kind][number] = Cell(None if module.error is None else 100 * module.error, note)
        ratios[kind][number] = Cell(module.error_ratio, note)
    marked = "rounded to nearest after all"
    return [
        heat_map("Error of each layer", errors, Scale(), unit="%", row="block", marked=marked),
        heat_map("Error as a multiple of that of rounding", ratios, _OF_ROUNDING, row="block", marked=marked),
    ]
