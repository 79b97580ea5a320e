"""What options are called: one name each, that of the parameter of the operation.

A parameter `max_rank` is `--max-rank` on the command line, `max_rank=` in Python and `max_rank:` (or `max-rank:`) in
a recipe. One that Python reserves ends in an underscore there, and only there: `from_`. What may be turned off is
`--no-NAME` on the command line, False in Python, and `NAME: false` or `no-NAME: true` in a recipe. Something of which
there may be several has a name in the singular: `--digest md5 --digest sha256`, `digest=("md5", "sha256")`.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping

OUTPUT = "output"
"""Stands below for what a recipe says of its outputs, and for the options of every command that writes."""

OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    "convert": {"layout": "from", "settings": "set"},
    "merge-lora": {"weights": "weight"},
    "extract-lora": {"targets": "target"},
    OUTPUT: {"digests": "digest"},
}
"""What options were called in 0.1, by operation: recipes and the command line still read these, and nothing else."""


def parameter_of(field: str, operation: str) -> str:
    """The parameter that a field of a recipe, or an option without its dashes, is about."""
    name = field.replace("-", "_")
    name = OLD_NAMES.get(operation, {}).get(name, name)
    return f"{name}_" if keyword.iskeyword(name) else name


def field_of(parameter: str) -> str:
    """What a recipe calls a parameter."""
    return parameter.removesuffix("_")


def spelled(value: str, known: Iterable[str]) -> str:
    """The one of the known names that `value` is, dashes and underscores being alike; else `value` itself."""
    return next((name for name in known if name.replace("_", "-") == value.replace("_", "-")), value)
