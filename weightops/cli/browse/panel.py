"""What the panel beside the tree shows, as text: of a module, of a tensor, and of what has been read of it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from weightops.cli.browse.reading import Reading
from weightops.cli.browse.subject import Subject
from weightops.cli.inspection import STATISTICS, count, statistics_cells
from weightops.cli.meter import human
from weightops.engine.examine import TensorReport
from weightops.io.escape import escape
from weightops.ops.measures.statistics import TensorStatistics

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_ROWS = 20
"""Lines of a histogram: below them, magnitudes are counted together."""
_LABELS = (*STATISTICS, "subnormal")
_LETTERS = ("A", "B")


def module_text(subject: Subject, path: str, names: Sequence[str]) -> Text:
    """A module: how much there is in it."""
    text = Text()
    text.append(f"{escape(path) or 'all tensors'}\n\n", "bold")
    for number, side in enumerate(subject.sides):
        own = [name for name in names if name in side.checkpoint]
        nbytes = sum(side.checkpoint[name].nbytes for name in own)
        weights = sum(side.inspection.weights[name] for name in own)
        share = f", {100 * nbytes / side.inspection.nbytes:.1f} % of the whole" if side.inspection.nbytes else ""
        letter = f"{_LETTERS[number]}  " if subject.is_pair else ""
        text.append(f"{letter}{len(own):,} tensors, {count(weights)} parameters, {human(nbytes)}{share}\n")
    if subject.is_pair:
        marks = [subject.mark(name) for name in names]
        text.append("\n")
        for mark, what in (("-", "only in A"), ("+", "only in B"), ("≠", "of another dtype or shape")):
            if mark in marks:
                text.append(f"{mark} {marks.count(mark):,} {what}\n")
        if not any(marks):
            text.append("the same names, dtypes and shapes on both sides\n")
    return text


def tensor_text(subject: Subject, name: str, reading: Reading | str | None, width: int) -> Text:
    """A tensor: what headers say of it, and what has been read, or in a sentence why nothing has."""
    text = Text()
    text.append(f"{escape(name)}\n\n", "bold")
    for number, side in enumerate(subject.sides):
        letter = f"{_LETTERS[number]}  " if subject.is_pair else ""
        tensor = side.checkpoint.get(name)
        if tensor is None:
            text.append(f"{letter}not there\n")
            continue
        text.append(f"{letter}{tensor.spec}\n", "bold")
        indent = " " * len(letter)
        share = 100 * tensor.nbytes / max(1, side.inspection.nbytes)
        text.append(f"{indent}{count(tensor.spec.numel)} elements, {human(tensor.nbytes)}, {share:.3g} %\n")
        text.append(f"{indent}in {escape(side.checkpoint.shards.get(name, side.checkpoint.name))}\n", "dim")
        alias = side.inspection.aliases.get(name)
        if alias is not None:
            text.append(f"{indent}shares the bytes of {escape(alias)}\n", "dim")
    text.append("\n")
    if not isinstance(reading, Reading):
        text.append(reading or "", "dim")
        return text
    for label, value in reading.figures:
        text.append(f"{label}: ")
        text.append(f"{value}\n", "bold")
    text.append("\n" if reading.figures else "")
    _append_values(text, reading, width, is_pair=subject.is_pair)
    for note in reading.notes:
        text.append(f"\n{note}\n", "dim")
    return text


def _append_values(text: Text, reading: Reading, width: int, *, is_pair: bool) -> None:
    found = [report for report in reading.reports if report is not None]
    letters = [letter for letter, report in zip(_LETTERS, reading.reports, strict=True) if report is not None]
    for letter, report in zip(letters, found, strict=True):
        label = f"{letter} xxh3_128" if is_pair else "xxh3_128"
        text.append(f"{label} ", "dim").append(f"{report.xxh3_128}\n")
    columns = [statistics_cells(report.statistics) for report in found]
    if any(report.statistics is None for report in found):
        text.append("\nIts numbers share bytes, and are not looked at.\n", "dim")
        return
    columns = [
        (*column, str(r.statistics.subnormal if r.statistics else 0)) for column, r in zip(columns, found, strict=True)
    ]
    text.append("\n")
    (_append_table if is_pair else _append_facts)(text, columns, letters)
    text.append("\n")
    _append_histogram(text, found, letters if is_pair else [""], width)


def _append_table(text: Text, columns: Sequence[Sequence[str]], letters: Sequence[str]) -> None:
    """A line for each number, a column for each side."""
    widths = [max(map(len, column)) for column in columns]
    heads = "  ".join(letter.rjust(size) for letter, size in zip(letters, widths, strict=True))
    text.append(f"{'':10}{heads}\n", "dim")
    for label, *cells in zip(_LABELS, *columns, strict=True):
        shown = "  ".join(cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
        text.append(f"{label:10}", "dim").append(f"{shown}\n", _style(label, cells))


def _append_facts(text: Text, columns: Sequence[Sequence[str]], _: Sequence[str]) -> None:
    """Two numbers in a line."""
    (cells,) = columns
    found = dict(zip(_LABELS, cells, strict=True))
    for pair in (("mean", "std"), ("min", "max"), ("NaN", "inf"), ("zero", "subnormal")):
        for label in pair:
            text.append(f"{label:5} ", "dim").append(f"{found[label]:11} ", _style(label, [found[label]]))
        text.append("\n")


def _style(label: str, cells: Sequence[str]) -> str:
    """How numbers are shown: those that are never right so that they are seen."""
    return "bold red" if label in ("NaN", "inf") and any(cell != "0" for cell in cells) else ""


def _append_histogram(text: Text, found: Sequence[TensorReport], letters: Sequence[str], width: int) -> None:
    """The shares of elements by magnitude, a line for each power of two from the largest down, a bar for each side."""
    shares = [_shares(report.statistics) for report in found if report.statistics is not None]
    exponents = sorted({exponent for each in shares for exponent in each}, reverse=True)
    if not exponents:
        return
    rows = list(range(exponents[0], max(exponents[-1], exponents[0] - _MOST_ROWS + 1) - 1, -1))
    top = max(share for each in shares for share in each.values())
    text.append("elements by magnitude |x|\n", "dim")
    room = max(4, width - 18 - 2 * (len(letters) > 1))
    for exponent in rows:
        is_last = exponent == rows[-1] and exponents[-1] < exponent
        for number, each in enumerate(shares):
            share = sum(n for e, n in each.items() if e <= exponent) if is_last else each.get(exponent, 0.0)
            label = (f"<2^{exponent + 1}" if is_last else f"≥2^{exponent}") if number == 0 else ""
            text.append(f"{label:>6} ", "dim")
            text.append(f"{letters[number]} " if len(letters) > 1 else "", "dim")
            text.append(_bar(share / top, room), "cyan" if number == 0 else "yellow")
            text.append(f" {100 * share:.3g} %\n" if share else "\n", "dim")


def _shares(found: TensorStatistics) -> dict[int, float]:
    return {exponent: n / found.elements for exponent, n in found.histogram.items()}


def _bar(share: float, room: int) -> str:
    """A bar of so large a share of `room`, to the eighth of a character."""
    eighths = round(min(1.0, share) * room * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
