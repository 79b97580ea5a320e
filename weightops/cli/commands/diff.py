"""weightops diff"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import FLOATS, SOURCE, WRITE_CODES, Command, NumberType, OneOf, epilog, named


@click.command("diff", cls=Command, epilog=epilog(WRITE_CODES))
@click.option("--raw", type=SOURCE, required=True, help="The original model.")
@click.option("--tuned", type=SOURCE, required=True, help="The model that is to be recovered.")
@out_option
@click.option(
    "--method",
    type=OneOf(named("operations.diff", "METHODS")),
    default="exact",
    show_default=True,
    help="How to make the difference: exact, for weightops, or subtract, as it was published in 2023.",
)
@click.option(
    "--dtype",
    type=NumberType(FLOATS),
    help="With --method subtract: the number type to subtract in and to write; default: float32.",
)
@click.option(
    "--compress",
    is_flag=True,
    help="Write smaller files: of a fine-tune about a third; `weightops recover` takes both.",
)
@write_options
def command(raw: Path | str, tuned: Path | str, out: Path, **options: Any) -> None:
    """Make the difference from which others recover your tuned model.

    Whoever has the original model gets yours back with `weightops recover`; without it the difference is of no use.
    --raw and --tuned are folders, weight files, hf://org/name[@revision] or URLs.

    \b
    Example:
      weightops diff --raw ./llama-13b --tuned ./zhixi --out ./zhixi-delta

    By default every bit comes back, whatever the number type, with a larger vocabulary too, and the difference knows
    the right original by its digest. --method subtract makes what was published in 2023, the tuned weights minus the
    original ones, which come back rounded.
    """
    write(weightops.diff, raw, tuned, out, **options)
