"""The tensors of a checkpoint under keys by which those of another can be found, whatever layout each is in.

Keys are transformers' names of LLaMA's tensors, or else the file's own. Rows of q and k are in transformers' order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.formats.adapter.names import unwrapped
from weightops.formats.gguf.metadata import is_typed
from weightops.layouts import meta
from weightops.layouts.embeddings import is_vocabulary
from weightops.layouts.names import LAYER, count_layers, find_layout, is_derived, roles
from weightops.layouts.source import Source, beside
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.compare.plain import as_plain
from weightops.ops.arrange import cut, one_of, pairs_to_halves

_TIED_BY_DEFAULT = ("gpt2", "gemma", "gemma2", "gemma3", "gemma3_text", "bloom", "opt", "falcon", "cohere", "cohere2")
"""Kinds of models whose head is the embedding unless config.json says otherwise."""
_EXPERT = re.compile(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w1|w2|w3)\.(weight|bias)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ROTARY = {role.name("hf", 0).split(".")[-2]: role.rotary for role in LAYER if role.rotary}


@dataclass(frozen=True)
class Heads:
    """How many heads q has, and k and v."""

    q: int
    kv: int


@dataclass(frozen=True)
class Entry:
    """A tensor: what the files call it, its values as numbers, its quantisation steps if it has, and its form there."""

    name: str
    tensor: LazyTensor
    steps: LazyTensor | None = None
    form: str = ""
    is_alias: bool = False
    """Whether it stands for another tensor of the checkpoint, as a tied head does."""

    def of(self, make: Any, name: str | None = None) -> Entry:
        """The same with tensor and steps made others."""
        steps = None if self.steps is None else make(self.steps)
        return replace(self, name=name or self.name, tensor=make(self.tensor), steps=steps)


@dataclass
class Entries:
    """A checkpoint's tensors by key; `left` are those that follow from others, with the reason.

    `parts` are tensors of the files that others are made of, such as scales, with what these are called.
    """

    checkpoint: Checkpoint
    layout: str | None
    by_key: dict[str, Entry]
    heads: Heads | None = None
    is_in_pairs: bool = False
    """Whether rows of q and k are in adjacent pairs, Meta's rotary order, rather than in halves."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """That of a GGUF file."""
    left: dict[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_tied: bool = False


def read_entries(checkpoint: Checkpoint, evaluate: Evaluate) -> Entries:
    """The tensors of a checkpoint by key.

    Raises `CorruptInput` for damaged quantised modules and for parts that do not fit each other, `UsageError` for
    parts whose parameters are not known.
    """
    layout = find_layout(checkpoint)
    if layout == "meta" and any("/" in name for name in checkpoint):
        return _joined(checkpoint, evaluate)
    plain = as_plain(checkpoint, evaluate)
    metadata = {k: v for k, v in checkpoint.metadata.items() if is_typed(v)} if layout == "gguf" else {}
    names = _hf_names(layout, plain.tensors) if layout not in (None, "hf") else {}
    left: dict[str, str] = {}
    found: dict[str, Entry] = {}
    for name, tensor in plain.tensors.items():
        if is_derived(name):
            left[name] = "follows from the configuration, and is computed by whoever loads the model"
            continue
        key = names.get(name) or _plain_key(name)
        found[key] = Entry(name, tensor, plain.steps.get(name), plain.stored.get(name, ""))
    entries = Entries(checkpoint, layout, found, metadata=metadata, left=left, parts=plain.taken, notes=plain.notes)
    entries.heads = _heads(entries)
    is_llama = metadata.get("general.architecture", {}).get("string") == "llama"
    entries.is_in_pairs = layout in ("meta", "tencentpretrain", "llama_inference") or (layout == "gguf" and is_llama)
    entries.by_key = dict(_experts_apart(found))
    return entries


def to_halves(entries: Entries, heads: Heads) -> None:
    """Bring the rows of q and k into transformers' order."""
    for key, entry in entries.by_key.items():
        parts = key.split(".")
        rotary = _ROTARY.get(parts[-2]) if len(parts) > 1 else None
        count = {"q": heads.q, "k": heads.kv, None: 0}[rotary]
        shape = entry.tensor.spec.shape
        if count and shape and shape[0] % (2 * count) == 0:
            entries.by_key[key] = entry.of(lambda tensor, count=count: pairs_to_halves(tensor, count))
    entries.is_in_pairs = False


def _joined(checkpoint: Checkpoint, evaluate: Evaluate) -> Entries:
    """Meta's parts as the whole tensors that they are."""
    source = Source(checkpoint, beside(checkpoint, None), lambda tensor: evaluate([tensor])[0])
    model = meta.read(source)
    h = model.hyperparameters
    names = _hf_names("meta", model.tensors)
    return Entries(
        checkpoint,
        "meta",
        {names.get(name, name): Entry(name, tensor) for name, tensor in model.tensors.items()},
        Heads(h.n_heads, h.n_kv_heads),
        is_in_pairs=True,
        left=dict(model.dropped),
        notes=model.notes,
        is_tied=h.tied,
    )


def _hf_names(layout: str, names: Mapping[str, LazyTensor]) -> dict[str, str]:
    """What transformers calls the tensors of a layout."""
    return {
        role.name(layout, layer, kind): role.name("hf", layer, kind)
        for role, layer in roles(count_layers(layout, names))
        for kind in ("weight", "bias")
        if role.name(layout, layer, kind) in names
    }


def _plain_key(name: str) -> str:
    """A name without what ways of saving one model differ in: wrappers, and what Mixtral's experts are called."""
    name = unwrapped(name)
    matched = _EXPERT.fullmatch(name)
    if matched:
        return f"{matched[1]}.mlp.experts.{matched[2]}.{_PROJECTIONS[matched[3]]}.{matched[4]}"
    return name.replace(".block_sparse_moe.", ".mlp.")


def _heads(entries: Entries) -> Heads | None:
    """How many heads there are, as far as the files say."""
    checkpoint, found = entries.checkpoint, list[Any]()
    if entries.layout == "gguf":
        name = entries.metadata.get("general.architecture", {}).get("string")
        for key in ("head_count", "head_count_kv"):
            found += entries.metadata.get(f"{name}.attention.{key}", {"": None}).values()
    else:
        document = _parameters(checkpoint, entries.layout)
        keys = {
            "meta": ("n_heads", "n_kv_heads"),
            **dict.fromkeys(("tencentpretrain", "llama_inference"), ("heads_num", "local_kv_heads_num")),
        }
        text = document.get("text_config")
        document = text if isinstance(text, dict) else document
        for key in keys.get(entries.layout or "", ("num_attention_heads", "num_key_value_heads")):
            found.append(document.get(key))
    q, kv = (*found, None, None)[:2]
    kv = q if kv is None else kv
    return Heads(q, kv) if all(type(count) is int and 0 < count < 1 << 20 for count in (q, kv)) else None


def _parameters(checkpoint: Checkpoint, layout: str | None) -> dict[str, Any]:
    """What lies beside the weights as their configuration; nothing where that cannot be read."""
    name = "params.json" if layout == "meta" else "config.json"
    try:
        read = beside(checkpoint, None)
        return Source(checkpoint, read, lambda _: b"").json(name) or {}
    except (UsageError, CorruptInput):
        return {}


def tied_head(entries: Entries, is_head: Callable[[str], bool]) -> Entry | None:
    """The embedding of a model that has no head of its own, if it is its head."""
    config = _parameters(entries.checkpoint, entries.layout)
    stated = config.get("tied_embeddings" if entries.layout == "meta" else "tie_word_embeddings")
    by_default = entries.layout == "gguf" or config.get("model_type") in _TIED_BY_DEFAULT
    found = [entry for key, entry in entries.by_key.items() if is_vocabulary(key) and not is_head(key)]
    is_tied = entries.is_tied or stated is True or (stated is None and by_default)
    return replace(found[0], is_alias=True) if is_tied and len(found) == 1 else None


def _experts_apart(by_key: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """Every tensor, those that stack a matrix for each expert as one for each, gates and values apart where known."""
    for key, entry in by_key.items():
        shape = entry.tensor.spec.shape
        if len(shape) != 3 or not _stacks(key) or entry.tensor.spec.dtype.is_packed or not all(shape):
            yield key, entry
            continue
        module, _, last = key.removesuffix(".weight").rpartition(".")
        is_usual = _is_usual(by_key, module) and last in ("gate_up_proj", "down_proj")
        for number in range(shape[0]):
            one = entry.of(lambda tensor, number=number: one_of(tensor, number), f"{entry.name}[{number}]")
            if not is_usual:
                yield f"{module}.{number}.{last}", one
            elif last == "down_proj":
                yield f"{module}.{number}.down_proj.weight", one
            else:
                half = shape[1] // 2
                for name, start in (("gate", 0), ("up", half)):
                    part = one.of(lambda tensor, start=start, half=half: cut(tensor, 0, start, start + half))
                    yield f"{module}.{number}.{name}_proj.weight", replace(part, name=f"{one.name}[{name}]")


def _is_usual(by_key: Mapping[str, Entry], module: str) -> bool:
    """Whether stacked experts are `[e, 2 f, h]` and `[e, h, f]`, each one's rows its outputs, gates above values."""
    joined, down = (by_key.get(f"{module}.{name}") for name in ("gate_up_proj", "down_proj"))
    if joined is None or down is None or len(down.tensor.spec.shape) != 3:
        return False
    _, height, width = down.tensor.spec.shape
    return joined.tensor.spec.shape[1:] == (2 * width, height)


def _stacks(key: str) -> bool:
    return ".experts." in key or key.endswith((".input_linear.weight", ".output_linear.weight"))
