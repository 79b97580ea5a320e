"""Cast: floating-point tensors in another type, or linear layers in fp8 with scales; what that loses is counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.io.names import listed, matching
from weightops.layouts.families import is_told_by_a_table
from weightops.layouts.loaded_names import LoadedNames
from weightops.lazy import Evaluate, LazyTensor, read_each
from weightops.operations.cast.schemes import Scheme, scaled
from weightops.operations.dequantize import plain_if_quantised
from weightops.ops.fp8 import Strategy
from weightops.ops.measures.loss import Overflow, counted_cast
from weightops.ops.numbers.float_formats import FORMATS
from weightops.spec import DType

DTYPES = (DType.F16, DType.BF16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2)


def cast(
    source: Checkpoint,
    *,
    dtype: DType | None = None,
    keep: Sequence[str] = (),
    on_overflow: Overflow = "refuse",
    scheme: Scheme | None = None,
    strategy: Strategy = "channel",
    cast_all: bool = False,
    evaluate: Evaluate = read_each,
) -> Checkpoint:
    """`source` with its floating-point tensors in `dtype`, or its linear layers in few bits with scales (`scheme`).

    Tensors that match one of the globs `keep` stay as they are, with those that share their memory; so do integers,
    booleans and complex numbers. Rounding is to nearest even, bit for bit as torch rounds. What each tensor loses is
    counted and recorded. `on_overflow` is for finite numbers beyond the new type's range: refuse them when the first is
    met, write the type's largest, or infinity (NaN in float8_e4m3fn, which has none; see `ops.loss.Overflow`).

    What transformers has in float32 although it loads the model in `dtype` (correction biases of routers and the like)
    is float32 in the result, unless `cast_all`; other models than LLaMA and Mistral are asked of transformers for it.
    A quantised model is cast as the plain one that it stands for, each weight in its native type first.

    `config.json` names the new type, but never an 8-bit one: transformers would take it for the type to compute in, and
    fails to load such a model. It keeps the type that it names, or is given bfloat16, which holds every 8-bit number.

    `scheme="fp8"` writes what compressed-tensors calls float-quantized, with llm-compressor's FP8_DYNAMIC rules: each
    matrix `NAME.weight` of what the loader has as a linear layer in float8_e4m3fn, beside it `NAME.weight_scale`, one
    of each row (`strategy` "channel", `[rows, 1]`) or one for all ("tensor", `[1]`), in the weight's old type.
    Activations are scaled per token at run time. Embeddings, output heads, routers of experts, vision layers and what
    `keep` matches are not quantised, and listed as ignored in `config.json`. The losses are those of the numbers over
    their scales.

    `scheme="fp8-block"` writes the same layers as DeepSeek publishes them: beside each weight its `weight_scale_inv`
    float32, with which blocks of 128 x 128 are multiplied. Layers that are no whole blocks, and those that vLLM joins
    with such, stay as they are and are listed, because transformers reads tails wrongly. `scheme="mxfp4"` writes what
    compressed-tensors calls mxfp4-pack-quantized, four bits with an exponent for each 32 (`ops.mxfp4`), and of gpt-oss
    its experts as OpenAI publishes them.

    Raises `UsageError` for options that contradict each other or match nothing, `IncompatibleInputs` for checkpoints
    that are quantised already, and on writing for numbers beyond the range.
    """
    refuse_delta(source, "the source")
    refuse_parts(source)
    _check_options(dtype, on_overflow, scheme, strategy, cast_all)
    if scheme is None:
        source = plain_if_quantised(source, evaluate)
    kept, notes = _kept(source, keep)
    if scheme is not None:
        refuse_adapter(source, "the source")
        result = scaled(source, kept, scheme, strategy)
    else:
        assert dtype is not None  # _check_options refuses anything else
        wide = set() if cast_all or not dtype.bits < 32 else _in_float32(source, dtype)
        result = _plain(source, dtype, kept, wide, on_overflow)
    digests = {name: found for name, found in source.digests.items() if result.get(name) is source.get(name)}
    return replace(result, warnings=(*result.warnings, *notes), total_size=None, content_id=None, digests=digests)


def _check_options(
    dtype: DType | None, on_overflow: Overflow, scheme: str | None, strategy: Strategy, cast_all: bool
) -> None:
    """Refuse what cannot be meant together."""
    if scheme is None and dtype is None:
        raise UsageError("a cast needs a type or a scheme", hint="for example --dtype bfloat16, or --scheme fp8")
    if scheme not in (None, "fp8") and strategy != "channel":
        raise UsageError(f"--scheme {scheme} has scales of its own kind", hint="leave out --strategy")
    if scheme is None:
        if dtype not in DTYPES:
            names = ", ".join(known.value for known in DTYPES)
            raise UsageError(f"weights are not cast to {dtype.value if dtype else None}", hint=f"choose one of {names}")
        if strategy != "channel":
            raise UsageError("only --scheme fp8 has scales", hint="leave out --strategy, or give --scheme fp8")
    elif dtype is not None and (dtype is not DType.F8_E4M3 or scheme == "mxfp4"):
        stores = "float4_e2m1fn" if scheme == "mxfp4" else "float8_e4m3fn"
        raise UsageError(
            f"--scheme {scheme} stores {stores}, --dtype says {dtype.value}",
            hint="leave out --dtype; to have the rest in another type, cast to that first",
        )
    elif on_overflow != "refuse":
        raise UsageError(f"nothing overflows with --scheme {scheme}", hint="leave out --on-overflow")
    elif cast_all:
        raise UsageError(f"--scheme {scheme} casts linear layers alone", hint="leave out --cast-all")


def _kept(source: Checkpoint, keep: Sequence[str]) -> tuple[set[str], list[str]]:
    """The tensors that stay as they are, and what there is to say of them."""
    for pattern in keep:
        if not matching(source, (pattern,)):
            raise UsageError(
                f"{escape(source.name)}: no tensor matches --keep {escape(pattern)}",
                hint=f"there are {listed(source, 3)}; `weightops inspect` lists all",
            )
    named = matching(source, keep)
    tensors = {source[name] for name in named}
    shared = {name for name, tensor in source.items() if tensor in tensors} - named
    notes = [f"{listed(shared)}: kept as well, because they share memory with tensors that are"] if shared else []
    return named | shared, notes


def _in_float32(source: Checkpoint, dtype: DType) -> set[str]:
    """The floating-point tensors that transformers has in float32 when it loads the model in `dtype`.

    What it keeps from float16 for its range is kept from eight bits too.
    """
    config = source.config()
    if not config or is_told_by_a_table(source, config):
        return set()
    names = LoadedNames(source)
    floats = (name for name, tensor in source.items() if tensor.spec.dtype.is_float)
    return {name for name in floats if names.is_float32(name, in_bfloat16=dtype is DType.BF16)}


def _plain(
    source: Checkpoint, dtype: DType, kept: Collection[str], wide: Collection[str], on_overflow: Overflow
) -> Checkpoint:
    """Every floating-point tensor that is not kept in `dtype`, or in float32."""
    for name in (name for name in source if name not in kept):
        _check_castable(source, name, dtype)
    made: dict[LazyTensor, LazyTensor] = {}  # of a tensor with two names, counted under the first
    for name, tensor in source.items():
        if name not in kept and tensor.spec.dtype.is_float and tensor not in made:
            made[tensor] = counted_cast(tensor, DType.F32 if name in wide else dtype, name, on_overflow)
    tensors = {name: tensor if name in kept else made.get(tensor, tensor) for name, tensor in source.items()}
    notes = []
    others = {name for name, tensor in source.items() if name not in kept and not tensor.spec.dtype.is_float}
    if others:
        notes.append(f"not floating-point, and left as they are: {listed(others)}")
    if set(wide) - {*kept}:
        notes.append(
            f"float32, as transformers has them in a {dtype.value} model (--cast-all casts them too): "
            f"{listed(set(wide) - {*kept})}"
        )
    if all(tensors[name] is tensor for name, tensor in source.items()):
        notes.append(f"nothing is cast: there is no floating-point tensor that is not {dtype.value} or kept")
    result = replace(source, tensors=tensors, warnings=(*source.warnings, *notes))
    return result.with_config(_compute_in_more_bits) if dtype.bits == 8 else result.with_dtype(dtype)


def _check_castable(source: Checkpoint, name: str, dtype: DType) -> None:
    """Refuse floats that are not numbers by themselves."""
    found = source[name].spec.dtype
    if found.is_float and found is not dtype and found not in FORMATS:
        raise UsageError(f"{escape(name)} is {found.value}, which is not cast", hint=f"--keep {escape(name)}")


def _compute_in_more_bits(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that names a type in which transformers can compute."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    named = config.get(key)
    fits = isinstance(named, str) and not named.startswith("float8")
    return config if fits else {**config, key: DType.BF16.value}
