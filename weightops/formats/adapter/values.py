"""What the values of adapters are: numbers or not, zeros, the same as others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightops.errors import CorruptInput
from weightops.formats.adapter.lora import Adapter
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.elementwise import Reinterpret, cast
from weightops.ops.lora.lowrank import Change
from weightops.spec import DType

_BATCH_NBYTES = 64 << 20


def scan(adapter: Adapter, tensors: Sequence[LazyTensor], evaluate: Evaluate) -> list[bool]:
    """For each tensor, whether it holds anything but zeros; raises `CorruptInput` for NaN and infinity."""
    return _scanned(adapter.name, adapter.tensors, tensors, evaluate)


def scan_tensors(of: str, tensors: Mapping[str, LazyTensor], evaluate: Evaluate) -> None:
    """Raise `CorruptInput` naming a tensor that holds NaN or infinity."""
    _scanned(of, tensors, list(tensors.values()), evaluate)


def _scanned(of: str, named: Mapping[str, LazyTensor], tensors: Sequence[LazyTensor], evaluate: Evaluate) -> list[bool]:
    import numpy as np

    found: list[bool] = []
    while len(found) < len(tensors):
        batch: list[LazyTensor] = []
        nbytes = 0
        for tensor in tensors[len(found) :]:
            if batch and nbytes + tensor.spec.numel * 4 > _BATCH_NBYTES:
                break
            batch.append(tensor)
            nbytes += tensor.spec.numel * 4
        for tensor, data in zip(batch, evaluate([cast(t, DType.F32) for t in batch]), strict=True):
            values = np.frombuffer(data, dtype=np.float32)
            if not np.isfinite(values).all():
                name = next(name for name, other in named.items() if other is tensor)
                raise CorruptInput(
                    f"{escape(of)}: {escape(name)} holds values that are no numbers",
                    hint="the training run failed, or the file was damaged after it",
                )
            found.append(bool(values.any()))
    return found


def scan_factors(adapter: Adapter, evaluate: Evaluate) -> None:
    """Raise `CorruptInput` for factors, biases and magnitudes that hold NaN or infinity."""
    parts = [(each.a, each.b, each.bias, each.magnitude) for each in adapter.factors.values()]
    scan(adapter, [tensor for own in parts for tensor in own if tensor is not None], evaluate)


def differ(old: LazyTensor, new: LazyTensor, evaluate: Evaluate) -> bool:
    """Whether two tensors hold other bytes, or another number of them."""
    if old.spec != new.spec:
        return True
    as_bytes = Reinterpret(DType.U8, (old.nbytes,))
    (found,) = evaluate([LazyTensor.make(Change(), *(LazyTensor.make(as_bytes, tensor) for tensor in (old, new)))])
    return memoryview(found).cast("d")[0] > 0
