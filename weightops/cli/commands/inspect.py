"""weightops inspect"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.options import refuse_unused, report_options, workers_option
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import GLOB, SOURCE, Command, epilog

if TYPE_CHECKING:
    from weightops.operations.inspect import Inspection


@click.command("inspect", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 13, 14, 130)))
@click.argument("source", type=SOURCE)
@click.option("-t", "--tensors", is_flag=True, help="List every tensor.")
@click.option("--tree", is_flag=True, help="Show the modules as a tree, repeated layers once.")
@click.option("--depth", type=click.IntRange(1), metavar="N", help="With --tree: show N levels.")
@click.option("--include", multiple=True, metavar="GLOB", help=f"Look only at tensors whose name matches. {GLOB}")
@click.option(
    "--stats",
    is_flag=True,
    help="Read the weights once: mean, deviation, range, zeros, NaN and infinities of each tensor, and of an adapter "
    "the size and rank of what it adds.",
)
@click.option("--base", type=SOURCE, help="For an adapter: say whether it fits this model.")
@workers_option
@report_options
def command(
    source: Path | str,
    tensors: bool,
    tree: bool,
    depth: int | None,
    include: tuple[str, ...],
    stats: bool,
    base: Path | str | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what the files of a model or an adapter hold.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL. Only headers are read, or fetched, so that the
    answer comes at once whatever the size, unless --stats asks for values. What looks wrong is said as a warning.

    \b
    Example:
      weightops inspect ./model --tree
      weightops inspect ./model --stats --include '*.layers.0.*'
      weightops inspect ./adapter --base ./model --stats
      weightops inspect hf://org/name

    In a tree, numbers of parameters, sizes and statistics are those of all that a line stands for: of `layers.[0-21]`
    those of 22 layers. With --base the exit code is 3 if the adapter does not fit.
    """
    if not tree:
        refuse_unused("without --tree", "depth")
    if not stats:
        refuse_unused("without --stats, which alone reads weights", "workers")
    with running(quiet or not stats) as control:
        found = weightops.inspect(source, include=include, stats=stats, base=base, workers=workers, control=control)
    if as_json:
        print_json(found.to_json(tree=tree, depth=depth))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        say("\n\n".join(part for part in _parts(found, tensors, tree, depth, stats, width) if part))
        warn(found.warnings)
    if found.adapter is not None and found.adapter.fits is False:
        click.get_current_context().exit(3)


def _parts(
    found: Inspection, tensors: bool, tree: bool, depth: int | None, stats: bool, width: int | None
) -> Iterator[str]:
    from weightops.cli import inspection  # imported here because help does without it

    yield inspection.inventory(found, width)
    if found.adapter is not None:
        yield inspection.adapter(found.adapter, width)
    yield inspection.files(found)
    if tree:
        yield inspection.tree(found, depth, width, stats=stats)
    if tensors or (stats and not tree):
        yield inspection.tensors(found, width, stats=stats)
    if stats:
        yield inspection.not_examined(found)
    yield inspection.beside(found, width)
