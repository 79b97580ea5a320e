"""weightops dequantize"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from weightops import api
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import CHECKPOINT_FORMAT, SOURCE, WRITE_CODES, Command, OneOf, epilog
from weightops.formats.quantized.gptq import CheckpointFormat
from weightops.formats.quantized.gptq_zeros import ZeroOverflow
from weightops.operations.dequantize import DTYPES


@click.command("dequantize", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    metavar="DTYPE",
    help=f"The number type of the weights: {', '.join(dtype.value for dtype in DTYPES)}.",
)
@click.option(
    "--checkpoint-format",
    type=OneOf(get_args(CheckpointFormat)),
    help=f"{CHECKPOINT_FORMAT} Default: what the model says.",
)
@click.option(
    "--zero-overflow",
    type=OneOf(get_args(ZeroOverflow)),
    help="In gptq, what a stored zero point of all ones means: 0 (wrap), 0 with a carry into the next one (carry), or "
    "one "
    "above the largest integer (plus-one).",
)
@click.option("--config", metavar="PATH", help="A config.json, or its folder, if none lies with the weights.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Turn a model that GPTQ quantised back into a plain one.

    Each weight becomes its scale times its integer less the zero point, rounded once to the number type: what a program
    that runs the quantised model computes with. What quantising lost does not come back. SOURCE is a folder, a weight
    file, hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops dequantize ./model-4bit --out ./model
      weightops dequantize './tigerbot/tigerbot-4bit-128g-*.pt' --dtype bfloat16 --out ./tigerbot-bf16

    Integers of 2, 3, 4 and 8 bits are read, in both versions of the format. A pattern in quotes names torch files
    without an index, as TigerBot published them. A model whose zero points contradict its config.json is refused.
    """
    write(api.dequantize, source, out, **options)
