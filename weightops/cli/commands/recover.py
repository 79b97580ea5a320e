"""weightops recover"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import GLOB, SOURCE, WRITE_CODES, Command, OneOf, epilog
from weightops.operations.recover import VOCAB_POLICIES


@click.command("recover", cls=Command, epilog=epilog(WRITE_CODES))
@click.option("--raw", type=SOURCE, required=True, help="The original model.")
@click.option(
    "--diff", type=SOURCE, required=True, help="The difference: a published one, or one that `weightops diff` made."
)
@out_option
@click.option(
    "--vocab",
    type=OneOf(VOCAB_POLICIES),
    default="refuse",
    show_default=True,
    help="What the rows of new tokens are differences to: the mean of the old rows (Alpaca), zero, or nothing, as they "
    "are stored whole (LLaVA). By default new tokens are refused.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Convert both to this number type first, such as float16; default: that of the difference.",
)
@click.option(
    "--carry",
    multiple=True,
    metavar="GLOB",
    help=f"Take such tensors over from the difference if the original lacks them. {GLOB}",
)
@click.option(
    "--drop", multiple=True, metavar="GLOB", help=f"Leave such tensors out if only the original has them. {GLOB}"
)
@write_options
def command(raw: Path | str, diff: Path | str, out: Path, **options: Any) -> None:
    """Recover a tuned model from the original model and a difference.

    Many models of 2023 (KnowLM, Alpaca, Vicuna, LLaVA) were published as a difference to LLaMA, which their authors
    might not pass on. Given LLaMA and the difference, this writes the model. If it is interrupted, the same command
    continues.

    \b
    Example:
      weightops recover --raw ./llama-13b --diff ./zhixi-diff --out ./zhixi
      weightops recover --raw ./llama-13b --diff hf://zjunlp/knowlm-13b-diff --out ./zhixi
      weightops recover --raw ./llama-13b --diff ./zhixi-diff --out ./zhixi \\
          --format torch-1.12 --max-shard-size 10GB --expect zhixi-13b-base

    --raw and --diff are folders, weight files, hf://org/name[@revision] or URLs. What comes over the network is checked
    against its digests, and not kept. A published difference is added in its own number type, as the scripts of its
    authors do. A difference that `weightops diff` made gives back every bit, and with the wrong original it is refused
    before anything is written.
    """
    write(api.recover, raw, diff, out, **options)
