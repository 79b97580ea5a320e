"""The operations by name. An operation's signature is its schema: what it takes from, and what may be said of it.

Parameters that take a `Checkpoint`, perhaps none, or a sequence of them, are its sources; keyword-only ones are its
options; `evaluate` is handed in by whoever runs it, and so are `stores`, the places beyond paths, `names`, those of its
sources in their order, and what a step is given besides.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.recipes.names import spelled
from weightops.spec import DType, parse_dtype

VERBS = (
    *("recover", "diff", "convert", "shard", "cast", "merge-lora", "extract-lora", "dequantize", "pack", "repack"),
    *("merge", "experts", "part", "edit", "vocab"),
    *("combine-adapters", "resize-adapter", "convert-adapter"),
)
_PACKAGES = {"combine-adapters": "adapter", "resize-adapter": "adapter", "convert-adapter": "adapter"}
"""Where operations are that lie with others in one package."""
_SUPPLIED = ("evaluate", "stores", "names", "text", "file", "said")


@dataclass(frozen=True)
class Verb:
    """An operation. `roles` says of each source whether there may be several; `options` gives types by name.

    What has no default must be given.
    """

    name: str
    function: Callable[..., Checkpoint]
    roles: Mapping[str, bool]
    options: Mapping[str, Any]
    defaults: Mapping[str, Any]
    supplied: frozenset[str]

    def option(self, name: str, value: Any) -> Any:
        """An option's value as the operation wants it; raises `UsageError` if it cannot be that."""
        wanted = self.options[name]
        if DType in (wanted, *get_args(wanted)):
            if value is None or isinstance(value, DType):
                return value
            if not isinstance(value, str):
                raise UsageError(f"expected the name of a dtype, found {value!r}")
            return parse_dtype(value)
        if isinstance(value, str) and get_origin(wanted) is Sequence:
            value = [value]
        if isinstance(value, str):
            value = spelled(value, _literals(wanted))
        try:
            return msgspec.convert(value, wanted)
        except msgspec.ValidationError as error:
            raise UsageError(str(error).replace(" - at `$`", "").replace("`", "").lower()) from None
        except (AttributeError, TypeError):  # of an object that is none of JSON's
            raise UsageError(f"{name} is a {type(value).__name__}, which it cannot be") from None


def _literals(wanted: Any) -> list[str]:
    """The texts that a type lists."""
    if get_origin(wanted) is Literal:
        return [value for value in get_args(wanted) if isinstance(value, str)]
    return [value for part in get_args(wanted) for value in _literals(part)]


@cache
def find_verb(name: str) -> Verb:
    """The operation of that name, which is imported; raises `UsageError` if there is none."""
    if name not in VERBS:
        raise UsageError(f"unknown operation {name!r}", hint=f"known are {', '.join(VERBS)}")
    identifier = name.replace("-", "_")
    module = importlib.import_module(f"weightops.operations.{_PACKAGES.get(name, identifier)}")
    function = getattr(module, identifier)
    hints = get_type_hints(function)
    roles: dict[str, bool] = {}
    options: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        kind = hints[parameter.name]
        if kind in (Checkpoint, Checkpoint | None, Sequence[Checkpoint]):
            roles[parameter.name] = kind == Sequence[Checkpoint]
            if kind == Checkpoint | None:
                defaults[parameter.name] = None
        elif parameter.name not in _SUPPLIED:
            options[parameter.name] = kind
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    supplied = frozenset(_SUPPLIED) & parameters.keys()
    return Verb(name, function, roles, options, defaults, supplied)
