"""Quantising block by block: each is loaded, its linear layers solved in the order in which they run, and left behind.

The data walks through the model once. What enters a block is read from a file, what leaves it is written to the next
(`work`); of the model only one block is in memory, and of Hessians only those of the layers that are being solved.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

import msgspec
from torch import Tensor, nn

from weightops.engine.control import Control
from weightops.errors import UsageError
from weightops.formats.quantized.gptq import CheckpointFormat, write_module
from weightops.inference.linears import TransposedLinear, routers
from weightops.inference.model import BlockModel
from weightops.io.escape import escape
from weightops.ops.gptq.solver import Solved
from weightops.quantization.block import Block, linear_of
from weightops.quantization.options import Options
from weightops.quantization.walk import Walk
from weightops.quantization.work import Work

_LOG = logging.getLogger(__name__)


def find_modules(model: BlockModel, options: Options) -> list[list[str]]:
    """The linear layers of each block that are to be quantised, by their names within it.

    Raises `UsageError` for layers that the format cannot hold, a glob to skip that none matches, or if none is left.
    """
    size = options.settings.group_size
    found, odd = [], []
    kept = routers(model.module)
    layers = [name for name, module in model.module.named_modules() if isinstance(module, nn.Linear)]
    for glob in options.skip:
        if not any(fnmatchcase(layer, glob) for layer in layers):
            raise UsageError(
                f"{model.shown}: no layer matches --skip {escape(glob)}",
                hint=f"they are called as {escape(layers[0])}" if layers else None,
            )
    for name in model.blocks:
        inside = []
        for inner, module in model.module.get_submodule(name).named_modules():
            full = f"{name}.{inner}"
            if not isinstance(module, nn.Linear) or full in kept or any(fnmatchcase(full, g) for g in options.skip):
                continue
            if isinstance(module, TransposedLinear) and options.checkpoint_format not in get_args(CheckpointFormat):
                raise UsageError(
                    f"{model.shown}: {escape(full)} is a Conv1D of transformers, which gptq alone holds",
                    hint="choose --checkpoint-format gptq or gptq_v2",
                )
            inside.append(inner)
            k, n = module.in_features, module.out_features
            if k % 32 or n % 32 or (size > 0 and k % size):
                odd.append(f"{escape(full)} is {n} x {k}")
        found.append(inside)
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
    walk = Walk(model, tokens, work) if options.method == "gptq" and done < len(modules) else None
    for i in range(done, len(modules)):
        _LOG.info("%s: %d layers to quantise", escape(model.blocks[i]), len(modules[i]))
        model.load(model.blocks[i])
        block = Block(model, i, modules[i], options, control)
        solved = block.solve(walk, spare_nbytes) if walk is not None else block.round()
        reports = [report for _, report in solved.values()]
        tensors = {n: t for name, (found, _) in solved.items() for n, t in _packed(name, found, options).items()}
        work.commit(i, tensors, msgspec.to_builtins(reports))
        model.unload(model.blocks[i])
        control.progress.finish_file(model.blocks[i], nbytes[i], resumed=False)
    control.progress.stop()


def _nbytes(model: BlockModel, i: int, names: Sequence[str]) -> int:
    block = model.module.get_submodule(model.blocks[i])
    return sum(linear_of(block, name).weight.nbytes for name in names)


def _packed(name: str, found: Solved, options: Options) -> Mapping[str, Any]:
    q, zeros, scales, g_idx = (t.cpu().numpy() for t in (found.q, found.zeros, found.scales, found.g_idx))
    return write_module(name, q, zeros, scales, g_idx, None, options.settings.bits, options.kept_as)
