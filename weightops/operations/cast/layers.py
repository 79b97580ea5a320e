"""Which layers the schemes of cast quantise, and under which names.

What loads is decided by the loader, which is transformers: it wants scales beside every Linear layer of its own model
that config.json does not tell it to ignore, whatever files call it, and folds the scales of single experts into the
parameter that it stacks them in. Other matrices have no scale that anything would read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
from weightops.ops.transpose import transposed

_QUANTISED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "SCB")
_EMBEDDINGS = ("wpe", "shared", "relative_attention_bias", "token_embd")
_HEADS = ("lm_head", "embed_out", "output", "score")
_ROUTERS = ("gate", "shared_expert_gate", "router")
_TOWERS = ("visual", "vision", "audio", "multi_modal_projector")
_CONV1D = "its layers are Conv1D, with transposed weights, which the scheme does not know: cast to a type with --dtype"
_STACKED = re.compile(r"(?P<experts>.+\.experts)\.(?P<layer>gate_up_proj|down_proj)")


_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of a module that vLLM joins: all of them are quantised, or none."""


@dataclass(frozen=True)
class Rules:
    """What a scheme asks of layers: a matrix is `unit` of `block` rows and columns, whole ones.

    `takes_experts_apart`: the loader has a Linear layer for each expert where files stack them, and not one module for
    all, which then is quantised as a whole or not at all.
    """

    unit: str = ""
    block: tuple[int, int] = (1, 1)
    takes_experts_apart: bool = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        return all(size % unit == 0 for size, unit in zip(shape, self.block, strict=True))


@dataclass(frozen=True)
class Layers:
    """The weights to quantise, in the tensors that the loader wants, and the modules that it is to ignore.

    `reason` says why there may be no weight.
    """

    source: Checkpoint
    quantised: set[str]
    ignored: list[str]
    notes: list[str] = field(default_factory=list)
    reason: str | None = None


def choose(source: Checkpoint, kept: Collection[str], rules: Rules) -> Layers:
    """By the loader's own model where transformers knows it, by names where it does not; less what does not fit.

    Raises `IncompatibleInputs` for a source that is quantised already, `UsageError` for what cannot be kept.
    """
    check_unquantised(source)
    odd = _odd(source, kept, rules)
    found = _choose(source, {*kept, *odd}, rules)
    if not odd:
        return found
    modules = [name.removesuffix(".weight") for name in odd]
    note = f"no whole {rules.unit}, or joined with such layers by vLLM, and left as they are: {listed(modules, 5)}"
    return replace(found, notes=[*found.notes, note], reason=found.reason or f"its layers are no whole {rules.unit}")


def _odd(source: Checkpoint, kept: Collection[str], rules: Rules) -> list[str]:
    """The matrices that are no whole blocks, and those that are joined with one."""
    layers = [name for name in _matrices(source) if name not in kept and not is_excluded(name)]
    odd = {name for name in layers if not rules.fits(source[name].spec.shape)}
    for name in sorted(odd):
        outer, _, layer = name.removesuffix(".weight").rpartition(".")
        joined = next((group for group in _TOGETHER if layer in group and rules.block[0] > 1), ())
        odd |= {f"{outer}.{each}.weight" for each in joined}
    return [name for name in layers if name in odd]


def _choose(source: Checkpoint, kept: Collection[str], rules: Rules) -> Layers:
    config = source.config()
    if is_told_by_a_table(source, config):
        return _by_names(source, kept)
    loader = LoadedNames(source, quantised=rules.takes_experts_apart)
    if any(loader.has(loader.of_file(name)) for name in source):
        apart = _with_experts_apart(source, loader, kept) if rules.takes_experts_apart else source
        return _by_loader(apart, loader, kept, rules)
    note = (
        f"{escape(source.name)}: transformers makes no model of this config.json to which the names belong, so linear "
        "layers were told by their names; modules with other names may not load"
    )
    found = _by_names(source, kept)
    return replace(found, notes=[note, *found.notes])


def _matrices(source: Checkpoint) -> Iterator[str]:
    return (name for name, tensor in source.items() if name.endswith(".weight") and len(tensor.spec.shape) == 2)


def _by_names(source: Checkpoint, kept: Collection[str]) -> Layers:
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


def _by_loader(source: Checkpoint, loader: LoadedNames, kept: Collection[str], rules: Rules) -> Layers:
    """The matrices that load into Linear layers, or as those of single experts."""
    loaded = {name: loader.of_file(name) for name in source}
    excluded = {source[name] for name in source if name in kept or is_excluded(name) or is_excluded(loaded[name])}
    excluded |= {source[name] for name in _matrices(source) if not rules.fits(source[name].spec.shape)}
    experts: dict[str, list[str]] = {}
    quantised: set[str] = set()
    reached: set[str] = set()
    ignored = ["lm_head"]
    for name in _matrices(source):
        module = loaded[name].removesuffix(".weight")
        merged = loader.merged(name)
        if merged is not None:
            stack = merged if rules.takes_experts_apart else merged.rpartition(".")[0]
            experts.setdefault(stack, []).append(name)
        if source[name] in excluded or (merged is None and module not in loader.quantisable):
            ignored.append(name.removesuffix(".weight"))
            continue
        quantised.add(name)
        reached.add(module)
    _check_experts(source, experts, quantised)
    if not rules.takes_experts_apart:
        stacks = {loaded[name].rpartition(".")[0] for name in source if len(source[name].spec.shape) > 2}
        stacks |= {stack for stack, names in experts.items() if not quantised.intersection(names)}
        ignored += sorted(stacks)
    ignored += sorted(loader.quantisable - reached)
    return _layers(source, quantised, ignored, loader.linears - loader.quantisable)


def _layers(source: Checkpoint, quantised: set[str], ignored: Sequence[str], conv1d: Collection[str]) -> Layers:
    """With what there is to say of layers that are Conv1D."""
    notes = [f"Conv1D, with transposed weights, and left as they are: {listed(conv1d)}"] if conv1d else []
    return Layers(source, quantised, list(dict.fromkeys(ignored)), notes, _CONV1D if conv1d else None)


def _check_experts(source: Checkpoint, experts: Mapping[str, Sequence[str]], quantised: Collection[str]) -> None:
    """Refuse what the loader would stack of plain and quantised matrices: it takes the scales in order."""
    for parameter, names in experts.items():
        left = [name for name in names if name not in quantised]
        if left and len(left) < len(names):
            raise UsageError(
                f"{escape(source.name)}: transformers stacks {len(names)} matrices to {escape(parameter)}, and can read"
                f" all of them quantised or none: {listed(left, 3)} would be kept",
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


def check_unquantised(source: Checkpoint) -> None:
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
