"""Element types and tensor specifications: values that describe bytes, and never hold any."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from functools import cached_property

import msgspec

from weightops.errors import UsageError


class DType(enum.Enum):
    """An element type. The member's name is its safetensors code, its value the name torch uses.

    Members stand in the order in which the safetensors library sorts tensors (ascending alignment),
    which its byte-identical writer needs. `C32` and `C128` exist in torch files only; those from `Q8_0` on in GGUF
    files only, under the names that ggml gives them, and their elements come in blocks that share scales.
    """

    BOOL = "bool"
    F4 = "float4_e2m1fn"
    F6_E2M3 = "float6_e2m3fn"
    F6_E3M2 = "float6_e3m2fn"
    U8 = "uint8"
    I8 = "int8"
    F8_E5M2 = "float8_e5m2"
    F8_E4M3 = "float8_e4m3fn"
    F8_E8M0 = "float8_e8m0fnu"
    F8_E4M3FNUZ = "float8_e4m3fnuz"
    F8_E5M2FNUZ = "float8_e5m2fnuz"
    I16 = "int16"
    U16 = "uint16"
    F16 = "float16"
    BF16 = "bfloat16"
    I32 = "int32"
    U32 = "uint32"
    F32 = "float32"
    C64 = "complex64"
    F64 = "float64"
    I64 = "int64"
    U64 = "uint64"
    C32 = "complex32"
    C128 = "complex128"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_1 = "q8_1"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    Q8_K = "q8_k"
    IQ1_S = "iq1_s"
    IQ1_M = "iq1_m"
    IQ2_XXS = "iq2_xxs"
    IQ2_XS = "iq2_xs"
    IQ2_S = "iq2_s"
    IQ3_XXS = "iq3_xxs"
    IQ3_S = "iq3_s"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    TQ1_0 = "tq1_0"
    TQ2_0 = "tq2_0"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    Q1_0 = "q1_0"
    Q2_0 = "q2_0"

    __hash__ = object.__hash__
    """By identity, which is what equality is: that of Enum is a call into Python."""

    @cached_property
    def bits(self) -> int:
        return _BITS[self]

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element; 1 for the types that pack several elements into a byte."""
        return max(1, self.bits // 8)

    @property
    def is_float(self) -> bool:
        return self.value.startswith(("float", "bfloat"))

    @property
    def is_packed(self) -> bool:
        """Whether elements share bytes, so that no arithmetic is possible on them here."""
        return self.bits < 8 or self in _BLOCKS

    @property
    def block(self) -> tuple[int, int]:
        """The elements that are stored together, along the last dimension, and their bytes."""
        return _BLOCKS.get(self, (8, self.bits))

    def nbytes(self, numel: int) -> int:
        """Bytes of so many elements."""
        count, nbytes = self.block
        return numel * nbytes // count

    @property
    def is_block(self) -> bool:
        """Whether it is one of ggml's, whose elements come in blocks that share scales."""
        return self in _BLOCKS

    @property
    def in_safetensors(self) -> bool:
        return self not in (DType.C32, DType.C128, *_BLOCKS)


_BLOCKS = {
    DType.Q8_0: (32, 34),
    DType.Q4_0: (32, 18),
    DType.Q4_1: (32, 20),
    DType.Q5_0: (32, 22),
    DType.Q5_1: (32, 24),
    DType.Q8_1: (32, 36),
    DType.Q2_K: (256, 84),
    DType.Q3_K: (256, 110),
    DType.Q4_K: (256, 144),
    DType.Q5_K: (256, 176),
    DType.Q6_K: (256, 210),
    DType.Q8_K: (256, 292),
    DType.IQ1_S: (256, 50),
    DType.IQ1_M: (256, 56),
    DType.IQ2_XXS: (256, 66),
    DType.IQ2_XS: (256, 74),
    DType.IQ2_S: (256, 82),
    DType.IQ3_XXS: (256, 98),
    DType.IQ3_S: (256, 110),
    DType.IQ4_NL: (32, 18),
    DType.IQ4_XS: (256, 136),
    DType.TQ1_0: (256, 54),
    DType.TQ2_0: (256, 66),
    DType.MXFP4: (32, 17),
    DType.NVFP4: (64, 36),
    DType.Q1_0: (128, 18),
    DType.Q2_0: (64, 18),
}
"""Elements and bytes of a block of ggml's, as `ggml-common.h` lays them out."""
_BITS = {DType.F4: 4, DType.F6_E2M3: 6, DType.F6_E3M2: 6, DType.BOOL: 8, DType.C64: 64}
_BITS |= {DType.C32: 32, DType.C128: 128}
for _dtype in DType:
    if _dtype not in _BITS:
        _BITS[_dtype] = int("".join(c for c in _dtype.name.split("_")[0] if c.isdigit()))


def parse_dtype(name: str | None) -> DType | None:
    """A dtype by torch's name or safetensors' code; raises `UsageError` for names that are neither."""
    if name is None:
        return None
    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
    found = next((d for d in DType if short.get(name.lower(), name.lower()) in (d.value, d.name.lower())), None)
    if found is None:
        raise UsageError(f"unknown dtype {name!r}", hint="for example float16, bfloat16 or float32")
    return found


def promoted(dtypes: Iterable[DType]) -> DType | None:
    """The type that holds the values of all, as torch.promote_types has it: of float16 and bfloat16 float32.

    None where there are several, and not all of them floating-point types of 16 to 64 bits.
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    if not distinct <= {DType.F16, DType.BF16, DType.F32, DType.F64}:
        return None
    return DType.F64 if DType.F64 in distinct else DType.F32


class TensorSpec(msgspec.Struct, frozen=True):
    """What a tensor is, without its values."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.numel)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, which is a slice of the first dimension; of the whole when 0-d."""
        return self.dtype.nbytes(math.prod(self.shape[1:]))

    def __str__(self) -> str:
        return f"{self.dtype.value} [{', '.join(map(str, self.shape))}]"


_UNSIGNED = {8: DType.U8, 16: DType.U16, 32: DType.U32, 64: DType.U64}


def bits_spec(spec: TensorSpec) -> TensorSpec:
    """The unsigned integers that hold a tensor's bits: same shape, or a flat one where elements share bytes."""
    unsigned = None if spec.dtype.is_packed else _UNSIGNED.get(spec.dtype.bits)
    return TensorSpec(unsigned, spec.shape) if unsigned else TensorSpec(DType.U8, (spec.nbytes,))
