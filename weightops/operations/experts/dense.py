"""A mixture of experts made of dense models, by a document in mergekit-moe's language.

Attention, norms and embeddings are those of the base, each expert's MLP that of its model. Source: mergekit 0.1.5,
mergekit/moe; sparse upcycling (Komatsuzaki and others, 2212.05055) is the same with copies of one model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.source import Source, beside
from weightops.layouts.tokenizers.files import TOKENIZER, TOKENIZER_CONFIG, TokenizerFiles
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.dequantize import plain_if_quantised
from weightops.operations.merge import reference
from weightops.ops.elementwise import cast
from weightops.ops.gather import Gather
from weightops.ops.rows import Given
from weightops.spec import DType, parse_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

GateMode = Literal["cheap_embed", "random", "uniform_random"]
_HIDDEN = ("hidden", "hidden_avg", "hidden_last")
_EMBEDDING = "model.embed_tokens.weight"
_MLP = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.(?P<part>[a-z_]+)\.(?P<leaf>weight|bias)")
_DEGENERATE = 5.0
"""A condition number of a layer's router above which mergekit warns: prompts are alike."""


class Expert(msgspec.Struct, forbid_unknown_fields=True):
    """A model whose MLPs become experts, and texts that are to be routed to them, or away from them."""

    source_model: str
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None


class Mixture(msgspec.Struct, forbid_unknown_fields=True):
    """mergekit-moe's document, of which models are names here."""

    base_model: str
    experts: list[Expert]
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int = 2
    shared_experts: list[Expert] | None = None
    architecture: str | None = None


class _Target(msgspec.Struct, frozen=True):
    """What a mixture of dense models of some kind is called, part by part."""

    architecture: str
    model_type: str
    block: str
    parts: Mapping[str, str]


_MIXTRAL = _Target(
    "MixtralForCausalLM",
    "mixtral",
    "block_sparse_moe",
    {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
)
_QWEN3 = _Target("Qwen3MoeForCausalLM", "qwen3_moe", "mlp", {p: p for p in ("gate_proj", "up_proj", "down_proj")})
_TARGETS: Mapping[str, _Target] = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3}
"""By the model_type of the dense models."""


def parse_mixture(document: Mapping[str, Any], where: str) -> Mixture:
    """The document, checked as far as it can be without the models; raises `UsageError` naming the field."""
    known = set(Mixture.__struct_fields__)
    for name in document:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), 1)
            hint = f"is {near[0]} meant?" if near else f"there are {', '.join(sorted(known))}"
            raise UsageError(f"{where}: {escape(str(name))}: unknown field", hint=hint)
    try:
        found = msgspec.convert(dict(document), Mixture)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {escape(str(error))}") from None
    _check(found, where)
    return found


def _check(found: Mixture, where: str) -> None:
    if found.gate_mode in _HIDDEN:
        raise UsageError(
            f"{where}: gate_mode {found.gate_mode} needs the base model to be run on the prompts, which is not done",
            hint="cheap_embed goes by the embeddings of the prompts; random and uniform_random are for training",
        )
    if found.gate_mode not in ("cheap_embed", "random", "uniform_random"):
        raise UsageError(f"{where}: gate_mode {escape(found.gate_mode)[:80]} is not known", hint="cheap_embed, random")
    if found.shared_experts:
        raise UsageError(f"{where}: shared_experts: neither Mixtral nor Qwen3-MoE has experts that all tokens take")
    if not 1 <= found.experts_per_token <= len(found.experts):
        raise UsageError(
            f"{where}: experts_per_token is {found.experts_per_token}, and there are {len(found.experts)} experts"
        )
    if any(expert.noise_scale or expert.residual_scale for expert in found.experts):
        raise UsageError(
            f"{where}: noise_scale and residual_scale are not done here",
            hint="weightops edit scales tensors; noise would be another one on every machine",
        )
    if found.gate_mode != "cheap_embed":
        return
    for number, expert in enumerate(found.experts):
        if not expert.positive_prompts:
            raise UsageError(
                f"{where}: expert {number} has no positive_prompts, by which its router is made",
                hint="gate_mode: random makes a router that is to be trained",
            )
    if len(found.experts) > 1 and len({str((e.positive_prompts, e.negative_prompts)) for e in found.experts}) == 1:
        raise UsageError(
            f"{where}: all experts have the same prompts: every token would go to the first ones",
            hint="say in each what is to be routed to it; gate_mode: random makes a router that is to be trained",
        )


def mixture(
    models: Mapping[str, Checkpoint], document: Mapping[str, Any], seed: int | None, evaluate: Evaluate
) -> Checkpoint:
    """The mixture: Mixtral of Llama and Mistral models, Qwen3-MoE of Qwen3 ones, under the names of published files.

    Routers of `cheap_embed` are computed in float32 from the embeddings of the prompts, each with the text of the
    base's bos token before it, the same in every layer; random ones are drawn by layer from `seed` (Philox), the same
    on every machine. Raises `UsageError` for documents that say what is not done, `IncompatibleInputs` for models
    that differ in kind or shape, or have what the mixture has no place for.
    """
    wanted = parse_mixture(document, "the mixture")
    used = list(dict.fromkeys([wanted.base_model, *(expert.source_model for expert in wanted.experts)]))
    unknown = next((name for name in used if name not in models), None)
    if unknown is not None:
        raise UsageError(f"the mixture: there is no model {escape(unknown)}", hint=f"there are {listed(models)}")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise UsageError(f"a seed is a whole number from 0 to {(1 << 64) - 1}")
    if seed is not None and wanted.gate_mode == "cheap_embed":
        raise UsageError("nothing is random with gate_mode cheap_embed", hint="leave out --seed")
    plain = {name: plain_if_quantised(models[name], evaluate) for name in used}
    base = plain[wanted.base_model]
    target = _target(plain)
    dtype = (parse_dtype(wanted.dtype) if wanted.dtype else None) or base[_EMBEDDING].spec.dtype
    if not dtype.is_float or dtype.bits < 16:
        raise UsageError(f"the mixture: dtype is {dtype.value}, expected one of 16 bits or more", hint="bfloat16")
    if wanted.architecture not in (None, target.model_type):
        raise UsageError(
            f"the mixture: architecture is {escape(str(wanted.architecture))[:80]}, and these models make a "
            f"{target.model_type}"
        )
    sources = [plain[expert.source_model] for expert in wanted.experts]
    _compare_shapes(base, sources)
    _compare_activations(base, sources)
    notes: list[str] = []
    routers = _routers(base, wanted, seed or 0, dtype, evaluate, notes)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in base.items():
        matched = _MLP.fullmatch(name)
        if matched is None:
            tensors[name] = cast(tensor, dtype)
            continue
        prefix = f"model.layers.{matched['layer']}.{target.block}"
        router = f"{prefix}.gate.weight"
        if router not in tensors:
            tensors[router] = routers[int(matched["layer"])]
        for number, source in enumerate(sources):
            part = f"{target.parts[matched['part']]}.{matched['leaf']}"
            tensors[f"{prefix}.experts.{number}.{part}"] = cast(source[name], dtype)
    if len({*used} - {wanted.base_model}) == 0 and wanted.gate_mode == "cheap_embed":
        notes.append("all experts are the same model: until it is trained, the mixture says what that says")
    count = len(sources)
    if count & (count - 1):
        notes.append(f"{count} experts are no power of two, which some programs want")
    from weightops.layouts.skeleton import taken_for_granted

    granted = taken_for_granted(base.config(), escape(base.name))
    edited = base.with_config(lambda config: _config({**config, **granted}, target, count, wanted.experts_per_token))
    others = [warning for name in used for warning in plain[name].warnings if warning not in edited.warnings]
    return edited.with_tensors(tensors).with_dtype(dtype).warned(*others, *notes)


def _target(models: Mapping[str, Checkpoint]) -> _Target:
    kinds = {name: str(model.config().get("model_type")) for name, model in models.items()}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{escape(name)} is {escape(kind)[:40]}" for name, kind in kinds.items())
        raise IncompatibleInputs(f"models of several kinds make no mixture: {shown}")
    kind = next(iter(kinds.values()))
    if kind not in _TARGETS:
        raise IncompatibleInputs(
            f"there is no mixture of {escape(kind)[:80]} models here", hint=f"there is one of {', '.join(_TARGETS)}"
        )
    target = _TARGETS[kind]
    for name, model in models.items():
        if _EMBEDDING not in model:
            raise IncompatibleInputs(f"{escape(name)}: has no {_EMBEDDING}", hint="weightops convert --to hf makes one")
        biases = [n for n in model if n.endswith("_proj.bias")]
        if biases and target is _MIXTRAL:
            raise IncompatibleInputs(
                f"{escape(name)}: has biases ({listed(biases, 3)}), for which {target.model_type} has no place",
                hint="leaving them out would change every answer",
            )
    return target


def _compare_shapes(base: Checkpoint, sources: Sequence[Checkpoint]) -> None:
    for source in sources:
        for name, tensor in base.items():
            if _MLP.fullmatch(name):
                found = source.get(name)
                if found is None or found.spec.shape != tensor.spec.shape:
                    has = "is missing" if found is None else f"is {list(found.spec.shape)}"
                    raise IncompatibleInputs(
                        f"{escape(source.name)}: {escape(name)} {has}, expected {list(tensor.spec.shape)}",
                        hint=f"experts have the shapes of the base, {escape(base.name)}",
                    )
        extra = next((n for n in source if _MLP.fullmatch(n) and n not in base), None)
        if extra is not None:
            raise IncompatibleInputs(f"{escape(source.name)}: has {escape(extra)}, which the base has not")


def _compare_activations(base: Checkpoint, sources: Sequence[Checkpoint]) -> None:
    """Raise `IncompatibleInputs` for an MLP that computes with another function than config.json will say."""
    wanted = base.config().get("hidden_act", "silu")
    for source in sources:
        found = source.config().get("hidden_act", "silu")
        if found != wanted:
            raise IncompatibleInputs(
                f"{escape(source.name)}/config.json: hidden_act is {escape(str(found))[:40]}, expected "
                f"{escape(str(wanted))[:40]} as in {escape(base.name)}",
                hint="all experts of a mixture compute with one function",
            )


def _config(config: dict[str, Any], target: _Target, count: int, per_token: int) -> dict[str, Any]:
    edited = {k: v for k, v in config.items() if k not in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim")}
    if config.get("head_dim") is not None:
        edited["head_dim"] = config["head_dim"]
    edited |= {"architectures": [target.architecture], "model_type": target.model_type}
    edited |= {"num_experts_per_tok": per_token}
    if target is _MIXTRAL:
        return {**edited, "num_local_experts": count, "sliding_window": None}
    own = {"num_experts": count, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return {**edited, **own, "attention_bias": config.get("attention_bias", False)} | {
        "moe_intermediate_size": config["intermediate_size"]
    }


def _routers(
    base: Checkpoint, wanted: Mixture, seed: int, dtype: DType, evaluate: Evaluate, notes: list[str]
) -> dict[int, LazyTensor]:
    """By layer, the rows of experts `[experts, hidden]`."""
    import numpy as np

    layers = sorted({int(matched["layer"]) for name in base if (matched := _MLP.fullmatch(name))})
    width = base[_EMBEDDING].spec.shape[1]
    shape = (len(wanted.experts), width)
    if wanted.gate_mode == "cheap_embed":
        rows = np.stack(list(_by_prompts(base, wanted.experts, evaluate)))
        if not np.isfinite(rows).all():
            raise CorruptInput(
                f"{escape(base.name)}: {_EMBEDDING} has rows of tokens in the prompts that are not finite"
            )
        condition = float(np.linalg.cond(rows))
        if condition > _DEGENERATE:
            notes.append(
                f"the routers' condition number is {condition:.3g}: prompts of experts are so alike that some of them "
                "will hardly be chosen"
            )
        by_layer = dict.fromkeys(layers, rows)
    else:
        by_layer = {}
        for layer in layers:
            random = np.random.Generator(np.random.Philox(key=np.array([seed, layer], np.uint64)))
            drawn = random.standard_normal(shape) if wanted.gate_mode == "random" else random.uniform(-1, 1, shape)
            by_layer[layer] = drawn if wanted.gate_mode == "random" else drawn / np.sqrt(width)
        notes.append(f"routers are random (seed {seed}): the mixture is to be trained before it says anything")
    given = {layer: _given(rows.astype(np.float32), i) for i, (layer, rows) in enumerate(by_layer.items())}
    return {layer: cast(rows, dtype) for layer, rows in given.items()}


def _given(rows: NDArray[Any], number: int) -> LazyTensor:
    return LazyTensor.make(Given(DType.F32, rows.shape, rows.tobytes(), number))


def _by_prompts(base: Checkpoint, experts: Sequence[Expert], evaluate: Evaluate) -> Iterator[NDArray[Any]]:
    """The direction of each expert's positive prompts, less that of its negative ones; unit vectors `[hidden]`."""
    for expert in experts:
        found = _direction(base, expert.positive_prompts or [], evaluate)
        if expert.negative_prompts:
            found = _unit(found - _direction(base, expert.negative_prompts, evaluate))
        yield found


def _direction(base: Checkpoint, prompts: Sequence[str], evaluate: Evaluate) -> NDArray[Any]:
    import numpy as np

    ids = [number for prompt in prompts for number in _encode(base, prompt)]
    embedding = base[_EMBEDDING]
    beyond = next((number for number in ids if number >= embedding.spec.shape[0]), None)
    if beyond is not None:
        raise IncompatibleInputs(f"{escape(base.name)}: its tokenizer gives the id {beyond}, which has no row")
    places = np.array([[0, number] for number in ids], "<i4")
    rows = cast(LazyTensor.make(Gather(places.tobytes()), embedding), DType.F32)
    (data,) = evaluate([rows])
    return _unit(np.frombuffer(data, np.float32).reshape(len(ids), -1).sum(axis=0, dtype=np.float32))


def _unit(vector: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    return vector / max(float(np.linalg.norm(vector)), 1e-8)


def _encode(base: Checkpoint, prompt: str) -> list[int]:
    """The tokens of the bos token's text and a prompt; raises `IncompatibleInputs` without a tokenizer.json."""
    from tokenizers import Tokenizer

    files = TokenizerFiles(Source(base, beside(base, None), lambda _: b"").tokenizer_files(layout="hf").files)
    if TOKENIZER not in files:
        raise IncompatibleInputs(
            f"{escape(base.name)}: has no tokenizer.json, by which prompts are cut into tokens",
            hint="transformers' save_pretrained writes one; gate_mode: random needs none",
        )
    bos = files.document(TOKENIZER_CONFIG).get("bos_token") or ""
    text = bos.get("content", "") if isinstance(bos, dict) else str(bos)
    try:
        ids: list[int] = (
            Tokenizer.from_str(files.files[TOKENIZER].decode()).encode(f"{text}{prompt}", add_special_tokens=False).ids
        )
    except Exception as error:  # the library raises plain exceptions
        raise IncompatibleInputs(
            f"{escape(base.name)}: its tokenizer.json cannot be used: {escape(str(error))[:200]}"
        ) from None
    return ids


def with_names(
    document: Mapping[str, Any], where: str, exists: Callable[[str], bool]
) -> tuple[Callable[[str], dict[str, Any]], list[str]]:
    """The places of a document's models, each once; and the document with names for them, by a pattern for those.

    Raises `UsageError` as `parse_mixture` does, and for models with adapters, which are merged before.
    """
    wanted = parse_mixture(document, where)
    texts = [wanted.base_model, *(expert.source_model for expert in wanted.experts)]
    places = {text: reference(text, exists) for text in texts}
    adapted = next((text for text, place in places.items() if place.adapter is not None), None)
    if adapted is not None:
        raise UsageError(f"{where}: {escape(adapted)}: a model with an adapter", hint="weightops merge-lora merges it")
    order = list(dict.fromkeys(place.model for place in places.values()))

    def named(pattern: str) -> dict[str, Any]:
        names = {text: pattern.format(order.index(place.model) + 1) for text, place in places.items()}
        experts = [{**each, "source_model": names[each["source_model"]]} for each in document["experts"]]
        return {**document, "base_model": names[wanted.base_model], "experts": experts}

    return named, order
