"""weightops experts"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import SEED, SOURCE, WRITE_CODES, Command, OneOf, epilog, named


@click.command("experts", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE, required=False)
@out_option
@click.option(
    "--layout",
    type=OneOf(named("layouts.experts", "Layout")),
    help="How the experts of a layer are to lie: stacked in two tensors, as transformers 5 holds them, or each in its "
    "own, as most models are published.",
)
@click.option(
    "--keep",
    metavar="LIST|FILE",
    help="Keep these experts: 0,2,4-7 in all layers, or a JSON file with a list, with one for each layer, or with "
    "scores: what `weightops eval --experts` writes.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --keep FILE of scores: keep the N best of each layer.",
)
@click.option(
    "--by",
    type=OneOf(("reap", "frequency")),
    help="What is best: the router's weight times the length of what an expert gives, by token that comes to it (reap, "
    "the default), or how many tokens come (frequency).",
)
@click.option("--per-token", type=click.IntRange(min=1), help="How many experts a token takes from now on.")
@click.option(
    "--ungroup",
    is_flag=True,
    help="With --keep, of a router that chooses among groups of experts: let it choose among all of them instead, "
    "where groups would not keep as many. What it chooses changes.",
)
@click.option(
    "--from-dense",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Make a mixture of dense models: a YAML file in mergekit-moe's language. There is no SOURCE then.",
)
@click.option("--seed", type=click.IntRange(min=0), help=SEED)
@write_options
def command(source: Path | str | None, out: Path, **options: Any) -> None:
    """Stack, take apart, drop or make the experts of a mixture.

    Programs differ in how they want the experts of a layer: all in one tensor, or each apart. Both hold the same
    numbers, and everything else in the model stays what it is. SOURCE is a folder, a weight file,
    hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops experts ./qwen3-moe --layout stacked --out ./qwen3-moe-stacked
      weightops experts ./qwen3-moe --keep 0-1 --out ./qwen3-moe-2
      weightops experts --from-dense moe.yml --out ./mixture

    With --keep the experts that are left are numbered anew; their rows of the router follow, and so does every count in
    config.json. What cannot be is refused before anything is written: fewer experts than a token takes, other numbers
    in different layers, groups of different sizes. Which experts to keep, weightops eval --experts measures on a text
    of yours.

    A mixture of dense models (--from-dense) has the attention and embeddings of the base and the MLPs of each model.
    With gate_mode cheap_embed the router goes by the embeddings of the prompts in the file, with random or
    uniform_random it is drawn from --seed and is to be trained.
    """
    write(weightops.experts, source, out, **options)
