"""weightops cast"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from weightops import api
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import GLOB, SOURCE, WRITE_CODES, Command, OneOf, epilog
from weightops.operations.cast import DTYPES
from weightops.ops.fp8 import Strategy
from weightops.ops.measures.loss import Overflow


@click.command("cast", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option("--dtype", metavar="DTYPE", help=f"The new number type: {', '.join(dtype.value for dtype in DTYPES)}.")
@click.option("--keep", multiple=True, metavar="GLOB", help=f"Leave such tensors as they are. {GLOB}")
@click.option(
    "--on-overflow",
    type=OneOf(get_args(Overflow)),
    default="refuse",
    show_default=True,
    help="What to do with numbers that are too large for the new type: refuse, write its largest number, or infinity.",
)
@click.option(
    "--scheme",
    type=OneOf(("fp8",)),
    help="Write linear layers in 8 bits with scales (float8_e4m3fn) instead of casting everything.",
)
@click.option(
    "--strategy",
    type=OneOf(get_args(Strategy)),
    default="channel",
    show_default=True,
    help="With --scheme: one scale for each output channel, or one for each tensor.",
)
@click.option("--cast-all", is_flag=True, help="Cast also what transformers keeps in float32.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Convert weights to another number type, and count what that loses.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL. Numbers are rounded as torch rounds them, and
    how many of them changed, overflowed or became zero is shown and written into the manifest.

    \b
    Example:
      weightops cast ./model --dtype float16 --out ./model-fp16
      weightops cast ./model --dtype bfloat16 --keep '*norm.weight' --out ./model-bf16
      weightops cast ./model --scheme fp8 --out ./model-fp8

    A number too large for the new type stops the command unless --on-overflow says what to make of it. What
    transformers keeps in float32 in any case, such as the correction biases of routers, stays float32 and is named.
    Scales of quantised weights stay as they are.

    --scheme fp8 makes what vLLM and transformers call FP8_DYNAMIC, in the format of compressed-tensors: linear layers
    are written in 8 bits with a scale beside each, and activations are to be scaled when the model runs. Embeddings,
    output head, norms, vision layers and the routers of experts stay as they are.
    """
    write(api.cast, source, out, **options)
