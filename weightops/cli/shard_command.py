"""weightops shard"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import FOLDER, WRITE_CODES, epilog, output_keywords, show_result, write_options
from weightops.cli.output import running


@click.command("shard", epilog=epilog(WRITE_CODES))
@click.argument("source", type=FOLDER)
@write_options
def command(source: Path, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Rewrite a checkpoint in files of another size or format; every tensor stays as it is, to the bit.

    \b
    Example:
      weightops shard ./model --max-shard-size 2GB --out ./model-2gb
    """
    workers = options["workers"]
    with running(quiet) as control:
        result = api.shard(source, out, **output_keywords(options, control))
    show_result(result, as_json, quiet, workers)
