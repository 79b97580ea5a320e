"""weightops recover"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.options import SOURCE, WRITE_CODES, OneOf, epilog, write, write_options
from weightops.operations.recover import VOCAB_POLICIES


@click.command("recover", epilog=epilog(WRITE_CODES))
@click.option("--raw", type=SOURCE, required=True, help="The raw (base) checkpoint.")
@click.option("--diff", type=SOURCE, required=True, help="The delta: published by subtraction, or made by diff.")
@click.option(
    "--vocab",
    type=OneOf(VOCAB_POLICIES),
    default="refuse",
    show_default=True,
    help="What new embedding rows are added to: the mean of the old (Alpaca), zero, or nothing (LLaVA).",
)
@click.option("--dtype", metavar="DTYPE", help="Convert both to this dtype first; default: the diff's own.")
@click.option("--carry", multiple=True, metavar="GLOB", help="Take tensors that raw lacks from the diff as they are.")
@click.option("--drop", multiple=True, metavar="GLOB", help="Leave out tensors of raw that the diff lacks.")
@write_options
def command(raw: Path | str, diff: Path | str, out: Path, **options: Any) -> None:
    """Recover tuned weights from raw weights and a delta, streaming.

    An exact delta (from `weightops diff`) is refused with a wrong base before anything is written, and gives the
    tuned weights to the bit. A published diff (KnowLM, Alpaca, Vicuna, LLaVA) is added in its own dtype. If the
    run is killed, the same command continues. Both may be a folder, a weight file, hf://org/name[@revision] or a
    URL; what comes over the network is held against its digests, and not kept.

    \b
    Example:
      weightops recover --raw ./llama-13b --diff ./zhixi-diff --out ./zhixi
      weightops recover --raw ./llama-13b --diff hf://zjunlp/knowlm-13b-diff --out ./zhixi
      weightops recover --raw ./llama-13b --diff ./zhixi-diff --out ./zhixi \\
          --format torch-1.12 --max-shard-size 10GB --expect zhixi-13b-base
    """
    write(api.recover, raw, diff, out, **options)
