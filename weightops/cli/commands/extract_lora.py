"""weightops extract-lora"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options


@click.command("extract-lora", epilog=epilog(WRITE_CODES))
@click.option("--base", type=SOURCE, required=True, help="The model before training.")
@click.option("--tuned", type=SOURCE, required=True, help="The model after it.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the factors; with --energy the largest.")
@click.option(
    "--energy", type=float, metavar="SHARE", help="Choose for each layer the rank that holds so much, as 0.9."
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    help="Largest rank for --energy without --rank; default: 256.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random matrix.")
@click.option("--dtype", metavar="DTYPE", help="Of the factors; default float32.")
@click.option("--target", multiple=True, metavar="GLOB", help="Layers to adapt, such as q_proj; default all Linear.")
@click.option(
    "--rest",
    type=OneOf(["save", "refuse", "drop"]),
    default="save",
    show_default=True,
    help="What differs and is no Linear weight: kept whole in the adapter, an error, or left out.",
)
@write_options
def command(base: Path | str, tuned: Path | str, out: Path, **options: Any) -> None:
    """Make a LoRA adapter of the difference between two models.

    Each Linear weight that differs gets factors of the rank that is given, or of the least one that holds a share of
    the change: its truncated singular value decomposition, made by streaming, whatever the size of the model.
    Embeddings, norms and biases that differ are kept whole. peft loads the adapter; the manifest says for each layer
    how much of the change it holds. Experts that transformers stacks are targeted by their parameters, as peft 0.21
    loads them.

    \b
    Example:
      weightops extract-lora --base ./llama-13b --tuned ./zhixi --rank 16 --out ./zhixi-lora
      weightops extract-lora --base ./llama-13b --tuned ./zhixi --energy 0.9 --dtype bfloat16 --out ./zhixi-lora
    """
    write(api.extract_lora, base, tuned, out, **options)
