"""weightops shard"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, epilog, write, write_options


@click.command("shard", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option("--drop", multiple=True, metavar="GLOB", help="Leave out tensors of this name; * stands for any text.")
@click.option("--drop-prefix", metavar="TEXT", help="Take this off the names that begin with it.")
@click.option(
    "--rename",
    multiple=True,
    nargs=2,
    type=str,
    metavar="PATTERN TEXT",
    help="Put TEXT in place of a regular expression in every name, as re.sub does: \\1 is its first group.",
)
@click.option("--add-prefix", metavar="TEXT", help="Put this before every name.")
@click.option("--layers", metavar="LIST", help="Layers to keep, in this order: 0-15,20-31; one may come twice.")
@click.option("--tie", is_flag=True, help="Leave out an output embedding that is equal to the input embedding.")
@click.option("--untie", is_flag=True, help="Write the input embedding as the output embedding, too.")
@write_options
def command(source: Path | str, out: Path, rename: tuple[tuple[str, str], ...], **options: Any) -> None:
    """Rewrite a checkpoint in files of another size or format, under other names, or in fewer or more layers.

    Every tensor stays as it is, to the bit. Edits are made in the order of the options below, each on the names that
    the one before it gave, and config.json follows. SOURCE is a folder, a weight file, hf://org/name[@revision] or a
    URL (one of a folder ends in a slash). What comes over the network is held against its digests, and not kept.

    \b
    Example:
      weightops shard ./model --max-shard-size 2GB --out ./model-2gb
      weightops shard hf://org/name --max-shard-size 2GB --out ./name-2gb
      weightops shard ./tied-2023 --drop '*.rotary_emb.inv_freq' --tie --out ./tied-lean
      weightops shard ./trained --drop-prefix module. --rename '^transformer\\.' model. --out ./renamed
      weightops shard ./llama-7b --layers 0-19,12-31 --out ./llama-40-layers
    """
    if len(dict(rename)) < len(rename):
        raise click.UsageError("one pattern is given to --rename twice.")
    write(api.shard, source, out, rename=dict(rename), **options)
