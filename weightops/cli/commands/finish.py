"""weightops finish"""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

import weightops
from weightops.cli.colour import say
from weightops.cli.meter import human
from weightops.cli.options import report_options
from weightops.cli.output import print_json, running
from weightops.cli.params import OUT, SEVERAL, WRITE_CODES, Command, epilog
from weightops.io.escape import escape


class FinishedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output of the job that has its name."""

    out: str
    files: int
    nbytes: int
    content_id: str | None


class FinishDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-finish/1"):
    """What `finish --json` prints; of a job that was given up there are no outputs."""

    job: str
    abandoned: bool
    outputs: tuple[FinishedOutput, ...]


@click.command("finish", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("job", type=OUT)
@click.option(
    "--abandon",
    is_flag=True,
    help="Give the job up: remove what it has made, and its own files. Outputs that have their names stay.",
)
@click.option(
    "--output-root",
    multiple=True,
    metavar="DIR",
    help=f"Let the job write below this folder. Without it, outputs must lie beside the job's folder. {SEVERAL}",
)
@report_options
def command(job: Path | str, abandon: bool, output_root: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """End a job: prove that all of it is there, and give the results their names.

    If groups are missing, they are named, and nothing has changed; do them with `weightops work`, and finish again. The
    results appear when all of them are complete. It does no harm to finish a job twice.

    \b
    Example:
      weightops finish ./tuned-job
      weightops finish ./other-job --abandon
    """
    place = os.fspath(job)
    with running(quiet) as control:
        published = weightops.finish(place, abandon=abandon, output_root=output_root, control=control)
    outputs = tuple(
        FinishedOutput(
            out=each.out,
            files=len(each.manifest.files),
            nbytes=sum(file.nbytes for file in each.manifest.files.values()),
            content_id=each.manifest.content_id,
        )
        for each in published
    )
    if as_json:
        print_json(msgspec.to_builtins(FinishDocument(job=place, abandoned=abandon, outputs=outputs)))
    elif not quiet:
        for output in outputs:
            say(f"{escape(output.out)}: {human(output.nbytes)} in {output.files} files\ncontent {output.content_id}")
        if abandon:
            say(f"{escape(place)} is given up")
