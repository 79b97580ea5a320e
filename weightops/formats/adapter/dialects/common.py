"""What the ways to store adapters have in common: pairs of factors by module, one rank and scale, facts of a base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.adapter.lora import Factors, LoraModule, refuse_odd
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.lora.combined import WeightedSum
from weightops.ops.rows import fit

NUMBER = re.compile(r"\.(\d+)\.")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class Base:
    """What config.json of a base says of its attention, and the base's modules; nothing of what was not given."""

    model_type: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    layers: int | None = None
    modules: tuple[str, ...] = ()
    name: str | None = None


def base_of(checkpoint: Checkpoint) -> Base:
    """The facts of a base, of the language part of one that has several."""
    config = checkpoint.config()
    text = config.get("text_config")
    own = {**config, **text} if isinstance(text, dict) else config

    def count(*keys: str) -> int | None:
        found = next((own[key] for key in keys if isinstance(own.get(key), int)), None)
        return found if found is None or found > 0 else None

    heads, hidden = count("num_attention_heads", "n_head"), count("hidden_size", "n_embd")
    return Base(
        model_type=own.get("model_type") if isinstance(own.get("model_type"), str) else None,
        heads=heads,
        kv_heads=count("num_key_value_heads") or heads,
        head_dim=count("head_dim") or (hidden // heads if heads and hidden else None),
        layers=count("num_hidden_layers", "n_layer"),
        modules=tuple(name.removesuffix(".weight") for name in checkpoint if name.endswith(".weight")),
        name=checkpoint.name,
    )


@dataclass
class Stored:
    """An adapter as some program has it: tensors, files beside them, and what the file is to be called."""

    tensors: dict[str, LazyTensor]
    sidecars: dict[str, Sidecar]
    prefix: str = "adapter_model"
    container: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=lambda: {"format": "pt"})
    notes: tuple[str, ...] = ()


def pairs_of(checkpoint: Checkpoint, a: str, b: str, others: Sequence[str] = ()) -> dict[str, dict[str, LazyTensor]]:
    """The tensors by module and by what their names end in: `a` and `b` of each, perhaps some of `others`.

    Raises `IncompatibleInputs` naming a tensor that is neither, or holds no plain numbers, `CorruptInput` for a factor
    whose other is missing.
    """
    where = escape(checkpoint.name)
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in checkpoint.items():
        end = next((end for end in (a, b, *others) if name.endswith(end)), None)
        if end is None:
            raise IncompatibleInputs(
                f"{where}: {escape(name)} is no part of an adapter whose factors are called {a[1:]} and {b[1:]}",
                hint="only plain LoRA can be converted",
            )
        if end in (a, b):
            refuse_odd(tensor, where, name)
        found.setdefault(name.removesuffix(end), {})[end] = tensor
    for module, parts in found.items():
        missing = next((end for end in (a, b) if end not in parts), None)
        if missing is not None:
            raise CorruptInput(f"{where}: {escape(module)} has no {missing[1:]}", hint="fetch the adapter again")
    return found


def make_module(where: str, path: str, scale: float, a: LazyTensor, b: LazyTensor) -> LoraModule:
    """A module by its path in transformers' model; raises `CorruptInput` for factors of different ranks."""
    if min(len(a.spec.shape), len(b.spec.shape)) < 2 or a.spec.shape[0] != b.spec.shape[1]:
        raise CorruptInput(f"{where}: {escape(path)}: the factors {a.spec} and {b.spec} are not of one rank")
    is_embedding = path.rpartition(".")[2] in _EMBEDDINGS
    return LoraModule(path, 0, path, a.spec.shape[0], scale, Factors(a, b, None, None, is_embedding))


def require_linear(modules: Sequence[LoraModule], program: str, embeddings: bool = False) -> None:
    """Raise `IncompatibleInputs` naming what a program has no place for: experts, biases, magnitudes, embeddings."""
    for module in modules:
        own = module.factors
        for is_there, what in (
            (module.experts > 1 or module.target != module.path, "the factors of stacked experts"),
            (own.bias is not None, "a bias (lora_bias)"),
            (own.magnitude is not None, "a magnitude (DoRA)"),
            (own.is_embedding and not embeddings, "an embedding"),
            (len(own.a.spec.shape) > 2, "a convolution"),
        ):
            if is_there:
                raise IncompatibleInputs(f"{escape(module.target)} is or has {what}, which {program} has no place for")


def uniform(modules: Sequence[LoraModule]) -> tuple[list[LoraModule], tuple[str, ...]]:
    """The modules with one rank and one scale, as programs want it that have these once; and what that rounded.

    Lower ranks get zeros, which changes nothing. Where scales differ, that of most modules is taken, and the others'
    B is multiplied by the rest.
    """
    rank = max(module.rank for module in modules)
    scale = Counter(module.scale for module in modules).most_common(1)[0][0]
    if scale == 0:
        scale = next((module.scale for module in modules if module.scale), 1.0)
    made, scaled = [], 0
    for module in modules:
        own, (a, b) = module.factors, (module.factors.a, module.factors.b)
        if module.scale != scale:
            b = cast(LazyTensor.make(WeightedSum((module.scale / scale,)), b), b.spec.dtype)
            scaled += 1
        a = fit(a, (rank, *a.spec.shape[1:]), bytes(a.spec.dtype.itemsize))
        b = fit(b, (b.spec.shape[0], rank, *b.spec.shape[2:]), bytes(b.spec.dtype.itemsize))
        made.append(replace(module, rank=rank, scale=scale, factors=replace(own, a=a, b=b)))
    said = f"B of {scaled} modules is multiplied by what their scale is more than {scale:g}, and rounded once"
    return made, (said,) if scaled else ()


class Table:
    """Module paths of transformers and of another program; `{}` stands for the layer's number."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._theirs = paths
        self._ours = {theirs: ours for ours, theirs in paths.items()}

    def theirs(self, path: str) -> str | None:
        """What the other program calls a module of transformers."""
        return _mapped(path, self._theirs)

    def ours(self, path: str) -> str | None:
        """What transformers calls a module of the other program."""
        return _mapped(path, self._ours)


def _mapped(path: str, table: Mapping[str, str]) -> str | None:
    number = NUMBER.search(path)
    found = table.get(NUMBER.sub(".{}.", path, count=1))
    return found and found.format(number[1] if number else "")


def unknown(path: str, program: str, known: str = "LLaMA-like models") -> IncompatibleInputs:
    """The error for a module whose name in another program is not known."""
    return IncompatibleInputs(f"{escape(path)}: what this is called in {program} is known of {known} alone")
