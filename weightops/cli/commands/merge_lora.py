"""weightops merge-lora"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options


@click.command("merge-lora", epilog=epilog(WRITE_CODES))
@click.option("--base", type=SOURCE, required=True, help="The model that the adapter was trained on.")
@click.option(
    "--adapter",
    type=SOURCE,
    required=True,
    multiple=True,
    help="A folder with adapter_config.json, or the file in it; of several, one is merged after the other.",
)
@click.option("--weight", type=float, multiple=True, help="A factor for each adapter's scale, in their order.")
@click.option(
    "--precision",
    type=OneOf(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="float32: the bits of peft on this kind of CPU. float64: the same bits on every machine.",
)
@click.option("--two-roundings", is_flag=True, help="Round the change before it is added, as peft's safe_merge does.")
@write_options
def command(base: Path | str, adapter: tuple[Path | str, ...], out: Path, **options: Any) -> None:
    """Merge LoRA adapters into a base, to the bit as peft's merge_and_unload does, streaming.

    LoRA, rsLoRA and DoRA with patterns of ranks, biases, embeddings, modules_to_save, trained tokens and stacked
    experts, for bases in float32, float16 or bfloat16. Every tensor of the adapter is used, or the merge is refused
    before anything is written; so is one that changes nothing. What was trained beside it and is no LoRA, such as
    LLaVA's non_lora_trainables.bin, is merged too, or refused by name. An adapter's tokenizer goes along if it is
    whole.

    \b
    Example:
      weightops merge-lora --base ./llama-7b --adapter ./lora --out ./merged
      weightops merge-lora --base ./llama-7b --adapter ./style --adapter ./facts --weight 0.5 --weight 1 --out ./merged
    """
    write(api.merge_lora, base, adapter, out, **options)
