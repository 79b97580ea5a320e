"""weightops cast"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options
from weightops.operations.cast import DTYPES
from weightops.ops.fp8 import Strategy
from weightops.ops.measures.loss import Overflow


@click.command("cast", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option("--dtype", metavar="DTYPE", help=f"The new type: {', '.join(dtype.value for dtype in DTYPES)}.")
@click.option("--keep", multiple=True, metavar="GLOB", help="Leave tensors of this name as they are; * is any text.")
@click.option(
    "--on-overflow",
    type=OneOf(get_args(Overflow)),
    default="refuse",
    show_default=True,
    help="What becomes of numbers too large for the type: an error, its largest number, or infinity.",
)
@click.option("--scheme", type=OneOf(("fp8",)), help="Quantise linear layers to float8_e4m3fn with scales.")
@click.option(
    "--strategy",
    type=OneOf(get_args(Strategy)),
    default="channel",
    show_default=True,
    help="With --scheme: a scale for each row (output channel), or one for each tensor.",
)
@click.option("--cast-all", is_flag=True, help="Cast what transformers keeps in float32 as well.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Convert weights to another type, and say of every tensor what that loses.

    All floating-point tensors are rounded to nearest even, as torch does it, and what overflows, becomes zero, becomes
    subnormal or changes is counted as it streams by. A number beyond the new type's range stops the run unless
    --on-overflow says what to make of it; nothing is published then. What transformers has in float32 in models of any
    type, such as correction biases of routers, stays float32 and is named. Scales of quantised weights stay as they
    are.

    --scheme fp8 writes what compressed-tensors and transformers read: linear layers in float8_e4m3fn, a weight_scale
    beside each, activations to be scaled per token at run time (FP8_DYNAMIC). Embeddings, output head, norms, vision
    layers, the routers of experts and what transformers does not have as a linear layer stay as they are.

    \b
    Example:
      weightops cast ./model --dtype float16 --out ./model-fp16
      weightops cast ./model --dtype bfloat16 --keep '*norm.weight' --out ./model-bf16
      weightops cast ./model --scheme fp8 --out ./model-fp8
    """
    write(api.cast, source, out, **options)
