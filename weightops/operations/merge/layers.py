"""Which tensors of a model are layers, and what is before and after them: by names, whatever the architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightops.layouts.layer_config import OTHER_TOWERS
from weightops.layouts.layers import NUMBERED, Stack
from weightops.operations.merge.parameters import position

_BEFORE = re.compile(rf"embed|(^|\.)(wte|wpe|shared)\b|projector|merger|connector|resampler|{OTHER_TOWERS.pattern}")
_AFTER = re.compile(r"embed_out\b|lm_head\b|(^|\.)mtp\b")


def positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor's layer is among its like, 0 the first and 1 the last; 0 for what is in no layer.

    Layers are modules that are numbered from 0 without a gap, outermost first: experts in a layer are none. Each stack
    of them counts for itself, as the towers of models for more than text do.
    """
    found = {name: matched for name in names if (matched := NUMBERED.fullmatch(name))}
    numbers: dict[str, set[int]] = {}
    for matched in found.values():
        if "." in matched["rest"]:  # what is directly in a numbered module, as in a Sequential, makes no layer
            numbers.setdefault(matched["prefix"], set()).add(int(matched["number"]))
    counts = {prefix: len(own) for prefix, own in numbers.items() if max(own) == len(own) - 1}
    return {
        name: position(int(matched["number"]), counts[matched["prefix"]])
        for name, matched in found.items()
        if matched["prefix"] in counts
    }


@dataclass(frozen=True)
class Parted:
    """A model's tensors: those before its layers, those after, and by layer what follows the number in their names.

    The last `n_further` layers predict further tokens.
    """

    prefix: str
    before: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    n_further: int

    def named(self, number: int) -> dict[str, str]:
        """The names of the tensors of a layer, by what follows the number; none if there is no such layer."""
        rests = self.layers[number] if number < len(self.layers) else ()
        return {rest: f"{self.prefix}.{number}.{rest}" for rest in rests}


def parted(names: Iterable[str], stack: Stack) -> Parted:
    """The tensors of a model whose layers are `stack`: embeddings and towers are before them, norms and heads after."""
    layers: list[list[str]] = [[] for _ in range(stack.count)]
    before, after = [], []
    for name in names:
        matched = NUMBERED.fullmatch(name)
        if matched and matched["prefix"] == stack.prefix:
            layers[int(matched["number"])].append(matched["rest"])
        elif _BEFORE.search(name) and not _AFTER.search(name):
            before.append(name)
        else:
            after.append(name)
    return Parted(stack.prefix, tuple(before), tuple(map(tuple, layers)), tuple(after), stack.n_mtp)


def in_modules(names: Iterable[str], modules: Sequence[str]) -> dict[str, list[str]]:
    """Names by the module whose name they begin with, the longest if several; under None those of no module.

    A single module whose name begins none has all of those.
    """
    names = list(names)
    found: dict[str, list[str]] = {module: [] for module in (*modules, "")}
    for name in names:
        fitting = [module for module in modules if module and f"{name}.".startswith(f"{module}.")]
        found[max(fitting, key=len, default="")].append(name)
    return found


def unnamed_modules(every: Mapping[str, Iterable[str]], modules: Sequence[str]) -> list[str]:
    """The modules whose names begin no tensor's name in any model."""
    return [
        module
        for module in modules
        if not any(f"{name}.".startswith(f"{module}.") for names in every.values() for name in names if module)
    ]
