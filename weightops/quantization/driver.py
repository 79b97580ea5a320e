"""Quantising block by block: each is loaded, its linear layers solved in the order in which they run, and left behind.

The data walks through the model once. What enters a block is read from a file, what leaves it is written to the next
(`work`); of the model only one block is in memory, and of Hessians only those of the layers that share an input.
Follows GPTQ (Frantar et al., arXiv:2210.17323) with its true-sequential order: layers are solved with the inputs that
already quantised layers before them give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from weightops.engine.control import Control
from weightops.errors import UsageError
from weightops.formats.gptq import CheckpointFormat, write_module
from weightops.inference.model import BlockModel
from weightops.inference.windows import check_finite
from weightops.io.escape import escape
from weightops.ops.gptq import (
    Factor,
    Hessian,
    Settings,
    Solved,
    dequantized,
    factorise,
    output_power,
    round_to_nearest,
    solve,
)
from weightops.quantization.kept import Kept
from weightops.quantization.work import Hidden, Work

Method = Literal["gptq", "rtn"]
_BATCH_TOKENS = 2048
"""Tokens that go through a block together."""
_EXPERT = re.compile(r"experts\.\d+\.")


@dataclass(frozen=True)
class Options:
    """What is done to which layers. `skip`: globs of modules that stay as they are."""

    settings: Settings
    method: Method = "gptq"
    skip: tuple[str, ...] = ()
    checkpoint_format: CheckpointFormat = "gptq"


class ModuleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a linear layer.

    `error` and `error_rtn` are the squared error of its output over the calibration data, over the square of the
    output itself: of this layer as written, and of one rounded to nearest. `tokens` that were seen; `damp`, what share
    of the Hessian's mean diagonal was added to it; `floored_scales` that were too small for float16; `fallback`, why
    the layer was rounded to nearest after all.
    """

    module: str
    in_features: int
    out_features: int
    tokens: int = 0
    error: float | None = None
    error_rtn: float | None = None
    damp: float = 0.0
    dead_columns: int = 0
    floored_scales: int = 0
    fallback: str | None = None


def find_modules(model: BlockModel, options: Options) -> list[list[str]]:
    """The linear layers of each block that are to be quantised, by their names within it.

    Raises `UsageError` for layers that the format cannot hold, or if none is left.
    """
    size = options.settings.group_size
    found, odd = [], []
    for name in model.blocks:
        layers = []
        for inner, module in model.module.get_submodule(name).named_modules():
            full = f"{name}.{inner}"
            if not isinstance(module, nn.Linear) or any(fnmatchcase(full, glob) for glob in options.skip):
                continue
            layers.append(inner)
            k, n = module.in_features, module.out_features
            if k % 32 or n % 32 or (size > 0 and k % size):
                odd.append(f"{escape(full)} is {n} x {k}")
        found.append(layers)
    if odd:
        groups = f", and inputs by {size}" if size > 0 else ""
        raise UsageError(
            f"{len(odd)} layers do not fit: both sizes must be divisible by 32{groups}; {odd[0]}",
            hint="give another --group-size, or leave such layers as they are with --skip GLOB",
        )
    if not any(found):
        raise UsageError("there is no linear layer to quantise in the model's blocks")
    return found


def quantize_blocks(
    model: BlockModel,
    modules: Sequence[Sequence[str]],
    options: Options,
    tokens: Tensor,
    work: Work,
    control: Control,
    *,
    spare_nbytes: int = 0,
) -> None:
    """Quantise all blocks that `work` does not have yet, with calibration `tokens` `[samples, tokens]`.

    Beside a block and what solving one layer takes, `spare_nbytes` of memory are used to run blocks less often; the
    result does not depend on it. Raises `CorruptInput` for hidden states that are not finite, and `UsageError` for a
    model whose blocks are given something that depends on the tokens.
    """
    nbytes = [_nbytes(model, i, names) for i, names in enumerate(modules)]
    control.progress.start("quantising", sum(nbytes))
    done = work.n_done
    for i in range(done):
        control.progress.advance(nbytes[i])
        control.progress.finish_file(model.blocks[i], nbytes[i], resumed=True)
    walk = _Walk(model, tokens, work) if options.method == "gptq" and done < len(modules) else None
    for i in range(done, len(modules)):
        model.load(model.blocks[i])
        block = _Block(model, i, modules[i], options, control)
        solved = block.solve(walk, spare_nbytes) if walk is not None else block.round()
        reports = [report for _, report in solved.values()]
        tensors = {n: t for name, (found, _) in solved.items() for n, t in _packed(name, found, options).items()}
        work.commit(i, tensors, msgspec.to_builtins(reports))
        model.unload(model.blocks[i])
        control.progress.finish_file(model.blocks[i], nbytes[i], resumed=False)
    control.progress.stop()


def _nbytes(model: BlockModel, i: int, names: Sequence[str]) -> int:
    block = model.module.get_submodule(model.blocks[i])
    return sum(_linear(block, name).weight.nbytes for name in names)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _packed(name: str, found: Solved, options: Options) -> Mapping[str, Any]:
    q, zeros, scales, g_idx = (t.cpu().numpy() for t in (found.q, found.zeros, found.scales, found.g_idx))
    return write_module(name, q, zeros, scales, g_idx, None, options.settings.bits, options.checkpoint_format)


class _Walk:
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


def _filled(groups: Sequence[list[str]], nbytes: Callable[[list[str]], int], room: int) -> Iterator[list[list[str]]]:
    """Groups, as many together as there is room for; at least one."""
    chosen: list[list[str]] = []
    for group in groups:
        if chosen and sum(map(nbytes, chosen)) + nbytes(group) > room:
            yield chosen
            chosen = []
        chosen.append(group)
    yield chosen


class _Seen(Exception):
    """Raised to leave a block once the inputs that are wanted have been seen."""


class _Block:
    """The linear layers of one block, which is loaded."""

    def __init__(self, model: BlockModel, i: int, names: Sequence[str], options: Options, control: Control) -> None:
        self._i, self._name, self._options, self._control = i, model.blocks[i], options, control
        block = model.module.get_submodule(self._name)
        self._layers = {name: _linear(block, name) for name in names}

    def round(self) -> dict[str, tuple[Solved, ModuleReport]]:
        """Round each layer to nearest, and leave its weights as they will be read; results by full name."""
        found = {}
        for name, layer in self._layers.items():
            solved = round_to_nearest(layer.weight, self._options.settings, label=self._full(name))
            found[self._full(name)] = self._settle(name, solved, 0, None)
        return found

    @torch.no_grad()
    def solve(self, walk: _Walk, spare_nbytes: int) -> dict[str, tuple[Solved, ModuleReport]]:
        """Solve each layer with what those before it give, and write what leaves the block; results as of `round`."""
        found: dict[str, tuple[Solved, ModuleReport]] = {}
        with walk.inputs(self._i) as inputs:
            turns = self._turns(walk, inputs)
            together = max(sum(map(self._hessian_nbytes, turn)) for turn in turns)
            with Kept(max(0, spare_nbytes - together)) as kept:
                for turn in turns:
                    for groups in _filled(turn, self._hessian_nbytes, spare_nbytes):
                        self._solve_groups(groups, walk, inputs, kept, found)
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
        walk: _Walk,
        inputs: Hidden,
        kept: Kept,
        found: dict[str, tuple[Solved, ModuleReport]],
    ) -> None:
        settings = self._options.settings
        hessians = self._hessians(walk, inputs, kept, [group[0] for group in groups])
        for group in groups:
            hessian = hessians.pop(group[0])
            tokens = hessian.tokens
            factor = factorise(hessian.matrix(), settings) if tokens else "no calibration token came to it"
            del hessian
            for name in group:
                self._control.check()
                layer = self._layers[name]
                solved = solve(layer.weight, factor, settings, label=self._full(name))
                found[name] = self._settle(name, solved, tokens, factor)
                kept.add(name, layer)

    def _leave(self, walk: _Walk, inputs: Hidden, kept: Kept) -> None:
        """Write what leaves the block."""
        with walk.inputs(self._i + 1) as outputs:
            for a, b in walk.batches:
                self._control.check()
                kept.begin(a, is_last=True)
                states = walk.run(self._i, inputs, a, b)
                check_finite(walk.model, states, self._name)
                outputs.write(a, states)
            outputs.flush()

    def _turns(self, walk: _Walk, inputs: Hidden) -> list[list[list[str]]]:
        """Groups of layers that are given the same input, and have one Hessian, in the order in which they run.

        The same layers of a mixture's experts do not hear of each other: their groups have one turn.
        """
        turns: dict[str, list[list[str]]] = {}
        for group in self._groups(walk, inputs):
            turns.setdefault(_EXPERT.sub("experts.*.", group[0]), []).append(group)
        return list(turns.values())

    def _groups(self, walk: _Walk, inputs: Hidden) -> list[list[str]]:
        """Layers that are given the same input, which have one Hessian, in the order in which they run."""
        seen: list[tuple[str, Tensor]] = []

        def hook(name: str) -> Any:
            return lambda module, args: seen.append((name, args[0]))

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in self._layers.items()]
        try:
            walk.run(self._i, inputs, 0, 1)
        finally:
            for handle in handles:
                handle.remove()
        groups: list[list[str]] = []
        last: Tensor | None = None
        for name, states in seen:
            if last is not None and last.data_ptr() == states.data_ptr() and last.shape == states.shape:
                groups[-1].append(name)
            elif not any(name in group for group in groups):
                groups.append([name])
            last = states
        called = {name for name, _ in seen}
        return [*groups, *([name] for name in self._layers if name not in called)]

    def _hessians(self, walk: _Walk, inputs: Hidden, kept: Kept, leaders: Sequence[str]) -> dict[str, Hessian]:
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
