"""weightops shard"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import FOLDER, WRITE_CODES, epilog, write, write_options


@click.command("shard", epilog=epilog(WRITE_CODES))
@click.argument("source", type=FOLDER)
@write_options
def command(source: Path, out: Path, **options: Any) -> None:
    """Rewrite a checkpoint in files of another size or format; every tensor stays as it is, to the bit.

    \b
    Example:
      weightops shard ./model --max-shard-size 2GB --out ./model-2gb
    """
    write(api.shard, source, out, **options)
