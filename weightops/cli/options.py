"""Options that several commands share, and what they have in common when they end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from weightops.cli.output import print_json, running, table, warn
from weightops.cli.progress import human
from weightops.engine.limits import peak_memory
from weightops.engine.preflight import default_workers, free_disk
from weightops.engine.proof import fetched_nbytes
from weightops.errors import UsageError
from weightops.formats.containers import FORMATS
from weightops.formats.places import is_remote
from weightops.io.escape import escape
from weightops.ops.measures.loss import Loss
from weightops.recipes.execute import Result

Command = TypeVar("Command", bound=Callable[..., Any])


class _Place(click.Path):
    """A path; where `remote` allows it also a repository on a hub or a URL, which stays the text that it is."""

    def __init__(self, *, remote: bool) -> None:
        super().__init__(path_type=Path)
        self._remote = remote
        self.name = "path|url" if remote else "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_remote(value):
            return super().convert(value, param, ctx)
        if not self._remote:
            self.fail(f"{escape(value)} is not on this machine; `weightops download` fetches it.", param, ctx)
        return value


FOLDER = _Place(remote=False)
SOURCE = _Place(remote=True)
WRITE_CODES = (0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 130)
READ_CODES = (0, 1, 2, 10, 13, 130)
_SHOWN_LOSSES = 5


def epilog(codes: Iterable[int]) -> str:
    """The last paragraph of a command's help."""
    from weightops.cli.main import EXIT_CODES

    return "Exit codes: " + "; ".join(f"{code} {EXIT_CODES[code]}" for code in codes) + "."


def _apply(options: list[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def report_options(command: Command) -> Command:
    """--json and --quiet."""
    return _apply(
        [
            click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
            click.option("-q", "--quiet", is_flag=True, help="No progress; errors only."),
        ]
    )(command)


def workers_option(command: Command) -> Command:
    """--workers."""
    return _apply([click.option("--workers", type=click.IntRange(1, 256), help="Files in work at once.")])(command)


def write_options(command: Command) -> Command:
    """What every command that writes a checkpoint takes."""
    return _apply(
        [
            click.option("-o", "--out", type=FOLDER, required=True, help="Folder to write; appears when it is whole."),
            click.option(
                "--format",
                type=click.Choice(FORMATS),
                help="Container; torch files are byte-identical to torch.save, torch-1.12 to that of 2022-23. "
                "Default: safetensors.",
            ),
            click.option(
                "--max-shard-size", metavar="SIZE", help="5GB, 2GiB, or `source` for its own files; default: 5GB."
            ),
            click.option("--expect", metavar="MANIFEST", help="Publish only what matches this manifest, list or name."),
            click.option("--digest", "digests", multiple=True, metavar="NAME", help="Record md5, sha256, ... as well."),
            click.option(
                "--card", is_flag=True, help="Write a model card, README.md, that says what it was made from."
            ),
            click.option(
                "--reflink", is_flag=True, help="Share unchanged blocks with the source (btrfs, XFS); pads headers."
            ),
            run_options,
        ]
    )(command)


def run_options(command: Command) -> Command:
    """How to write, whatever it is."""
    return _apply(
        [
            click.option("-n", "--dry-run", is_flag=True, help="Show files, bytes, memory and disk; write nothing."),
            click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is whole."),
            click.option("--restart", is_flag=True, help="Throw away a partial output instead of continuing it."),
            workers_option,
            report_options,
        ]
    )(command)


def refuse_unused(why: str, *names: str) -> None:
    """Refuse those parameters of the command at work that were given, in words that say why they have no use."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[-1]} has no use {why}", hint=f"leave out {parameter.opts[-1]}")


def write(function: Callable[..., Result], *arguments: Path | str | Sequence[Path | str], **options: Any) -> None:
    """Call a function of the API that writes, with the options of `write_options` and its own, and show the result."""
    as_json, quiet, workers = options.pop("as_json"), options.pop("quiet"), options["workers"]
    with running(quiet) as control:
        result = function(*arguments, control=control, **options)
    show_result(result, as_json, quiet, workers)


def show_result(result: Result, as_json: bool, quiet: bool, workers: int | None) -> None:
    """What a writing command says when it is done, or with --dry-run would do."""
    warn(result.warnings)
    if as_json:
        print_json(result_document(result, workers))
    elif result.manifest is None:
        click.echo(_dry_run_text(result, workers))
    elif not quiet:
        nbytes, count = result.plan.total_nbytes, len(result.plan.shards)
        kept = f", {len(result.resumed)} kept from before" if result.resumed else ""
        click.echo(
            f"{escape(str(result.out))}: {len(result.manifest.tensors)} tensors, {human(nbytes)} in {count} files{kept}"
        )
        if result.manifest.losses:
            click.echo(_loss_text(result.manifest.losses))
        energies = {name: note for name, note in result.manifest.notes.items() if "energy" in note}
        if energies:
            click.echo(_energy_text(energies))
        click.echo(f"content {result.manifest.content_id}")


def result_document(result: Result, workers: int | None) -> dict[str, Any]:
    """What a writing command says on stdout with --json."""
    plan = result.plan
    return {
        "schema": "weightops-write/1",
        "out": str(result.out),
        "written": result.manifest is not None,
        "fingerprint": plan.fingerprint,
        "nbytes": plan.total_nbytes,
        "fetched_nbytes": fetched_nbytes(plan),
        "peak_memory_nbytes": peak_memory([plan], workers or default_workers([plan])),
        "files": [{"name": n, "nbytes": size} for n, size in plan.shard_nbytes.items()],
        "resumed": list(result.resumed),
        "losses": msgspec.to_builtins(result.manifest.losses) if result.manifest else {},
        "notes": dict(result.manifest.notes) if result.manifest else {},
        "content_id": result.manifest.content_id if result.manifest else None,
        "warnings": list(result.warnings),
    }


def _loss_text(losses: Mapping[str, Loss]) -> str:
    """What the casts lost: the sum, and the tensors with the gravest losses."""
    worst = sorted(losses.items(), key=lambda item: (-item[1].too_large, -item[1].flushed, -item[1].changed))
    rows: list[tuple[str, ...]] = []
    for name, loss in [("all tensors", sum(losses.values(), Loss())), *worst[:_SHOWN_LOSSES]]:
        counts = (loss.overflowed, loss.saturated, loss.flushed, loss.subnormal, loss.nan)
        share = f"{100 * loss.changed / max(1, loss.elements):.3g} %"
        rows.append((escape(name), share, *map(str, counts), f"{loss.max_relative_error:.2g}"))
    heads = ("cast", "changed", "to infinity", "clamped", "to zero", "subnormal", "NaN before", "largest error")
    return table([heads, *rows], right=range(1, 8))


def _energy_text(notes: Mapping[str, Mapping[str, float]]) -> str:
    """How much of each change an adapter's rank has captured: the mean, and the modules with least."""
    least = sorted(notes.items(), key=lambda item: item[1]["energy"])
    rows = [("module", "rank", "captured", "change")]
    rows += [
        (escape(n), f"{note['rank']:.0f}", f"{100 * note['energy']:.4g} %", f"{100 * note.get('change', 0):.3g} %")
        for n, note in least[:_SHOWN_LOSSES]
    ]
    mean = sum(note["energy"] for note in notes.values()) / len(notes)
    return f"{table(rows, right=(1, 2, 3))}\n{len(notes)} modules, {100 * mean:.4g} % captured on average"


def _dry_run_text(result: Result, workers: int | None) -> str:
    plan = result.plan
    rows = [("file", "tensors", "size")]
    rows += [(s.name, str(len(s.tensors)), human(plan.shard_nbytes[s.name])) for s in plan.shards]
    rows += [("total", str(sum(1 for _ in plan.tensors)), human(plan.total_nbytes))]
    memory = peak_memory([plan], workers or default_workers([plan]))
    fetched = fetched_nbytes(plan)
    network = f", {human(fetched)} over the network" if fetched else ""
    return "\n".join(
        [
            table(rows, right=(1, 2)),
            "",
            f"reads    {human(sum(f.nbytes for f in plan.sources))} from {len(plan.sources)} files{network}",
            f"memory   at most {human(memory)}",
            f"disk     {human(plan.total_nbytes)} of {human(free_disk(result.out))} free",
            f"others   {', '.join(map(escape, sorted(plan.sidecars))) or 'none'}",
        ]
    )


def cache_folder(name: str) -> Path | None:
    """Where what can be found again is kept for this user, by XDG's rules; None for one without a home."""
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(base):
            return Path(base) / "weightops" / name
    return None
