"""What check says of layers against one another, whatever the architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.formats.modules import NUMBERED
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.restored import ROTARY_SUFFIX
from weightops.operations.check.report import Finding, Severity

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_FEW = 3
"""Modules of so few tensors may well be parts of a chain in which those between have none, such as activations."""

Shapes = dict[str, tuple[int, ...]]
Layers = dict[str, dict[int, Shapes]]
"""By what stands before the first number of a name: by that number, the shapes by what stands after it."""


def layers_of(checkpoint: Checkpoint) -> Layers:
    """The tensors of each layer of each stack of layers."""
    layers: Layers = {}
    for name, tensor in checkpoint.items():
        matched = NUMBERED.fullmatch(name)
        if matched and not name.endswith(ROTARY_SUFFIX):
            layers.setdefault(matched[1], {}).setdefault(int(matched[2]), {})[matched[3]] = tensor.spec.shape
    return {prefix: found for prefix, found in layers.items() if max(map(len, found.values())) >= _FEW}


def layer_findings(
    layers: Layers, severity: Severity, *, tensors: bool, shapes: Callable[[str], bool]
) -> Iterator[Finding]:
    """Layers that are not there, that lack `tensors` that most have, or whose `shapes` differ from those of most.

    `shapes` says of a tensor's name whether its shape is of interest.
    """
    for prefix, by_number in layers.items():
        count, last = len(by_number), max(by_number)
        if last >= count:
            missing = next(n for n in range(count) if n not in by_number)
            text = f"{escape(prefix)} has {count} layers up to number {last}, and no number {missing}"
            yield Finding(severity, "layers", f"{prefix}.{missing}", text, "is a file of the model missing?")
        (usual, times), *_ = Counter(map(frozenset, by_number.values())).most_common(1)
        if times <= count // 2:
            continue
        for number, found in sorted(by_number.items()) if tensors else ():
            # A layer that also has what others lack is of another kind, as the first ones of some mixtures of experts.
            if found.keys() < usual:
                lacking = [f"{prefix}.{number}.{suffix}" for suffix in usual - found.keys()]
                text = f"layer {number} of {escape(prefix)} lacks {listed(lacking)}, which {times} layers have"
                yield Finding(severity, "layers", min(lacking), text, "is a file of the model missing?")
        yield from _odd_shapes(prefix, by_number, usual, shapes)


def _odd_shapes(
    prefix: str, by_number: Mapping[int, Shapes], usual: Iterable[str], of_interest: Callable[[str], bool]
) -> Iterator[Finding]:
    for suffix in sorted(usual):
        shapes = {number: found[suffix] for number, found in sorted(by_number.items()) if suffix in found}
        (common, times), *_ = Counter(shapes.values()).most_common(1)
        odd = [number for number, shape in shapes.items() if shape != common]
        if not odd or times <= len(shapes) // 2 or not of_interest(f"{prefix}.{odd[0]}.{suffix}"):
            continue
        name = f"{prefix}.{odd[0]}.{suffix}"
        more = f", and {len(odd) - 1} more layers differ" if len(odd) > 1 else ""
        text = f"{escape(name)} is {list(shapes[odd[0]])}, in {times} layers it is {list(common)}{more}"
        yield Finding("warning", "layers", name, text)


def layer_count_findings(layers: Layers, config: Mapping[str, Any], severity: Severity) -> Iterator[Finding]:
    """The number of layers, which may be more by those that predict further tokens (DeepSeek-V3).

    That there are none at all is a finding where layers are known by their names, and so `severity` is an error.
    """
    key = next((key for key in _COUNTS if type(config.get(key)) is int), None)
    if key is None or (not layers and severity != "error"):
        return
    counts = {prefix: len(numbers) for prefix, numbers in layers.items()} or {"the checkpoint": 0}
    prefix, found = max(counts.items(), key=lambda item: item[1])
    stated, further = config[key], config.get("num_nextn_predict_layers")
    if found not in (stated, stated + further if type(further) is int else stated):
        text = f"config.json: {key} is {str(stated)[:80]}, {escape(prefix)} has {found} layers"
        hint = "is a file of the model missing?" if found < stated else "loading leaves the others out"
        yield Finding(severity, "config-layers", "config.json", text, hint)
