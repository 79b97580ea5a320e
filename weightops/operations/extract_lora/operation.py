"""Extract LoRA: an adapter that turns one model into another, as near as its ranks allow; the way back from merge_lora.

Of every Linear weight that differs, the change is approximated by a product of two thin matrices, its truncated
singular value decomposition, made by streaming (`weightops.ops.lora.lowrank`). The adapter is one that peft loads:
names, files and settings are those of `PeftModel.save_pretrained` of peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Literal, TypedDict

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.adapter.written import FACTOR_DTYPES, check_factor_dtype
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.modules import is_conv1d
from weightops.io.escape import escape
from weightops.io.names import listed, matching
from weightops.layouts.embeddings import is_vocabulary
from weightops.layouts.restored import ROTARY_SUFFIX, as_loaded
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.dequantize import plain_if_quantised
from weightops.operations.extract_lora import adapter as adapter
from weightops.operations.extract_lora.adapter import Pair, Rest, is_head, is_linear, module_of
from weightops.operations.extract_lora.places import Places
from weightops.ops.elementwise import Reinterpret, cast
from weightops.ops.lora.lowrank import OVERSAMPLE, PASSES, Change, LowRank, SingularValues
from weightops.spec import DType

_WEIGHT_DTYPES = (*FACTOR_DTYPES, DType.F64)
_ENERGY_TOLERANCE = 1e-6
"""What float32 leaves of a share that should be 1."""
_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-24, 1e24
"""With ||D||^2 between these, products stay in float32's range; beyond, float64 is used."""
_MAX_RANK = 256
"""What an energy may take where nothing else is said."""
_SAME_MODEL = "are these the same model, before and after training?"


class _Sketch(TypedDict):
    """What `LowRank` and `SingularValues` have in common."""

    shape: tuple[int, int]
    width: int
    passes: int
    seed: int
    label: str


def extract_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    seed: int = 0,
    dtype: DType | None = None,
    target: Sequence[str] = (),
    rest: Literal["save", "refuse", "drop"] = "save",
    evaluate: Evaluate,
) -> Checkpoint:
    """A LoRA adapter in peft's format that makes `tuned` of `base`, for `rank`, `energy`, or both.

    Every Linear weight that differs gets factors B [out, r] and A [r, in] with B A close to tuned - base: `rank` is
    r, less where a matrix has less; `energy`, a share of ||tuned - base||^2 in (0, 1], asks of each matrix for the
    least rank that holds so much, at most `rank` or else `max_rank`, 256 if that is None (those that need more are
    named in a warning). The scale of the adapter is 1, and the singular values are split evenly. What the factors hold
    is noted by module (`weightops.ops.lora.lowrank.LowRank`). `dtype` is that of the factors, default float32. `seed`
    draws the random matrix.

    `target`: globs of the modules that get factors, by their path or its end (`q_proj`, `*.mlp.*`); other Linear
    weights that differ are named in a warning. Output embeddings get factors only if a glob of `target` matches.
    `rest`: what else differs, embeddings, norms, biases and vocabularies of another size, is kept whole as peft's
    `modules_to_save` ("save"), to the bit; named in an error ("refuse"); or left out, with a warning ("drop").

    Values are read at once: all tensors once to see which differ, and the Linear ones as often again for `energy` as
    for the factors later. All tensors of an adapter belong in one file.

    Raises `UsageError` for options that cannot be meant, `IncompatibleInputs` if the two are not the same kind of
    model, hold the same values, or differ in what no adapter can hold, `CorruptInput` if a change is NaN or infinite.
    """
    _check_options(rank, energy, max_rank, seed, dtype)
    base, tuned = (_whole(role, checkpoint, evaluate) for role, checkpoint in (("base", base), ("tuned", tuned)))
    pairs = _pairs(base, tuned)
    places = Places(tuned, pairs)
    chosen = _targets(pairs, places, target, base)
    changes = _measure(pairs, chosen, evaluate)
    if not changes:
        raise IncompatibleInputs(
            f"base {escape(base.name)} and tuned {escape(tuned.name)} hold the same values: there is nothing to extract"
        )
    touched = {places[name].experts for name in changes if name in chosen} - {None}
    stacked = {name for name in pairs if places[name].experts in touched}
    factored = {n: None for n in pairs if n in stacked or (n in changes and n in chosen and not pairs[n].is_resized)}
    linear = {name for name in changes if is_linear(name, pairs[name], places)}
    untargeted = [name for name in changes if name in linear and name not in chosen]
    others = [name for name in changes if name not in factored and name not in untargeted]
    _refuse_rest(factored, untargeted, others, rest)
    config = tuned.config()
    kept = adapter.keep_whole(others, factored, pairs, places, config) if rest == "save" else Rest()
    limit = rank or max_rank or _MAX_RANK
    # All experts of a layer get factors, those that are no target or do not differ ones of zeros.
    sizes = {name: changes.get(name, 0.0) if name in chosen else 0.0 for name in factored}
    ours = {name: pairs[name] if name in chosen else Pair(pairs[name].base, pairs[name].base) for name in factored}
    wanted = {name: _decomposed(pair, sizes[name]) for name, pair in ours.items()}
    paths = {name: places[name].module for name in factored}
    sketches = {name: _sketch(pair, limit, seed, paths[name]) for name, pair in wanted.items()}
    ranks = {name: min(*pair.base.spec.shape, limit) for name, pair in wanted.items()}
    warnings = [*base.warnings, *tuned.warnings]
    if energy is not None:
        data = evaluate([LazyTensor.make(SingularValues(**sketches[n]), *pair) for n, pair in wanted.items()])
        shares = {n: _shares(values, ranks[n], sizes[n]) for n, values in zip(wanted, data, strict=True)}
        ranks = {n: _least(shares[n], energy) for n in ranks}
        short = [f"{paths[n]} ({100 * s[-1]:.3g} %)" for n, s in shares.items() if s[-1] < energy - _ENERGY_TOLERANCE]
        if short:
            warnings.append(f"a rank of {limit} holds less than {100 * energy:g} % of the change of {listed(short)}")
    ranks |= dict.fromkeys(stacked, max((ranks[name] for name in stacked), default=0))
    if untargeted:
        warnings.append(f"left out, because no target matches: the changes of {listed(untargeted)}")
    if others and rest == "drop":
        warnings.append(f"left out, because they are no Linear weights: the changes of {listed(others)}")
    tensors: dict[str, LazyTensor] = {}
    for name, pair in wanted.items():
        path = paths[name]
        for letter, factor in _factors(pair, sketches[name], ranks[name], is_conv1d(path, config.get("model_type"))):
            tensors[f"{adapter.PREFIX}{path}.lora_{letter}.weight"] = cast(factor, dtype or DType.F32)
    modules = {paths[name]: ranks[name] for name in factored if name not in stacked}
    experts = {places[name].stacked or "": ranks[name] for name in stacked}
    return Checkpoint(
        tuned.name,
        {**tensors, **kept.tensors},
        sidecars=adapter.sidecars(modules, experts, kept, places, base, tuned),
        warnings=(*warnings, *adapter.notes(pairs, modules, kept)),
        prefix="adapter_model",
        in_one_file=True,
    )


def _check_options(
    rank: int | None, energy: float | None, max_rank: int | None, seed: int, dtype: DType | None
) -> None:
    if rank is None and energy is None:
        raise UsageError("neither a rank nor an energy is given", hint="--rank 16, or --energy 0.9 for what that takes")
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} holds nothing: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"an energy of {energy:g} is no share: expected more than 0, at most 1", hint="--energy 0.9")
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"a largest rank of {max_rank} holds nothing: expected at least 1")
    if max_rank is not None and rank is not None:
        raise UsageError("a largest rank is for an energy without a rank", hint="leave out --max-rank")
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"the seed {seed} does not have 64 bits: expected 0 to {(1 << 64) - 1}")
    check_factor_dtype(dtype)


def _refuse_rest(factored: Collection[str], untargeted: Sequence[str], others: Sequence[str], rest: str) -> None:
    """Refuse what differs beside Linear weights if that is asked for, and what differs in nothing else in any case."""
    if others and rest == "refuse":
        raise IncompatibleInputs(
            f"{listed(others)}: the values differ, and factors can only stand for Linear weights",
            hint="--rest save keeps them whole, --rest drop leaves them out",
        )
    if not factored:
        raise IncompatibleInputs(
            f"no Linear weight that is a target differs, only {listed([*untargeted, *others])}",
            hint="an adapter needs a layer to adapt; `weightops diff` makes a delta of any change",
        )


def _whole(role: str, checkpoint: Checkpoint, evaluate: Evaluate) -> Checkpoint:
    """A whole model in plain numbers, here or in a bucket, dequantised if it is quantised; what is none is refused."""
    shown = f"{role} {escape(checkpoint.name)}"
    refuse_delta(checkpoint, role)
    refuse_parts(checkpoint)
    refuse_adapter(checkpoint, role)
    sources = (node.op.source for tensor in checkpoint.values() for node in tensor.walk())
    # A bucket may be as near as a disk, and who keeps models there has nowhere else to put them.
    if any(source is not None and source.is_on_server and source.scheme != "s3" for source in sources):
        raise UsageError(
            f"{shown} is on a server, and would be fetched {PASSES + 2} times or more",
            hint="weightops download fetches it once",
        )
    checkpoint = plain_if_quantised(checkpoint, evaluate)
    quantised = [n for n, t in checkpoint.items() if n.endswith("weight") and t.spec.dtype not in _WEIGHT_DTYPES]
    if quantised:
        raise IncompatibleInputs(
            f"{shown}: {listed(quantised)}: found {checkpoint[quantised[0]].spec.dtype.value}, "
            f"expected one of {', '.join(d.value for d in _WEIGHT_DTYPES)}",
            hint="dequantise it first",
        )
    return checkpoint


def _pairs(base: Checkpoint, tuned: Checkpoint) -> dict[str, Pair]:
    """The tensors of both by name; refused unless they are those of one model, but for the size of the vocabulary."""
    before, after = as_loaded(base, tuned), as_loaded(tuned, base)
    names = [name for name in after if not name.endswith(ROTARY_SUFFIX)]
    missing = [name for name in names if name not in before]
    extra = [name for name in before if name not in after and not name.endswith(ROTARY_SUFFIX)]
    if missing or extra:
        side, odd = ("base lacks", missing) if missing else ("tuned lacks", extra)
        raise IncompatibleInputs(f"{side} {listed(odd)}, which the other has", hint=_SAME_MODEL)
    pairs = {name: Pair(before[name], after[name]) for name in names}
    for name, (old, new) in pairs.items():
        rows_alone = len(old.spec.shape) == len(new.spec.shape) and old.spec.shape[1:] == new.spec.shape[1:]
        is_fit = old.spec.shape == new.spec.shape or (rows_alone and is_vocabulary(f"{module_of(name)}.weight"))
        if not is_fit or (old.spec.dtype is not new.spec.dtype and not _are_weights(old, new)):
            raise IncompatibleInputs(f"{escape(name)}: base is {old.spec}, tuned is {new.spec}", hint=_SAME_MODEL)
    return pairs


def _are_weights(*tensors: LazyTensor) -> bool:
    return all(tensor.spec.dtype in _WEIGHT_DTYPES for tensor in tensors)


def _targets(pairs: Mapping[str, Pair], places: Places, patterns: Sequence[str], base: Checkpoint) -> set[str]:
    """The weights that are to get factors where they differ; every pattern has to match one.

    Patterns are held against the paths in the files and those in transformers' model.
    """
    if not patterns:
        return {name for name, pair in pairs.items() if is_linear(name, pair, places)}
    layers = [name for name, pair in pairs.items() if is_linear(name, pair, places) or is_head(name, pair)]
    modules = {path: name for name in layers for path in (module_of(name), places[name].module)}
    found: set[str] = set()
    for pattern in patterns:
        matched = matching(modules, (pattern, f"*.{pattern}"))
        if not matched:
            known = f"layers are named like {escape(next(iter(modules)))}" if modules else None
            raise UsageError(f"the target {escape(pattern)!r} matches no Linear layer", hint=known)
        found |= {modules[module] for module in matched}
    tied = [name for name in found if is_head(name, pairs[name])] if base.config().get("tie_word_embeddings") else []
    if tied:
        raise UsageError(
            f"{listed(tied)}: is the input embedding too in base, which factors for the one would change as well",
            hint="leave it out of --target: --rest save keeps it whole",
        )
    return found


def _measure(pairs: Mapping[str, Pair], chosen: Container[str], evaluate: Evaluate) -> dict[str, float]:
    """The tensors that differ, each with the square of the norm of its change; infinity for those of another size.

    Raises `CorruptInput` for one that is to get factors and cannot, because its change is not finite.
    """
    compared = {n: pair for n, pair in pairs.items() if not pair.is_resized and pair.base != pair.tuned}
    results = dict(zip(compared, evaluate([_change(pair) for pair in compared.values()]), strict=True))
    changes: dict[str, float] = {}
    for name, pair in pairs.items():
        count, change, size = memoryview(results[name]).cast("d") if name in results else (pair.is_resized, math.inf, 0)
        if name in chosen and not pair.is_resized and count and not math.isfinite(change):
            raise CorruptInput(
                f"{escape(name)}: {'tuned' if math.isfinite(size) else 'base'} holds NaN or infinity, "
                "and the change has no factors"
            )
        if count:
            changes[name] = change
    return changes


def _change(pair: Pair) -> LazyTensor:
    """The measure of a pair of one shape: as numbers where both are, else as bytes."""
    if _are_weights(*pair):
        return LazyTensor.make(Change(), *_in_type(pair, _common(pair)))
    as_bytes = Reinterpret(DType.U8, (pair.base.nbytes,))
    return LazyTensor.make(Change(), *(LazyTensor.make(as_bytes, tensor) for tensor in pair))


def _common(pair: Pair) -> DType:
    return DType.F64 if DType.F64 in (pair.base.spec.dtype, pair.tuned.spec.dtype) else DType.F32


def _in_type(pair: Pair, dtype: DType) -> Pair:
    return Pair(cast(pair.base, dtype), cast(pair.tuned, dtype))


def _decomposed(pair: Pair, change: float) -> Pair:
    """The pair in the type in which its change is decomposed."""
    return _in_type(pair, _common(pair) if _SMALLEST_SQUARE < change < _LARGEST_SQUARE else DType.F64)


def _sketch(pair: Pair, limit: int, seed: int, label: str) -> _Sketch:
    """One basis both for the choice of a rank and for the factors, so that these hold what was promised."""
    rows, columns = pair.base.spec.shape
    width = min(rows, columns, limit + OVERSAMPLE)
    return {"shape": (rows, columns), "width": width, "passes": PASSES, "seed": seed, "label": label}


def _shares(singular_values: bytes, limit: int, change: float) -> list[float]:
    """The share of the change that factors of rank 1, 2, ... up to `limit` hold."""
    shares, total = [], 0.0
    for value in memoryview(singular_values).cast("d")[:limit]:
        total += value * value
        shares.append(min(1.0, total / change) if change else 1.0)
    return shares


def _least(shares: Sequence[float], energy: float) -> int:
    """The least rank whose factors hold `energy`, or the largest there is."""
    return next((i for i, share in enumerate(shares, 1) if share >= energy - _ENERGY_TOLERANCE), len(shares))


def _factors(pair: Pair, sketch: _Sketch, rank: int, is_transposed: bool) -> list[tuple[str, LazyTensor]]:
    """A [rank, in] and B [out, rank], of a weight [out, in], or [in, out] if it is transposed."""
    right = LowRank(**sketch, rank=rank, part="right", transpose=is_transposed)
    left = LowRank(**sketch, rank=rank, part="left", transpose=is_transposed)
    a, b = (left, right) if is_transposed else (right, left)
    return [("A", LazyTensor.make(a, *pair)), ("B", LazyTensor.make(b, *pair))]
