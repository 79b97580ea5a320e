"""weightops pack"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options
from weightops.formats.quantized.gptq import CheckpointFormat
from weightops.ops.numbers.bitpack import BITS


@click.command("pack", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option("--bits", type=OneOf([str(bits) for bits in BITS]), required=True, help="Of each integer.")
@click.option("--group-size", type=int, required=True, metavar="N", help="Inputs that share a scale; -1 for all.")
@click.option(
    "--checkpoint-format",
    type=OneOf(get_args(CheckpointFormat)),
    default="gptq",
    show_default=True,
    help="gptq stores zero points minus one and cannot store 0; gptq_v2 stores them as they are.",
)
@write_options
def command(source: Path | str, out: Path, bits: str, **options: Any) -> None:
    """Make a GPTQ model of integers, scales and zero points that were computed elsewhere.

    For a layer NAME of K inputs and N outputs in G groups the source holds NAME.q, integers [K, N] from 0 to
    2^bits - 1; NAME.scales, floats [G, N]; NAME.zeros, the true zero points [G, N], 2^(bits-1) where there are none;
    NAME.g_idx, the group of each input, in their order where there is none; NAME.bias. Other tensors are copied.

    \b
    Example:
      weightops pack ./integers --bits 4 --group-size 128 --out ./model-4bit
    """
    write(api.pack, source, out, bits=int(bits), **options)
