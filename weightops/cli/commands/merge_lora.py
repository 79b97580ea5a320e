"""weightops merge-lora"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import SOURCE, WRITE_CODES, Command, OneOf, epilog


@click.command("merge-lora", cls=Command, epilog=epilog(WRITE_CODES))
@click.option(
    "--base",
    type=SOURCE,
    required=True,
    help="The model that the adapter was trained on, in float32, float16 or bfloat16.",
)
@click.option(
    "--adapter",
    type=SOURCE,
    required=True,
    multiple=True,
    help="The adapter: a folder with adapter_config.json, the weight file in it, or a GGUF file. "
    "Can be given several times.",
)
@out_option
@click.option(
    "--weight",
    type=float,
    metavar="FACTOR",
    multiple=True,
    help="How strongly to merge each adapter, in their order; 1 is as it was trained, -1 takes it off again.",
)
@click.option(
    "--precision",
    type=OneOf(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="What to compute in: float32 gives the bits of peft on this kind of processor, float64 the same bits on "
    "every one.",
)
@click.option(
    "--two-roundings", is_flag=True, help="Round the change before it is added, as peft does with safe_merge."
)
@write_options
def command(base: Path | str, adapter: tuple[Path | str, ...], out: Path, **options: Any) -> None:
    """Merge LoRA adapters into the model that they were trained on.

    The result is a model like any other, equal to the bit to what peft's merge_and_unload gives, and the model is never
    held in memory. Several adapters are merged one after the other.

    \b
    Example:
      weightops merge-lora --base ./llama-7b --adapter ./lora --out ./merged
      weightops merge-lora --base ./llama-7b --adapter ./style --adapter ./facts --weight 0.5 --weight 1 --out ./merged

    LoRA, rsLoRA and DoRA are merged, with ranks by pattern, biases, embeddings, modules_to_save, trained tokens and
    experts. Every tensor of an adapter is used, or the merge is refused before anything is written; so is one that
    changes nothing. Other weights that were trained with the adapter, such as LLaVA's non_lora_trainables.bin, are
    merged too or refused by name. If the adapter has a whole tokenizer, the result gets that one. What training has
    saved with the factors in it (base_layer beside lora_A) is merged too: name it as --base and as --adapter.
    """
    write(weightops.merge_lora, base, adapter, out, **options)
