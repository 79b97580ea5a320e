"""weightops inspect"""

from __future__ import annotations

from pathlib import Path

import click

from weightops import api
from weightops.cli.meter import human
from weightops.cli.options import json_option
from weightops.cli.output import print_json, running, table, warn
from weightops.cli.params import SOURCE, Command, epilog
from weightops.io.escape import escape
from weightops.operations.inspect import Inspection


@click.command("inspect", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 13, 14, 130)))
@click.argument("source", type=SOURCE)
@click.option("-t", "--tensors", is_flag=True, help="List every tensor.")
@json_option
def command(source: Path | str, tensors: bool, as_json: bool) -> None:
    """Show what the files of a model hold, without reading the weights.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL. Only headers are read, or fetched, so that the
    answer comes at once whatever the size. What looks wrong is said as a warning.

    \b
    Example:
      weightops inspect ./model --tensors
      weightops inspect hf://org/name
    """
    with running(True) as control:
        found = api.inspect(source, control=control)
    if as_json:
        print_json(found.to_json())
        return
    click.echo(_text(found, tensors))
    warn(found.warnings)


def _text(found: Inspection, tensors: bool) -> str:
    dtypes = ", ".join(f"{dtype} {human(nbytes)}" for dtype, nbytes in found.by_dtype().items())
    lines = [
        f"{escape(found.path)}: {found.kind}" + (f", {escape(found.model_type)}" if found.model_type else ""),
        f"{len(found.tensors)} tensors, {found.parameters:,} parameters, {human(found.nbytes)} ({dtypes})",
    ]
    if found.content_id:
        lines.append(f"content {found.content_id} (from its manifest)")
    lines += ["", "made by", *(f"  {escape(line)}" for line in found.history)] if found.history else []
    rows = [("file", "tensors", "size")]
    rows += [(escape(n), str(count), human(nbytes)) for n, (count, nbytes) in found.by_shard().items()]
    lines += ["", table(rows, right=(1, 2))]
    if tensors:
        rows = [("tensor", "dtype", "shape")]
        rows += [(escape(n), s.dtype.value, str(list(s.shape))) for n, s in found.tensors.items()]
        lines += ["", table(rows)]
    if found.aliases:
        lines += ["", *(f"{escape(alias)} shares the bytes of {escape(name)}" for alias, name in found.aliases.items())]
    if found.sidecars:
        lines += ["", f"beside the weights: {', '.join(map(escape, found.sidecars))}"]
    return "\n".join(lines)
