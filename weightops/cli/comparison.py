"""What is said of models and tensors that are compared, cell by cell: for the text and the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from weightops.cli.divergence import quoted
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


def change_facts(tensor: TensorChange) -> Iterator[tuple[str, str]]:
    """All that is said of one pair, as labels and texts; of equal ones only that they are."""
    from weightops.operations.compare import KINDS  # imported here because it brings numpy, which help does not need

    yield tensor.kind, KINDS[tensor.kind]
    for more, side in ((tensor.added_a, "A"), (tensor.added_b, "B")):
        if more:
            yield f"more rows in {side}", f"{more:,}, which are not compared"
    odd = (tensor.a.nan, tensor.b.nan, tensor.a.infinite, tensor.b.infinite)
    if any(odd):
        first = "" if tensor.first_odd is None else f"; the first of B alone at {list(tensor.first_odd)}"
        yield "not finite", "NaN {:,} in A, {:,} in B; infinite {:,} in A, {:,} in B".format(*odd) + first
    if tensor.is_equal or tensor.kind == "not-numbers":
        return
    yield "||B - A|| / ||A||", figure(tensor.relative) or "means nothing here"
    yield "1 - cosine", figure(tensor.angle) or "means nothing here"
    yield "changed", f"{tensor.changed:,} of {tensor.elements:,} ({share(tensor.changed / max(1, tensor.elements))})"
    yield "sign flips", f"{tensor.flips:,}"
    if tensor.largest is not None:
        most = tensor.largest
        yield "greatest difference", f"{most.abs:.4g} at {list(most.at)}: {most.a:.6g} in A, {most.b:.6g} in B"
    if tensor.scale is not None:
        yield "B is A times", f"{tensor.scale:.6g}"
    if tensor.rank is not None:
        yield "r99", f"{tensor.rank}, stable rank {figure(tensor.stable_rank)}"
    if tensor.steps is not None:
        within = share(tensor.within_half_step)
        yield "quantisation steps apart", f"{tensor.steps:.3g} in the root mean square, {within} within half a step"
    if tensor.heads:
        yield "changed heads", listed_heads(tensor)
    elif tensor.rows:
        yield "changed rows", f"{tensor.changed_rows:,} of {tensor.n_rows:,}: {listed_rows(tensor)}"


def listed_heads(tensor: TensorChange) -> str:
    """The heads that changed, by number."""
    return f"{', '.join(str(head.head) for head in tensor.heads)} of {tensor.n_heads}"


def listed_rows(tensor: TensorChange) -> str:
    """The first rows that changed, by number, with their tokens where they have such."""
    return ", ".join(f"{r.row}" + (f" {quoted(r.token)}" if r.token is not None else "") for r in tensor.rows[:8])


def share(value: float | None) -> str:
    """A share in percent."""
    return "" if value is None else f"{100 * value:.3g} %"


def figure(value: float | None) -> str:
    """A number in three digits."""
    return "" if value is None else f"{value:.3g}"
