"""Adapters of LitGPT: its own names, q, k and v in one pair of factors, and hyperparameters.yaml beside them.

Source: `lora.py`, `scripts/merge_lora.py` and `scripts/convert_hf_checkpoint.py` of LitGPT 0.5.12. Of q, k and v those
that are adapted share a module, `attn.qkv` (until 0.5.4 `attn.attn`): lora_A is theirs one below the other,
`[n r, in]`, lora_B likewise, `[rows of all, r]`, and what is not adapted is left out; LitGPT pads the product with
zeros there. Which they are, rank and alpha are in hyperparameters.yaml alone. A model has all modules of a kind in all
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.checkpoint import Checkpoint, Written
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.adapter.dialects.common import (
    NUMBER,
    Base,
    Stored,
    Table,
    make_module,
    pairs_of,
    require_linear,
    uniform,
    unknown,
)
from weightops.formats.adapter.lora import LoraModule
from weightops.formats.adapter.written import plain_number
from weightops.io.escape import escape
from weightops.io.yaml_document import read_document
from weightops.lazy import LazyTensor
from weightops.ops.arrange import concat, cut
from weightops.ops.rows import Repeat
from weightops.spec import DType

A, B = ".lora_A", ".lora_B"
SETTINGS = "hyperparameters.yaml"
STEM = "lit_model.pth"
_TABLE = Table(
    {
        "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.proj",
        "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.fc_1",
        "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.fc_2",
        "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.proj",
        "lm_head": "lm_head",
    }
)
_FUSED = (".attn.qkv", ".attn.attn")
_PARTS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_KINDS = {
    "projection": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "head": ("lm_head",),
}


def read(checkpoint: Checkpoint, base: Base, alpha: float | None) -> list[LoraModule]:
    """The modules of an adapter of LitGPT, q, k and v apart; raises `UsageError` where nothing says what is needed."""
    where = escape(checkpoint.name)
    settings = _settings(checkpoint)
    alpha = settings.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float):
        raise UsageError(f"{where}: nothing says what lora_alpha is: there is no {SETTINGS}", hint="--alpha")
    found = []
    for name, parts in pairs_of(checkpoint, A, B).items():
        a, b = parts[A], parts[B]
        if min(len(a.spec.shape), len(b.spec.shape)) < 2:
            raise CorruptInput(f"{where}: {escape(name)}: the factors {a.spec} and {b.spec} are no matrices")
        scale = alpha / b.spec.shape[1]
        if name.endswith(_FUSED):
            number = NUMBER.search(name)
            stem = f"model.layers.{number[1] if number else ''}.self_attn"
            for last, own_a, own_b in _apart(where, name, a, b, settings, base):
                found.append(make_module(where, f"{stem}.{last}", scale, own_a, own_b))
            continue
        path = _TABLE.ours(name)
        if path is None:
            raise unknown(name, "transformers")
        found.append(make_module(where, path, scale, a, b))
    return found


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """hyperparameters.yaml, empty where there is none."""
    folder = checkpoint.folder
    if folder is None or not folder.has(SETTINGS):
        return {}
    where = f"{escape(checkpoint.name)}/{SETTINGS}"
    return read_document(folder.get(SETTINGS).decode("utf-8", "replace"), where).data


def _apart(
    where: str, name: str, a: LazyTensor, b: LazyTensor, settings: Mapping[str, Any], base: Base
) -> list[tuple[str, LazyTensor, LazyTensor]]:
    """Which of q, k and v there are, with the factors of each."""
    rank, rows = b.spec.shape[1], b.spec.shape[0]
    count, rest = divmod(a.spec.shape[0], rank)
    chosen = [last for last, kind in _PARTS.items() if settings.get(f"lora_{kind}")]
    if not chosen and count == len(_PARTS):
        chosen = [*_PARTS]
    if rest or len(chosen) != count:
        raise UsageError(
            f"{where}: {escape(name)} holds the factors of {count} of q, k and v, and {SETTINGS} names "
            f"{', '.join(chosen) or 'none'}",
            hint=f"{SETTINGS} with lora_query, lora_key and lora_value lies beside what LitGPT has trained",
        )
    heads, groups, size = base.heads, base.kv_heads, base.head_dim
    if heads is None or groups is None or size is None:
        if count > 1 and chosen != ["k_proj", "v_proj"]:
            raise UsageError(
                f"{where}: {escape(name)} holds several of q, k and v, and nothing says how many rows each has",
                hint="--base MODEL, whose config.json says it",
            )
        sizes = dict.fromkeys(chosen, rows // count)
    else:
        sizes = {last: size * (heads if last == "q_proj" else groups) for last in chosen}
    if sum(sizes.values()) != rows:
        raise IncompatibleInputs(
            f"{where}: {escape(name)}: B has {rows} rows, {', '.join(chosen)} of the base have {sum(sizes.values())}",
            hint="is this the base that the adapter was trained on?",
        )
    found, top = [], 0
    for i, last in enumerate(chosen):
        own = cut(b, 0, top, top + sizes[last])
        found.append((last, cut(a, 0, i * rank, (i + 1) * rank), own))
        top += sizes[last]
    return found


def write(modules: Sequence[LoraModule], base: Base) -> Stored:
    """The adapter as LitGPT has it; raises `IncompatibleInputs` for what it has no place for.

    Modules that are adapted in one layer and not in another get factors of zeros there.
    """
    require_linear(modules, "LitGPT")
    same, notes = uniform(modules)
    known = {module.path: module for module in same}
    numbers = [int(found[1]) for module in same if (found := NUMBER.search(module.path))]
    layers = base.layers or max(numbers, default=-1) + 1
    if max(numbers, default=-1) >= layers:
        raise IncompatibleInputs(f"the adapter has {max(numbers) + 1} layers, the base {layers}")
    shapes = _shapes(same)
    rank, dtype = same[0].rank, same[0].factors.a.spec.dtype
    tensors: dict[str, LazyTensor] = {}
    taken: set[str] = set()

    def factors(path: str, kind: str) -> tuple[LazyTensor, LazyTensor]:
        taken.add(path)
        if path in known:
            return known[path].factors.a, known[path].factors.b
        out, width = shapes[kind]
        return _zeros(dtype, (rank, width)), _zeros(dtype, (out, rank))

    chosen = [last for last in _PARTS if f"self_attn.{last}" in shapes]
    for i in range(layers):
        if chosen:
            own = [factors(f"model.layers.{i}.self_attn.{last}", f"self_attn.{last}") for last in chosen]
            stem = f"transformer.h.{i}.attn.qkv"
            tensors[f"{stem}{A}"] = concat([a for a, _ in own], 0)
            tensors[f"{stem}{B}"] = concat([b for _, b in own], 0)
        for kind in (*_KINDS["projection"], *_KINDS["mlp"]):
            if kind in shapes:
                path = f"model.layers.{i}.{kind}"
                name = _TABLE.theirs(path)
                tensors[f"{name}{A}"], tensors[f"{name}{B}"] = factors(path, kind)
    if "lm_head" in known:
        tensors[f"lm_head{A}"], tensors[f"lm_head{B}"] = factors("lm_head", "lm_head")
    left = next((path for path in known if path not in taken), None)
    if left is not None:
        raise unknown(left, "LitGPT")
    settings = {"lora_r": rank, "lora_alpha": plain_number(same[0].scale * rank), "lora_dropout": 0.0}
    settings |= {f"lora_{kind}": last in chosen for last, kind in _PARTS.items()}
    settings |= {f"lora_{kind}": any(name in shapes for name in names) for kind, names in _KINDS.items()}
    lines = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}\n" for key, value in settings.items()]
    if base.name:
        lines.insert(0, f"checkpoint_dir: {_quoted(base.name)}\n")
    return Stored(tensors, {SETTINGS: Written("".join(lines).encode())}, STEM, container="lit", notes=notes)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _zeros(dtype: DType, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor.make(Repeat(dtype, shape, bytes(dtype.itemsize)))


def _shapes(modules: Sequence[LoraModule]) -> dict[str, tuple[int, int]]:
    """The rows and columns of what is adapted, by the end of its path; of an MLP all three parts."""
    found = {}
    for module in modules:
        number = NUMBER.search(module.path)
        found[module.path[number.end() :] if number else module.path] = module.shape
    gate = found.get("mlp.gate_proj") or found.get("mlp.up_proj")
    down = found.get("mlp.down_proj")
    gate = gate or (down and down[::-1])
    if gate:
        found |= {"mlp.gate_proj": gate, "mlp.up_proj": gate, "mlp.down_proj": gate[::-1]}
    return found
