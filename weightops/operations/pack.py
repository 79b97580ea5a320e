"""Pack: a quantised checkpoint from integers, scales and zero points that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.quantized.containers import Container
from weightops.formats.quantized.gptq import (
    CheckpointFormat,
    QuantizeConfig,
    check_groups,
    check_scales,
    check_sizes,
    is_act_order,
    prefixes,
    with_config,
)
from weightops.formats.quantized.table import find_weights
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.repack import repacked
from weightops.ops.gptq.tensors import INTEGERS, GroupIndex, Pack, PackZeros, as_codes
from weightops.ops.measures.loss import counted_cast
from weightops.ops.numbers.bitpack import period
from weightops.ops.rows import Repeat
from weightops.spec import DType
from weightops.version import __version__

_GIVEN = ("q", "zeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Packed:
    """The packed tensors of a module by part, and what its values say."""

    tensors: Mapping[str, LazyTensor]
    is_symmetric: bool
    is_act_order: bool
    is_ragged: bool


def pack(
    source: Checkpoint,
    *,
    bits: int,
    group_size: int,
    checkpoint_format: Container = "gptq",
    evaluate: Evaluate,
) -> Checkpoint:
    """`source` with packed tensors for every module whose integers it holds; others stay as they are.

    A module `P` of K inputs and N outputs is given by `P.q`, integers `[K, N]` from 0 to `2**bits - 1` in any integer
    type, `P.scales` `[G, N]` of floats, stored as float16, `P.zeros` `[G, N]`, the true zero points (`2**(bits-1)` if
    there are none), and `P.g_idx` `[K]`, the group of each column (`k // group_size` if there is none). A `group_size`
    of -1 makes one group. `P.bias` stays. config.json says how it is quantised, and of GPTQ quantize_config.json too;
    other containers than GPTQ's hold what `repack` says.

    Raises `UsageError` for bits and group sizes that the format does not have, or where no module is given,
    `IncompatibleInputs` for shapes that do not fit, sizes that are no multiples of 32, integers out of range, a zero
    point of 0 in v1, and scales that are zero, subnormal in float16 or no numbers.
    """
    refuse_delta(source, "the source")
    refuse_adapter(source, "the source")
    refuse_parts(source)
    where = escape(source.name)
    period(bits)
    stored: CheckpointFormat = "gptq" if checkpoint_format == "gptq" else "gptq_v2"
    if group_size != -1 and group_size < 1:
        raise UsageError(f"a group of {group_size} columns holds nothing", hint="give -1 to have one group")
    packed_already = prefixes(source)
    if packed_already:
        raise IncompatibleInputs(
            f"{where}: is packed already: it holds {escape(packed_already[0])}.qweight", hint="give the integers"
        )
    given = [name.removesuffix(".q") for name in source if name.endswith(".q")]
    if not given:
        raise UsageError(
            f"{where}: holds no integers to pack, expected tensors named NAME.q, NAME.scales and NAME.zeros",
            hint="`weightops inspect` lists its tensors",
        )
    made = {p: _pack_module(source, p, bits, group_size, stored == "gptq", evaluate) for p in given}
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in source.items():
        prefix, _, part = name.rpartition(".")
        if prefix in made and part in (*_GIVEN, "bias"):
            if part == "q":  # a module's tensors stand together
                bias = source.get(f"{prefix}.bias")
                parts = {**made[prefix].tensors, **({"bias": bias} if bias is not None else {})}
                tensors |= {f"{prefix}.{p}": t for p, t in parts.items()}
                shards |= {f"{prefix}.{p}": source.shards.get(name, "") for p in parts}
        else:
            tensors[name] = tensor
            shards[name] = source.shards.get(name, "")
    settings = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        desc_act=any(module.is_act_order for module in made.values()),
        sym=all(module.is_symmetric for module in made.values()),
        checkpoint_format=stored,
        lm_head="lm_head" in made,
        meta={"quantizer": [f"weightops:{__version__}"]},
    )
    ragged = [prefix for prefix, module in made.items() if module.is_ragged]
    notes = []
    if ragged:
        notes.append(f"inputs are no multiple of group_size {group_size}, which vLLM refuses: {listed(ragged, 3)}")
    if not settings.sym and stored == "gptq":
        notes.append("asymmetric in checkpoint_format gptq: GPTQModel and transformers want gptq_v2 for that")
    if not source.config():
        notes.append(f"{where}: has no config.json, without which models do not load")
    result = replace(
        source,
        tensors=tensors,
        shards=shards if source.shards else {},
        warnings=(*source.warnings, *notes),
        total_size=None,
        content_id=None,
        digests={n: d for n, d in source.digests.items() if tensors.get(n) == source.get(n)},
        prefix=None,
    )
    packed = with_config(result, settings)
    if checkpoint_format in ("gptq", "gptq_v2"):
        return packed
    return repacked(packed, find_weights(packed, evaluate), checkpoint_format, evaluate)


def _pack_module(
    source: Checkpoint, prefix: str, bits: int, group_size: int, is_v1: bool, evaluate: Evaluate
) -> _Packed:
    """The packed tensors of a module; everything but its integers is looked at before anything is written."""
    where = f"{escape(source.name)}: {escape(prefix)}"
    q, zeros, scales, g_idx = (source.get(f"{prefix}.{part}") for part in _GIVEN)
    assert q is not None
    if scales is None:
        raise IncompatibleInputs(f"{where} has q and no scales, expected [G, N]", hint="store them beside the integers")
    if len(q.spec.shape) != 2 or q.spec.dtype not in INTEGERS:
        raise IncompatibleInputs(f"{where}.q is {q.spec}, expected integers [K, N]")
    columns, outputs = q.spec.shape
    check_sizes(where, columns, outputs)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    _check_shape(f"{where}.scales", scales, (groups, outputs))
    if not scales.spec.dtype.is_float or scales.spec.dtype.is_packed:
        raise IncompatibleInputs(f"{where}.scales is {scales.spec}, expected floats")
    stored = counted_cast(scales, DType.F16, f"{prefix}.scales", "refuse")
    values = np.frombuffer(evaluate([stored])[0], np.float16).reshape(stored.spec.shape)
    check_scales(values, f"{source.name}: {prefix}.scales")
    middle = 1 << bits - 1
    if zeros is None:
        zeros = LazyTensor.make(Repeat(DType.U8, (groups, outputs), bytes([middle])))
    _check_shape(f"{where}.zeros", zeros, (groups, outputs))
    points = as_codes(_integers(where, "zeros", zeros, evaluate), bits, f"{source.name}: {prefix}.zeros")
    packed_zeros = LazyTensor.make(PackZeros(f"{source.name}: {prefix}.zeros", bits, is_v1), zeros)
    if is_v1 and not points.all():
        evaluate([packed_zeros])  # says which cannot be stored
    order = False
    if g_idx is None:
        g_idx = LazyTensor.make(GroupIndex(columns, columns if group_size == -1 else group_size))
    else:
        _check_shape(f"{where}.g_idx", g_idx, (columns,))
        if g_idx.spec.dtype is not DType.I32:
            raise IncompatibleInputs(f"{where}.g_idx is {g_idx.spec}, expected int32")
        index = _integers(where, "g_idx", g_idx, evaluate)
        check_groups(index, groups, f"{source.name}: {prefix}.g_idx")
        order = is_act_order(index)
        if group_size != -1 and int(np.bincount(index, minlength=groups).max()) > group_size:
            raise IncompatibleInputs(
                f"{where}.g_idx: a group has {int(np.bincount(index).max())} columns, expected at most {group_size}",
                hint="give the group size that the integers were made with",
            )
    tensors = {
        "qweight": LazyTensor.make(Pack(f"{source.name}: {prefix}.q", bits), q),
        "qzeros": packed_zeros,
        "scales": stored,
        "g_idx": g_idx,
    }
    is_ragged = group_size != -1 and columns % group_size > 0
    return _Packed(tensors, bool((points == middle).all()), order, is_ragged)


def _check_shape(label: str, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    if tensor.spec.shape != shape:
        raise IncompatibleInputs(
            f"{label} is {list(tensor.spec.shape)}, expected {list(shape)}",
            hint="do q, scales and zeros belong together, and is this their group size?",
        )


def _integers(where: str, part: str, tensor: LazyTensor, evaluate: Evaluate) -> Any:
    if tensor.spec.dtype not in INTEGERS:
        raise IncompatibleInputs(f"{where}.{part} is {tensor.spec}, expected integers")
    data = evaluate([tensor])[0]
    return np.frombuffer(data, tensor.spec.dtype.value).reshape(tensor.spec.shape)
