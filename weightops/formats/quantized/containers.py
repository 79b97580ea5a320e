"""Containers that hold the same integers: GPTQ's, AWQ's and compressed-tensors'; written from any of them.

Each has its own words, order and config; the numbers do not depend on it. What loaders need of each is here. Sources:
compressed-tensors 0.20 (`PackedQuantizationCompressor`), autoawq 0.2.9 (`WQLinear_GEMM`), vLLM
(`quantization/awq_marlin.py`, `compressed_tensors_wNa16.py`), and for GPTQ see `gptq`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from zlib import crc32

from weightops.errors import IncompatibleInputs
from weightops.formats.quantized.gptq import MULTIPLE
from weightops.formats.quantized.weights import Integers
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.gptq.tensors import GroupIndex, PackZeros
from weightops.ops.numbers.bitpack import BITS
from weightops.ops.numbers.codes import AWQ
from weightops.ops.numbers.words import row_words_of, words_of
from weightops.ops.rows import Given, Repeat
from weightops.ops.transpose import transposed
from weightops.spec import DType

Container = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
"""gptq stores zero points minus one and gptq_v2 as they are; awq holds 4 bits; compressed-tensors no act-order."""
COMPRESSED_VERSION = "0.20.0"
"""The version of compressed-tensors whose words are written: before 0.18 those of 3 bits were others."""
AWQ_BITS = 4
_AWQ_OUTPUTS = 8


def refuse_module(
    where: str, container: Container, bits: int, inputs: int, outputs: int, group_size: int, *, in_order: bool
) -> None:
    """Raise `IncompatibleInputs` for a module that the container has no form for, by what is known without its values.

    `in_order`: whether input j is in group `j // group_size`.
    """
    is_gptq = container in ("gptq", "gptq_v2")
    known = (AWQ_BITS,) if container == "awq" else BITS
    problem = hint = None
    if bits not in known:
        problem = f"has {bits} bits, {container} holds {' or '.join(map(str, known))}"
        hint = "choose another format: compressed-tensors and gptq hold 2, 3, 4 and 8 bits"
    elif not in_order and not is_gptq:
        problem = (
            f"has its inputs grouped in another order than they stand in (act-order), which {container} cannot say"
        )
        hint = "gptq and gptq_v2 can; or quantise with --static-groups, or without --act-order"
    elif is_gptq and (inputs % MULTIPLE or outputs % MULTIPLE):
        problem = f"has {inputs} inputs and {outputs} outputs, {container} holds multiples of {MULTIPLE}"
    elif container == "awq" and outputs % _AWQ_OUTPUTS:
        problem = f"has {outputs} outputs, awq holds multiples of {_AWQ_OUTPUTS}"
    elif not is_gptq and inputs % group_size:
        problem = f"has {inputs} inputs in groups of {group_size}, {container} has none that is shorter"
        hint = "gptq and gptq_v2 do"
    if problem is not None:
        raise IncompatibleInputs(f"{where}: {problem}", hint=hint or "leave the layer unquantised")


def write_integers(
    prefix: str, found: Integers, container: Container, *, symmetric: bool, scales: DType | None = None
) -> dict[str, LazyTensor]:
    """The tensors of module `prefix` by full name, in the order of the container's own library.

    `symmetric`: all zero points are `2**(bits-1)`, which compressed-tensors then does not store. Scales are stored in
    the type `scales`, or in that of the container: float16, or for compressed-tensors the one that they have. No value
    is looked at: what the container cannot hold is refused by `refuse_module`, and by whoever has read the values.
    """
    rows, columns = found.codes.spec.shape
    if container == "compressed-tensors":
        shape = struct.pack("<2q", rows, columns)
        parts = {
            "weight_packed": words_of(found.codes, found.bits),
            "weight_scale": cast(found.scales, scales or found.scales.spec.dtype),
            # A number of its own: layers of one shape share no memory.
            "weight_shape": LazyTensor.make(Given(DType.I64, (2,), shape, crc32(prefix.encode()))),
        }
        if not symmetric and found.zeros is not None:
            parts["weight_zero_point"] = transposed(words_of(transposed(found.zeros), found.bits))
        return _named(prefix, parts)
    points = transposed(_points(found))
    factors = transposed(cast(found.scales, scales or DType.F16))
    if container == "awq":
        qweight = transposed(row_words_of(found.codes, found.bits, AWQ))
        qzeros = transposed(row_words_of(_points(found), found.bits, AWQ))
        return _named(prefix, {"qweight": qweight, "qzeros": qzeros, "scales": factors})
    g_idx = found.g_idx or LazyTensor.make(GroupIndex(columns, found.group_size))
    qzeros = LazyTensor.make(PackZeros(f"{prefix}.zeros", found.bits, container == "gptq"), points)
    qweight = transposed(words_of(found.codes, found.bits))
    return _named(prefix, {"qweight": qweight, "qzeros": qzeros, "scales": factors, "g_idx": g_idx})


def _named(prefix: str, parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {f"{prefix}.{part}": tensor for part, tensor in parts.items()}


def _points(found: Integers) -> LazyTensor:
    """The zero points `[n, g]`, also where there is one for all."""
    middle = bytes([1 << found.bits - 1])
    return found.zeros or LazyTensor.make(Repeat(DType.U8, found.scales.spec.shape, middle))


def awq_config(group_size: int, left: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` as autoawq 0.2.9 writes it; `left` are the modules that are not quantised.

    Zero points are always there, those of symmetric integers too. A `group_size` of -1 is one group.
    """
    return {
        "bits": AWQ_BITS,
        "group_size": group_size,
        "modules_to_not_convert": list(left) or None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def compressed_config(groups: Iterable[tuple[dict[str, Any], Sequence[str]]], left: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors 0.20 writes it for packed integers.

    `groups`: what each is like (`compressed_weights`) and the modules or classes in it; `left` are not quantised.
    """
    return {
        "config_groups": {
            f"group_{i}": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": list(targets),
                "weights": weights,
            }
            for i, (weights, targets) in enumerate(groups)
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(left),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": COMPRESSED_VERSION,
    }


def compressed_weights(bits: int, group_size: int | None, *, symmetric: bool) -> dict[str, Any]:
    """What compressed-tensors says of integers; a `group_size` of None is one scale a row."""
    return {
        "dynamic": False,
        "group_size": group_size,
        "num_bits": bits,
        "strategy": "channel" if group_size is None else "group",
        "symmetric": symmetric,
        "type": "int",
    }
