"""The fp8 scheme of cast: which layers are quantised, under which names, and what config.json says of it.

What loads is decided by the loader, compressed-tensors through transformers: it puts a scale beside every Linear layer
of its own model that config.json does not tell it to ignore, whatever files call it, and folds the scales of single
experts into the parameter that it stacks them in. Other matrices have no scale that anything would read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.modules import is_conv1d, last_part
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import is_vocabulary
from weightops.layouts.families import is_told_by_a_table
from weightops.layouts.loaded_names import LoadedNames
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.elementwise import Reinterpret
from weightops.ops.fp8 import SCALED, Strategy, scaled_fp8
from weightops.ops.transpose import transposed

_QUANTISED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "SCB")
_EMBEDDINGS = ("wpe", "shared", "relative_attention_bias", "token_embd")
_HEADS = ("lm_head", "embed_out", "output", "score")
_ROUTERS = ("gate", "shared_expert_gate", "router")
_TOWERS = ("visual", "vision", "audio", "multi_modal_projector")
_CONV1D = "its layers are Conv1D, with transposed weights, which the scheme does not know: cast to a type with --dtype"
_STACKED = re.compile(r"(?P<experts>.+\.experts)\.(?P<layer>gate_up_proj|down_proj)")


def scaled(source: Checkpoint, kept: Collection[str], strategy: Strategy) -> Checkpoint:
    """`source` with its linear layers in fp8 with their scales, in the form of compressed-tensors; not those `kept`."""
    _check_unquantised(source)
    layers = _choose(source, kept)
    tensors: dict[str, LazyTensor] = {}
    made: dict[LazyTensor, tuple[LazyTensor, LazyTensor]] = {}
    shards = dict(source.shards)
    for name, tensor in layers.source.items():
        tensors[name] = tensor
        if name not in layers.quantised:
            continue
        if tensor.spec.dtype not in SCALED:
            found = tensor.spec.dtype.value
            raise IncompatibleInputs(f"{escape(name)} is {found}: not quantised to fp8", hint=f"--keep {escape(name)}")
        if tensor not in made:
            made[tensor] = scaled_fp8(tensor, strategy, name)
        tensors[name], tensors[f"{name}_scale"] = made[tensor]
        if name in layers.source.shards:
            shards[name] = shards[f"{name}_scale"] = layers.source.shards[name]
    if not made:
        raise UsageError(f"{escape(source.name)}: there is no linear layer to quantise", hint=layers.reason)
    notes = list(layers.notes)
    floats = {name for name, tensor in layers.source.items() if tensor.spec.dtype.is_float}
    stacked = {name for name in floats if len(tensors[name].spec.shape) > 2} - set(kept)
    if stacked:
        notes.append(f"no matrices, and left as they are: {listed(stacked)}")
    result = replace(layers.source, tensors=tensors, shards=shards, warnings=(*source.warnings, *notes))
    document = quantization_config(strategy, layers.ignored)
    return result.with_config(lambda config: {**config, "quantization_config": document})


@dataclass(frozen=True)
class _Layers:
    """The weights to quantise, in the tensors that the loader wants, and the modules that it is to ignore.

    `reason` says why there may be no weight.
    """

    source: Checkpoint
    quantised: set[str]
    ignored: list[str]
    notes: list[str] = field(default_factory=list)
    reason: str | None = None


def _choose(source: Checkpoint, kept: Collection[str]) -> _Layers:
    """By the loader's own model where transformers knows it, by names where it does not."""
    config = source.config()
    if is_told_by_a_table(source, config):
        return _by_names(source, kept)
    loader = LoadedNames(source, quantised=True)
    if any(loader.has(loader.of_file(name)) for name in source):
        return _by_loader(_with_experts_apart(source, loader, kept), loader, kept)
    note = (
        f"{escape(source.name)}: transformers makes no model of this config.json to which the names belong, so linear "
        "layers were told by their names; modules with other names may not load"
    )
    found = _by_names(source, kept)
    return replace(found, notes=[note, *found.notes])


def _matrices(source: Checkpoint) -> Iterator[str]:
    return (name for name, tensor in source.items() if name.endswith(".weight") and len(tensor.spec.shape) == 2)


def _by_names(source: Checkpoint, kept: Collection[str]) -> _Layers:
    """Every matrix that is not of an embedding or another module that is told by its name."""
    model_type = source.config().get("model_type")
    conv1d = {name.removesuffix(".weight") for name in _matrices(source)}
    conv1d = {module for module in conv1d if is_conv1d(module, model_type)}
    excluded = {source[name] for name in source if name in kept or is_excluded(name)}
    quantised: set[str] = set()
    ignored = ["lm_head"]
    for name in _matrices(source):
        module = name.removesuffix(".weight")
        if module in conv1d or source[name] in excluded:
            ignored.append(module)
        else:
            quantised.add(name)
    return _layers(source, quantised, ignored, conv1d)


def _by_loader(source: Checkpoint, loader: LoadedNames, kept: Collection[str]) -> _Layers:
    """The matrices that load into Linear layers, or as those of single experts."""
    loaded = {name: loader.of_file(name) for name in source}
    excluded = {source[name] for name in source if name in kept or is_excluded(name) or is_excluded(loaded[name])}
    experts: dict[str, list[str]] = {}
    quantised: set[str] = set()
    reached: set[str] = set()
    ignored = ["lm_head"]
    for name in _matrices(source):
        module = loaded[name].removesuffix(".weight")
        merged = loader.merged(name)
        if merged is not None:
            experts.setdefault(merged, []).append(name)
        if source[name] in excluded or (merged is None and module not in loader.quantisable):
            ignored.append(name.removesuffix(".weight"))
            continue
        quantised.add(name)
        reached.add(module)
    _check_experts(source, experts, quantised)
    ignored += sorted(loader.quantisable - reached)
    return _layers(source, quantised, ignored, loader.linears - loader.quantisable)


def _layers(source: Checkpoint, quantised: set[str], ignored: Sequence[str], conv1d: Collection[str]) -> _Layers:
    """With what there is to say of layers that are Conv1D."""
    notes = [f"Conv1D, with transposed weights, and left as they are: {listed(conv1d)}"] if conv1d else []
    return _Layers(source, quantised, list(dict.fromkeys(ignored)), notes, _CONV1D if conv1d else None)


def _check_experts(source: Checkpoint, experts: Mapping[str, Sequence[str]], quantised: Collection[str]) -> None:
    """Refuse what the loader would stack of plain and quantised matrices: it takes the scales in order."""
    for parameter, names in experts.items():
        left = [name for name in names if name not in quantised]
        if left and len(left) < len(names):
            raise UsageError(
                f"{escape(source.name)}: transformers stacks {len(names)} matrices to {escape(parameter)}, and can read"
                f" all of them in fp8 or none: {listed(left, 3)} would be kept",
                hint=f"keep them all: --keep '{escape(left[0].rpartition('.experts.')[0])}.experts.*'",
            )


def _with_experts_apart(source: Checkpoint, loader: LoadedNames, kept: Collection[str]) -> Checkpoint:
    """With a matrix of each expert where files stack them, `[experts, in, out]`, and the loader does not."""
    tensors: dict[str, LazyTensor] = {}
    shards = dict(source.shards)
    for name, tensor in source.items():
        parts = _apart(name, tensor, loader)
        if parts and name in kept:
            raise UsageError(
                f"{escape(name)}: transformers takes these experts apart in a quantised model, so they are not kept",
                hint="leave this --keep out",
            )
        tensors |= parts or {name: tensor}
        if parts and name in shards:
            shards |= dict.fromkeys(parts, shards.pop(name))
    return replace(source, tensors=tensors, shards=shards) if len(tensors) > len(source) else source


def _apart(name: str, tensor: LazyTensor, loader: LoadedNames) -> dict[str, LazyTensor]:
    """The matrices, `[out, in]`, of a stacked tensor; none if the loader has it as it is."""
    matched, shape = _STACKED.fullmatch(name), tensor.spec.shape
    if matched is None or len(shape) != 3:
        return {}
    layers = ("gate_proj", "up_proj") if matched["layer"] == "gate_up_proj" else ("down_proj",)
    if loader.of_file(f"{matched['experts']}.0.{layers[0]}.weight").removesuffix(".weight") not in loader.quantisable:
        return {}
    count, rows, columns = shape
    width, found = columns // len(layers), {}
    for expert in range(count):
        matrix = LazyTensor.make(Reinterpret(tensor.spec.dtype, (rows, columns)), cut(tensor, 0, expert, expert + 1))
        for place, layer in enumerate(layers):
            part = cut(matrix, 1, place * width, (place + 1) * width) if len(layers) > 1 else matrix
            found[f"{matched['experts']}.{expert}.{layer}.weight"] = transposed(part)
    return found


def _check_unquantised(source: Checkpoint) -> None:
    """Refuse what is quantised already, or could not be read again."""
    where = escape(source.name)
    method = quantization(source)
    if method is not None:
        raise IncompatibleInputs(
            f"{where}: is quantised already ({method}, says config.json)", hint="cast the model that it was made from"
        )
    found = {name for name in source if last_part(name) in _QUANTISED}
    if found:
        raise IncompatibleInputs(
            f"{where}: is quantised already: it holds {listed(found, 3)}", hint="cast the model that it was made from"
        )
    if not source.config():
        raise UsageError(f"{where}: has no config.json, where the scheme has to be said", hint="add it to the folder")


def quantization(source: Checkpoint) -> str | None:
    """The method by which a model is quantised, according to its config.json."""
    config = source.config()
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return escape(str(found.get("quant_method", "unnamed"))) if isinstance(found, Mapping) else "unnamed"


def is_excluded(name: str) -> bool:
    """Whether a matrix is that of an embedding, a norm, an output head, a router of experts, or of another tower."""
    *outer, layer = name.removesuffix(".weight").lower().split(".")
    return (
        is_vocabulary(name)
        or "embed" in layer
        or "norm" in layer
        or layer in (*_EMBEDDINGS, *_HEADS, *_ROUTERS)
        or any("router" in part for part in (*outer, layer))
        or any(part.startswith(_TOWERS) for part in outer)
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
