"""What the panel beside the tree shows, as text: of a module, of a tensor, and of what has been read of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from weightops.cli.browse.reading import Reading
from weightops.cli.browse.rows import Member, Row
from weightops.cli.browse.subject import Side, Subject
from weightops.cli.comparison import change_facts
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
        own = [member for name in names if (member := subject.rows[name].members[number]) is not None]
        nbytes = sum(member.nbytes(side.checkpoint) for member in own)
        weights = sum(member.parameters(side.inspection) for member in own)
        share = f", {100 * nbytes / side.inspection.nbytes:.1f} % of the whole" if side.inspection.nbytes else ""
        letter = f"{_LETTERS[number]}  " if subject.is_pair else ""
        text.append(f"{letter}{len(own):,} tensors, {count(weights)} parameters, {human(nbytes)}{share}\n")
    if subject.is_pair:
        marks = [subject.mark(name) for name in names]
        text.append("\n")
        for mark, what in (
            ("-", "only in A"),
            ("+", "only in B"),
            ("≠", "of another type or shape"),
        ):
            if mark in marks:
                text.append(f"{mark} {marks.count(mark):,} {what}\n")
        if not any(marks):
            text.append("the same tensors, of the same types and shapes, on both sides\n")
        for note in subject.notes if not path else ():
            text.append(f"\n{escape(note)}\n", "dim")
    return text


def tensor_text(subject: Subject, name: str, reading: Reading | str | None, width: int) -> Text:
    """A tensor: what headers say of it, and what has been read, or in a sentence why nothing has."""
    text = Text()
    text.append(f"{escape(name)}\n\n", "bold")
    row = subject.rows[name]
    for number, (side, member) in enumerate(zip(subject.sides, row.members, strict=False)):
        letter = f"{_LETTERS[number]}  " if subject.is_pair else ""
        if member is None:
            text.append(f"{letter}{'not there' if row.is_derived else 'no partner: nothing here is this tensor'}\n")
            continue
        text.append(f"{letter}{member.form + ', as ' if member.form else ''}{member.tensor.spec}\n", "bold")
        indent = " " * len(letter)
        nbytes, numel = member.nbytes(side.checkpoint), member.tensor.spec.numel
        share = 100 * nbytes / max(1, side.inspection.nbytes)
        size = "" if member.is_alias else f", {human(nbytes)}, {share:.3g} %"
        text.append(f"{indent}{count(numel)} elements{size}\n")
        for line in _origin(name, member, side):
            text.append(f"{indent}{line}\n", "dim")
    if row.reason:
        text.append(f"\n{escape(row.reason)}\n")
    text.append("\n")
    if not isinstance(reading, Reading):
        text.append(reading or "", "dim")
        return text
    for label, value in change_facts(reading.change) if reading.change is not None else ():
        text.append(f"{label}: ")
        text.append(f"{value}\n", "bold")
    text.append("\n" if reading.change is not None else "")
    _append_values(text, reading, row, width, is_pair=subject.is_pair)
    for note in reading.notes:
        text.append(f"\n{note}\n", "dim")
    return text


def _origin(shown: str, member: Member, side: Side) -> Iterator[str]:
    """Where a tensor of one side, which is shown under some name, comes from."""
    if member.name != shown:
        yield f"{'is' if member.is_alias else 'named'} {escape(member.name)}"
    yield f"in {escape(side.checkpoint.shards.get(next(iter(member.files), ''), side.checkpoint.name))}"
    alias = side.inspection.aliases.get(member.name)
    if alias is not None:
        yield f"shares the bytes of {escape(alias)}"


def _append_values(text: Text, reading: Reading, row: Row, width: int, *, is_pair: bool) -> None:
    found = [report for report in reading.reports if report is not None]
    letters = [letter for letter, report in zip(_LETTERS, reading.reports, strict=True) if report is not None]
    members = [member for member in row.members if member is not None]
    for letter, report, member in zip(letters, found, members, strict=True):
        if not member.is_as_stored:
            continue  # a digest of bytes that no file has says nothing
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
