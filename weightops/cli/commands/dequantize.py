"""weightops dequantize"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import CHECKPOINT_FORMAT, SOURCE, WRITE_CODES, Command, NumberType, OneOf, epilog, named


@click.command("dequantize", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option(
    "--dtype",
    type=NumberType(named("operations.dequantize", "DTYPES")),
    help="The number type of the weights. Default: float16; of GGUF files bfloat16, or what their file type says.",
)
@click.option(
    "--checkpoint-format",
    type=OneOf(named("formats.quantized.gptq", "CheckpointFormat")),
    help=f"{CHECKPOINT_FORMAT} Default: what the model says.",
)
@click.option(
    "--zero-overflow",
    type=OneOf(named("formats.quantized.gptq_zeros", "ZeroOverflow")),
    help="In gptq, what a stored zero point of all ones means: 0 (wrap), 0 with a carry into the next one (carry), or "
    "one "
    "above the largest integer (plus-one).",
)
@click.option("--config", metavar="PATH", help="A config.json, or its folder, if none lies with the weights.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Turn a model that GPTQ or llama.cpp quantised back into a plain one.

    Each weight becomes its scale times its integer less the zero point, rounded once to the number type: what a program
    that runs the quantised model computes with. What quantising lost does not come back. SOURCE is a folder, a weight
    file, hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops dequantize ./model-4bit --out ./model
      weightops dequantize './tigerbot/tigerbot-4bit-128g-*.pt' --dtype bfloat16 --out ./tigerbot-bf16
      weightops dequantize ./gguf/model-Q4_K_M.gguf --dtype float32 --out ./model-f32

    Integers of 2, 3, 4 and 8 bits are read, in both versions of the format. A pattern in quotes names torch files
    without an index, as TigerBot published them. A model whose zero points contradict its config.json is refused.

    GGUF files are read in every type of ggml's, and tensors keep the names that they have there. In float32 the values
    are what llama.cpp computes, to the bit. Any one of NAME-00001-of-00003.gguf stands for all of them.
    """
    write(weightops.dequantize, source, out, **options)
