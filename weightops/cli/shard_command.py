"""weightops shard"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, epilog, write, write_options


@click.command("shard", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Rewrite a checkpoint in files of another size or format; every tensor stays as it is, to the bit.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL (one of a folder ends in a slash). What comes
    over the network is held against its digests, and not kept.

    \b
    Example:
      weightops shard ./model --max-shard-size 2GB --out ./model-2gb
      weightops shard hf://org/name --max-shard-size 2GB --out ./name-2gb
    """
    write(api.shard, source, out, **options)
