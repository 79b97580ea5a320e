"""What is lost where an adapter is taken off a model by a weight below 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightops.checkpoint import Checkpoint
from weightops.formats.adapter.lora import Adapter
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.lora.factors import DTYPES
from weightops.ops.lora.returning import Returning

_LOOKED_AT = 64 << 20
"""Numbers that are looked at, and the rest of the tensor that is the last."""


def about_taking_off(
    base: Checkpoint, merged: Mapping[str, LazyTensor], adapters: Sequence[Adapter], evaluate: Evaluate
) -> list[str]:
    """What to say of a merge of these adapters into `base`, whose tensors are `merged`; nothing if all are added.

    How many numbers come back can only be counted with the model from before; how many do on average is known from the
    roundings (`weightops.ops.lora.returning`).
    """
    if not any(adapter.weight < 0 and adapter.factors for adapter in adapters):
        return []
    pairs: list[LazyTensor] = []
    count = 0
    changed = (name for name in base if name in merged and merged[name] != base[name])
    for name in sorted(changed, key=lambda name: base[name].nbytes):
        spec = base[name].spec
        if merged[name].spec != spec or spec.dtype not in DTYPES or (pairs and count + spec.numel > _LOOKED_AT):
            continue
        pairs.append(LazyTensor.make(Returning(), base[name], merged[name]))
        count += spec.numel
    found = [memoryview(data).cast("d") for data in evaluate(pairs)]
    same, off, size = (sum(each[i] for each in found) for i in range(3))
    if not count:
        return []
    error = f" ({(off / size) ** 0.5:.1e} of the weights' norm)" if size and off else ""
    return [
        "a weight below 0 takes an adapter off, and that is not exact: weights were rounded when it was added, and are "
        f"again now. By the sizes of {count} numbers about {100 * same / count:.3g} % of them come back as they were, "
        f"and the others are off by roundings{error}"
    ]
