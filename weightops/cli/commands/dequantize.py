"""weightops dequantize"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options
from weightops.formats.quantized.gptq import CheckpointFormat
from weightops.formats.quantized.gptq_zeros import ZeroOverflow
from weightops.operations.dequantize import DTYPES


@click.command("dequantize", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    metavar="DTYPE",
    help=f"Of the weights: {', '.join(dtype.value for dtype in DTYPES)}.",
)
@click.option(
    "--checkpoint-format",
    type=OneOf(get_args(CheckpointFormat)),
    help="Go by this and not by the config: gptq stores zero points minus one, gptq_v2 as they are.",
)
@click.option(
    "--zero-overflow",
    type=OneOf(get_args(ZeroOverflow)),
    help="What a stored zero point of all ones is in gptq: 0; 0 by adding to whole words; or one above the largest.",
)
@click.option("--config", metavar="PATH", help="A config.json, or its folder, where none lies beside the weights.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Turn a model quantised by GPTQ back into a plain one.

    Each weight is its scale times its integer less the zero point, exact, and rounded once. Integers of 2, 3, 4 and 8
    bits are read, with or without act-order, in both formats; shards of torch files without an index, as TigerBot
    shipped them, by a pattern in quotes. A model whose zero points contradict its config is refused.

    \b
    Example:
      weightops dequantize ./model-4bit --out ./model
      weightops dequantize './tigerbot/tigerbot-4bit-128g-*.pt' --dtype bfloat16 --out ./tigerbot-bf16
    """
    write(api.dequantize, source, out, **options)
