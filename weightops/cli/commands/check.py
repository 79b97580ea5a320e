"""weightops check"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from weightops import api
from weightops.cli.options import SOURCE, cache_folder, epilog, report_options
from weightops.cli.output import escape_lines, print_json, running, save_report, table
from weightops.cli.progress import human
from weightops.io.atomic import check_target
from weightops.io.escape import escape
from weightops.operations.check import CODES, CheckReport, Finding

_SHOWN = 10
"""Findings of one code that the table shows; --json has all of them."""


@click.command("check", epilog=epilog((0, 1, 2, 3, 10, 13, 14, 130)))
@click.argument("source", metavar="SRC", type=SOURCE)
@click.option("--strict", is_flag=True, help="Exit with 3 if there is an error or a warning.")
@click.option("--no-values", is_flag=True, help="Headers and the files beside them only: reads no tensor.")
@click.option("--no-architecture", is_flag=True, help="Do not ask transformers what tensors the model has; faster.")
@click.option("--max-abs", type=float, metavar="X", help="Warn of magnitudes above X.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="CODE",
    type=click.Choice(list(CODES)),
    help="Leave such findings out; repeatable.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with a heat map of layers.")
@click.option("--workers", type=click.IntRange(1, 256), help="Tensors in work at once; default: one for each core.")
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
    """Look for what is wrong with a checkpoint, in one pass over its tensors.

    SRC is a folder, a weight file, hf://org/name[@revision] or a URL. Looked for are NaN, infinities, tensors of zeros
    or of one value, equal tensors, names and shapes that transformers' class for config.json does not have, missing
    tensors and layers, a tokenizer that does not fit, and leftovers of training, LoRA and quantising. --json has the
    statistics of every tensor.

    \b
    Example:
      weightops check ./model
      weightops check ./model --strict --ignore duplicate --json > check.json
    """
    if html is not None:
        check_target(html)
    with running(quiet or as_json) as control:
        report = api.check(
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
        click.echo(_text(report))
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
            rows.append((finding.severity, finding.code, escape_lines(finding.message)))
            hints |= {_hint(finding): None} if finding.hint else {}
    rows += [("", code, f"and {n - _SHOWN} more (--json has all)") for code, n in shown.items() if n > _SHOWN]
    lines = [table(rows), ""] if rows else []
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
    return f"{escape(report.name)}: {counts or 'nothing found'}{ignored} ({size})"
