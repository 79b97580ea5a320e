"""weightops compare"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.answers import answers_text
from weightops.cli.asking import asking_options, check_asked
from weightops.cli.colour import Kind, say, styled
from weightops.cli.comparison import candidate_heads, candidate_rows, changed_row
from weightops.cli.divergence import divergence_text
from weightops.cli.options import refuse_unused, report_options, run_model_options, workers_option
from weightops.cli.output import escape_lines, print_json, running, save_report, table, warn
from weightops.cli.params import FILE, SEQ_LEN, SOURCE, Command, epilog
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.api import Comparisons, ComputeDType
    from weightops.inference.packed import Engine
    from weightops.operations.compare import Comparison, Lone, TensorChange

_SHOWN = 20
"""Tensors and other things of a kind that the text shows; --json has all."""
_GRAVE = ("not-finite", "no-partner", "shape", "moved")
_OF_MODELS = ("dtype", "device", "engine", "max_memory")


@click.command("compare", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 13, 14, 16, 130)))
@click.argument("a", type=SOURCE)
@click.argument("b", nargs=-1, required=True, type=SOURCE)
@click.option(
    "--tolerance",
    type=float,
    metavar="X",
    help="Exit with 3 if ||B-A|| / ||A|| of any tensor is above X, or a tensor has no partner; 0: equal numbers.",
)
@click.option(
    "--strict", is_flag=True, help="With --tolerance: settings that change results, and the tokenizer, count too."
)
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    type=FILE,
    help="Compare also what the models make of this text, in UTF-8. Can be given several times.",
)
@click.option(
    "--seq-len", type=click.IntRange(2), metavar="N", help=f"Tokens in each window of the text; default: {SEQ_LEN}."
)
@click.option(
    "--prompts",
    type=FILE,
    metavar="FILE",
    help="Let all models answer these prompts, and show where the answers part: a line each, or JSON lines with "
    "settings of their own.",
)
@asking_options
@click.option("--html", type=FILE, help="Write a page for a browser: what changed, where, and by how much.")
@run_model_options
@workers_option
@report_options
def command(
    a: Path | str,
    b: tuple[Path | str, ...],
    tolerance: float | None,
    strict: bool,
    text: tuple[Path, ...],
    seq_len: int | None,
    prompts: Path | None,
    html: Path | None,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Say what a model is to another: which weights changed, how much, and in what way.

    A and B are folders, weight files, hf://org/name[@revision] or URLs; each B is compared with A. Layouts, names of
    files, prefixes and number types are no differences: quantised weights (GPTQ, fp8, GGUF) are compared by the numbers
    that they stand for, and what has no partner is named.

    \b
    Example:
      weightops compare ./base ./tuned
      weightops compare ./base ./tuned --html changes.html --json > changes.json
      weightops compare ./base ./tuned ./base-gptq --text heldout.txt
      weightops compare ./base ./base-gptq --prompts prompts.txt --max-new-tokens 64
      weightops compare ./model ./converted --tolerance 0

    Told apart are casts, quantised copies, merged LoRAs, changed heads, rows and tokens, exchanged tensors, and
    training of everything. Settings, tokenizer and chat template are compared as well. Both are read once, in bounded
    memory.

    With --prompts the most probable token is always taken, unless --temperature says otherwise. --template puts each
    prompt into a chat template. A prompt that a model cannot answer says why, and the exit code is then 1; --tolerance
    does not look at answers.
    """
    if not text:
        refuse_unused("without --text", "seq_len")
    if prompts is None:
        refuse_unused("without --prompts", *asked)
        asked = {}
    else:
        check_asked(asked)
    if not text and prompts is None:
        refuse_unused("without --text or --prompts", *_OF_MODELS)
    if html is not None:
        from weightops.io.atomic import check_target

        check_target(html)
    with running(quiet) as control:
        found = weightops.compare(
            a,
            b,
            tolerance=tolerance,
            strict=strict,
            text=text or None,
            seq_len=seq_len,
            prompts=prompts,
            dtype=dtype,
            device=device,
            engine=engine,
            max_memory=max_memory,
            workers=workers,
            control=control,
            **asked,
        )
    if found.outputs is not None:
        warn(found.outputs.warnings)
    if found.answers is not None:
        warn(found.answers.warnings)
    if as_json:
        print_json(found.to_json())
    elif not quiet or found.differs:
        say(_text(found))
    saved = 0
    if html is not None:
        # Imported here because few want a page.
        from weightops.cli.pages.compare import page

        saved = save_report(html, page(found))
    failed = found.answers is not None and found.answers.failed > 0
    click.get_current_context().exit(3 if found.differs else 1 if failed else saved)


def _text(found: Comparisons) -> str:
    parts = [_candidates(found)] if len(found.comparisons) > 1 else []
    parts += [_comparison(each, is_alone=len(found.comparisons) == 1) for each in found.comparisons]
    if found.outputs is not None:
        reference, *scores = found.outputs.scores
        parts += [*(divergence_text(score, reference) for score in scores), found.outputs.convention]
    if found.answers is not None:
        parts.append(answers_text(found.answers))
    return "\n\n".join(parts)


def _candidates(found: Comparisons) -> str:
    """All of them in one table."""
    rows: list[tuple[str, ...]] = [candidate_heads(found), *candidate_rows(found)]
    return table(rows, right=range(1, len(rows[0])))


def _comparison(found: Comparison, *, is_alone: bool) -> str:
    """The sentence, what to see first, and the tensors that changed most."""
    who = f"A is {escape(found.a)}, B is {escape(found.b)}." if is_alone else f"{escape(found.b)}:"
    kind: Kind = "good" if not found.changed and not found.unpaired else "heading"
    lines = [f"{who} {styled(escape_lines(found.relation), kind)}"]
    for finding in found.findings:
        mark = styled(finding.code, "bad" if finding.code in _GRAVE else "heading")
        lines.append(f"  {mark}: {escape_lines(finding.text)}")
    if found.changed and is_alone:
        lines += ["", _changed(found.changed)]
    lines += _lone([each for each in found.lone if each.is_derived])
    lines += [f"Note: {escape_lines(note)}" for note in found.notes]
    if found.differs is not None:
        lines.append(styled("differs beyond the tolerance", "bad") if found.differs else "equal within the tolerance")
    return "\n".join(lines)


def _changed(changed: list[TensorChange]) -> str:
    heads = ("tensor", "kind", "‖B-A‖/‖A‖", "1-cos", "max |d|", "changed", "signs")
    rows = [heads, *(changed_row(tensor) for tensor in changed[:_SHOWN])]
    more = f"\nand {len(changed) - _SHOWN} more (--json and --html have all)" if len(changed) > _SHOWN else ""
    return table(rows, right=range(2, len(heads))) + more


def _lone(derived: list[Lone]) -> list[str]:
    reasons: dict[str, int] = {}
    for each in derived:
        reason = each.reason if not each.reason.startswith("goes into") else "packed parts of weights that are compared"
        reasons[reason] = reasons.get(reason, 0) + 1
    return [f"Not compared by themselves: {count} tensors ({escape(reason)})" for reason, count in reasons.items()]
