"""weightops check"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

import weightops
from weightops.cli.colour import Kind, say, styled
from weightops.cli.meter import human
from weightops.cli.options import cache_folder, report_options, workers_option
from weightops.cli.output import escape_lines, print_json, running, save_report, table
from weightops.cli.params import FILE, NO_ARCHITECTURE, SOURCE, Command, OneOf, epilog, named
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.operations.check import CheckReport, Finding

_KINDS: Mapping[str, Kind] = {"error": "bad", "warning": "doubtful", "note": "heading"}
_SHOWN = 10
"""Findings of one code that the table shows; --json has all of them."""


@click.command("check", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 13, 14, 130)))
@click.argument("source", type=SOURCE)
@click.option("--strict", is_flag=True, help="Exit with 3 if there is an error or a warning.")
@click.option("--no-values", is_flag=True, help="Look at headers and settings only, and read no tensors.")
@click.option(
    "--no-architecture",
    is_flag=True,
    help=NO_ARCHITECTURE,
)
@click.option("--max-abs", type=float, metavar="X", help="Warn of numbers whose magnitude is above X.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="CODE",
    type=OneOf(named("operations.check", "CODES")),
    help="Leave such findings out. Can be given several times.",
)
@click.option("--html", type=FILE, help="Write a page for a browser, with the statistics of every layer.")
@workers_option
@report_options
def command(
    source: Path | str,
    strict: bool,
    no_values: bool,
    no_architecture: bool,
    max_abs: float | None,
    ignore: tuple[str, ...],
    html: Path | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look for mistakes in a model: in its values, its tensors and its settings.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL. What may be wrong is listed as errors (the
    model does not work), warnings (probably a mistake) and notes.

    \b
    Example:
      weightops check ./model
      weightops check ./model --strict --ignore duplicate --json > check.json

    Looked for are NaN and infinities, tensors that are zero, constant or equal to another, names and shapes that the
    model's class in transformers does not have, missing tensors and layers, a tokenizer that does not fit, and what
    training, LoRA and quantising leave behind. Every tensor is read once. --json has the statistics of each.
    """
    if html is not None:
        from weightops.io.atomic import check_target

        check_target(html)
    with running(quiet) as control:
        report = weightops.check(
            source,
            values=not no_values,
            max_abs=max_abs,
            ignore=ignore,
            architecture=not no_architecture,
            cache=cache_folder("architectures"),
            workers=workers,
            control=control,
        )
    if as_json:
        print_json(report.to_json())
    elif not quiet or report.findings:
        say(_text(report))
    saved = 0
    if html is not None:
        # Imported here because few want a page.
        from weightops.cli.pages.check import page

        saved = save_report(html, page(report))
    click.get_current_context().exit(3 if strict and not report.verdict else saved)


def _text(report: CheckReport) -> str:
    shown: Counter[str] = Counter()
    rows: list[tuple[str, ...]] = []
    hints: dict[str, None] = {}
    for finding in report.findings:
        shown[finding.code] += 1
        if shown[finding.code] <= _SHOWN:
            rows.append(
                (styled(finding.severity, _KINDS[finding.severity]), finding.code, escape_lines(finding.message))
            )
            hints |= {_hint(finding): None} if finding.hint else {}
    rows += [("", code, f"and {n - _SHOWN} more (--json has all)") for code, n in shown.items() if n > _SHOWN]
    lines = [table(rows, heads=False), ""] if rows else []
    lines += [*(f"Hint: {hint}" for hint in hints), ""] if hints else []
    return "\n".join([*lines, _summary(report)])


def _hint(finding: Finding) -> str:
    return f"{finding.code}: {escape_lines(finding.hint)}"


def _summary(report: CheckReport) -> str:
    counts = ", ".join(f"{n} {severity}" + "s" * (n != 1) for severity, n in report.counts.items() if n)
    ignored = f", {report.ignored_count} ignored" if report.ignored_count else ""
    read = "" if report.examined else "; values not read"
    held = f"held against {report.held_against}" if report.held_against else "held against no architecture"
    why = f": {report.not_held}" if report.not_held else ""
    size = f"{len(report.tensors)} tensors, {human(report.nbytes)}{read}; {held}{escape(why)}"
    found = styled(counts or "nothing found", "good" if report.verdict else _KINDS[report.findings[0].severity])
    return f"{escape(report.name)}: {found}{ignored} ({size})"
