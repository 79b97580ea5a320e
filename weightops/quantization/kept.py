"""Outputs of solved layers, kept in memory for the next runs of a block as long as there is room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


class Kept:
    """A block is run again for every turn of its layers, and what was solved gives what it gave: so it is kept.

    Of a LLaMA's block that is half of all products. Results are the same whatever there is room for: a layer that is
    not kept is computed again. A context manager; at its end layers are as they were.
    """

    def __init__(self, room_nbytes: int) -> None:
        self._room = room_nbytes
        self._outputs: dict[tuple[str, int, int], tuple[Tensor, int]] = {}
        self._calls: Counter[str] = Counter()
        self._batch = 0
        self._is_last = False
        self._layers: list[nn.Linear] = []

    def begin(self, batch: int, *, is_last: bool = False) -> None:
        """The block is about to be run with a batch of its inputs; for the last time, if nothing new is to be kept."""
        self._batch, self._is_last = batch, is_last
        self._calls.clear()

    def add(self, name: str, layer: nn.Linear) -> None:
        """This layer is solved: for the inputs of a batch it always gives the same from now on."""
        layer.forward = self._forward(name, layer.forward)  # type: ignore[method-assign, assignment]
        self._layers.append(layer)

    def _forward(self, name: str, compute: Forward) -> Forward:
        def forward(inputs: Tensor) -> Tensor:
            # A layer may be called several times in a run.
            key = (name, self._batch, self._calls[name])
            self._calls[name] += 1
            found = self._outputs.pop(key, None)
            # What was changed in place since then is not what the layer gave.
            output = compute(inputs) if found is None or found[0]._version != found[1] else found[0]
            self._room += found[0].nbytes if found is not None else 0
            if not self._is_last and output.nbytes <= self._room:
                self._room -= output.nbytes
                self._outputs[key] = (output, output._version)
            return output

        return forward

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward
        self._outputs.clear()
