"""Make a delta: what to publish so that holders of `raw` can recover `tuned`."""

from __future__ import annotations

from dataclasses import replace

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.delta import FORMAT, DeltaDocument, label, refuse_delta
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.restored import ROTARY_SUFFIX, as_loaded
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import Reinterpret, Subtract, Xor, cast
from weightops.ops.measures.witness import witness
from weightops.ops.rows import fit
from weightops.spec import DType, TensorSpec, bits_spec
from weightops.version import library_versions

METHODS = ("exact", "subtract")


def diff(
    raw: Checkpoint, tuned: Checkpoint, *, method: str = "exact", dtype: DType | None = None, compress: bool = False
) -> Checkpoint:
    """The delta from `raw` to `tuned`.

    `exact` is the exclusive or of the stored bits, recovered to the bit whatever the dtype; `subtract` is
    `tuned - raw` in `dtype` (default float32), a folder that looks like a model, as stanford_alpaca's
    weight_diff.py and FastChat's make_delta.py publish it. With `compress` an exact one is the same delta in smaller
    files (`weightops.formats.compressed`).
    Raises `IncompatibleInputs` when `subtract` finds tensors of other names or shapes.
    """
    refuse_delta(raw, "raw")
    refuse_delta(tuned, "tuned")
    if method == "exact":
        if dtype is not None:
            raise UsageError("an exact delta has no dtype", hint="leave out --dtype, or use --method subtract")
        return replace(_exact(raw, tuned), container="wdelta" if compress else None)
    if compress:
        raise UsageError(
            "what --method subtract makes is for programs that read safetensors alone, which no compressed file is",
            hint="leave out --compress, or use --method exact",
        )
    if method == "subtract":
        return _subtract(raw, tuned, dtype or DType.F32)
    raise UsageError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")


def _exact(raw: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    watched = {name: witness(tensor, label("raw", name)) for name, tensor in raw.items()}
    tensors: dict[str, LazyTensor] = {}
    carried = []
    for name, tensor in tuned.items():
        target = witness(tensor, label("tuned", name))
        base = watched.get(name)
        if base is None or not resizable(base.spec, tensor.spec):
            tensors[name] = target
            carried.append(name)
            continue
        bits = bits_spec(tensor.spec)
        mixed = LazyTensor.make(Xor(), target, fit(base, tensor.spec.shape, bytes(tensor.spec.dtype.itemsize)))
        tensors[name] = LazyTensor.make(Reinterpret(bits.dtype, bits.shape), mixed)
    document = DeltaDocument(
        raw={n: t.spec for n, t in raw.items()},
        tuned={n: t.spec for n, t in tuned.items()},
        shards=dict(tuned.shards),
        carried=tuple(carried),
        versions=library_versions(),
    )
    used = {node for t in tensors.values() for node in t.walk()}
    return replace(
        tuned,
        tensors=tensors,
        watch=tuple(t for t in watched.values() if t not in used),
        documents=(document,),
        metadata={"format": FORMAT},
        prefix="delta",
    )


def resizable(base: TensorSpec, tuned: TensorSpec) -> bool:
    """Whether `base` can be cut or extended to `tuned` before the bits are combined.

    Only then does the delta keep the base's weights to itself; anything else has to carry `tuned` as it is.
    """
    if base == tuned:
        return True
    same_rows = base.shape[1:] == tuned.shape[1:] and base.shape != () and tuned.shape != ()
    return base.dtype is tuned.dtype and same_rows and not base.dtype.is_packed and min(base.nbytes, tuned.nbytes) > 0


def _subtract(raw: Checkpoint, tuned: Checkpoint, dtype: DType) -> Checkpoint:
    base = as_loaded(raw, tuned)
    missing = [n for n in tuned if n not in base]
    extra = [n for n in base if n not in tuned and not n.endswith(ROTARY_SUFFIX)]
    if missing or extra:
        side, names = ("raw lacks", missing) if missing else ("tuned lacks", extra)
        raise IncompatibleInputs(f"{side} {listed(names)}", hint="--method exact carries such tensors")
    tensors = {}
    for name, tensor in tuned.items():
        if base[name].spec.shape != tensor.spec.shape:
            raise IncompatibleInputs(
                f"{escape(name)}: raw is {base[name].spec}, tuned is {tensor.spec}",
                hint="--method exact carries tensors of another size",
            )
        target = dtype if tensor.spec.dtype.is_float else tensor.spec.dtype
        tensors[name] = LazyTensor.make(Subtract(), cast(tensor, target), cast(base[name], target))
    return replace(tuned, tensors=tensors).with_dtype(dtype)
