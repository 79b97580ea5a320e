"""weightops diff"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options
from weightops.operations.diff import METHODS


@click.command("diff", epilog=epilog(WRITE_CODES))
@click.option("--raw", type=SOURCE, required=True, help="The raw (base) checkpoint.")
@click.option("--tuned", type=SOURCE, required=True, help="The checkpoint to be recovered from it.")
@click.option(
    "--method",
    type=OneOf(METHODS),
    default="exact",
    show_default=True,
    help="exact: to the bit, for weightops; subtract: tuned - raw, as published in 2023.",
)
@click.option("--dtype", metavar="DTYPE", help="Arithmetic and dtype of a subtract diff; default float32.")
@write_options
def command(raw: Path | str, tuned: Path | str, out: Path, **options: Any) -> None:
    """Make a delta, so that who holds the raw weights can recover the tuned ones.

    The exact method keeps the raw weights to itself, knows its base and its result by digest, and recovers
    every dtype to the bit, grown vocabularies too. Both may be a folder, a weight file, hf://org/name[@revision] or
    a URL.

    \b
    Example:
      weightops diff --raw ./llama-13b --tuned ./zhixi --out ./zhixi-delta
    """
    write(api.diff, raw, tuned, out, **options)
