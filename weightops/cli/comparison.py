"""What is said of models and tensors that are compared, cell by cell: for the text and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.api import Comparisons
    from weightops.operations.compare import TensorChange


def candidate_heads(found: Comparisons) -> tuple[str, ...]:
    """What is said of each candidate, by column."""
    outputs = () if found.outputs is None else ("perplexity", "mean KL", "same top")
    return (
        f"against {escape(found.comparisons[0].a)}",
        "equal",
        "changed",
        "no partner",
        "‖B-A‖/‖A‖",
        "1-cos",
        *outputs,
    )


def candidate_rows(found: Comparisons) -> list[tuple[str, ...]]:
    """The candidates in the order in which they were given."""
    scores = [None] * len(found.comparisons) if found.outputs is None else found.outputs.scores[1:]
    rows: list[tuple[str, ...]] = []
    for each, score in zip(found.comparisons, scores, strict=True):
        changed = len(each.changed)
        row: tuple[str, ...] = (escape(each.b), str(len(each.tensors) - changed), str(changed), str(len(each.unpaired)))
        row += (share(each.relative), figure(each.angle))
        if score is not None and score.agreement is not None:
            row += (f"{score.perplexity:.4f}", f"{score.agreement.kl_mean:.3g}", f"{100 * score.agreement.top1:.2f} %")
        rows.append(row)
    return rows


def changed_row(tensor: TensorChange) -> tuple[str, ...]:
    """What is said of a tensor, by column."""
    largest = "" if tensor.largest is None else f"{tensor.largest.abs:.3g}"
    changed = f"{100 * tensor.changed / max(1, tensor.elements):.3g} %"
    return (
        escape(tensor.name),
        kind_text(tensor),
        share(tensor.relative),
        figure(tensor.angle),
        largest,
        changed,
        str(tensor.flips),
    )


def kind_text(tensor: TensorChange) -> str:
    """The kind of change, with its one figure."""
    if tensor.rank is not None:
        return f"{tensor.kind}, r99 {tensor.rank}"
    if tensor.scale is not None:
        return f"{tensor.kind}, times {tensor.scale:.6g}"
    if tensor.steps is not None and tensor.kind == "quantised":
        return f"{tensor.kind}, {tensor.steps:.2g} steps"
    return tensor.kind


def share(value: float | None) -> str:
    """A share in percent."""
    return "" if value is None else f"{100 * value:.3g} %"


def figure(value: float | None) -> str:
    """A number in three digits."""
    return "" if value is None else f"{value:.3g}"
