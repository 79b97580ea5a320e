"""weightops convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options
from weightops.layouts.source import SETTINGS
from weightops.operations.convert import READERS, WRITERS

_TARGETS = (*WRITERS, "safetensors", "torch")


def _settings(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not equals for _, equals, _ in pairs):
        raise click.BadParameter("expected NAME=VALUE", context, option)
    return {name.strip(): value.strip() for name, _, value in pairs}


@click.command("convert", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option("--to", type=OneOf(_TARGETS), required=True, help="The layout to write.")
@click.option("--from", "from_", type=OneOf(tuple(READERS)), help="The layout to read; default: by its names.")
@click.option("--model-parallel", type=click.IntRange(1, 64), help="Parts in Meta's layout; default: as the source.")
@click.option("--dtype", metavar="DTYPE", help="Convert weights to this dtype and count what is lost; default: none.")
@click.option(
    "--set",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_settings,
    help=f"What the files leave unsaid: {', '.join(SETTINGS)}.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="tokenizer.model or tokenizer.json, with what lies beside it; default: in the folder, or the one above.",
)
@click.option("--no-tokenizer", is_flag=True, help="Convert the weights alone.")
@click.option("--check", is_flag=True, help="First hold the source against its checklist.chk.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Convert a LLaMA or Mistral model into another layout, streaming and to the bit.

    \b
    hf               transformers: config.json, safetensors (or --format torch)
    meta             consolidated.NN.pth and params.json; any number of parts
    tencentpretrain  TencentPretrain: one .bin, or blocks with an index
    llama_inference  the same, with llama_inference's names
    gguf             llama.cpp: --dtype float32, float16, bfloat16, q8_0 or q4_0 (written only)

    Every tensor is used, or named with the reason why not. What a layout's files do not say, such as the context
    length of Meta's, is taken from the published model with these very numbers and reported, or asked for.
    `safetensors` and `torch` change the container alone, of any model.

    \b
    Example:
      weightops convert ./llama-2-7b --to hf --set context_length=4096 --out ./llama-2-7b-hf
      weightops convert ./llama-2-7b-hf --to meta --model-parallel 2 --out ./llama-2-7b-mp2
      weightops convert ./llama-2-7b-hf --to gguf --dtype q8_0 --out ./llama-2-7b-gguf
    """
    if options.pop("no_tokenizer"):
        if options["tokenizer"] is not None:
            raise click.UsageError("--tokenizer names one and --no-tokenizer does without: give one of the two.")
        options["tokenizer"] = False
    write(api.convert, source, out, **options)
