"""Importance matrices: how large the inputs of each linear layer are, column by column, on some text.

The model is walked block by block, as for GPTQ; one block is in memory. Source: llama.cpp's tools/imatrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.errors import UsageError
from weightops.formats.gguf.imatrix import CALLS, CHUNKS, COUNTS, DATASETS, SIZE, SUMS
from weightops.inference.finite import check_finite
from weightops.inference.linears import left_as_they_are
from weightops.inference.model import BlockModel
from weightops.io.escape import escape
from weightops.layouts.gguf.weights import Matrix, find_matrices
from weightops.lazy import LazyTensor
from weightops.ops.ggml.importance import Importance
from weightops.ops.rows import Given, Repeat
from weightops.quantization.walk import Walk
from weightops.quantization.work import Work
from weightops.spec import DType


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model's blocks that have a place in its GGUF file, by block and name."""

    model: BlockModel
    matrices: Sequence[Mapping[str, Matrix]]
    warnings: tuple[str, ...] = ()


def find_layers(model: BlockModel, config: Mapping[str, Any]) -> Layers:
    """Raises `UsageError` for models of a family that GGUF files are not written of, or without linear layers."""
    known = find_matrices(config, model.checkpoint, model.shown)
    found, lacking = [], []
    for block in model.blocks:
        names = model.tensor_names(block)
        own = {}
        for inner, module in model.module.get_submodule(block).named_modules():
            if not isinstance(module, nn.Linear):
                continue
            matrix = known.get(names[f"{block}.{inner}.weight"])
            if matrix is None:
                lacking.append(f"{block}.{inner}")
            else:
                own[inner] = matrix
        found.append(own)
    if not any(found):
        raise UsageError(f"{model.shown}: there is no linear layer in the model's blocks")
    said = [*left_as_they_are(model.module, model.blocks, model.shown)]
    if lacking:
        more = f" and {len(lacking) - 1} more are" if len(lacking) > 1 else " is"
        said.append(f"{escape(lacking[0])}{more} left out: GGUF files have such matrices in another form")
    return Layers(model, found, tuple(said))


@dataclass
class _Seen:
    """Of a tensor `[count, rows, columns]` the sums of squares `[count, columns]`, and the tokens of each matrix."""

    sums: Tensor
    counts: list[int] = field(default_factory=list)


def collect(layers: Layers, tokens: Tensor, work: Work, control: Control) -> None:
    """Run what `work` does not have yet, with `tokens` `[samples, tokens]`; raises `CorruptInput` for odd states."""
    model, total = layers.model, len(layers.matrices)
    control.progress.start("running", sum(map(model.nbytes, model.blocks)))
    done = work.n_done
    for block in model.blocks[:done]:
        control.progress.advance(model.nbytes(block))
        control.progress.finish_file(block, model.nbytes(block), resumed=True)
    if done == total:
        return
    walk = Walk(model, tokens, work)
    for i in range(done, total):
        block = model.blocks[i]
        model.load(block)
        seen = _run(layers, i, walk, control)
        sums = {name: each.sums.to(torch.float32).numpy() for name, each in seen.items()}
        work.commit(i, sums, {name: each.counts for name, each in seen.items()})
        model.unload(block)
        control.progress.advance(model.nbytes(block))
        control.progress.finish_file(block, model.nbytes(block), resumed=False)
    control.progress.stop()


@torch.no_grad()
def _run(layers: Layers, i: int, walk: Walk, control: Control) -> dict[str, _Seen]:
    """What enters the layers of a block, while all batches go through it."""
    name = layers.model.blocks[i]
    block, seen = layers.model.module.get_submodule(name), dict[str, _Seen]()
    with ExitStack() as stack:
        for inner, matrix in layers.matrices[i].items():
            layer = block.get_submodule(inner)
            stack.callback(layer.register_forward_pre_hook(_hook(seen, matrix)).remove)
        inputs = stack.enter_context(walk.inputs(i))
        outputs = stack.enter_context(walk.inputs(i + 1)) if i + 1 < len(layers.model.blocks) else None
        for a, b in walk.batches:
            control.check()
            states = walk.run(i, inputs, a, b)
            check_finite(layers.model, states, f"{name} gives")
            if outputs is not None:
                outputs.write(a, states)
        if outputs is not None:
            outputs.flush()
    return seen


def _hook(seen: dict[str, _Seen], matrix: Matrix) -> Any:
    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        states = args[0].flatten(0, -2)
        found = seen.get(matrix.name)
        if found is None:
            zeros = torch.zeros(matrix.of, states.shape[-1], dtype=torch.float64)
            found = seen[matrix.name] = _Seen(zeros, [0] * matrix.of)
        # In float32 of as many tokens as are run at once, in float64 over all.
        found.sums[matrix.number] += states.float().square().sum(0).double().cpu()
        found.counts[matrix.number] += len(states)

    return see


Sums = Mapping[str, tuple[LazyTensor, Sequence[int]]]
"""By name of a tensor in the GGUF file: sums of squares `[count, columns]`, and of each matrix the tokens."""


def measured(work: Work) -> Sums:
    """What `collect` has seen."""
    found = dict[str, tuple[LazyTensor, Sequence[int]]]()
    for i in range(work.n_done):
        tensors, counts = work.read(i)
        found |= {weight: (tensor, counts[weight]) for weight, tensor in tensors.items()}
    return found


def expected(layers: Layers) -> Sums:
    """The same before anything is run, with zeros for sums."""
    found = {}
    for block, matrices in zip(layers.model.blocks, layers.matrices, strict=True):
        module = layers.model.module.get_submodule(block)
        for inner, matrix in matrices.items():
            columns = module.get_parameter(f"{inner}.weight").shape[-1]
            zeros = LazyTensor.make(Repeat(DType.F32, (matrix.of, columns), bytes(4)))
            found[matrix.name] = (zeros, [1] * matrix.of)
    return found


def matrix_of(found: Sums, name: str, datasets: Sequence[str], shape: tuple[int, int], *, is_old: bool) -> Checkpoint:
    """An importance matrix as llama-imatrix writes it, of windows of this `shape`; `is_old`: as its `.dat`.

    Names are in alphabetical order. Of experts to which no token came it is said how many they are.
    """
    chunks, size = shape
    metadata: dict[str, Any] = {
        "general.type": {"string": "imatrix"},
        DATASETS: {"array": ["string", list(datasets)]},
        CHUNKS: {"uint32": chunks},
        SIZE: {"uint32": size},
    }
    made, calls = dict[str, LazyTensor](), list[int]()
    for weight in sorted(found, key=str.encode):
        sums, counts = found[weight]
        by = torch.tensor(counts, dtype=torch.float32).numpy().tobytes()
        tokens = LazyTensor.make(Given(DType.F32, (len(counts), 1), by))
        if is_old:
            calls.append(-(-max(counts) // size))
            made[weight] = LazyTensor.make(Importance(calls[-1]), sums, tokens)
        else:
            made |= {f"{weight}{SUMS}": sums, f"{weight}{COUNTS}": tokens}
    if is_old:
        metadata[CALLS] = {"array": ["int32", calls]}
    container = "imatrix.dat" if is_old else "gguf"
    said = tuple(_on_experts({weight: counts for weight, (_, counts) in found.items()}))
    return Checkpoint(name, made, metadata=metadata, container=container, warnings=said)


def _on_experts(counts: Mapping[str, Sequence[int]]) -> Iterator[str]:
    lacking = {weight: sum(not count for count in found) for weight, found in counts.items()}
    names = [weight for weight, missing in lacking.items() if missing]
    if names:
        more = f", and as much of {len(names) - 1} more tensors" if len(names) > 1 else ""
        yield (
            f"{names[0]}: no token came to {lacking[names[0]]} of its {len(counts[names[0]])} experts{more}: more or "
            "other text would reach them"
        )
