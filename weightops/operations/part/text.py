"""The language model of a model for more than text, or one of its towers, alone; and a language model put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.quantized.weights import stated
from weightops.formats.sidecars import Kind, kind_of
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.experts import find_blocks, find_family
from weightops.layouts.parts import (
    CLASSES,
    CROSS_ATTENTION,
    OF_IMAGES,
    TEXT_SETTINGS,
    TEXT_TYPES,
    TOWERS,
    Spelling,
    is_whole,
    spelling_of,
    text_key,
    tower_prefix,
)
from weightops.layouts.renamed import renamed, without_names
from weightops.lazy import LazyTensor
from weightops.operations.experts import arranged
from weightops.ops.transpose import transposed

_TIE = "tie_word_embeddings"
_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization_config")
"""What config.json may say outside for the language model too."""
_NOT_OF_TEXT = ("_name_or_path", "_attn_implementation", "architectures", "auto_map", "vision_config", "audio_config")
_OF_ANY = (
    *("transformers_version", "rope_scaling", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict"),
)
"""What every config of transformers has, and says nothing of the model."""
_HEADS = ("lm_head.weight", "embed_out.weight")
_COMPARED = (
    *("model_type", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "hidden_act"),
    "sliding_window",
)


def text_part(source: Checkpoint) -> Checkpoint:
    """The language model alone, as its own class loads it.

    config.json is what describes it in the whole, but for what only the whole says: whether embeddings are tied, and
    ends. Raises `UsageError` for models without parts, and for those whose language model is none alone.
    """
    where, config = escape(source.name), source.config()
    spelling = _spelling(source, config)
    names = {name: new for name in source if (new := spelling.text(name)) is not None}
    rest = [name for name in source if name not in names]
    text = _text_config(config, where, has_head=any(new in _HEADS for new in names.values()))
    result = renamed(without_names(source, rest, "no part of the language model"), names)
    result = _with_files(result, {**text, **_quantised(result)}, where)
    if config.get(text_key(config) or "", {}).get("model_type") == "qwen3_vl_moe_text":
        # its stacks may be columns, which the language model's class does not read
        of_whole = result.with_config(lambda known: {**known, "model_type": "qwen3_vl_moe_text"})
        blocks = find_blocks(of_whole)
        result = result.with_tensors(arranged(of_whole, blocks, find_family(of_whole, blocks), "separate"))
    kinds = sorted({name.split(".")[1 if name.startswith("model.") else 0] for name in rest})
    return result.did(f"{len(names)} tensors are the language model of {where}; left out: {listed(kinds)}")


def _spelling(source: Checkpoint, config: Mapping[str, Any]) -> Spelling:
    where = escape(source.name)
    if not config:
        raise UsageError(f"{where}: has no config.json, which says what parts a model has")
    kind = str(config.get("model_type"))
    if kind in CROSS_ATTENTION:
        raise UsageError(
            f"{where}: {kind}'s language model attends to images in layers of its own: without them it is no model",
            hint="weightops shard --layers leaves those layers out, and changes what it says",
        )
    found = spelling_of(source) if is_whole(config) else None
    if found is None:
        raise UsageError(
            f"{where}: model_type {escape(kind)[:80]} has no language model within a larger one",
            hint="it is one already, or its names are not known: weightops inspect shows them",
        )
    return found


def _text_config(config: Mapping[str, Any], where: str, *, has_head: bool) -> dict[str, Any]:
    """config.json of the language model alone."""
    key = text_key(config)
    inner = {k: v for k, v in (config[key] if key else config).items() if k not in _NOT_OF_TEXT}
    if key is None:
        inner = {k: v for k, v in inner.items() if not OF_IMAGES.match(k)}
    kind = _text_type(inner, config, key, where)
    inner["model_type"] = kind
    if kind in TEXT_TYPES:
        inner = _as_type(inner, kind, TEXT_TYPES[kind], where)
    outer = {k: config[k] for k in _OUTER if config.get(k) is not None and inner.get(k) is None}
    if any(k in inner for k in ("dtype", "torch_dtype")):
        outer = {k: v for k, v in outer.items() if k not in ("dtype", "torch_dtype")}
    # What the whole says of ties is what counts: some families say otherwise within.
    tied = _is_tied(config, has_head=has_head, where=where)
    version = {k: config[k] for k in ("transformers_version",) if k in config}
    return {"architectures": [_class_of(inner["model_type"], where)], **inner, **outer, _TIE: tied, **version}


def _text_type(inner: Mapping[str, Any], config: Mapping[str, Any], key: str | None, where: str) -> str:
    """The model_type of the language model: its own, or what the whole's class takes where it says none."""
    kind = inner.get("model_type")
    if kind is None and key is not None:
        from weightops.layouts.skeleton import parse_config

        plain = {k: v for k, v in config.items() if k != "auto_map"}
        kind = getattr(getattr(parse_config(plain, where), key, None), "model_type", None)
    kind = config.get("model_type") if kind is None and key is None else kind
    if not isinstance(kind, str) or not kind:
        inside = f"{key}.model_type" if key else "model_type"
        raise UsageError(f"{where}/config.json: {inside} is {escape(repr(kind))[:80]}, expected text")
    return kind


def _is_tied(config: Mapping[str, Any], *, has_head: bool, where: str) -> bool:
    """Whether the head is the embedding, by what config.json says outside, or by what is there."""
    said = config.get(_TIE)
    if said is not None and not isinstance(said, bool):
        raise UsageError(f"{where}/config.json: {_TIE} is {escape(repr(said))[:80]}, expected true or false")
    return not has_head if said is None else said


def _as_type(inner: Mapping[str, Any], kind: str, target: str, where: str) -> dict[str, Any]:
    """What a language model is called alone, with what its type within the whole takes for granted written out."""
    from transformers import CONFIG_MAPPING

    from weightops.layouts.skeleton import parse_config

    own = f"{kind}_text" if f"{kind}_text" in CONFIG_MAPPING else kind
    full = parse_config({**inner, "model_type": own}, where).to_dict()
    wanted = CONFIG_MAPPING[target]().to_dict()
    found = {k: v for k, v in full.items() if k in (*wanted, *inner) and k not in (*_NOT_OF_TEXT, *_OF_ANY)}
    rope = found.get("rope_parameters")
    if isinstance(rope, dict):  # positions of text are the same in all three dimensions
        kept = {k: v for k, v in rope.items() if not k.startswith("mrope") and k != "type"}
        turned = "default" if rope.get("rope_type") == "mrope" else rope["rope_type"]
        found["rope_parameters"] = {**kept, "rope_type": turned}
        found["rope_theta"] = rope["rope_theta"]  # for transformers before 5
    dtype = {k: v for k, v in inner.items() if k in ("dtype", "torch_dtype")}
    plain = {k: v for k, v in found.items() if k not in ("dtype", "torch_dtype")}
    return {**plain, **TEXT_SETTINGS.get(kind, {}), **dtype, "model_type": target}


def _class_of(kind: str, where: str) -> str:
    if kind in CLASSES:
        return CLASSES[kind]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if found is None:
        raise UsageError(f"{where}: transformers has no language model of model_type {escape(kind)[:80]}")
    return found


def _quantised(source: Checkpoint) -> dict[str, Any]:
    """What config.json says of quantised modules, once they are renamed."""
    return {k: v for k, v in source.config().items() if k in ("quantization_config", "compression_config")}


def _with_files(source: Checkpoint, config: Mapping[str, Any], where: str) -> Checkpoint:
    """With this config.json, and without what prepares images and sounds."""
    gone = sorted(name for name in source.sidecars if kind_of(name) is Kind.PROCESSOR)
    sidecars = {name: file for name, file in source.sidecars.items() if name not in gone}
    result = source.with_sidecars({**sidecars, "config.json": written_json(config)})
    return result.did(f"left out, as there are no images: {listed(gone)}") if gone else result


def tower(source: Checkpoint, kind: str) -> Checkpoint:
    """A tower alone, under the names of its own class; raises `UsageError` if there is none."""
    where, config = escape(source.name), source.config()
    prefix, described = tower_prefix(source, kind), config.get(f"{kind}_config")
    if prefix is None or not isinstance(described, dict):
        raise UsageError(
            f"{where}: has no {kind} tower that is known by its names",
            hint=f"known are {', '.join(TOWERS[kind])} with {kind}_config in config.json",
        )
    names = {name: name.removeprefix(prefix) for name in source if name.startswith(prefix)}
    rest = [name for name in source if name not in names]
    result = renamed(without_names(source, rest, f"no part of the {kind} tower"), names)
    outer = {k: config[k] for k in ("torch_dtype", "dtype") if k in config and k not in described}
    own = {**{k: v for k, v in described.items() if k != "architectures"}, **outer}
    known = _tower_class(str(described.get("model_type")))
    result = result.with_sidecars(
        {
            name: file
            for name, file in result.sidecars.items()
            if kind_of(name) not in (Kind.TOKENIZER, Kind.TEMPLATE, Kind.GENERATION)
        }
        | {"config.json": written_json({**({"architectures": [known]} if known else {}), **own})}
    )
    return result.did(f"{len(names)} tensors are the {kind} tower of {where}; its projector is not part of it")


def _tower_class(kind: str) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = MODEL_MAPPING_NAMES.get(kind)
    return found if isinstance(found, str) or found is None else found[0]


def grafted(source: Checkpoint, text: Checkpoint) -> Checkpoint:
    """The whole with another language model in it; towers, config.json and tokenizer are those of `source`.

    `text` is a language model, or another whole whose language model is meant. Raises `IncompatibleInputs` unless it
    has the same tensors in the same shapes, rows of tokens too, and embeddings tied alike.
    """
    where = escape(source.name)
    spelling = _spelling(source, source.config())
    text = text_part(text) if is_whole(text.config()) else text
    shown = escape(text.name)
    wanted = {new: name for name in source if (new := spelling.text(name)) is not None}
    text = _stacked_alike(text, {new: source[name] for new, name in wanted.items()})
    given = {name.removeprefix("base_model."): name for name in text}
    _refuse_quantised_alone(source, text)
    lacking, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    heads = [name for name in (*lacking, *extra) if name in _HEADS]
    if heads:
        has = "has a head of its own" if heads[0] in extra else "has none, as its embeddings are tied"
        raise IncompatibleInputs(
            f"{shown}: {has}, and {where} is otherwise: {escape(heads[0])}",
            hint="weightops shard --untie or --tie makes the two alike",
        )
    if lacking or extra:
        what = f"lacks {listed(lacking)}" if lacking else f"has {listed(extra)} besides"
        raise IncompatibleInputs(f"{shown}: {what}: it is not the language model of {where}")
    for new, name in wanted.items():
        found, expected = text[given[new]].spec.shape, source[name].spec.shape
        if found != expected:
            rows = new in _HEADS or "embed_tokens" in new
            hint = "weightops vocab gives it as many rows: ids of images must keep theirs" if rows else None
            raise IncompatibleInputs(
                f"{shown}: {escape(given[new])} is {list(found)}, expected {list(expected)} as in {where}", hint=hint
            )
    _refuse_otherwise(source, text, has_head=any(name in _HEADS for name in wanted))
    graft = {name: text[given[new]] for new, name in wanted.items()}
    notes = _other_settings(source, text)
    odd = {tensor.spec.dtype for name, tensor in graft.items() if tensor.spec.dtype != source[name].spec.dtype}
    if odd:
        kinds = ", ".join(sorted(dtype.value for dtype in odd))
        notes.append(f"{shown}: is {kinds}, other than in {where}; weightops cast makes them one type")
    result = source.with_tensors({**source.tensors, **graft})
    of_text = {name: text.digests[given[new]] for new, name in wanted.items() if given[new] in text.digests}
    result = result.with_digests({**result.digests, **of_text}).warned(*notes)
    return result.did(f"{len(wanted)} tensors of the language model of {where} are those of {shown}")


def _refuse_quantised_alone(source: Checkpoint, text: Checkpoint) -> None:
    """Raise `IncompatibleInputs` unless both are quantised in one way, or neither is."""
    mine, theirs = (stated(each)[0].get("quant_method") if stated(each)[0] else None for each in (source, text))
    if mine != theirs:
        shown = [f"{escape(str(method))[:40]}" if method else "plain" for method in (theirs, mine)]
        raise IncompatibleInputs(
            f"{escape(text.name)}: its weights are {shown[0]}, expected {shown[1]} as in {escape(source.name)}",
            hint="weightops dequantize makes plain weights of a quantised model",
        )


def _refuse_otherwise(source: Checkpoint, text: Checkpoint, *, has_head: bool) -> None:
    """Raise `IncompatibleInputs` for settings by which the same shapes hold other numbers."""
    config, own = source.config(), text.config()
    inner = config[key] if (key := text_key(config)) else config
    where, shown = escape(source.name), escape(text.name)
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        one, other = inner.get(name), own.get(name)
        if one is not None and other is not None and one != other:
            raise IncompatibleInputs(
                f"{shown}/config.json: {name} is {escape(repr(other))[:40]}, expected {escape(repr(one))[:40]} as in "
                f"{where}"
            )
    ours, theirs = (_is_tied(c, has_head=has_head, where=w) for c, w in ((config, where), (own or config, shown)))
    if ours != theirs:
        raise IncompatibleInputs(
            f"{shown}/config.json: {_TIE} is {str(theirs).lower()}, and {where} is otherwise: one of the two passes "
            "over the head that lies in its file",
            hint="weightops shard --untie or --tie makes the two alike",
        )


def _stacked_alike(text: Checkpoint, wanted: Mapping[str, LazyTensor]) -> Checkpoint:
    """A language model whose experts are stacked where those of the whole are, rows or columns as there."""
    stacks = [name for name in wanted if name.endswith(".experts.gate_up_proj")]
    if not stacks or stacks[0] in text:
        return text
    blocks = find_blocks(text)
    found = arranged(text, blocks, find_family(text, blocks), "stacked")
    for name, tensor in found.items():
        like = wanted.get(name)
        if like is not None and len(like.spec.shape) == 3 and like.spec.shape == transposed(tensor).spec.shape:
            found[name] = tensor if like.spec.shape == tensor.spec.shape else transposed(tensor)
    return text.with_tensors(found)


def _other_settings(source: Checkpoint, text: Checkpoint) -> list[str]:
    config, own = source.config(), text.config()
    inner = config[key] if (key := text_key(config)) else config
    kind = inner.get("model_type")
    inner = {**inner, "model_type": TEXT_TYPES.get(kind, kind) if isinstance(kind, str) else None}
    odd = [k for k in _COMPARED if inner.get(k) is not None and own.get(k) is not None and inner[k] != own[k]]
    shown = ", ".join(f"{k} is {escape(str(own[k]))[:60]}, was {escape(str(inner[k]))[:60]}" for k in odd)
    return [f"{escape(text.name)}/config.json: {shown}: what {escape(source.name)} says stays"] if odd else []
