"""weightops convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import SEVERAL, SOURCE, WRITE_CODES, Command, NumberType, OneOf, epilog, named


def _targets() -> tuple[str, ...]:
    return (*named("operations.convert", "WRITERS")(), "llama", "safetensors", "torch")


def _settings(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not equals for _, equals, _ in pairs):
        raise click.BadParameter("expected NAME=VALUE", context, option)
    return {name.strip(): value.strip() for name, _, value in pairs}


@click.command("convert", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option("--to", type=OneOf(_targets), required=True, help="The layout to write; see above.")
@out_option
@click.option(
    "--from",
    "from_",
    type=OneOf(named("operations.convert", "READERS")),
    help="The layout to read; default: what the names of the tensors say.",
)
@click.option(
    "--model-parallel",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Number of files among which Meta's layout divides the model; default: as many as the source has, or 1.",
)
@click.option(
    "--dtype",
    type=NumberType(named("layouts.gguf.options", "DTYPES")),
    help="Convert the weights to this number type, and count what is lost; those from q8_0 on are for gguf, mixed as "
    "llama-quantize does.",
)
@click.option("--pure", is_flag=True, help="Give all quantised tensors of a GGUF file one type, instead of a mix.")
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weigh errors by this importance matrix when quantising to gguf; `weightops imatrix` makes one.",
)
@click.option(
    "--tensor-type",
    multiple=True,
    metavar="REGEX=TYPE",
    help=f"Give tensors of a GGUF file whose names match this type; the first that matches counts. {SEVERAL}",
)
@click.option("--output-tensor-type", metavar="TYPE", help="The type of output.weight in a GGUF file.")
@click.option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight in a GGUF file.")
@click.option(
    "--allow-requantize", is_flag=True, help="Quantise a GGUF file that is quantised already, which loses more."
)
@click.option(
    "--set",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_settings,
    help="Say what the files do not: context_length, rope_factor, rope_theta, norm_eps, n_heads, pre or instruct. "
    f"{SEVERAL}",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take this tokenizer.model or tokenizer.json, with what lies beside it; default: that of the source.",
)
@click.option("--no-tokenizer", is_flag=True, help="Convert the weights without a tokenizer.")
@click.option(
    "--base",
    type=SOURCE,
    help="The model that a LoRA adapter is for: a folder, its config.json, a GGUF file of it or hf://org/name; "
    "only the configuration of it is read. Default: what adapter_config.json names, where that is a folder.",
)
@click.option("--check", is_flag=True, help="First check the source against its checklist.chk.")
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Convert a model, or a LoRA adapter, into the files that another program reads.

    SOURCE is a folder, a weight file, hf://org/name[@revision] or a URL. Every bit of the weights is kept unless
    --dtype asks for another number type.

    \b
    Example:
      weightops convert ./llama-2-7b --to hf --set context_length=4096 --out ./llama-2-7b-hf
      weightops convert ./llama-2-7b-hf --to meta --model-parallel 2 --out ./llama-2-7b-mp2
      weightops convert ./qwen3-8b --to gguf --dtype q4_k_m --out ./qwen3-8b-q4_k_m.gguf
      weightops convert ./gguf/gemma-2-9b-Q4_K_M.gguf --to hf --out ./gemma-2-9b
      weightops convert ./my-lora --to gguf --base ./qwen3-8b --out ./my-lora.gguf

    \b
    What programs read is called a layout here:
      hf               transformers: config.json and safetensors files
      meta             Meta's own code: consolidated.NN.pth and params.json
      tencentpretrain  TencentPretrain: one .bin file, or several with an index
      llama_inference  llama_inference: the same under other names
      gguf             llama.cpp: one file
      llama            transformers' Llama, of a model that computes what Llama does
      safetensors      any model: other weight files, and nothing else changed
      torch            the same, as torch saves them

    LLaMA and Mistral models go from any layout into any other. Between hf and gguf go Mixtral, Qwen 2, Qwen 3 and their
    mixtures of experts, Gemma 1 to 3, Phi-3, Granite, OLMo 2, StarCoder2, Command R, DeepSeek V2 and V3, gpt-oss too,
    byte for byte as llama.cpp's own converter writes them, and back into what transformers saves. LoRA adapters for
    all of these go from what peft saves (hf) to gguf and back, in float32 or --dtype float16, bfloat16 or q8_0.

    With --to llama a Mistral, Qwen 2, Phi-3, Granite, MiniCPM, InternLM2, Baichuan 7B or Qwen 1 model becomes a Llama,
    which every program runs: fused projections are taken apart, missing biases are zero, factors of the settings go
    into the weights. It gives the same answers; where numbers are rounded for that, the report says so.

    A tensor that has no place in the new layout is named, with the reason. What the old files do not say, such as the
    context length of Meta's, is taken from the published model of just these sizes, and reported, or has to be said
    with --set.
    """
    if options.pop("no_tokenizer"):
        if options["tokenizer"] is not None:
            raise click.UsageError("--tokenizer names one and --no-tokenizer does without: give one of the two.")
        options["tokenizer"] = False
    write(weightops.convert, source, out, **options)
