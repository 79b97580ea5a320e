"""Cast: floating-point tensors in another type, or linear layers in fp8 with scales; what that loses is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.operations.pairing import is_vocabulary, listed, matching, refuse_adapter, refuse_delta
from weightops.ops.float_formats import FORMATS
from weightops.ops.fp8 import SCALED, Strategy, scaled_fp8
from weightops.ops.loss import Overflow, counted_cast
from weightops.spec import DType

DTYPES = (DType.F16, DType.BF16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2)
_SCALES = ("_scale", "_scale_inv", "_scale_2")
"""What the scale of a quantised weight is called beyond the weight's own name."""
_QUANTISED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "SCB")
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose layers are `Conv1D`, with transposed weights, which are no `Linear` to compressed-tensors."""
_EMBEDDINGS = ("wpe", "shared", "relative_attention_bias", "token_embd")
_HEADS = ("lm_head", "embed_out", "output")
_ROUTERS = ("gate", "shared_expert_gate")


def cast(
    source: Checkpoint,
    *,
    dtype: DType | None = None,
    keep: Sequence[str] = (),
    on_overflow: Overflow = "refuse",
    scheme: Literal["fp8"] | None = None,
    strategy: Strategy = "channel",
) -> Checkpoint:
    """`source` with its floating-point tensors in `dtype`, or its linear layers in fp8 with scales (`scheme`).

    Tensors that match one of the globs `keep` stay as they are, with those that share their memory; so do integers,
    booleans and complex numbers. Rounding is to nearest even, bit for bit as torch rounds. What each tensor loses is
    counted and recorded. `on_overflow` is for finite numbers beyond the new type's range: refuse them when the first is
    met, write the type's largest, or infinity (NaN in float8_e4m3fn, which has none; see `ops.loss.Overflow`).

    `config.json` names the new type, but never an 8-bit one: transformers would take it for the type to compute in, and
    fails to load such a model. It keeps the type that it names, or is given bfloat16, which holds every 8-bit number.

    `scheme="fp8"` writes what compressed-tensors calls float-quantized, with llm-compressor's FP8_DYNAMIC rules: each
    matrix `NAME.weight` of a linear layer in float8_e4m3fn, beside it `NAME.weight_scale`, one of each row (`strategy`
    "channel", `[rows, 1]`) or one for all ("tensor", `[1]`), in the weight's old type. Activations are scaled per token
    at run time. Embeddings, output heads, routers of experts, vision layers and what `keep` matches are not quantised,
    and listed as ignored in `config.json`. The losses are those of the numbers over their scales.

    Raises `UsageError` for options that contradict each other or match nothing, `IncompatibleInputs` for checkpoints
    that are quantised already, and on writing for numbers beyond the range.
    """
    refuse_delta(source, "the source")
    refuse_parts(source)
    _check_options(dtype, on_overflow, scheme, strategy)
    kept, notes = _kept(source, keep)
    if scheme is not None:
        refuse_adapter(source, "the source")
        result = _scaled(source, kept, strategy)
    else:
        assert dtype is not None  # _check_options refuses anything else
        result = _plain(source, dtype, kept, on_overflow)
    digests = {name: found for name, found in source.digests.items() if result.get(name) is source.get(name)}
    return replace(result, warnings=(*result.warnings, *notes), total_size=None, content_id=None, digests=digests)


def _check_options(dtype: DType | None, on_overflow: Overflow, scheme: str | None, strategy: Strategy) -> None:
    """Refuse what cannot be meant together."""
    if scheme is None and dtype is None:
        raise UsageError("a cast needs a type or a scheme", hint="for example --dtype bfloat16, or --scheme fp8")
    if scheme is None:
        if dtype not in DTYPES:
            names = ", ".join(known.value for known in DTYPES)
            raise UsageError(f"weights are not cast to {dtype.value if dtype else None}", hint=f"choose one of {names}")
        if strategy != "channel":
            raise UsageError("only --scheme fp8 has scales", hint="leave out --strategy, or give --scheme fp8")
    elif dtype not in (None, DType.F8_E4M3):
        raise UsageError(
            f"--scheme {scheme} stores float8_e4m3fn, --dtype says {dtype.value}",
            hint="leave out --dtype; to have the rest in another type, cast to that first",
        )
    elif on_overflow != "refuse":
        raise UsageError(f"nothing overflows with --scheme {scheme}", hint="leave out --on-overflow")


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


def _plain(source: Checkpoint, dtype: DType, kept: set[str], on_overflow: Overflow) -> Checkpoint:
    """Every floating-point tensor that is not kept in `dtype`."""
    for name in (name for name in source if name not in kept):
        _check_castable(source, name, dtype)
    made: dict[LazyTensor, LazyTensor] = {}  # of a tensor with two names, counted under the first
    for name, tensor in source.items():
        if name not in kept and tensor.spec.dtype.is_float and tensor not in made:
            made[tensor] = counted_cast(tensor, dtype, name, on_overflow)
    tensors = {name: tensor if name in kept else made.get(tensor, tensor) for name, tensor in source.items()}
    notes = []
    others = {name for name, tensor in source.items() if name not in kept and not tensor.spec.dtype.is_float}
    if others:
        notes.append(f"not floating-point, and left as they are: {listed(others)}")
    if all(tensors[name] is tensor for name, tensor in source.items()):
        notes.append(f"nothing is cast: there is no floating-point tensor that is not {dtype.value} or kept")
    method = _quantization(source)
    if method is not None:
        notes.append(f"config.json says that the model is quantised ({method}); its floats are cast all the same")
    result = replace(source, tensors=tensors, warnings=(*source.warnings, *notes))
    return result.with_config(_compute_in_more_bits) if dtype.bits == 8 else result.with_dtype(dtype)


def _check_castable(source: Checkpoint, name: str, dtype: DType) -> None:
    """Refuse floats that are not numbers by themselves."""
    found = source[name].spec.dtype
    if not found.is_float or found is dtype:
        return
    if found not in FORMATS:
        raise UsageError(f"{escape(name)} is {found.value}, which is not cast", hint=f"--keep {escape(name)}")
    scale = next((name + suffix for suffix in _SCALES if name + suffix in source), None)
    if found.bits == 8 and scale is not None:
        raise IncompatibleInputs(
            f"{escape(name)} is {found.value} with the scale {escape(scale)}: cast alone, it would be another weight",
            hint=f"--keep {escape(name)}, or dequantise the model first",
        )


def _compute_in_more_bits(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that names a type in which transformers can compute."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    named = config.get(key)
    fits = isinstance(named, str) and not named.startswith("float8")
    return config if fits else {**config, key: DType.BF16.value}


def _scaled(source: Checkpoint, kept: set[str], strategy: Strategy) -> Checkpoint:
    """The linear layers in fp8 with their scales, in the form of compressed-tensors."""
    _check_unquantised(source)
    excluded = {source[name] for name in source if name in kept or _is_excluded(name)}
    tensors: dict[str, LazyTensor] = {}
    made: dict[LazyTensor, tuple[LazyTensor, LazyTensor]] = {}
    ignored: list[str] = []
    shards = dict(source.shards)
    for name, tensor in source.items():
        tensors[name] = tensor
        if not name.endswith(".weight") or len(tensor.spec.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        if tensor in excluded:
            ignored.append(module)
            continue
        if tensor.spec.dtype not in SCALED:
            found = tensor.spec.dtype.value
            raise IncompatibleInputs(f"{escape(name)} is {found}: not quantised to fp8", hint=f"--keep {escape(name)}")
        if tensor not in made:
            made[tensor] = scaled_fp8(tensor, strategy, name)
        tensors[name], tensors[f"{name}_scale"] = made[tensor]
        if name in shards:
            shards[f"{name}_scale"] = shards[name]
    if not made:
        raise UsageError(f"{escape(source.name)}: there is no linear layer to quantise")
    notes = []
    stacked = {name for name, tensor in source.items() if len(tensor.spec.shape) > 2 and tensor.spec.dtype.is_float}
    if stacked - kept:
        notes.append(f"no matrices, and left as they are: {listed(stacked - kept)}")
    result = replace(source, tensors=tensors, shards=shards, warnings=(*source.warnings, *notes))
    document = quantization_config(strategy, ["lm_head", *(module for module in ignored if module != "lm_head")])
    return result.with_config(lambda config: {**config, "quantization_config": document})


def _check_unquantised(source: Checkpoint) -> None:
    """Refuse what is quantised already, or could not be read again."""
    config, where = source.config(), escape(source.name)
    method = _quantization(source)
    if method is not None:
        raise IncompatibleInputs(
            f"{where}: is quantised already ({method}, says config.json)", hint="cast the model that it was made from"
        )
    found = {name for name in source if name.rpartition(".")[2] in _QUANTISED}
    if found:
        raise IncompatibleInputs(
            f"{where}: is quantised already: it holds {listed(found, 3)}", hint="cast the model that it was made from"
        )
    if not config:
        raise UsageError(f"{where}: has no config.json, where the scheme has to be said", hint="add it to the folder")
    if config.get("model_type") in _CONV1D:
        raise UsageError(
            f"{where}: the layers of {escape(config['model_type'])} are transposed, which the scheme does not know",
            hint="cast to a type with --dtype",
        )


def _quantization(source: Checkpoint) -> str | None:
    """The method by which a model is quantised, according to its config.json."""
    config = source.config()
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return escape(str(found.get("quant_method", "unnamed"))) if isinstance(found, Mapping) else "unnamed"


def _is_excluded(name: str) -> bool:
    """Whether a matrix is that of an embedding, a norm, an output head, a router of experts, or of a vision model."""
    *outer, layer = name.removesuffix(".weight").lower().split(".")
    return (
        is_vocabulary(name)
        or "embed" in layer
        or "norm" in layer
        or layer in (*_EMBEDDINGS, *_HEADS, *_ROUTERS)
        or any("router" in part for part in (*outer, layer))
        or any(part.startswith(("visual", "vision", "multi_modal_projector")) for part in outer)
    )


def quantization_config(strategy: Strategy, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json as compressed-tensors 0.20 writes it for FP8_DYNAMIC."""

    def arguments(strategy: str, dynamic: bool) -> dict[str, Any]:
        return {
            "dynamic": dynamic,
            "group_size": None,
            "num_bits": 8,
            "strategy": strategy,
            "symmetric": True,
            "type": "float",
        }

    group = {
        "format": "float-quantized",
        "input_activations": arguments("token", True),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": arguments(strategy, False),
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
