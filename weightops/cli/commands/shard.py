"""weightops shard"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import GLOB, SOURCE, WRITE_CODES, Command, epilog


@click.command("shard", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option("--drop", multiple=True, metavar="GLOB", help=f"Leave out such tensors. {GLOB}")
@click.option("--drop-prefix", metavar="TEXT", help="Take this text off the names that begin with it.")
@click.option(
    "--rename",
    multiple=True,
    nargs=2,
    type=str,
    metavar="PATTERN TEXT",
    help="Replace in every name what a regular expression matches by TEXT, in which \\1 is its first group. Can be "
    "given "
    "several times.",
)
@click.option("--add-prefix", metavar="TEXT", help="Put this text before every name.")
@click.option(
    "--layers",
    metavar="LIST",
    help="Keep these layers, in this order: 0-15,20-31. A layer may come twice; 3= is a copy of layer 3 that changes "
    "nothing until it is trained.",
)
@click.option("--tie", is_flag=True, help="Leave out the output embedding, if it is equal to the input embedding.")
@click.option("--untie", is_flag=True, help="Write the input embedding once more, as the output embedding.")
@write_options
def command(source: Path | str, out: Path, rename: tuple[tuple[str, str], ...], **options: Any) -> None:
    """Rewrite a model in other files, under other names, or with other layers.

    Every tensor stays as it is, to the bit. SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL (that
    of a folder ends in a slash). What comes over the network is checked against its digests, and not kept.

    \b
    Example:
      weightops shard ./model --max-shard-size 2GB --out ./model-2gb
      weightops shard hf://org/name --max-shard-size 2GB --out ./name-2gb
      weightops shard ./tied-2023 --drop '*.rotary_emb.inv_freq' --tie --out ./tied-lean
      weightops shard ./trained --drop-prefix module. --rename '^transformer\\.' model. --out ./renamed
      weightops shard ./llama-7b --layers 0-19,12-31 --out ./llama-40-layers
      weightops shard ./llama-7b --layers 0-15,15=,16-31,31= --out ./llama-34-layers

    Several edits are made in the order of the options below, each on the names that the one before gave. config.json is
    changed with them.
    """
    if len(dict(rename)) < len(rename):
        raise click.UsageError("one pattern is given to --rename twice.")
    write(weightops.shard, source, out, rename=dict(rename), **options)
