"""How far each quantised linear layer's output is from that of the layer it was made from, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from weightops.errors import IncompatibleInputs
from weightops.inference.model import BlockModel

_SAMPLE_TOKENS = 4096


class ModuleErrors:
    """Relative squared output errors `sum((y - y_ref)^2) / sum(y_ref^2)` by module, while a model is run.

    The inputs are those that the module gets in the quantised model; `y_ref` is what the module of the reference
    makes of them. The first 4096 tokens are used. Blocks of both models are in memory at a time.
    """

    def __init__(self, model: BlockModel, reference: BlockModel) -> None:
        """Raises `IncompatibleInputs` if a quantised module of `model` has no counterpart of its shape."""
        self._model, self._reference = model, reference
        self._names = [_modules(model, block) for block in model.blocks]
        self._sums: dict[str, tuple[float, float]] = {}
        theirs = dict(reference.module.named_modules())
        for name in (name for names in self._names for name in names):
            own, other = model.module.get_submodule(name), theirs.get(name)
            shape = tuple(own.get_parameter("weight").shape)
            found = tuple(other.get_parameter("weight").shape) if isinstance(other, type(own)) else None
            if found != shape:
                raise IncompatibleInputs(
                    f"{model.shown}: its {name} of shape {list(shape)} has no counterpart in {reference.shown}",
                    hint="give as --reference the checkpoint that it was quantised from",
                )

    @property
    def errors(self) -> dict[str, float]:
        """The errors so far, by module."""
        return {name: of / max(all_, 1e-30) for name, (of, all_) in self._sums.items()}

    @contextmanager
    def around(self, i: int) -> Iterator[Callable[[int], None] | None]:
        """Measure block `i`, which is loaded, for the length of a `with` block."""
        names = self._names[i]
        if not names:
            yield None
            return
        seen = 0
        is_measured = True
        block = self._model.blocks[i]

        def start(tokens: int) -> None:
            nonlocal seen, is_measured
            is_measured = seen < _SAMPLE_TOKENS
            if seen and not is_measured:
                self._reference.unload(block)
            seen += tokens

        with ExitStack() as stack:
            stack.enter_context(self._reference.loaded(block))
            for name in names:

                def measure(module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
                    if is_measured:
                        self._add(name, output, self._reference.module.get_submodule(name)(*inputs))

                stack.callback(self._model.module.get_submodule(name).register_forward_hook(measure).remove)
            yield start

    def _add(self, name: str, output: torch.Tensor, expected: torch.Tensor) -> None:
        squared = (output.float() - expected.float()).square().sum(dtype=torch.float64)
        total = expected.float().square().sum(dtype=torch.float64)
        of, all_ = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = of + float(squared), all_ + float(total)


def _modules(model: BlockModel, block: str) -> list[str]:
    """Names in the module of the quantised linear layers of a block."""
    sources = model.tensor_names(block).items()
    return [
        name.removesuffix(".weight")
        for name, source in sources
        if name.endswith(".weight") and source.removesuffix(".weight") in model.quantized
    ]
