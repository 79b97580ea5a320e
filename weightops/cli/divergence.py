"""How far a model's predictions are from another's, as lines of text: the figures of llama.cpp, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightops.cli.output import escape_lines, table
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.inference.evaluate import Score
    from weightops.inference.figures import Divergence, Position, Spread

_AT = ("99.9", "99", "95", "90", "50", "10", "5", "1")
_SHOWN = 5


def divergence_text(score: Score, reference: Score) -> str:
    """Tables of what sets a model apart from its reference."""
    assert score.agreement is not None
    found = score.agreement.divergence
    lines = [
        figures(score, reference),
        "",
        table([("", "max", *(f"{at} %" for at in _AT), "min"), *_spreads(found)], right=range(1, 11)),
    ]
    if found.first is not None:
        lines += ["", first_other(found)]
    if found.worst:
        lines += ["", worst(found.worst)]
    return "\n".join(lines)


def figures(score: Score, reference: Score) -> str:
    """The figures that have one number each."""
    assert score.agreement is not None
    found = score.agreement.divergence
    ratio, log = found.perplexity_ratio, found.log_perplexity_ratio
    rows = [
        (escape(score.name), f"against {escape(reference.name)}"),
        (
            "perplexity",
            f"{_with(score.perplexity, score.perplexity_error)}, of the reference {reference.perplexity:.4f}",
        ),
        ("perplexity ratio", f"{_with(ratio.value, ratio.error)}, its logarithm {_with(log.value, log.error)}"),
        ("correlation of log perplexities", f"{100 * found.correlation:.2f} %"),
        ("mean KL divergence", f"{found.kl.mean:.6f} ± {found.kl.error:.6f}"),
        ("the other way round", f"{found.kl_reverse.mean:.6f} ± {found.kl_reverse.error:.6f}"),
        ("mean Δp", f"{100 * found.probability.mean:.3f} ± {100 * found.probability.error:.3f} %"),
        ("RMS Δp", f"{100 * found.probability_rms.value:.3f} ± {100 * found.probability_rms.error:.3f} %"),
        ("same top token", f"{100 * found.top1.value:.3f} ± {100 * found.top1.error:.3f} %"),
    ]
    return table(rows)


def _with(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def _spreads(found: Divergence) -> list[tuple[str, ...]]:
    return [
        ("KL divergence", *_row(found.kl, 1.0)),
        ("the other way round", *_row(found.kl_reverse, 1.0)),
        ("Δp, %", *_row(found.probability, 100.0)),
    ]


def _row(spread: Spread, unit: float) -> list[str]:
    values = (spread.max, *(spread.percentiles[at] for at in _AT), spread.min)
    return [f"{unit * value:.3g}" for value in values]


def first_other(found: Divergence) -> str:
    """Where the two first choose another token, and by how much."""
    assert found.first is not None
    seen, reference, model = found.first, found.first.of_reference, found.first.of_model
    lines = [
        f"{found.differing} positions with another most probable token, {found.ties} of them ties (apart by less than "
        "the arithmetic's noise).",
        f"The first{' that is no tie' if not seen.is_tie else ''}: token {seen.index}, after {quoted(seen.context)}: "
        f"the reference has {quoted(reference.text)} ({reference.reference:.3f}, {quoted(model.text)} "
        f"{model.reference:.3f}), the model {quoted(model.text)} ({model.model:.3f}, {quoted(reference.text)} "
        f"{reference.model:.3f}).",
    ]
    return "\n".join(lines)


def worst(positions: Sequence[Position]) -> str:
    """The positions with the largest divergence."""
    rows: list[tuple[str, ...]] = [("token", "KL", "after", "text", "reference", "model")]
    rows += [
        (
            str(each.index),
            f"{each.kl:.3g}",
            quoted(each.context[-40:]),
            quoted(each.expected) if each.expected is not None else "",
            quoted(each.of_reference.text),
            quoted(each.of_model.text),
        )
        for each in positions[:_SHOWN]
    ]
    return table(rows, right=(0, 1))


def quoted(text: str) -> str:
    """A piece of text in quotes, in one line and harmless."""
    return f"“{escape_lines(text.replace(chr(10), '⏎'))}”"
