"""The numbers that GGUF files have for types of metadata and of tensors."""

from __future__ import annotations

from weightops.spec import DType

SCALARS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
"""Numbers and `struct` codes of the types of metadata that have a fixed size."""
STRING, ARRAY = 8, 9
KINDS = {number: kind for kind, (number, _) in SCALARS.items()} | {STRING: "string", ARRAY: "array"}
NUMBERS = {kind: number for number, kind in KINDS.items()}

CODES = {
    DType.F32: 0,
    DType.F16: 1,
    DType.Q4_0: 2,
    DType.Q4_1: 3,
    DType.Q5_0: 6,
    DType.Q5_1: 7,
    DType.Q8_0: 8,
    DType.Q8_1: 9,
    DType.Q2_K: 10,
    DType.Q3_K: 11,
    DType.Q4_K: 12,
    DType.Q5_K: 13,
    DType.Q6_K: 14,
    DType.Q8_K: 15,
    DType.IQ2_XXS: 16,
    DType.IQ2_XS: 17,
    DType.IQ3_XXS: 18,
    DType.IQ1_S: 19,
    DType.IQ4_NL: 20,
    DType.IQ3_S: 21,
    DType.IQ2_S: 22,
    DType.IQ4_XS: 23,
    DType.I8: 24,
    DType.I16: 25,
    DType.I32: 26,
    DType.I64: 27,
    DType.F64: 28,
    DType.IQ1_M: 29,
    DType.BF16: 30,
    DType.TQ1_0: 34,
    DType.TQ2_0: 35,
    DType.MXFP4: 39,
    DType.NVFP4: 40,
    DType.Q1_0: 41,
    DType.Q2_0: 42,
}
"""ggml's numbers of the types of tensors: `enum ggml_type`."""
DTYPES = {code: dtype for dtype, code in CODES.items()}
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
"""Types that ggml no longer has; those from 31 on were for one kind of processor."""
