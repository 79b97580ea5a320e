"""weightops imatrix"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import run_options, write
from weightops.cli.params import DEVICE, OUT, SEED, SOURCE, WRITE_CODES, Command, epilog, some


@click.command("imatrix", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option(
    "-o",
    "--out",
    type=OUT,
    required=True,
    help="File to write: NAME.gguf, or NAME.dat, which older programs read. It appears when it is complete.",
)
@click.option(
    "--calibration",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to calibrate with: a text file or JSONL. Can be given several times.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    default=128,
    show_default=True,
    help="Number of pieces of the text to calibrate with.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(8),
    metavar="N",
    help="Tokens in each piece of the text; default: 512, or as many as the model has positions.",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help=SEED)
@click.option(
    "--device",
    default="auto",
    shell_complete=some("auto", "cpu", "cuda"),
    show_default=True,
    metavar="DEVICE",
    help=DEVICE,
)
@run_options
def command(source: Path | str, out: Path | str, **options: Any) -> None:
    """Measure on a text which weights of a model matter most, for quantising to GGUF.

    The text runs through the model, and of what enters each linear layer the squares are summed up, column by column:
    an importance matrix. With it `weightops convert --imatrix` and llama-quantize keep errors small where inputs are
    large, which helps most below 5 bits. SOURCE is a model that transformers knows, with its tokenizer: a folder,
    hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops imatrix ./model --calibration ./text.txt --out ./model-imatrix.gguf
      weightops convert ./model --to gguf --dtype iq4_xs --imatrix ./model-imatrix.gguf --out ./model-iq4_xs.gguf

    One block of the model is in memory at a time; an interrupted run continues at its block when the same command is
    given again. The file is what llama-imatrix writes.
    """
    write(weightops.imatrix, source, out, **options)
