"""Reads a LoRA adapter in GGUF as what peft saves: `weightops.layouts.gguf.adapter_write`, backwards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.gguf.metadata import ARCHITECTURE_KEY, text
from weightops.formats.modules import shortest
from weightops.formats.quantized.gguf import plain_tensor
from weightops.io.escape import escape
from weightops.layouts.gguf.adapter_base import Base
from weightops.layouts.gguf.adapter_write import ALPHA, NORM
from weightops.layouts.gguf.links import Link, find_links
from weightops.layouts.gguf.parameters import value_of
from weightops.layouts.gguf.transforms import of_factors
from weightops.layouts.gguf.write import EMBEDDING
from weightops.lazy import LazyTensor
from weightops.ops.measures.loss import counted_cast
from weightops.ops.transpose import transposed
from weightops.spec import DType

_PREFIX = "base_model.model."
_SIDES, _EMBEDDING_SIDES = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_HUB = "https://huggingface.co/"
_KIND, _INVOCATION = "adapter.type", "adapter.alora.invocation_tokens"
_OTHER_MODEL = "is this the model that the adapter was trained on?"

_Pairs = dict[str, dict[str, LazyTensor]]
"""Factors `a` and `b` by the name of the tensor that they change."""


def read(checkpoint: Checkpoint, base: Base, dtype: DType | None = None) -> Checkpoint:
    """The adapter in a GGUF file as peft saves it, for the model `base`; factors in `dtype`, or in their own type.

    Blocks become float32. Raises `UsageError` for adapters that are no LoRA, `IncompatibleInputs` for those of another
    model, `CorruptInput` where tensors do not belong together.
    """
    where, metadata = escape(checkpoint.name), checkpoint.metadata
    alpha = _alpha(metadata, where)
    arch = text(metadata, ARCHITECTURE_KEY)
    if arch != base.family.arch:
        raise IncompatibleInputs(
            f"{where}: is for {escape(str(arch))[:80]} models, {base.where} is a {base.family.arch} one",
            hint=_OTHER_MODEL,
        )
    pairs, whole = _sorted(checkpoint, where)
    links = {link.packed[0]: link for link in find_links(base.family, base.settings, _stored(base), base.where).links}
    strange = next((name for name in (*pairs, *whole) if name not in links), None)
    if strange is not None:
        raise IncompatibleInputs(f"{where}: {escape(strange)} is no tensor of {base.where}", hint=_OTHER_MODEL)
    tensors, ranks = dict[str, LazyTensor](), dict[str, int]()
    for name, pair in pairs.items():
        for weight, a, b in _factors(links[name], pair, base, where):
            path = base.modules[weight.removesuffix(".weight")]
            first, second = _EMBEDDING_SIDES if name == EMBEDDING else _SIDES
            ranks[path] = a.spec.shape[0]
            tensors |= {f"{_PREFIX}{path}.{first}": a, f"{_PREFIX}{path}.{second}": b}
    kept = []
    for name, tensor in whole.items():
        (weight,) = links[name].saved
        (norm,) = links[name].back([plain_tensor(tensor, DType.F32)], where)
        _check(weight, norm.spec.shape, base, where)
        kept.append(base.modules[weight.removesuffix(".weight")])
        tensors[f"{_PREFIX}{kept[-1]}.weight"] = norm
    wanted = {name: counted_cast(t, dtype, name) if dtype else t for name, t in tensors.items()}
    targets = shortest(ranks, base.modules.values())
    config = _config(alpha, ranks, kept, targets, _base_name(metadata, base))
    return Checkpoint(
        checkpoint.name.removesuffix(".gguf"),
        wanted,
        sidecars={CONFIG_NAME: written_json(config)},
        prefix="adapter_model",
        in_one_file=True,
    )


def _alpha(metadata: Mapping[str, Any], where: str) -> float:
    """The alpha of a file; 0, or none, for factors that are not scaled."""
    kind, alpha = text(metadata, _KIND), value_of(metadata, ALPHA)
    if kind != "lora":
        raise UsageError(f"{where}: is an adapter of type {escape(str(kind))[:80]}, and no LoRA")
    if value_of(metadata, _INVOCATION) is not None:
        raise UsageError(
            f"{where}: is active after some tokens only (aLoRA), which peft's plain LoRA is not",
            hint="llama.cpp runs it; it is not converted back",
        )
    if alpha is None:
        return 0.0
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise CorruptInput(f"{where}: {ALPHA} is {escape(repr(alpha))[:80]}, expected a number")
    return alpha


def _sorted(checkpoint: Checkpoint, where: str) -> tuple[_Pairs, dict[str, LazyTensor]]:
    """Factors, and norms, by the name of the tensor in a model's file; refuses anything else, and halves of pairs."""
    pairs, whole = _Pairs(), dict[str, LazyTensor]()
    for name, tensor in checkpoint.items():
        stem, _, side = name.rpartition(".lora_")
        if stem and side in ("a", "b"):
            if not tensor.spec.dtype.is_float and not tensor.spec.dtype.is_block:
                raise CorruptInput(f"{where}: {escape(name)} is {tensor.spec}, expected floating-point numbers")
            pairs.setdefault(stem, {})[side] = plain_tensor(tensor, DType.F32) if tensor.spec.dtype.is_block else tensor
        elif name.endswith(NORM) and len(tensor.spec.shape) == 1:
            whole[name] = tensor
        else:
            raise CorruptInput(f"{where}: {escape(name)} is no part of a LoRA adapter", hint="is it a model's?")
    half = next((name for name, pair in pairs.items() if len(pair) < 2), None)
    if half is not None:
        (present,) = pairs[half]
        absent = "b" if present == "a" else "a"
        raise CorruptInput(f"{where}: {escape(half)} has a lora_{present} and no lora_{absent}", hint="fetch it again")
    if not pairs:
        raise CorruptInput(f"{where}: an adapter without factors", hint="fetch it again")
    return pairs, whole


def _stored(base: Base) -> list[str]:
    return list(base.architecture.stored)


def _factors(
    link: Link, pair: Mapping[str, LazyTensor], base: Base, where: str
) -> list[tuple[str, LazyTensor, LazyTensor]]:
    """The name of each weight that a pair is for, with A `[rank, in]` and B `[out, rank]`."""
    name, a, b = link.packed[0], pair["a"], pair["b"]
    sides = of_factors(link.transform)
    if sides is None:
        raise UsageError(f"{where}: {escape(name)} is a part of {link.saved[0]}, whose factors do not follow from it")
    if len(a.spec.shape) != len(b.spec.shape) or len(a.spec.shape) not in (2, 3):
        raise CorruptInput(f"{where}: {escape(name)} has lora_a {a.spec} and lora_b {b.spec}: they are no factors")
    a = transposed(a) if name == EMBEDDING else a
    if a.spec.shape[-2] != b.spec.shape[-1] or not a.spec.numel or not b.spec.numel:
        raise CorruptInput(f"{where}: {escape(name)} has lora_a {a.spec} and lora_b {b.spec}: they are not of one rank")
    left = replace(link, transform=sides[0]).back([a], where)
    right = replace(link, transform=sides[1]).back([b], where)
    for weight, first, second in zip(link.saved, left, right, strict=True):
        if len(first.spec.shape) != 2:
            raise CorruptInput(f"{where}: {escape(name)} has lora_a {a.spec}, expected a matrix")
        out, inner = second.spec.shape[0], first.spec.shape[-1]
        _check(weight, (inner, out) if name == EMBEDDING else (out, inner), base, where)
    return list(zip(link.saved, left, right, strict=True))


def _check(weight: str, shape: tuple[int, ...], base: Base, where: str) -> None:
    known = base.shape(weight)
    if shape != known:
        raise IncompatibleInputs(
            f"{where}: {escape(weight)} is for a tensor of {list(shape)}, in {base.where} it is {list(known or ())}",
            hint=_OTHER_MODEL,
        )


def _base_name(metadata: Mapping[str, Any], base: Base) -> str:
    """What the model card of the adapter called its base, or else what its own config does, or the user."""
    url = value_of(metadata, "general.base_model.0.repo_url")
    if isinstance(url, str) and url.startswith(_HUB):
        return url.removeprefix(_HUB)
    known = base.config.get("_name_or_path")
    return known if isinstance(known, str) and known else base.where


def _config(
    alpha: float, ranks: Mapping[str, int], kept: list[str], targets: list[str], known_as: str
) -> dict[str, Any]:
    """adapter_config.json, with the fields that every peft since 0.7 knows; without an alpha every scale is 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": known_as,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": (int(alpha) if alpha.is_integer() else alpha) if alpha else usual,
        "rank_pattern": others,
        "alpha_pattern": {} if alpha else others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets,
        "modules_to_save": kept or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
