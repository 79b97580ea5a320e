"""Recover: the tuned checkpoint, from the raw one and a delta of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weightops.checkpoint import Checkpoint, Sidecar
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.delta import NAME as DELTA_NAME
from weightops.formats.delta import Delta, DeltaTensor, find_delta, label, refuse_delta
from weightops.formats.quantized.weights import refuse_quantised
from weightops.formats.sidecars import Kind, is_tokenizer_file, kind_of
from weightops.io.escape import escape
from weightops.io.names import listed, matching
from weightops.layouts.embeddings import is_vocabulary
from weightops.layouts.restored import ROTARY_SUFFIX, as_loaded
from weightops.lazy import LazyTensor
from weightops.operations.diff import resizable
from weightops.ops.elementwise import Add, Reinterpret, Xor, cast
from weightops.ops.measures.witness import Witness
from weightops.ops.rows import extend_by_mean, fit
from weightops.spec import DType, bits_spec

VOCAB_POLICIES = ("refuse", "mean", "zero", "stored")


def recover(
    raw: Checkpoint,
    diff: Checkpoint,
    *,
    vocab: str = "refuse",
    dtype: DType | None = None,
    carry: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Checkpoint:
    """The tuned checkpoint that `diff` was made from.

    An exact delta names its base: `raw` is held against it first, tensor by tensor. A published subtract diff
    is added in the diff's own dtype, `raw` converted to it (or both converted to `dtype`, as KnowLM's
    `--is_fp16` does); names, order, config and tokenizer come from the diff.

    `vocab` says what new rows of the embeddings are added to: `mean` of the old rows (stanford_alpaca), `zero`,
    or nothing (`stored`, which keeps even the sign of zero; LLaVA). `carry` and `drop` are globs of tensors that
    only the diff or only raw has, to be taken over or left out.

    Raises `IncompatibleInputs` naming the tensors that do not fit.
    """
    refuse_delta(raw, "raw")
    if vocab not in VOCAB_POLICIES:
        raise UsageError(f"unknown vocabulary policy {vocab!r}, expected one of {', '.join(VOCAB_POLICIES)}")
    delta = find_delta(diff)
    if delta is not None:
        if vocab != "refuse" or tuple(carry) or tuple(drop):
            raise UsageError("an exact delta knows its tensors", hint="leave out --vocab, --carry and --drop")
        recovered = _recover_exact(raw, diff, delta)
        if dtype is not None:
            tensors = {n: cast(t, dtype) if t.spec.dtype.is_float else t for n, t in recovered.items()}
            recovered = replace(recovered, tensors=tensors)
    else:
        recovered = _recover_published(raw, diff, vocab, dtype, tuple(carry), tuple(drop))
    recovered = replace(
        recovered, sidecars=_sidecars(raw, diff), metadata={**diff.metadata, "format": "pt"}, prefix=None
    )
    return recovered.with_dtype(dtype) if dtype else recovered


def _sidecars(raw: Checkpoint, diff: Checkpoint) -> dict[str, Sidecar]:
    """Config and tokenizer files of the diff; from raw the ones that the diff lacks."""
    has_tokenizer = any(n.startswith("tokenizer") for n in diff.sidecars)
    from_raw = {
        n: s
        for n, s in raw.sidecars.items()
        if n == "config.json"
        or kind_of(n) in (Kind.GENERATION, Kind.NOTICE)
        or (is_tokenizer_file(n) and not has_tokenizer)
    }
    return {**from_raw, **{n: s for n, s in diff.sidecars.items() if n != DELTA_NAME}}


def _recover_exact(raw: Checkpoint, diff: Checkpoint, delta: Delta) -> Checkpoint:
    expected = {t.name: t for t in delta.raw.tensors}
    missing, extra = expected.keys() - raw.keys(), raw.keys() - expected.keys()
    if missing or extra:
        side, names = ("raw lacks", missing) if missing else ("raw has, and the delta's base has not,", extra)
        raise IncompatibleInputs(f"raw is not the base of this delta: {side} {listed(names)}")
    for name, tensor in raw.items():
        if tensor.spec != expected[name].spec:
            raise IncompatibleInputs(
                f"raw is not the base of this delta: {escape(name)} is {tensor.spec}, expected {expected[name].spec}"
            )
    entries = {t.name: t for t in delta.tuned.tensors}
    if len(entries) != len(delta.tuned.tensors) or entries.keys() != diff.keys():
        raise CorruptInput(f"{escape(diff.name)}: {DELTA_NAME} and the delta's weight files name different tensors")
    carried = set(delta.carried)
    return replace(
        diff,
        tensors={n: _recovered(raw.get(n), diff[n], entry, n in carried) for n, entry in entries.items()},
        shards={n: entry.shard for n, entry in entries.items()},
        watch=tuple(_must_be(tensor, expected[n].xxh3_128, n) for n, tensor in raw.items()),
    )


def _must_be(tensor: LazyTensor, digest: str, name: str) -> LazyTensor:
    problem = f"raw is not the base of this delta: {name} differs"
    return LazyTensor.make(Witness(label("raw", name), digest, problem), tensor)


def _recovered(base: LazyTensor | None, stored: LazyTensor, entry: DeltaTensor, carried: bool) -> LazyTensor:
    """One tensor of tuned, checked against its digest as it streams by."""
    fits = carried or (base is not None and resizable(base.spec, entry.spec))
    if not fits or stored.spec != (entry.spec if carried else bits_spec(entry.spec)):
        raise CorruptInput(f"{escape(entry.name)}: the delta holds {stored.spec}, which cannot give {entry.spec}")
    if base is None or carried:
        tensor = stored
    else:
        resized = fit(base, entry.shape, bytes(entry.dtype.itemsize))
        tensor = LazyTensor.make(Xor(), LazyTensor.make(Reinterpret(entry.dtype, entry.shape), stored), resized)
    problem = f"the delta is damaged: it does not give {entry.name} as it was"
    return LazyTensor.make(Witness(label("tuned", entry.name), entry.xxh3_128, problem, "corrupt"), tensor)


def _recover_published(
    raw: Checkpoint, diff: Checkpoint, vocab: str, dtype: DType | None, carry: tuple[str, ...], drop: tuple[str, ...]
) -> Checkpoint:
    for role, checkpoint in (("raw", raw), ("the diff", diff)):
        refuse_quantised(checkpoint, role, "a diff is added to plain weights")
    base = as_loaded(raw, diff)
    new = diff.keys() - base.keys()
    unexpected = new - matching(new, carry)
    if unexpected:
        raise IncompatibleInputs(
            f"raw lacks {listed(unexpected)}, which the diff has",
            hint="is this the right raw checkpoint? --carry GLOB takes such tensors from the diff as they are",
        )
    unused = {n for n in base.keys() - diff.keys() if not n.endswith(ROTARY_SUFFIX)}
    unused -= matching(unused, drop)
    if unused:
        raise IncompatibleInputs(
            f"the diff lacks {listed(unused)}, which raw has",
            hint="is this the right raw checkpoint? --drop GLOB leaves such tensors out",
        )
    tensors = {}
    for name, tensor in diff.items():
        target = dtype if dtype and tensor.spec.dtype.is_float else tensor.spec.dtype
        change = cast(tensor, target)
        if name in new:
            tensors[name] = change
        else:
            extended = _extended(name, cast(base[name], target), change, vocab)
            tensors[name] = LazyTensor.make(Add(), change, extended)
    return replace(diff, tensors=tensors)


def _extended(name: str, base: LazyTensor, change: LazyTensor, vocab: str) -> LazyTensor:
    """`base` in the shape of `change`: as it is, or grown by the vocabulary policy."""
    old, new = base.spec.shape, change.spec.shape
    if old == new:
        return base
    grown = len(old) == len(new) == 2 and old[0] <= new[0] and old[1] <= new[1] and old[0] > 0
    if not is_vocabulary(name) or not grown or (vocab == "mean" and old[1] != new[1]):
        raise IncompatibleInputs(
            f"{escape(name)}: raw is {list(old)}, the diff is {list(new)}", hint="is this the right raw checkpoint?"
        )
    if vocab == "refuse":
        raise IncompatibleInputs(
            f"{escape(name)}: raw has {old[0]} rows, the diff has {new[0]}: say what the new rows are added to",
            hint="--vocab mean (as stanford_alpaca did), zero, or stored (as LLaVA did)",
        )
    if vocab == "mean":
        return extend_by_mean(base, new[0])
    # x + -0.0 is x for every x, also for x = -0.0: new elements come out as the diff stores them.
    itemsize = base.spec.dtype.itemsize
    return fit(base, new, bytes(itemsize) if vocab == "zero" else bytes(itemsize - 1) + b"\x80")
