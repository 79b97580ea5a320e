"""weightops extract-lora"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import GLOB, SEED, SOURCE, WRITE_CODES, Command, OneOf, epilog


@click.command("extract-lora", cls=Command, epilog=epilog(WRITE_CODES))
@click.option("--base", type=SOURCE, required=True, help="The model before it was tuned.")
@click.option("--tuned", type=SOURCE, required=True, help="The model after it was tuned.")
@out_option
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="The rank of every layer; with --energy the highest that a layer may get.",
)
@click.option(
    "--energy",
    type=float,
    metavar="SHARE",
    help="Give each layer the least rank that holds this share of its change, such as 0.9.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --energy and without --rank: the highest rank that a layer may get; default: 256.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help=SEED)
@click.option("--dtype", metavar="DTYPE", help="The number type of the adapter; default: float32.")
@click.option(
    "--target",
    multiple=True,
    metavar="GLOB",
    help=f"Adapt only layers of such names, as q_proj; default: all linear layers. {GLOB}",
)
@click.option(
    "--rest",
    type=OneOf(["save", "refuse", "drop"]),
    default="save",
    show_default=True,
    help="What to do with other tensors that differ: save them whole in the adapter, refuse, or drop them.",
)
@write_options
def command(base: Path | str, tuned: Path | str, out: Path, **options: Any) -> None:
    """Make a LoRA adapter of the difference between two models.

    With the adapter, peft makes of the first model the second one, as nearly as the rank of the adapter allows: a
    higher rank holds more of the difference, and makes a larger file. Give --rank, or --energy for the least rank that
    holds a share of the change.

    \b
    Example:
      weightops extract-lora --base ./llama-13b --tuned ./zhixi --rank 16 --out ./zhixi-lora
      weightops extract-lora --base ./llama-13b --tuned ./zhixi --energy 0.9 --dtype bfloat16 --out ./zhixi-lora

    Each linear layer that differs gets the two factors of its truncated singular value decomposition. How much of the
    change they hold is shown, and recorded in weightops-manifest.json. Embeddings, norms and biases that differ are
    kept whole in the adapter. Experts of which transformers stacks the weights are adapted as peft 0.21 does it.
    """
    write(api.extract_lora, base, tuned, out, **options)
