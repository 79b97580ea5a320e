"""What adapters hold beside factors: modules saved whole, biases of the base, trained tokens; and how it goes along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.lora import Adapter
from weightops.formats.adapter.values import differ
from weightops.formats.adapter.written import PREFIX
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor


@dataclass
class Carried:
    """Tensors by their names in an adapter's file, the settings that go with them, and what there is to say."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def refuse_beside(adapter: Adapter) -> None:
    """Raise `IncompatibleInputs` for weights that were trained with an adapter and lie in a file of their own."""
    if adapter.files:
        path, file = next(iter(adapter.files.items()))
        raise IncompatibleInputs(
            f"{escape(adapter.name)}/{escape(file)}: was trained with the adapter and holds {escape(path)}, which an "
            "adapter of peft has no place for",
            hint=f"merge-lora merges both; move {escape(file)} out of the folder to leave it out",
        )


def carry(adapters: Sequence[Adapter], weights: Sequence[float], evaluate: Evaluate) -> Carried:
    """What the adapters hold beside factors, where one alone has it or all that have it agree; it has no weight.

    Raises `IncompatibleInputs` naming the tensor for those of which two adapters hold other values.
    """
    carried = Carried()
    owners: dict[str, tuple[Adapter, LazyTensor]] = {}
    for adapter in adapters:
        refuse_beside(adapter)
        for name, tensor in _beside_factors(adapter).items():
            if name not in owners:
                owners[name] = (adapter, tensor)
                continue
            other, known = owners[name]
            if differ(known, tensor, evaluate):
                raise IncompatibleInputs(
                    f"{escape(other.name)} and {escape(adapter.name)} both hold "
                    f"{escape(name.removeprefix(PREFIX))} whole, with other values: there is no sum of the two",
                    hint="combine the adapters' factors alone, or merge the one into the base first",
                )
    carried.tensors = {name: tensor for name, (_, tensor) in owners.items()}
    carried.settings = _settings(adapters)
    for adapter, weight in zip(adapters, weights, strict=True):
        held = [name for name, (owner, _) in owners.items() if owner is adapter and not is_of_base(name)]
        if weight != 1 and held:
            carried.notes.append(
                f"{escape(adapter.name)}: holds {escape(held[0].removeprefix(PREFIX))} whole, which has no scale: it "
                f"is taken as it is, not {weight:g} times"
            )
    return carried


def is_of_base(name: str) -> bool:
    """Whether a tensor is the weight that factors are added to, which peft saves with those of embeddings."""
    return name.endswith(".base_layer.weight")


def _beside_factors(adapter: Adapter) -> dict[str, LazyTensor]:
    found = {f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": tensor for path, tensor in adapter.rows.items()}
    for path, tensor in adapter.base.items():
        module, _, parameter = path.rpartition(".")
        wrapper = "token_adapter.base_layer" if module in adapter.rows else "base_layer"
        found[f"{PREFIX}{module}.{wrapper}.{parameter}"] = tensor
    return found | {f"{PREFIX}{path}": tensor for path, tensor in adapter.whole.items()}


def _settings(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The settings that go with what is carried; raises `IncompatibleInputs` for tokens that cannot be joined."""
    found: dict[str, Any] = {}
    saved = dict.fromkeys(name for each in adapters for name in each.config.modules_to_save or ())
    if saved:
        found["modules_to_save"] = [*saved]
    biases = {each.config.bias for each in adapters} - {"none"}
    if len(biases) > 1:
        names = " and ".join(escape(each.name) for each in adapters if each.config.bias != "none")
        raise IncompatibleInputs(f"{names} trained other biases of the base: bias is {' and '.join(sorted(biases))}")
    if biases:
        found["bias"] = biases.pop()
    if any(each.config.ensure_weight_tying for each in adapters):
        found["ensure_weight_tying"] = True
    tokens = [each for each in adapters if each.config.trainable_token_indices]
    for each in tokens:
        for other in tokens:
            if _tokens(each) != _tokens(other):
                raise IncompatibleInputs(
                    f"{escape(each.name)} and {escape(other.name)} trained other tokens (trainable_token_indices)",
                    hint="merge the one into the base first",
                )
    if tokens:
        found["trainable_token_indices"] = tokens[0].config.trainable_token_indices
    return found


def _tokens(adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
    return {path: adapter.token_rows(path) for path in adapter.rows}
