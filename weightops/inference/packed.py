"""GPTQ weights that stay packed in memory: `weightops_kernels` multiplies in the place of a model's Linear.

What the integers stand for (bits, groups, zero points) was decided when the checkpoint was dequantised, lazily: this
takes the tensors and settings of `ops.gptq_tensors.Dequantize` apart, so it knows no format.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from weightops.engine.control import Control
from weightops.errors import UsageError
from weightops.inference.names import Part
from weightops.inference.weights import read_all, torch_dtype
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.gptq.tensors import Dequantize, pack_zeros, true_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from weightops_kernels.linear import QuantLinear

Engine = Literal["auto", "dequantized", "packed"]
"""How the layers of a quantised model multiply: with weights that are dequantised as they are loaded, or as they are
needed, from integers that stay packed. `auto` is packed where that is faster, or where nothing else fits."""
ENGINES: tuple[Engine, ...] = ("auto", "dequantized", "packed")


@dataclass(frozen=True)
class PackedWeight:
    """The weight `[N, K]` of a Linear, to be kept as integers. `module` is the layer's name in the model."""

    module: str
    tensor: LazyTensor
    op: Dequantize

    @property
    def nbytes(self) -> int:
        """Bytes of the layer in memory, or a few more: integers, and for each group of an output scale and zero point.

        The kernels rearrange tensors, and keep no more than this. An order of columns is counted, needed or not.
        """
        qweight, _, scales, *_ = self.tensor.inputs
        steps = scales.spec.numel * (scales.spec.dtype.itemsize + 2)
        return qweight.nbytes + steps + self.tensor.spec.shape[1] * 8

    @property
    def suits_int4(self) -> bool:
        """Whether torch's four-bit operator takes it, as far as shapes say."""
        from weightops_kernels import cpu

        (outputs, columns), groups = self.tensor.spec.shape, self.tensor.inputs[2].spec.shape[0]
        return self.op.bits == 4 and outputs % 16 == 0 and columns / groups in cpu.INT4_GROUPS

    def load(self, linear: nn.Linear, dtype: torch.dtype, device: str, control: Control) -> QuantLinear:
        """The layer with the bias of `linear`, for inputs of `dtype`.

        Raises what dequantising raises, for scales that are no numbers and for groups that do not exist.
        """
        from weightops_kernels.linear import QuantLinear
        from weightops_kernels.reference import trivial_g_idx

        inputs = [(tensor, torch_dtype(tensor.spec.dtype)) for tensor in self.tensor.inputs]
        # Whoever computes one row has looked at the whole module.
        row = (cut(self.tensor, 0, 0, 1), torch.float32)
        qweight, qzeros, scales, *g_idx, _ = read_all([*inputs, row], "cpu", control)
        zeros = true_zeros(qzeros.numpy(), self.op.bits, self.op.zeros)
        qzeros = torch.from_numpy(pack_zeros(zeros, self.op.bits, False, f"{self.op.label}.qzeros"))
        index = g_idx[0] if g_idx else trivial_g_idx(self.tensor.spec.shape[1], self.op.group_size)
        made = QuantLinear.from_tensors(qweight, qzeros, scales, index, self.op.bits, "gptq_v2", linear.bias)
        return made.to(device).prepare("auto", dtype, release=True).requires_grad_(False)


def find_packed(module: PreTrainedModel, parts: Iterable[Part]) -> dict[str, PackedWeight]:
    """Name of a parameter -> its weight, of those that a Linear multiplies with and nothing else refers to."""
    found: dict[str, PackedWeight] = {}
    if getattr(module.config, "slow_but_exact", False):
        return found  # BLOOM then multiplies with slices of weights
    for part in parts:
        (name, *others), op = part.names, part.tensor.op
        owner, _, leaf = name.rpartition(".")
        if not isinstance(op, Dequantize) or leaf != "weight" or others or part.is_buffer:
            continue
        if _is_plain(module.get_submodule(owner)):
            found[name] = PackedWeight(owner, part.tensor, op)
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether it gives what a Linear gives: it has Linear's forward, or its own says the same of a small layer."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    weight, inputs = torch.arange(6.0).view(2, 3), torch.arange(15.0).view(1, 5, 3)
    bias = None if module.bias is None else torch.ones(2)
    small = copy.copy(module)
    small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    try:
        result = small.forward(inputs)
    except Exception:  # routers and the like, of which nothing is known
        return False
    return isinstance(result, torch.Tensor) and torch.equal(result, nn.functional.linear(inputs, weight, bias))


def are_faster(weights: Sequence[PackedWeight], dtype: torch.dtype, device: str) -> bool:
    """Whether a token takes less time with packed weights: where torch has an operator for them, which reads less."""
    if device != "cpu" or dtype != torch.bfloat16 or not weights:
        return False
    from weightops_kernels import cpu

    return cpu.has_fast_int4() and all(weight.suits_int4 for weight in weights)


def refuse_unquantized(engine: Engine, shown: Sequence[str], *, is_any: bool) -> None:
    """Raise `UsageError` for an engine that there is not, and for `packed` unless there `is_any` weight for it."""
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {escape(repr(engine))}", hint=f"choose one of {', '.join(ENGINES)}")
    if engine == "packed" and not is_any:
        raise UsageError(
            f"{', '.join(shown)}: holds no quantised layer whose weights could stay packed",
            hint="leave out --engine packed; `weightops quantize` makes models that have some",
        )
