"""How tensors of transformers become tensors of GGUF, and how they become what they were.

`out` takes those of transformers and gives those of GGUF, `back` the other way; both lists are in the order of a
`Link`'s names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from weightops.lazy import LazyTensor
from weightops.ops.arrange import concat, cut, halves_to_pairs, one_of, pairs_to_halves, stacked
from weightops.ops.elementwise import Shift, cast, reshaped
from weightops.ops.ggml.mxfp4 import Mxfp4Blocks
from weightops.ops.transpose import transposed
from weightops.spec import DType

Tensors = Sequence[LazyTensor]


class Transform(Protocol):
    """One way there and back; raises `WeightopsError` for shapes that do not fit."""

    def out(self, tensors: Tensors) -> list[LazyTensor]: ...

    def back(self, tensors: Tensors) -> list[LazyTensor]: ...


@dataclass(frozen=True)
class Same:
    """As it is."""

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        return list(tensors)

    back = out


SAME = Same()


@dataclass(frozen=True)
class Rotary:
    """Rows of q or k, or their bias: halves of a head in transformers, adjacent pairs in GGUF."""

    heads: int

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        return [halves_to_pairs(tensor, self.heads) for tensor in tensors]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        return [pairs_to_halves(tensor, self.heads) for tensor in tensors]


@dataclass(frozen=True)
class Shifted:
    """A norm to which a number is added, in float32 unless it is float16. The way back is the nearest in float32."""

    by: float

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        wide = [t if t.spec.dtype is DType.F16 else cast(t, DType.F32) for t in tensors]
        return [LazyTensor.make(Shift(self.by), tensor) for tensor in wide]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        return [LazyTensor.make(Shift(-self.by), cast(tensor, DType.F32)) for tensor in tensors]


@dataclass(frozen=True)
class Stacked:
    """Matrices of experts, one after another in a tensor of three dimensions."""

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        return [stacked(tensors)]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        (tensor,) = tensors
        count, _, _ = tensor.spec.shape
        return [one_of(tensor, i) for i in range(count)]


@dataclass(frozen=True)
class KeysAndValues:
    """DeepSeek's kv_b: for each head rows of k, then of v. GGUF has the two apart, and k transposed."""

    heads: int
    keys: int
    """Rows of k of a head."""

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        (tensor,) = tensors
        rows, columns = tensor.spec.shape
        size = rows // self.heads
        heads = reshaped(tensor, (self.heads, size, columns))
        return [transposed(cut(heads, 1, 0, self.keys)), cut(heads, 1, self.keys, size)]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        keys, values = tensors
        heads = concat([transposed(keys), values], 1)
        count, size, columns = heads.spec.shape
        return [reshaped(heads, (count * size, columns))]


@dataclass(frozen=True)
class Transposed:
    """Matrices of experts, each transposed."""

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        return [transposed(tensor) for tensor in tensors]

    back = out


@dataclass(frozen=True)
class GateAndUp:
    """gpt-oss' experts: columns of gate and up alternate. GGUF has the two apart, with rows for columns."""

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        (tensor,) = tensors
        experts, columns, rows = tensor.spec.shape
        alternating = reshaped(transposed(tensor), (experts * rows, columns))
        both = reshaped(pairs_to_halves(alternating, experts), (experts, rows, columns))
        return [cut(both, 1, 0, rows // 2), cut(both, 1, rows // 2, rows)]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        both = concat(tensors, 1)
        experts, rows, columns = both.spec.shape
        alternating = halves_to_pairs(reshaped(both, (experts * rows, columns)), experts)
        return [transposed(reshaped(alternating, (experts, rows, columns)))]


@dataclass(frozen=True)
class Mxfp4:
    """Codes and scales of gpt-oss' experts in ggml's blocks, for each of `step` tensors every so many rows.

    There is no way back: numbers are what comes of a file.
    """

    step: int = 1

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        return [LazyTensor.make(Mxfp4Blocks(first, self.step), *tensors) for first in range(self.step)]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class GateAndUpBias:
    """The biases of gpt-oss' experts, `[experts, 2 * inner]`, in which gate and up alternate."""

    def out(self, tensors: Tensors) -> list[LazyTensor]:
        (tensor,) = tensors
        experts, width = tensor.spec.shape
        halves = pairs_to_halves(reshaped(tensor, (experts * width,)), experts)
        both = pairs_to_halves(reshaped(halves, (2 * experts, width // 2)), 1)
        return [cut(both, 0, 0, experts), cut(both, 0, experts, 2 * experts)]

    def back(self, tensors: Tensors) -> list[LazyTensor]:
        gates, ups = tensors
        experts, width = gates.spec.shape
        halves = halves_to_pairs(concat([gates, ups], 0), 1)
        return [reshaped(halves_to_pairs(reshaped(halves, (2 * experts * width,)), experts), (experts, 2 * width))]


def of_factors(transform: Transform) -> tuple[Transform, Transform] | None:
    """What a transform of weights is to the factors A `[rank, in]` and B `[out, rank]` of a change of them.

    None where what comes of the weights has no such factors, or llama.cpp's converter has no way to them.
    """
    match transform:
        case Same() | Stacked():
            return transform, transform
        case Rotary():  # of rows, which are B's
            return SAME, transform
        case _:
            return None
