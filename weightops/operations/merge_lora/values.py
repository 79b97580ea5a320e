"""Whether the values of adapters can be merged, and whether anything comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.lora import Adapter
from weightops.formats.adapter.values import differ, scan
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor

_NO_CHANGE = "what it holds is what the base has, or too small for the base's numbers"


def check_values(
    adapters: Sequence[Adapter], changes: Iterable[tuple[LazyTensor, LazyTensor]], evaluate: Evaluate
) -> list[str]:
    """What there is to say of adapters; `changes` are tensors of the base, and what becomes of each.

    Raises `CorruptInput` for values that are no numbers, `IncompatibleInputs` for an adapter whose factors change
    nothing and that holds nothing else, and for a merge after which every tensor is that of the base: tensors are read
    until one is not.
    """
    notes: list[str] = []
    causes: list[str] = []
    for adapter in adapters:
        factors = list(adapter.factors.values())
        vectors = [t for f in factors for t in (f.bias, f.magnitude) if t is not None]
        matters = scan(adapter, [*vectors, *adapter.rows.values()], evaluate)
        is_nonzero = scan(adapter, [t for f in factors for t in (f.a, f.b)], evaluate)
        cause = _why_nothing(adapter, is_nonzero[::2], is_nonzero[1::2])
        has_more = any(f.magnitude is not None for f in factors) or adapter.rows or adapter.base or adapter.whole
        if cause is not None and not has_more and not any(matters):
            raise _changes_nothing(adapter, cause)
        notes += adapter.notes
        if cause is not None and factors:
            causes.append(cause)
            notes.append(f"{escape(adapter.name)}: the factors change nothing: {cause}")
    if not any(differ(old, new, evaluate) for old, new in changes):
        raise _changes_nothing(adapters[-1], causes[-1] if causes else _NO_CHANGE)
    return notes


def _why_nothing(adapter: Adapter, has_a: Sequence[bool], has_b: Sequence[bool]) -> str | None:
    """Why the products of an adapter's factors are zero; `has_a` and `has_b` say of each which is not. Else None."""
    scales = [adapter.scale(path) != 0 for path, _ in adapter.factors]
    if any(all(each) for each in zip(scales, has_a, has_b, strict=True)):
        return None
    if not scales:
        return "it holds no factors"
    if adapter.weight == 0:
        return "its weight is 0"
    for name, found in (("lora_alpha", scales), ("lora_B", has_b), ("lora_A", has_a)):
        if not any(found):
            return f"{name} is zero everywhere"
    return "of each module lora_alpha, lora_A or lora_B is zero"


def _changes_nothing(adapter: Adapter, cause: str) -> IncompatibleInputs:
    return IncompatibleInputs(
        f"{escape(adapter.name)}: changes nothing: {cause}",
        hint="was it saved before it was trained, or without its factors?",
    )
