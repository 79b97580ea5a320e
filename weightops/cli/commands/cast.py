"""weightops cast"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import GLOB, SOURCE, WRITE_CODES, Command, NumberType, OneOf, epilog, named


@click.command("cast", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option("--dtype", type=NumberType(named("operations.cast", "DTYPES")), help="The new number type.")
@click.option("--keep", multiple=True, metavar="GLOB", help=f"Leave such tensors as they are. {GLOB}")
@click.option(
    "--on-overflow",
    type=OneOf(named("ops.measures.loss", "Overflow")),
    default="refuse",
    show_default=True,
    help="What to do with numbers that are too large for the new type: refuse, write its largest number, or infinity.",
)
@click.option(
    "--scheme",
    type=OneOf(named("operations.cast", "Scheme")),
    help="Write linear layers in 8 bits with scales (fp8, fp8-block) or in 4 (mxfp4) instead of casting everything.",
)
@click.option(
    "--strategy",
    type=OneOf(named("ops.fp8", "Strategy")),
    default="channel",
    show_default=True,
    help="With --scheme fp8: one scale for each output channel, or one for each tensor.",
)
@click.option("--cast-all", is_flag=True, help="Cast also what transformers keeps in float32.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Convert weights to another number type, and count what that loses.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL. Numbers are rounded as torch rounds them, and
    how many of them changed, overflowed or became zero is shown, and recorded in weightops-manifest.json.

    \b
    Example:
      weightops cast ./model --dtype float16 --out ./model-fp16
      weightops cast ./model --dtype bfloat16 --keep '*norm.weight' --out ./model-bf16
      weightops cast ./model --scheme fp8 --out ./model-fp8
      weightops cast ./model --scheme mxfp4 --out ./model-mxfp4

    A number too large for the new type stops the command unless --on-overflow says what to make of it. What
    transformers keeps in float32 in any case, such as the correction biases of routers, stays float32 and is named.
    Scales of quantised weights stay as they are.

    --scheme fp8 makes what vLLM and transformers call FP8_DYNAMIC, in the format of compressed-tensors: linear layers
    are written in 8 bits with a scale beside each, and activations are to be scaled when the model runs. Embeddings,
    output head, norms, vision layers and the routers of experts stay as they are.

    --scheme fp8-block writes the same layers as DeepSeek publishes them, with a scale for each block of 128 x 128.
    Layers that are no whole blocks stay as they are, and so do those that vLLM joins with one; they are named. --scheme
    mxfp4 writes 4 bits with an exponent for each 32 weights: in the format of compressed-tensors, with its bits, and of
    gpt-oss the experts as OpenAI publishes them.
    """
    write(weightops.cast, source, out, **options)
