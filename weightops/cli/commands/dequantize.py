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
    type=NumberType(named("ops.numbers.affine", "DTYPES")),
    help="The number type of the weights; float32 keeps the exact numbers. Default: what the format's own library "
    "gives, mostly the type of the scales; of GGUF bfloat16, or what the file type says.",
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
    """Turn a quantised model back into a plain one.

    Read are GPTQ, AWQ, FP8, compressed-tensors, MXFP4, NVFP4, bitsandbytes, MLX, HQQ, torchao, quanto and GGUF; the
    tensors show which it is. Each weight is computed from its codes and scales and rounded once to the number type:
    what a program that runs the quantised model computes with. What quantising lost does not come back. SOURCE is a
    folder, a weight file, hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops dequantize ./deepseek-fp8 --out ./deepseek-bf16
      weightops dequantize './tigerbot/tigerbot-4bit-128g-*.pt' --dtype bfloat16 --out ./tigerbot-bf16
      weightops dequantize ./gguf/model-Q4_K_M.gguf --dtype float32 --out ./model-f32

    A pattern in quotes names torch files without an index, as TigerBot published them. A model whose tensors contradict
    its config.json is refused.

    GGUF files are read in every type of ggml's; tensors keep the names that they have there, and float32 values are
    what llama.cpp computes, to the bit. Any one of NAME-00001-of-00003.gguf stands for all of them.
    """
    write(weightops.dequantize, source, out, **options)
