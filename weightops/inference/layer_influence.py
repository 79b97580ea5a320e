"""How much each block of a model changes of what passes through it: which layers could be left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from weightops.inference.figures import Estimate, LayerFigures
from weightops.inference.model import BlockModel

_ENDS_NBYTES = 256 << 20
"""States of last tokens that are kept: of a model of 80 blocks and 8192 elements those of 100 windows in float32."""


class LayerInfluence:
    """Block influence, and angular distances between the inputs of blocks, while a model is run.

    Block influence (ShortGPT, arXiv 2403.03853) is added up as the states pass. Angular distances (arXiv 2403.17887)
    are of the last tokens of windows, whose states are kept for all blocks: those of as many windows as take 256 MiB.
    """

    def __init__(self, model: BlockModel, windows: torch.Tensor) -> None:
        """`windows` `[n, seq_len]` are the tokens that the model will be run on."""
        self._model = model
        depth = len(model.blocks)
        count = max(1, _ENDS_NBYTES // ((depth + 1) * model.hidden_size * model.dtype.itemsize))
        self._ends = torch.empty((depth + 1, min(count, len(windows)), model.hidden_size), dtype=model.dtype)
        self._sums = [(0, 0.0, 0.0)] * depth

    @contextmanager
    def around(self, i: int) -> Iterator[None]:
        """Measure block `i`, which is loaded, for the length of a `with` block."""
        seen = 0

        def measure(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal seen
            before, after = inputs[0], output[0] if isinstance(output, tuple | list) else output
            chosen = slice(seen, seen + len(before))
            kept = self._ends.shape[1]
            if seen < kept:
                self._ends[i, chosen] = before[: kept - seen, -1].to(self._ends)
                if i == len(self._model.blocks) - 1:
                    self._ends[i + 1, chosen] = after[: kept - seen, -1].to(self._ends)
            seen += len(before)
            self._add(i, before, after)

        handle = self._model.module.get_submodule(self._model.blocks[i]).register_forward_hook(measure)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, i: int, before: torch.Tensor, after: torch.Tensor) -> None:
        # 1 - cos is half the squared distance of the unit vectors, which keeps its digits where the two are all but the
        # same.
        apart = _unit(after.float()).sub_(_unit(before.float())).square().sum(-1, dtype=torch.float64) / 2
        count, total, squares = self._sums[i]
        self._sums[i] = count + apart.numel(), total + float(apart.sum()), squares + float(apart.square().sum())

    def figures(self) -> LayerFigures:
        """What was measured, when all blocks have been run over all windows."""
        places, windows, _ = self._ends.shape
        angles = torch.zeros((places, places), dtype=torch.float64)
        for window in range(windows):
            ends = _unit(self._ends[:, window].double())
            angles += (ends @ ends.T).clamp(-1, 1).acos() / math.pi
        angles /= windows
        distances = tuple(tuple(angles.diagonal(n).tolist()) for n in range(1, places))
        return LayerFigures(
            influence=tuple(_estimate(*sums) for sums in self._sums), distances=distances, windows=windows
        )


def _unit(states: torch.Tensor) -> torch.Tensor:
    """Vectors in the last dimension divided by their lengths."""
    return nn.functional.normalize(states, dim=-1, eps=torch.finfo(states.dtype).tiny)


def _estimate(count: int, total: float, squares: float) -> Estimate:
    mean = total / count
    variance = max(0.0, squares / count - mean**2)
    return Estimate(value=mean, error=math.sqrt(variance / (count - 1)) if count > 1 else math.inf)
