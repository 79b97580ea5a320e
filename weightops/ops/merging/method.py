"""What a method of merging is: a function of the tensors to be merged, whose signature is its schema.

    def slerp(inputs: Inputs, *, t: float) -> Blockwise: ...

Keyword-only parameters are what a merge file may say. One of type `Sequence[...]` has a value for each model, with one
for all as its default; any other is shared. The function reads the tensors as often as it must for what depends on the
whole of them (norms, thresholds), and returns the function that gives a block of the result from the same block of
each input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from weightops.spec import DType

if TYPE_CHECKING:
    import torch


class Blockwise(Protocol):
    """Gives a block of the result."""

    def __call__(self, blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        """From a block of each input, the element with number `first` of the tensor being the first in each.

        Blocks are flat, or `[rows, columns]` for a method that works by rows. The result has the tensors' dtype, or a
        wider one, and is rounded.
        """


@dataclass(frozen=True)
class Tallied:
    """A function of a block that depends on what there is before it.

    `tally` counts in a block, `compute` gets the sum of that over all blocks before it.
    """

    tally: Callable[[Sequence[torch.Tensor], int], Any]
    compute: Callable[[Sequence[torch.Tensor], int, Any], torch.Tensor]


Value = float | int | bool | None


@dataclass(frozen=True)
class Parameter:
    """What a method may be told: `kind` is float, int or bool; `default` is None where it must be said.

    `is_optional`: it may stay unsaid, and is None then. `of_each`: each model has its own value.
    """

    name: str
    kind: type[float] | type[int] | type[bool]
    default: Value
    is_optional: bool
    of_each: bool

    @property
    def is_needed(self) -> bool:
        """Whether it must be said."""
        return self.default is None and not self.is_optional


@dataclass(frozen=True)
class Method:
    """A way to merge tensors.

    `base`: whether the base model is `needed`, `optional`, or an `input` like any other. `others`: how many models
    there must be besides (of an `input`, in all), least and most. `by_rows`: its blocks are whole rows. `is_wide`: its
    result is float32 where its inputs have 16 bits. `is_random`: it draws masks. `check` gets the shared parameters and
    those of each model, and says what is wrong with them. `source` is the paper, or where there is none the program.
    `plugin` is the SHA-256 of the file that brought it, if one did.
    """

    function: Callable[..., Blockwise | Tallied]
    source: str
    base: Literal["needed", "optional", "input"]
    others: tuple[int, int | None] = (1, None)
    by_rows: bool = False
    is_wide: bool = False
    is_random: bool = False
    check: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], str | None] | None = None
    plugin: str | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """By the names that merge files use; `lambda_` is called `lambda` there."""
        hints = get_type_hints(self.function)
        found = {}
        for given in inspect.signature(self.function).parameters.values():
            if given.kind is not given.KEYWORD_ONLY:
                continue
            wanted, default = hints[given.name], None if given.default is given.empty else given.default
            of_each = get_origin(wanted) is Sequence
            if of_each:
                (wanted,) = get_args(wanted)
                default = None if default is None else default[0]
            kinds = [kind for kind in get_args(wanted) or (wanted,) if kind is not type(None)]
            name = given.name.rstrip("_")
            found[name] = Parameter(name, kinds[0], default, type(None) in get_args(wanted), of_each)
        return found

    @property
    def shared(self) -> Mapping[str, Parameter]:
        """The parameters that have one value for all models."""
        return {name: found for name, found in self.parameters.items() if not found.of_each}

    @property
    def of_each(self) -> Mapping[str, Parameter]:
        """The parameters that each model has its own value of."""
        return {name: found for name, found in self.parameters.items() if found.of_each}

    def dtype(self, inputs: DType) -> DType:
        """The type of the result, from that of the inputs."""
        return DType.F32 if self.is_wide and inputs.bits < 32 else inputs

    def start(
        self, inputs: Any, shared: Mapping[str, Value], of_each: Sequence[Mapping[str, Value]]
    ) -> Blockwise | Tallied:
        """Do what needs whole tensors; `of_each` has an entry for every input, an empty one for a needed base."""
        own = {name: [values.get(name) for values in of_each] for name in self.of_each}
        arguments = {self._argument(name): value for name, value in {**shared, **own}.items()}
        return self.function(inputs, **arguments)

    def _argument(self, name: str) -> str:
        return f"{name}_" if f"{name}_" in inspect.signature(self.function).parameters else name
