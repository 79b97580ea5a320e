"""The linear layers of one block, solved in turn.

Follows GPTQ (Frantar et al., arXiv:2210.17323) with its true-sequential order: layers are solved with the inputs that
already quantised layers before them give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from weightops.engine.control import Control
from weightops.inference.finite import check_finite
from weightops.inference.model import BlockModel
from weightops.io.platform.machine import release_freed
from weightops.ops.gptq.solver import (
    Factor,
    Hessian,
    Solved,
    dequantized,
    factorise,
    output_power,
    round_to_nearest,
    solve_together,
)
from weightops.quantization.kept import Kept
from weightops.quantization.options import ModuleReport, Options
from weightops.quantization.walk import Walk
from weightops.quantization.work import Hidden

_EXPERT = re.compile(r"experts\.\d+\.")


class _Seen(Exception):
    """Raised to leave a block once the inputs that are wanted have been seen."""


class Block:
    """The linear layers of one block, which is loaded."""

    def __init__(self, model: BlockModel, i: int, names: Sequence[str], options: Options, control: Control) -> None:
        self._i, self._name, self._options, self._control = i, model.blocks[i], options, control
        block = model.module.get_submodule(self._name)
        self._layers = {name: linear_of(block, name) for name in names}

    def round(self) -> dict[str, tuple[Solved, ModuleReport]]:
        """Round each layer to nearest, and leave its weights as they will be read; results by full name."""
        found = {}
        for name, layer in self._layers.items():
            solved = round_to_nearest(layer.weight, self._options.settings, label=self._full(name))
            found[self._full(name)] = self._settle(name, solved, 0, None)
        return found

    @torch.no_grad()
    def solve(self, walk: Walk, spare_nbytes: int) -> dict[str, tuple[Solved, ModuleReport]]:
        """Solve each layer with what those before it give, and write what leaves the block; results as of `round`."""
        found: dict[str, tuple[Solved, ModuleReport]] = {}
        with walk.inputs(self._i) as inputs:
            turns = self._turns(walk, inputs)
            together = max((sum(map(self._hessian_nbytes, turn)) for turn in turns), default=0)
            with Kept(max(0, spare_nbytes - together)) as kept:
                for turn in turns:
                    for groups in _filled(turn, self._hessian_nbytes, spare_nbytes):
                        self._solve_groups(groups, walk, inputs, kept, found)
                left = [name for name in self._layers if name not in found]
                self._solve_group(left, 0, "no calibration token came to it", found)
                if self._i + 1 < len(walk.model.blocks):
                    self._leave(walk, inputs, kept)
        return {self._full(name): found[name] for name in self._layers}

    def _full(self, name: str) -> str:
        return f"{self._name}.{name}"

    def _hessian_nbytes(self, group: Sequence[str]) -> int:
        return 4 * self._layers[group[0]].in_features ** 2

    def _solve_groups(
        self,
        groups: Sequence[Sequence[str]],
        walk: Walk,
        inputs: Hidden,
        kept: Kept,
        found: dict[str, tuple[Solved, ModuleReport]],
    ) -> None:
        hessians = self._hessians(walk, inputs, kept, [group[0] for group in groups])
        release_freed()
        for group in groups:
            hessian = hessians.pop(group[0])
            tokens = hessian.tokens
            factor = factorise(hessian.matrix(), self._options.settings)
            del hessian
            self._solve_group(group, tokens, factor, found)
            for name in group:
                kept.add(name, self._layers[name])

    def _solve_group(
        self,
        names: Sequence[str],
        tokens: int,
        factor: Factor | str,
        found: dict[str, tuple[Solved, ModuleReport]],
    ) -> None:
        self._control.check()
        weights = {self._full(name): self._layers[name].weight for name in names}
        solved = solve_together(weights, factor, self._options.settings)
        for name in names:
            found[name] = self._settle(name, solved[self._full(name)], tokens, factor)

    def _leave(self, walk: Walk, inputs: Hidden, kept: Kept) -> None:
        """Write what leaves the block."""
        with walk.inputs(self._i + 1) as outputs:
            for a, b in walk.batches:
                self._control.check()
                kept.begin(a, is_last=True)
                states = walk.run(self._i, inputs, a, b)
                check_finite(walk.model, states, f"{self._name} gives")
                outputs.write(a, states)
            outputs.flush()

    def _turns(self, walk: Walk, inputs: Hidden) -> list[list[list[str]]]:
        """Groups of layers that are given the same input, and have one Hessian, in the order in which they run.

        The same layers of a mixture's experts do not hear of each other: their groups have one turn.
        """
        turns: dict[str, list[list[str]]] = {}
        for group in self._groups(walk, inputs):
            turns.setdefault(_EXPERT.sub("experts.*.", group[0]), []).append(group)
        return list(turns.values())

    def _groups(self, walk: Walk, inputs: Hidden) -> list[list[str]]:
        """Layers that are given the same input, which have one Hessian, in the order in which they run.

        Samples are run until every layer was called: not every expert is by the first. Some may never be.
        """
        seen: list[tuple[str, Tensor]] = []
        groups: list[list[str]] = []
        left = set(self._layers)

        def hook(name: str) -> Any:
            return lambda module, args: seen.append((name, args[0]))

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in self._layers.items()]
        try:
            for sample in range(walk.batches[-1][1]):
                self._control.check()
                walk.run(self._i, inputs, sample, sample + 1)
                last: Tensor | None = None
                for name, states in seen:
                    is_same = last is not None and last.data_ptr() == states.data_ptr() and last.shape == states.shape
                    if name in left:
                        left.remove(name)
                        groups = [*groups[:-1], [*groups[-1], name]] if is_same else [*groups, [name]]
                    last = states
                seen.clear()
                if not left:
                    break
        finally:
            for handle in handles:
                handle.remove()
        return groups

    def _hessians(self, walk: Walk, inputs: Hidden, kept: Kept, leaders: Sequence[str]) -> dict[str, Hessian]:
        """The Hessians of the inputs of some layers, over all calibration data."""
        hessians = {name: Hessian(self._layers[name].in_features, walk.model.device) for name in leaders}

        def hook(name: str) -> Any:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                hessians[name].add(args[0].flatten(0, -2))
                if len(leaders) == 1:
                    raise _Seen

            return see

        handles = [self._layers[name].register_forward_pre_hook(hook(name)) for name in leaders]
        try:
            for a, b in walk.batches:
                self._control.check()
                kept.begin(a)
                with suppress(_Seen):
                    walk.run(self._i, inputs, a, b)
        finally:
            for handle in handles:
                handle.remove()
        return hessians

    def _settle(
        self, name: str, solved: Solved, tokens: int, factor: Factor | str | None
    ) -> tuple[Solved, ModuleReport]:
        """Put the quantised weight in place of the layer's own, and report on it."""
        layer, error, error_rtn = self._layers[name], None, None
        if isinstance(factor, Factor):
            whole = output_power(layer.weight, factor)
            error, error_rtn = (found / whole if whole else 0.0 for found in (solved.loss, solved.error_rtn))
        layer.weight.data = dequantized(solved).to(layer.weight.dtype)
        self._control.progress.advance(layer.weight.nbytes)
        report = ModuleReport(
            module=self._full(name),
            in_features=layer.in_features,
            out_features=layer.out_features,
            tokens=tokens,
            error=error,
            error_rtn=error_rtn,
            damp=solved.damp,
            dead_columns=solved.dead_columns,
            floored_scales=solved.floored_scales,
            fallback=solved.fallback,
        )
        return solved, report


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """A linear layer of a block by its name within it."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _filled(groups: Sequence[list[str]], nbytes: Callable[[list[str]], int], room: int) -> Iterator[list[list[str]]]:
    """Groups, as many together as there is room for; at least one."""
    chosen: list[list[str]] = []
    for group in groups:
        if chosen and sum(map(nbytes, chosen)) + nbytes(group) > room:
            yield chosen
            chosen = []
        chosen.append(group)
    yield chosen
