"""weightops edit"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import WRITE_CODES, Command, epilog
from weightops.errors import UsageError
from weightops.io.escape import escape


@click.command("edit", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("steps", type=click.Path(path_type=Path))
@out_option
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=PLACE",
    help="Where a source of the file lies; overrides what the file says.",
)
@write_options
def command(steps: Path, out: Path, sources: Sequence[str], **options: Any) -> None:
    """Change the tensors and settings of a model by steps that a file lists.

    Each step selects tensors by a regular expression that whole names match, does one thing with them, and names the
    results. What no step selects stays what it is, to the bit. STEPS is a YAML file; its places count from its folder.

    \b
    Example:
      weightops edit steps.yml --out ./edited

    \b
    where steps.yml is
      edit:
        source: ./phi-3
        steps:
          - select: '(?P<p>model\\.layers\\.\\d+\\.self_attn)\\.qkv_proj\\.weight'
            split: {axis: 0, heads: [q, k, v]}
            name: ['{p}.q_proj.weight', '{p}.k_proj.weight', '{p}.v_proj.weight']
        config: {set: {model_type: llama, architectures: [LlamaForCausalLM]}}

    A step does one of: drop, take, split, concat, stack, unstack, transpose, view, fill, scale, lowrank, combine,
    project, fold; without any of them it renames. A step that selects nothing is an error, and so are two tensors of
    one name. The documentation describes each.
    """
    named = dict(_pair(text) for text in sources)
    write(weightops.edit, steps, out, sources=named, **options)


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UsageError(f"--source {escape(text)}: expected NAME=PLACE", hint="--source base=./model")
    return name, place
