"""Options that several commands share, and how a command is called with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from weightops.cli.output import PROGRESS, VERBOSE, running
from weightops.cli.params import (
    DEVICE,
    DIGESTS,
    FILE,
    FLOATS,
    OUT,
    SEVERAL,
    NameOrFile,
    OneOf,
    named,
    published,
    some,
)
from weightops.cli.progress import HOWS
from weightops.errors import UsageError

if TYPE_CHECKING:
    from weightops.engine.job.drive import Executor
    from weightops.recipes.execute import Result

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _all(*options: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that keeps an option's value in the context, where `running` finds it."""

    def keep(context: click.Context, option: click.Parameter, value: Any) -> None:
        context.meta[key] = value

    return keep


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Number of threads to work with; default: what suits the machine.",
)
progress_options = _all(
    click.option(
        "--progress",
        type=OneOf(HOWS),
        default="auto",
        show_default=True,
        expose_value=False,
        callback=_keep(PROGRESS),
        help="How to show progress on stderr: bars on a terminal and lines elsewhere (auto), lines, JSON lines, or "
        "none.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_keep(VERBOSE),
        help="Say what is done with which files, how long it takes, and with an error which versions were at work.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Show no progress and no summary, only errors."),
)
report_options = _all(json_option, progress_options)
out_option = click.option(
    "-o", "--out", type=OUT, required=True, help="Folder to write. It appears when it is complete."
)
dry_run_option = click.option(
    "-n", "--dry-run", is_flag=True, help="Show what would be written, and what that takes. Write nothing."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what is at the output, once the new one is complete."
)
run_options = _all(
    dry_run_option,
    overwrite_option,
    click.option(
        "--if-exists",
        type=OneOf(named("recipes.execute", "IfExists")),
        default="fail",
        show_default=True,
        help="What to do if the output is there: fail, or skip what this very command has made before and is complete.",
    ),
    click.option("--restart", is_flag=True, help="Begin anew instead of continuing what an interrupted run left."),
    workers_option,
    report_options,
)
job_options = _all(
    click.option(
        "--job",
        type=OUT,
        metavar="JOB",
        help="Do nothing yet, but write into this folder what there is to do, for several machines: `weightops work` "
        "does a part, `weightops finish` ends it.",
    ),
    click.option(
        "--executor",
        metavar="WHO",
        shell_complete=some("threads", "dask:"),
        help="Have the job done at once: by the threads of this process, or by dask:ADDRESS, the workers of a Dask "
        "cluster that see the same files.",
    ),
)
digest_option = click.option(
    "--digest",
    shell_complete=some(*DIGESTS),
    multiple=True,
    metavar="NAME",
    help=f"Record this digest too, such as md5 or sha256. {SEVERAL}",
)
trust_config_option = click.option(
    "--trust-config",
    type=FILE,
    help="Which Sigstore to ask: a trust configuration in JSON; default: the public one.",
)
write_here_options = _all(
    click.option(
        "--format",
        type=OneOf(named("formats.containers", "FORMATS")),
        help="Kind of weight files: safetensors (the default), torch, as torch.save writes them, or torch-1.12, as "
        "torch "
        "of 2022 and 2023 wrote them, byte for byte.",
    ),
    click.option(
        "--max-shard-size",
        shell_complete=some("source"),
        metavar="SIZE",
        help="Largest size of a weight file, such as 5GB (the default) or 2GiB; `source` keeps the files of the "
        "source.",
    ),
    click.option(
        "--expect",
        type=NameOrFile(published),
        metavar="MANIFEST",
        help="Publish the result only if this manifest, checksum list or name agrees.",
    ),
    digest_option,
    click.option(
        "--card", is_flag=True, help="Write a model card, README.md, that says what the result was made from."
    ),
    click.option(
        "--reflink",
        is_flag=True,
        help="Share unchanged data with the source instead of copying it, where the disk can (btrfs, XFS).",
    ),
    run_options,
)
"""What a command takes that writes a checkpoint on this machine alone, besides its output."""
write_options = _all(write_here_options, job_options)
"""What every other command that writes a checkpoint takes."""
run_model_options = _all(
    click.option(
        "--dtype",
        type=OneOf(FLOATS),
        default="float32",
        show_default=True,
        help="The number type to compute in.",
    ),
    click.option(
        "--device",
        default="auto",
        shell_complete=some("auto", "cpu", "cuda"),
        show_default=True,
        metavar="DEVICE",
        help=DEVICE,
    ),
    click.option(
        "--engine",
        type=OneOf(("auto", "dequantized", "packed")),
        default="auto",
        show_default=True,
        help="How a quantised model multiplies: with full weights, made when it is loaded (dequantized), with its "
        "integers (packed), or as is faster and fits (auto).",
    ),
    click.option(
        "--max-memory",
        metavar="SIZE",
        help="Take no more memory than this, as far as that can be, such as 8GB; default: what is free.",
    ),
)
"""Options of the commands that run a model."""


def refuse_unused(why: str, *names: str) -> None:
    """Refuse those parameters of the command at work that were given, in words that say why they have no use."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[-1]} has no use {why}", hint=f"leave out {parameter.opts[-1]}")


def write(
    function: Callable[..., Result], *arguments: Path | str | Sequence[Path | str] | None, **options: Any
) -> Result:
    """Call a function of the API that writes, with the options of `write_options` and its own, and show the result."""
    from weightops.cli.results import show_result

    as_json, quiet, workers = options.pop("as_json"), options.pop("quiet"), options["workers"]
    if "executor" in options:
        options["executor"] = executor(options["executor"], workers)
    with running(quiet) as control:
        result = function(*arguments, control=control, **options)
    show_result(result, as_json, quiet, workers)
    return result


def executor(given: str | None, workers: int | None) -> Executor | None:
    """Who does the groups of a job; workers elsewhere are given what their own environment describes."""
    if given is None:
        return None
    from weightops.cli.elsewhere import do_group
    from weightops.recipes.jobs import executor_of

    return executor_of(given, workers, do_group)


def cache_folder(name: str) -> Path | None:
    """Where what can be found again is kept for this user, by XDG's rules; None for one without a home."""
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(base):
            return Path(base) / "weightops" / name
    return None
