"""weightops part"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import SEED, SOURCE, WRITE_CODES, Command, OneOf, epilog, named


@click.command("part", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option(
    "--take",
    type=OneOf(named("layouts.parts", "Part")),
    help="The part that is to be a model of its own: text is the language model, vision and audio are towers.",
)
@click.option("--graft", type=SOURCE, help="A language model to put in the place of the one in SOURCE.")
@click.option(
    "--drop",
    type=OneOf(named("operations.part.operation", "Droppable")),
    multiple=True,
    help="What to leave out: mtp are the layers that predict further tokens; their count becomes 0.",
)
@click.option("--mtp", type=SOURCE, help="A model whose layers that predict further tokens SOURCE is to get.")
@click.option(
    "--head",
    type=OneOf(named("operations.part.ends", "Head")),
    help="What is to stand at the end instead: none, or a new head that sorts texts or tokens by labels.",
)
@click.option("--labels", type=click.IntRange(min=1), help="Of a new head, how many labels there are.")
@click.option(
    "--init",
    type=OneOf(named("operations.part.ends", "Init")),
    default="zero",
    show_default=True,
    help="Of a new head, what it is before it is trained; normal is random, by --seed.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help=SEED)
@write_options
def command(source: Path | str, out: Path, **options: Any) -> None:
    """Cut a part out of a model, or put one into it.

    A model that sees holds a language model, which is one by itself once it has its own names and settings; trained
    further, it goes back in its place. The same goes for the layers that predict further tokens (MTP), which training
    programs lose. All other tensors stay what they are, to the bit. SOURCE is a folder, a weight file,
    hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops part ./gemma-3-4b-it --take text --out ./gemma-3-4b-text
      weightops part ./gemma-3-4b-it --graft ./gemma-3-4b-text-tuned --out ./gemma-3-4b-tuned
      weightops part ./deepseek-tuned --mtp ./deepseek-original --out ./deepseek-with-mtp

    The result is held against transformers' class for it before anything is written: a model that would load with
    random weights is refused. A language model that goes back must have the same tensors in the same shapes: rows of
    tokens too, since images have ids of their own.
    """
    write(weightops.part, source, out, **options)
