"""weightops work"""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

import weightops
from weightops.cli.colour import say
from weightops.cli.options import report_options, workers_option
from weightops.cli.output import print_json, running
from weightops.cli.params import OUT, SEVERAL, WRITE_CODES, Command, epilog
from weightops.errors import UsageError

_INDEXES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


class WorkDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-work/1"):
    """What `work --json` prints: `done` is false if the group had been done before."""

    job: str
    group: int
    done: bool


@click.command("work", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("job", type=OUT)
@click.option(
    "--group",
    type=click.IntRange(0),
    metavar="K",
    help="Which group to do, from 0. Default: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, which Slurm and Kubernetes "
    "set for each task.",
)
@click.option(
    "--output-root",
    multiple=True,
    metavar="DIR",
    help=f"Let the job write below this folder. Without it, outputs must lie beside the job's folder. {SEVERAL}",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Stop after so many seconds, as SIGTERM does.",
)
@workers_option
@report_options
def command(
    job: Path | str,
    group: int | None,
    output_root: tuple[str, ...],
    time_limit: float | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do one group of a job, on this machine.

    A job is what a command writes with --job: a folder that says what there is to do, in groups. Any number of groups
    can be done at the same time, on any machine that sees the job, the sources and the outputs by the same names. To
    do one twice is no harm.

    \b
    Example:
      weightops recover --raw ./llama --diff ./diff --out ./tuned --job ./tuned-job
      weightops work ./tuned-job --group 0
      weightops finish ./tuned-job
    """
    number = group if group is not None else _index()
    with running(quiet, time_limit_s=time_limit) as control:
        done = weightops.work(job, number, output_root=output_root, workers=workers, control=control)
    if as_json:
        print_json(msgspec.to_builtins(WorkDocument(job=os.fspath(job), group=number, done=done)))
    elif not quiet:
        say(f"group {number} is done" if done else f"group {number} was done before")


def _index() -> int:
    """The number of this task in an array of them."""
    for name in _INDEXES:
        value = os.environ.get(name, "")
        if value.isascii() and value.isdigit():
            return int(value)
    raise UsageError(
        "which group is to be done is not said", hint=f"give --group K, or run in an array ({' or '.join(_INDEXES)})"
    )
