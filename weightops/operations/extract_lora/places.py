"""Where peft has the tensors of a model: in which module, and which of those it can give factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from weightops.checkpoint import Checkpoint
from weightops.formats.modules import last_part, shortest
from weightops.layouts.loaded_names import LoadedNames

_CONVERTED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""What peft 0.21 takes for layers of stacked experts wherever they are in a model that has some.

Source: `_MOE_TARGET_MODULE_MAPPING`.
"""


@dataclass(frozen=True)
class Place:
    """A tensor's `module`, and its name in there; `stacked` is the parameter that holds it with those of other experts.

    `module` is then that which factors are named by: peft stacks those as transformers stacks the weights.
    """

    module: str
    parameter: str
    stacked: str | None = None

    @property
    def path(self) -> str:
        """The tensor's own path."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def experts(self) -> str | None:
        """The module of all experts."""
        return self.stacked and self.stacked.rpartition(".")[0]


class Places:
    """The places of a model's tensors, by their names in files.

    They are those in transformers' model of config.json, where that has all that the files have and the files all that
    it has. Else, as for models of which only their own code knows, modules are called as in the files.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        # Sorted, because some renamings depend on what they have seen before.
        names, loaded = sorted(names), LoadedNames(checkpoint)
        self._places = {name: _place(loaded.of_file(name), loaded.stacked(name)) for name in names}
        filled = {place.stacked or place.path for place in self._places.values()}
        is_whole = loaded.parameters and all(loaded.is_converted(n) for n in loaded.parameters - filled)
        self._loaded = loaded if is_whole else None
        if self._loaded is None:
            self._places = {name: _place(name, None) for name in names}

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def is_known(self, name: str) -> bool:
        """Whether the tensor is a parameter or a buffer of the model as it is in the file."""
        return self._loaded is None or self._loaded.has(self[name].path)

    def may_be_linear(self, name: str) -> bool:
        """Whether nothing speaks against the weight being that of a Linear layer, or of one of an expert."""
        return self._loaded is None or self[name].stacked is not None or self[name].module in self._loaded.linears

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """All modules of the model, or those that names in files speak of."""
        if self._loaded is not None:
            return self._loaded.modules
        parts = [place.module.split(".") for place in self._places.values()]
        return tuple({".".join(each[:depth]): None for each in parts for depth in range(1, len(each) + 1)})

    @cached_property
    def _stacked(self) -> frozenset[str]:
        return frozenset(place.stacked for place in self._places.values() if place.stacked)

    def parameter(self, target: str) -> str | None:
        """The parameter by which peft can have what is to get factors, a module or stacked experts; None by its module.

        In a model with stacked experts, layers that are called as theirs once were can only be had by their parameter.
        """
        if target in self._stacked:
            return target
        return f"{target}.weight" if self._stacked and last_part(target) in _CONVERTED else None

    def shortest(self, modules: Iterable[str]) -> list[str]:
        """`target_modules` that fits these and no others of the model's."""
        return shortest(modules, self.modules)


def _place(name: str, stacked: str | None) -> Place:
    module, _, parameter = name.rpartition(".")
    return Place(module, parameter, stacked)
