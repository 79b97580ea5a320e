"""Meta's layout: `consolidated.NN.pth`, each with a part of every tensor, and `params.json`; Mistral's one file too.

Sources: llama-models' parallel layers (which dimension is cut) and model arguments, mistral-inference's arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weightops.checkpoint import Checkpoint, Written, written_json
from weightops.errors import CorruptInput, UsageError
from weightops.formats.proofs.checklist import Checklist
from weightops.io.escape import escape
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import (
    EMBEDDING,
    HEAD,
    LAYER,
    LAYOUTS,
    NORM,
    Role,
    from_canonical,
    is_derived,
    roles,
    shape_of,
    to_canonical,
)
from weightops.layouts.releases import Release, candidates
from weightops.layouts.source import Fields, Source
from weightops.layouts.tokenizers.ranks import rank_file
from weightops.lazy import LazyTensor
from weightops.ops.arrange import Agreed, concat, cut
from weightops.ops.elementwise import cast
from weightops.spec import DType

_UNDERSTOOD = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size"),
    *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "head_dim", "hidden_dim", "sliding_window"),
    *("max_seq_len", "max_batch_size", "max_position_embeddings", "model_parallel_size", "tied_embeddings"),
    *("model_type", "_sliding_window"),
}
_ROLES = {role.names[LAYOUTS.index("meta")] + ".weight": role for role in (EMBEDDING, *LAYER, NORM, HEAD)}
Parts = Sequence[Mapping[str, LazyTensor]]
_FREQUENCIES = "rope.freqs"
_FREQUENCY_TOLERANCE = 0.01
_REPEATED = (16384, 126, 16, 16)
"""Dimensions, layers, heads of k and parts of Llama 3.1 405B's files for 16 GPUs, which say 16 heads for 8."""


def read(source: Source) -> Model:
    """The model in one or more parts.

    Raises `CorruptInput` for parts that do not fit one another or the parameters, `UsageError` for parameters of
    other architectures and for what has to be asked.
    """
    parts = _parts(source.checkpoint)
    where = source.where if len(parts) == 1 else f"{source.where} ({len(parts)} parts)"
    hyperparameters, notes = _hyperparameters(source, parts)
    joined = {name: _join(name, hyperparameters, parts, source) for name in parts[0]}
    if hyperparameters.tied and HEAD.name("meta", 0) in joined:
        embedding = EMBEDDING.name("meta", 0)
        problem = f"{where}: the head of this release is its embedding"
        joined[embedding] = LazyTensor.make(Agreed(problem), joined[embedding], joined[HEAD.name("meta", 0)])
    _check_frequencies(joined.get(_FREQUENCIES), hyperparameters, source)
    tensors, dropped = to_canonical("meta", joined, hyperparameters, where)
    return Model(
        name=source.checkpoint.name, hyperparameters=hyperparameters, tensors=tensors, dropped=dropped, notes=notes
    )


def _parts(checkpoint: Checkpoint) -> list[dict[str, LazyTensor]]:
    """Each part's tensors; raises `CorruptInput` if they do not have the same."""
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in checkpoint.items():
        part, _, tensor_name = name.rpartition("/")
        parts.setdefault(part, {})[tensor_name] = tensor
    if not parts:
        raise CorruptInput(f"{escape(checkpoint.name)}: holds no tensors")
    (first, names), *others = parts.items()
    for part, tensors in others:
        odd = min(names.keys() ^ tensors.keys(), default=None)
        if odd is not None:
            there, missing = (escape(name) for name in ((first, part) if odd in names else (part, first)))
            raise CorruptInput(f"{escape(checkpoint.name)}: {escape(odd)} is in {there}.pth and not in {missing}.pth")
    return list(parts.values())


def _hyperparameters(source: Source, parts: Parts) -> tuple[Hyperparameters, tuple[str, ...]]:
    params, where = _params(source)
    fields = Fields(params, where)
    dim, n_layers, n_heads = fields.count("dim"), fields.count("n_layers"), fields.count("n_heads")
    n_kv_heads = fields.count("n_kv_heads", n_heads)
    notes = []
    if (dim, n_layers, n_kv_heads, len(parts)) == _REPEATED:
        n_kv_heads //= 2
        notes.append("8 heads of k and v, each in two parts: those of Llama 3.1 405B in 16 parts")
    if params.get("head_dim") is None and dim % n_heads:
        raise CorruptInput(f"{where}: {n_heads} heads do not fit {dim} dimensions")
    head = parts[0].get(HEAD.name("meta", 0))
    embedding = parts[0].get(EMBEDDING.name("meta", 0))
    if embedding is None or len(embedding.spec.shape) != 2:
        raise CorruptInput(f"{source.where}: {EMBEDDING.name('meta', 0)} is missing, or no matrix")
    by_rows = embedding.spec.shape[1] == dim
    split = [part[HEAD.name("meta", 0)] for part in parts] if head is not None else []
    if not split:
        split = [part[EMBEDDING.name("meta", 0)] for part in parts] if by_rows else [embedding]
    is_mistral = params.get("hidden_dim") is not None or "sliding_window" in params
    window = next((key for key in ("sliding_window", "_sliding_window") if params.get(key) is not None), None)
    theta = source.setting("rope_theta", fields.number("rope_theta") if params.get("rope_theta") is not None else None)
    if theta is None and is_mistral:
        theta = 1e6 if window is None else 1e4
        notes.append(f"rope_theta {theta:g}: what mistral-inference took where none was given")
    hyperparameters = Hyperparameters(
        family="mistral" if is_mistral else "llama",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=fields.count("head_dim", dim // n_heads),
        ffn_dim=_ffn_dim(fields, parts),
        vocab_size=sum(tensor.spec.shape[0] for tensor in split if tensor.spec.shape),
        norm_eps=fields.number("norm_eps"),
        rope_theta=theta or 10000.0,
        sliding_window=fields.count(window) if window is not None else None,
        tied=fields.flag("tied_embeddings"),
    )
    stated = params.get("vocab_size")
    if stated not in (None, -1, hyperparameters.vocab_size):
        raise CorruptInput(
            f"{where}: vocab_size is {escape(repr(stated))[:80]}, "
            f"the {len(parts)} parts hold {hyperparameters.vocab_size} rows",
            hint="is a part missing, or of another model?",
        )
    return _with_release(hyperparameters, fields, source, notes)


def _params(source: Source) -> tuple[dict[str, Any], str]:
    params, where = source.parameters("params.json"), f"{source.where}/params.json"
    if isinstance(params.get("model"), dict):
        params, where = params["model"], f"{where}: model"
    odd = sorted(key for key, value in params.items() if key not in _UNDERSTOOD and value not in (None, False, {}, []))
    if odd:
        raise UsageError(
            f"{where}: {escape(odd[0])} is no parameter of a LLaMA model",
            hint="mixtures of experts, vision and quantised models are not converted",
        )
    return params, where


def _ffn_dim(fields: Fields, parts: Parts) -> int:
    """The inner dimension that the parts have; raises `CorruptInput` if the parameters say another."""
    name = LAYER[4].name("meta", 0)
    missing = any(name not in part or not part[name].spec.shape for part in parts)
    found = 0 if missing else sum(part[name].spec.shape[0] for part in parts)
    stated: int | None = None
    if fields.get("hidden_dim") is not None:
        stated = fields.count("hidden_dim")
    elif fields.get("multiple_of") is not None:
        multiplier = fields.number("ffn_dim_multiplier", 1.0)
        stated = ffn_dim(fields.count("dim"), fields.count("multiple_of"), multiplier)
    if not found or stated not in (None, found):
        raise CorruptInput(
            f"{fields.where}: feed-forward layers should have {stated or 'some'} rows, {len(parts)} parts hold {found}",
            hint="is a part missing, or of another model?",
        )
    return found


def ffn_dim(dim: int, multiple_of: int, multiplier: float) -> int:
    """Meta's rule for the inner dimension."""
    return multiple_of * math.ceil(int(multiplier * int(8 * dim / 3)) / multiple_of)


def _with_release(
    h: Hyperparameters, fields: Fields, source: Source, notes: list[str]
) -> tuple[Hyperparameters, tuple[str, ...]]:
    """The parameters with what the release is known to have, and what the user says."""
    scaled = fields.flag("use_scaled_rope")
    known = candidates(h, scaled)
    names = " or ".join(r.name for r in known)
    stating = ["max_position_embeddings"]
    if h.family == "mistral":
        stating.append("max_seq_len")  # in Meta's files this is what somebody once ran it with
    stated = next((fields.count(key) for key in stating if fields.get(key) is not None), None)
    context = source.setting("context_length", stated)
    if context is None and len({r.context_length for r in known}) == 1:
        context = known[0].context_length
        notes.append(f"context length {context}: that of {names}")
    if known and all(r.tied for r in known) and not h.tied:
        h = replace(h, tied=True)
        notes.append(f"the head is tied to the embedding, as that of {names}")
    scaling = None
    if scaled:
        stretched = fields.number("rope_scaling_factor") if fields.get("rope_scaling_factor") is not None else None
        factor = source.setting("rope_factor", stretched)
        if factor is None:
            factor = _factor(known, fields.where)
            notes.append(f"rope scaling by {factor:g}: that of {names}")
        scaling = RopeScaling(factor=factor)
    return replace(h, context_length=context, rope_scaling=scaling), tuple(notes)


def _factor(known: Sequence[Release], where: str) -> float:
    found = {r.rope_factor for r in known if r.rope_factor is not None}
    if len(found) != 1:
        raise UsageError(
            f"{where}: use_scaled_rope is set, and by how much is not said",
            hint="give --set rope_factor=N (Llama 3.1 and 3.3: 8, Llama 3.2: 32)",
        )
    return found.pop()


def _join(name: str, h: Hyperparameters, parts: Parts, source: Source) -> LazyTensor:
    """A tensor from its parts."""
    tensors = [part[name] for part in parts]
    first = tensors[0]
    role = _ROLES.get(re.sub(r"\d+", "{n}", name, count=1))
    if len(tensors) == 1 or (role is None and not is_derived(name)):
        return first
    where = f"{source.where}: {escape(name)}"
    if role is None or role.split == "copies" or len(first.spec.shape) != 2:
        values = [source.evaluate(tensor) if tensor.nbytes < 1 << 24 else b"" for tensor in tensors]
        odd = next((i for i, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise CorruptInput(
                f"{where}: consolidated.{odd:02d}.pth has other values than consolidated.00.pth",
                hint="are the parts of one model?",
            )
        return first
    if role is EMBEDDING:
        return _joined(tensors, 0 if first.spec.shape[1] == h.dim else 1, where)
    repeats = len(parts) // h.n_kv_heads
    if role in LAYER[1:3] and repeats > 1 and first.spec.shape[0] == h.head_dim:
        problem = f"{where}: the parts that repeat a head do not agree"
        groups = [tensors[i : i + repeats] for i in range(0, len(tensors), repeats)]
        tensors = [LazyTensor.make(Agreed(problem), *group) for group in groups]
        for group in groups:
            if len({source.evaluate(cut(tensor, 0, 0, 1)) for tensor in group}) > 1:
                raise CorruptInput(
                    problem, hint="does params.json give the right heads, and are the parts of one model?"
                )
    return _joined(tensors, 0 if role.split == "rows" else 1, where)


def _joined(tensors: Sequence[LazyTensor], axis: int, where: str) -> LazyTensor:
    first = tensors[0].spec
    for i, tensor in enumerate(tensors):
        shape, dtype = tensor.spec.shape, tensor.spec.dtype
        if (dtype, len(shape), shape[1 - axis :][:1]) != (first.dtype, 2, first.shape[1 - axis :][:1]):
            raise CorruptInput(
                f"{where}: consolidated.{i:02d}.pth has {tensor.spec}, consolidated.00.pth {first}",
                hint="are the parts of one model?",
            )
    return concat(tensors, axis)


def _check_frequencies(tensor: LazyTensor | None, h: Hyperparameters, source: Source) -> None:
    """Refuse stored rotary frequencies that are not those of `rope_theta`: it decides what the model computes."""
    if tensor is None or h.rope_scaling is not None or tensor.spec.shape != (h.head_dim // 2,):
        return
    found = np.frombuffer(source.evaluate(cast(tensor, DType.F32)), dtype=np.float32)
    expected = h.rope_theta ** -(np.arange(0, h.head_dim, 2) / h.head_dim)
    if not np.allclose(found, expected, rtol=_FREQUENCY_TOLERANCE):
        raise CorruptInput(
            f"{source.where}: {_FREQUENCIES} are not the frequencies of rope_theta {h.rope_theta:g}",
            hint="is params.json that of this model?",
        )


def write(model: Model, parts: int) -> Checkpoint:
    """The model in so many parts; raises `UsageError` for what does not divide or Meta's layout cannot hold."""
    h = model.hyperparameters
    tensors = dict(model.tensors)
    bias = next((name for name in tensors if name.endswith(".bias")), None)
    if bias is not None:
        raise UsageError(f"{escape(model.name)}: {escape(bias)} has no place in Meta's layout")
    if h.tied:
        tensors[HEAD.name("meta", 0)] = tensors[EMBEDDING.name("meta", 0)]
    whole = from_canonical("meta", tensors, replace(h, tied=False))
    by_rows = model.tokenizer.kind == "ranks" if model.tokenizer else h.vocab_size >= 128000
    result: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for part in range(parts):
        stem = f"consolidated.{part:02d}"
        for (role, layer), tensor in zip(roles(h.n_layers), whole.values(), strict=True):
            name = role.name("meta", layer)
            key = f"{stem}/{name}" if parts > 1 else name
            result[key] = _part_of(tensor, role, h, part, parts, by_rows, name)
            shards[key] = f"{stem}.pth"
    sidecars = {"params.json": written_json(params_of(h)), **model.sidecars}
    if model.tokenizer is not None:
        is_ranks = model.tokenizer.kind == "ranks"
        sidecars["tokenizer.model"] = Written(rank_file(model.tokenizer) if is_ranks else model.tokenizer.data)
    return Checkpoint(model.name, result, sidecars=sidecars, shards=shards, container="meta", documents=(Checklist(),))


def _part_of(
    tensor: LazyTensor, role: Role, h: Hyperparameters, part: int, parts: int, by_rows: bool, name: str
) -> LazyTensor:
    if role.split == "copies":
        return tensor
    axis = 0 if role.split == "rows" or (role is EMBEDDING and by_rows) else 1
    units, what = shape_of(role, h)[axis], ("rows", "columns")[axis]
    if role.rotary == "k" or role in LAYER[1:3]:
        units, what = h.n_kv_heads, "heads"
        if parts > units and parts % units == 0:
            part, parts = part * units // parts, units  # each head is in several parts
    elif role.rotary == "q" or role is LAYER[3]:
        units, what = h.n_heads, "heads"
    if units % parts:
        raise UsageError(
            f"{name}: {units} {what} cannot be divided among {parts} parts", hint="give another --model-parallel"
        )
    size = tensor.spec.shape[axis] // parts
    return cut(tensor, axis, part * size, (part + 1) * size)


def params_of(h: Hyperparameters) -> dict[str, Any]:
    """params.json of a model. The rule for the inner dimension is solved for its two parameters."""
    common: dict[str, Any] = {"dim": h.dim, "n_layers": h.n_layers, "n_heads": h.n_heads, "n_kv_heads": h.n_kv_heads}
    if h.family == "mistral":
        if h.rope_scaling is not None:
            raise UsageError("rope scaling has no place in Mistral's params.json")
        common |= {"head_dim": h.head_dim, "hidden_dim": h.ffn_dim, "norm_eps": h.norm_eps}
        common |= {"vocab_size": h.vocab_size, "rope_theta": h.rope_theta, "sliding_window": h.sliding_window}
        return common
    if h.head_dim * h.n_heads != h.dim:
        raise UsageError(f"heads of {h.head_dim} do not make {h.dim} dimensions, which Meta's layout takes for granted")
    multiple_of, multiplier = _solve_ffn(h.dim, h.ffn_dim)
    common |= {"vocab_size": h.vocab_size, "multiple_of": multiple_of}
    common |= {"ffn_dim_multiplier": multiplier} if multiplier is not None else {}
    common |= {"norm_eps": h.norm_eps, "rope_theta": h.rope_theta}
    if h.rope_scaling is not None:
        s = h.rope_scaling
        if (s.low_freq_factor, s.high_freq_factor, s.original_context_length) != (1.0, 4.0, 8192):
            raise UsageError(
                "this rope scaling has other limits than Llama 3.1's, which Meta's layout takes for granted"
            )
        common |= {"use_scaled_rope": True, "rope_scaling_factor": s.factor}
    return common


def _solve_ffn(dim: int, wanted: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give `wanted`: a published pair if one does."""
    published: list[tuple[int, float | None]] = [(256, None), (4096, 1.3), (1024, 1.3), (256, 1.5), (1024, 1.0)]
    published += [(4096, 1.2), (1024, 1.4), (256, 1.0)]
    for multiple_of, multiplier in published:
        if ffn_dim(dim, multiple_of, 1.0 if multiplier is None else multiplier) == wanted:
            return multiple_of, multiplier
    return wanted, wanted / int(8 * dim / 3)
