"""The calibration data on its way through the model: what enters each block, in files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from weightops.inference.model import BlockModel
from weightops.quantization.work import Hidden, Work

_BATCH_TOKENS = 2048
"""Tokens that go through a block together."""


class Walk:
    """The calibration data on its way through the model."""

    def __init__(self, model: BlockModel, tokens: Tensor, work: Work) -> None:
        self.model, self._work = model, work
        samples, length = tokens.shape
        self.batches = list(_batches(samples, max(1, _BATCH_TOKENS // length)))
        model.load("")
        # What blocks need beside hidden states depends on the shape of a batch alone: there is no padding.
        sizes = {1, *(b - a for a, b in (self.batches[0], self.batches[-1]))}
        self.kwargs = {size: model.embed(tokens[:size])[1] for size in sizes}
        self._shape = (samples, length, model.hidden_size)
        if work.n_done == 0:
            with work.hidden(0, self._shape) as states:
                for a, b in self.batches:
                    states.write(a, model.embed(tokens[a:b])[0])
                states.flush()
        model.unload("")

    def inputs(self, i: int) -> Hidden:
        return self._work.hidden(i, self._shape)

    def run(self, i: int, inputs: Hidden, first: int, stop: int) -> Tensor:
        states = inputs.read(first, stop).to(self.model.device, self.model.dtype)
        return self.model.run(i, states, self.kwargs[stop - first])


def _batches(samples: int, size: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + size, samples)) for a in range(0, samples, size))
