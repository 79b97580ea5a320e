"""weightops edit"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import SEVERAL, SOURCE, WRITE_CODES, Command, epilog
from weightops.errors import UsageError
from weightops.io.escape import escape


@click.command("edit", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("steps", type=SOURCE, metavar="STEPS|SOURCE")
@out_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of a model: set this in config.json. Dots stand for what is within, as in text_config.vocab_size; a value is "
    "read as YAML. rope.type, rope.factor and the like are written as all versions of transformers read them. "
    f"{SEVERAL}",
)
@click.option("--unset", multiple=True, metavar="NAME", help=f"Of a model: take this out of config.json. {SEVERAL}")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=PLACE",
    help="Where a source of the file lies; overrides what the file says.",
)
@write_options
def command(
    steps: Path | str,
    out: Path,
    settings: Sequence[str],
    unset: Sequence[str],
    sources: Sequence[str],
    **options: Any,
) -> None:
    """Change the tensors and settings of a model by steps that a file lists.

    STEPS is a YAML file; places in it count from its folder. With a model (SOURCE) in its stead, only settings of its
    config.json are changed. What cannot be, such as a rotary scaling that the model would not load with, is refused.

    Each step selects tensors by a regular expression that whole names match, does one thing with them, and names the
    results. What no step selects stays what it is, to the bit.

    \b
    Example:
      weightops edit steps.yml --out ./edited
      weightops edit ./qwen3-8b --set rope.type=yarn --set rope.factor=4 --out ./qwen3-8b-long

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
    named = dict(_pair(text, "--source base=./model") for text in sources)
    if str(steps).endswith((".yml", ".yaml")):
        if settings or unset:
            raise UsageError("--set and --unset are for a model; a file of steps says them", hint="config: {set: {}}")
        write(weightops.edit, steps, out, sources=named, **options)
        return
    if named:
        raise UsageError("--source says where sources of a file of steps lie", hint="weightops edit steps.yml")
    config = {"set": {name: _value(text) for name, text in (_pair(s, "--set name=value") for s in settings)}}
    write(weightops.edit, (), out, source=steps, config={**config, "unset": list(unset)}, **options)


def _pair(text: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{escape(text)}: expected a name and a value", hint=example)
    return name, value


def _value(text: str) -> Any:
    """A value as YAML has it; raises `UsageError`."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"{escape(text)}: not YAML", hint="put text in quotes") from None
