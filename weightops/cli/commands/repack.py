"""weightops repack"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import CHECKPOINT_FORMAT, CONTAINER, SOURCE, WRITE_CODES, Command, OneOf, epilog, named


@click.command("repack", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option("--to", type=OneOf(named("formats.quantized.containers", "Container")), required=True, help=CONTAINER)
@click.option(
    "--checkpoint-format",
    type=OneOf(named("formats.quantized.gptq", "CheckpointFormat")),
    help=f"Of a GPTQ source. {CHECKPOINT_FORMAT} Default: what the model says.",
)
@click.option(
    "--zero-overflow",
    type=OneOf(named("formats.quantized.gptq_zeros", "ZeroOverflow")),
    help="Of a source in gptq, what a stored zero point of all ones means; see weightops dequantize.",
)
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Put the integers of a quantised model into another container.

    GPTQ, AWQ and compressed-tensors store the same numbers in other words: integers, scales and zero points are moved
    as they are, and every weight stays what it was. Use it when the program that is to run the model reads another
    container. SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops repack ./model-awq --to gptq_v2 --out ./model-gptq
      weightops repack ./model-gptq --to compressed-tensors --out ./model-w4a16

    What the other container cannot hold is refused before anything is written: other than 4 bits or groups of several
    sizes in awq, act-order in awq and compressed-tensors, a zero point of 0 in gptq, scales in gptq and awq that
    float16 does not have. Models that quantise activations as well are refused, too.
    """
    write(weightops.repack, source, out, **options)
