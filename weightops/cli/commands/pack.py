"""weightops pack"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import (
    CONTAINER,
    GROUP_SIZE,
    SOURCE,
    WEIGHT_BITS,
    WRITE_CODES,
    Command,
    OneOf,
    epilog,
    named,
)


@click.command("pack", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option("--bits", type=OneOf(named("ops.numbers.bitpack", "BITS")), required=True, help=WEIGHT_BITS)
@click.option("--group-size", type=int, required=True, metavar="N", help=GROUP_SIZE)
@click.option(
    "--checkpoint-format",
    type=OneOf(named("formats.quantized.containers", "Container")),
    default="gptq",
    show_default=True,
    help=CONTAINER,
)
@write_options
def command(source: Path | str, out: Path, bits: str, **options: Any) -> None:
    """Make a quantised model of integers, scales and zero points that you have.

    Use it when something else has quantised the weights, and the result is to be read by transformers, vLLM, gptqmodel
    or auto-gptq. SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops pack ./integers --bits 4 --group-size 128 --out ./model-4bit

    \b
    For a linear layer NAME of K inputs and N outputs, in G groups of inputs, SOURCE holds
      NAME.q       integers [K, N] from 0 to 2^bits - 1
      NAME.scales  floats [G, N]
      NAME.zeros   the zero points [G, N]; 2^(bits-1) if there are none
      NAME.g_idx   the group of each input; in their order if there is none
      NAME.bias    if the layer has one

    Other tensors are copied. Without --checkpoint-format the model is GPTQ's; awq and compressed-tensors need a
    config.json in SOURCE, and inputs in the order of their groups.
    """
    write(weightops.pack, source, out, bits=int(bits), **options)
