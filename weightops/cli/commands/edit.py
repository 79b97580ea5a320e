"""weightops edit"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import NO_ARCHITECTURE, SEVERAL, SOURCE, WRITE_CODES, Command, epilog
from weightops.errors import UsageError
from weightops.io.escape import escape


@click.command("edit", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option(
    "--set",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of a model: set this in config.json. Dots stand for what is within, as in text_config.vocab_size; a value is "
    "read as YAML. rope.type, rope.factor and the like are written as all versions of transformers read them. "
    f"{SEVERAL}",
)
@click.option("--unset", multiple=True, metavar="NAME", help=f"Of a model: take this out of config.json. {SEVERAL}")
@click.option(
    "--other",
    multiple=True,
    metavar="NAME=PLACE",
    help=f"Of a file of steps: where a source that it names lies, whatever the file says. {SEVERAL}",
)
@click.option("--no-architecture", is_flag=True, help=NO_ARCHITECTURE)
@write_options
def command(
    source: Path | str,
    out: Path,
    set: Sequence[str],
    unset: Sequence[str],
    other: Sequence[str],
    no_architecture: bool,
    **options: Any,
) -> None:
    """Change the tensors and settings of a model by steps that a file lists.

    SOURCE is a YAML file of steps, in which places count from its folder; or a model, of which --set and --unset change
    settings alone. What no step selects stays what it is, to the bit.

    \b
    Example:
      weightops edit steps.yml --out ./edited
      weightops edit ./qwen3-8b --set rope.type=yarn --set rope.factor=4 --out ./qwen3-8b-long

    Each step selects tensors by a regular expression that whole names match, does one thing with them, and names the
    results:

    \b
      edit:
        source: ./phi-3
        steps:
          - select: '(?P<p>model\\.layers\\.\\d+\\.self_attn)\\.qkv_proj\\.weight'
            split: {axis: 0, heads: [q, k, v]}
            name: ['{p}.q_proj.weight', '{p}.k_proj.weight', '{p}.v_proj.weight']
        config: {set: {model_type: llama, architectures: [LlamaForCausalLM]}}

    A step does one of: drop, take, split, concat, stack, unstack, transpose, view, fill, scale, lowrank, combine,
    project, fold, unit_rows; without any of them it renames. A step that selects nothing is an error, and so are two
    tensors of one name. The documentation describes each.
    """
    settings = {name: _value(text) for name, text in (_pair(s, "--set name=value") for s in set)}
    others = dict(_pair(text, "--other base=./model") for text in other)
    more: dict[str, Any] = {"set": settings, "unset": unset, "other": others, "architecture": not no_architecture}
    write(weightops.edit, source, out, **more, **options)


def _pair(text: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{escape(text)}: expected a name and a value", hint=example)
    return name, value


def _value(text: str) -> Any:
    """A value as YAML has it; raises `UsageError`."""
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UsageError(f"{escape(text)}: holds an alias (*name)", hint="write out what it stands for")
        return yaml.safe_load(text)
    except RecursionError:
        raise UsageError(f"{escape(text)[:80]}: nested too deep") from None
    except (yaml.YAMLError, ValueError):
        raise UsageError(f"{escape(text)}: not YAML", hint="put text in quotes") from None
