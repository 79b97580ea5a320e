"""Convert: a model from one layout into another.

Layouts of LLaMA models are read into a `Model`, and written from one. GGUF, which has many families, is read into what
transformers saves (`Saved`), and written from that. What a layout does not hold is dropped by name and with the reason,
or the conversion is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from weightops.checkpoint import Checkpoint, Sidecar, Written, written_json
from weightops.errors import UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.gguf.metadata import is_typed
from weightops.formats.quantized.gguf import is_gguf
from weightops.formats.quantized.table import find_weights
from weightops.formats.quantized.weights import CONFIG_KEY
from weightops.formats.sidecars import Kind, kind_of
from weightops.io.escape import escape
from weightops.layouts import gguf, hf, meta, tencentpretrain
from weightops.layouts.ggml_mix import FILE_TYPES
from weightops.layouts.model import Model
from weightops.layouts.names import EMBEDDING, HEAD, find_layout
from weightops.layouts.source import Source, beside, parse_settings
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, PIECES, SENTENCEPIECE, TokenizerFiles
from weightops.layouts.tokenizers.read import count_tokens, read_tokenizer, refuse_larger
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.convert.adapters import convert_adapter, find_base, is_lora
from weightops.operations.convert.said import check_norms, check_settings, left_out, with_settings
from weightops.operations.dequantize import plain, plain_if_quantised
from weightops.operations.edit import as_llama
from weightops.ops.arrange import Agreed
from weightops.ops.measures.loss import counted_cast
from weightops.spec import DType
from weightops.stores.stores import Stores


@dataclass(frozen=True)
class Target:
    """How to write. `parts`: files among which Meta's layout divides each tensor. `dtype`: of all weights, None to
    keep theirs; `mix`: their types in GGUF files, instead. `as_in_2023`: see `weightops.layouts.hf.write`; `pre`:
    `weightops.layouts.gguf.write`.
    """

    parts: int | None = None
    dtype: DType | None = None
    mix: gguf.Mix | None = None
    as_in_2023: bool = False
    pre: str | None = None


READERS: Mapping[str, Callable[[Source], Model]] = {
    "hf": hf.read,
    "gguf": lambda source: hf.read(_as_hf(source)),
    "meta": meta.read,
    "tencentpretrain": lambda source: tencentpretrain.read(source, "tencentpretrain"),
    "llama_inference": lambda source: tencentpretrain.read(source, "llama_inference"),
}
WRITERS: Mapping[str, Callable[[Model, Target], Checkpoint]] = {
    "hf": lambda model, target: hf.write(model, as_in_2023=target.as_in_2023),
    "meta": lambda model, target: meta.write(model, target.parts or 1),
    "tencentpretrain": lambda model, target: tencentpretrain.write(model, "tencentpretrain"),
    "llama_inference": lambda model, target: tencentpretrain.write(model, "llama_inference"),
    "gguf": lambda model, target: _to_gguf(gguf.from_model(model), target),
}
LLAMA = "llama"
"""Not a layout, but the names and settings of Llama for models that compute the same."""
_ANYWHERE = frozenset({Kind.NOTICE, Kind.CARD})
_IN_A_FOLDER = _ANYWHERE | {Kind.TOKENIZER, Kind.TEMPLATE, Kind.GENERATION}
_PLACES: Mapping[str, frozenset[Kind]] = {
    "hf": _IN_A_FOLDER | {Kind.PROCESSOR},
    **dict.fromkeys(("meta", "tencentpretrain", "llama_inference"), _IN_A_FOLDER),
    "gguf": _ANYWHERE,
}
"""The kinds of files that a layout takes along as they are; Meta's code and TencentPretrain's pass over the others."""
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REWRITTEN = ("config.json", "params.json")


@dataclass(frozen=True)
class Converted:
    """The result, and for each tensor that was not taken the reason."""

    checkpoint: Checkpoint
    layout: str
    dropped: Mapping[str, str]


def convert(
    source: Checkpoint,
    *,
    to: str,
    from_: str | None = None,
    model_parallel: int | None = None,
    dtype: str | None = None,
    pure: bool = False,
    imatrix: str | None = None,
    tensor_type: Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    allow_requantize: bool = False,
    set: Mapping[str, str] | None = None,
    tokenizer: str | bool | None = None,
    base: str | None = None,
    as_in_2023: bool = False,
    evaluate: Evaluate,
    stores: Stores | None = None,
) -> Checkpoint:
    """A model in the layout `to`: hf, meta, tencentpretrain, llama_inference or gguf; only LLaMA is in all of them.

    With `to` "llama" a model of another family that computes what Llama does, as a Llama: see `as_llama`.

    `from_` is the layout of the source, found from its tensors by default. `model_parallel`: parts in Meta's layout.
    `dtype`: a number type, or for GGUF a file type of llama-quantize, of which the options up to `allow_requantize` are
    too: `pure` is one type for all, `imatrix` an importance matrix, `tensor_type` are `REGEX=TYPE`.
    `set`: what its files leave unsaid. `tokenizer`: the path of one elsewhere, or False for none.
    `as_in_2023`: see `weightops.layouts.hf.write`. A LoRA adapter goes from what peft saves to GGUF and back; `base` is
    then where its model's config.json is. Raises as `convert_model` and `convert_adapter` do.
    """
    known = parse_settings(set or {})
    if to not in (*WRITERS, LLAMA):
        raise UsageError(f"unknown layout {to!r}", hint=f"known are {', '.join((*WRITERS, LLAMA))}")
    if to == LLAMA:
        if known.keys() - {"context_length"} or any((from_, model_parallel, dtype, tokenizer is not None, as_in_2023)):
            raise UsageError(
                "a Llama of another family has its settings and its tokenizer", hint="weightops cast casts"
            )
        return as_llama(plain_if_quantised(source, evaluate), known.get("context_length"), evaluate)
    if tokenizer is True:
        raise UsageError("a tokenizer is given by its path", hint="leave it out for the one that lies with the source")
    own: dict[str, Any] = {"pure": pure, "imatrix": imatrix, "tensor_type": tensor_type}
    own |= {"output_tensor_type": output_tensor_type, "token_embedding_type": token_embedding_type}
    number, mixed = gguf.parse_types(to, dtype, {**own, "requantise": allow_requantize})
    if is_lora(source):
        options = {"model_parallel": model_parallel, "set": set, "tokenizer": tokenizer, "from": from_}
        options |= {**own, "allow_requantize": allow_requantize or None, "pure": pure or None}
        find = partial(find_base, source, base, stores)
        return convert_adapter(source, to=to, find=find, dtype=number, mix=mixed, options=options)
    if base is not None:
        hint = "leave --base out"
        raise UsageError(f"{escape(source.name)} is no LoRA adapter, which a base could be for", hint=hint)
    if not is_gguf(source) and (to not in ("hf", "gguf") or (to == "hf" and dtype is not None)):
        source = plain_if_quantised(source, evaluate)  # its parts have no place there, or scales would be cast
    files = beside(source, Path(tokenizer) if isinstance(tokenizer, str) else tokenizer)
    opened = Source(source, files, lambda tensor: evaluate([tensor])[0], known, has_own_tokenizer=tokenizer is None)
    target = Target(model_parallel, number, mixed, as_in_2023, known.get("pre"))
    converted = convert_model(opened, to, target, from_)
    return replace(converted.checkpoint, dropped=converted.dropped)


def convert_model(source: Source, to: str, target: Target, layout: str | None = None) -> Converted:
    """`source` in the layout `to`; its own is found from the names of its tensors unless it is given.

    Without `parts`, Meta's layout gets as many as the source has. Raises `UsageError` for what has to be asked or is
    not converted, `CorruptInput` for files that do not fit.
    """
    refuse_adapter(source.checkpoint, "the source")
    refuse_delta(source.checkpoint, "the source")
    layout = layout or find_layout(source.checkpoint)
    if layout is None and any(name.endswith(f".{EMBEDDING.name('hf', 0)}") for name in source.checkpoint):
        layout = "hf"  # a language model within another
    if layout is None or layout not in READERS:
        raise UsageError(
            f"{source.where}: no layout that is known", hint=f"its tensors are named as in none of {', '.join(READERS)}"
        )
    _check_target(to, target)
    if to == layout and to not in ("meta", "gguf"):
        return Converted(_in_dtype(source.checkpoint, target.dtype, to), layout, {})
    if {layout, to} <= {"hf", "gguf"}:
        return _by_saved(source, to, target, layout)
    own_parts = len(set(source.checkpoint.shards.values())) if layout == "meta" else None
    target = replace(target, parts=target.parts or own_parts)
    source, layout_read = (_as_hf(source), "hf") if layout == "gguf" else (source, layout)
    model = READERS[layout_read](source)
    check_settings(model, source)
    check_norms(model.tensors, source)
    unchanged = ("params.json",) if to == layout and target.parts == own_parts else ()
    model = _with_tokenizer(model, source, layout=layout_read, to=to)
    sidecars, notes = _sidecars(model.files, source, to=to, unchanged=unchanged)
    model = replace(model, sidecars=sidecars, notes=(*model.notes, *notes))
    result = WRITERS[to](model, target)
    if to != "gguf":  # which has types and metadata of its own
        metadata = {**result.metadata, **source.checkpoint.metadata}
        result = replace(_in_dtype(result, target.dtype, to), metadata=metadata)
    said = _warnings(source, result, model.notes, model.dropped)
    said += _on_tokens(model.n_tokens, model.hyperparameters.vocab_size)
    return Converted(replace(result, warnings=said), layout, model.dropped)


def _by_saved(source: Source, to: str, target: Target, layout: str) -> Converted:
    """Between transformers and GGUF, for every family that GGUF is written of and read as here."""
    if target.mix is not None and layout == "gguf":
        return _quantised(source, target.mix)
    if layout == "gguf":
        saved = gguf.read(source, target.dtype if to == "hf" else None)
    else:
        saved = _read_saved(_dequantised(source, is_exact=(target.dtype or target.mix) is not None))
    check_norms(saved.tensors, source)
    rows = saved.config.get("vocab_size")
    n_tokens = count_tokens(saved.files, rows) if saved.files.is_hugging_face and type(rows) is int else None
    result = _to_gguf(saved, target) if to == "gguf" else _written(saved)
    said = _warnings(source, result, (), result.dropped) + _on_tokens(n_tokens, rows)
    return Converted(replace(result, warnings=said), layout, result.dropped)


def _to_gguf(saved: gguf.Saved, target: Target) -> Checkpoint:
    """As llama.cpp's converter writes it, which has few types itself; the others are those of llama-quantize."""
    how = target.mix
    if how is None:
        return gguf.write(saved, target.dtype, target.pre)
    base = FILE_TYPES[how.name].base
    if how.pure and how.is_plain and base in gguf.FILE_TYPES:
        return gguf.write(saved, base, target.pre)
    return gguf.quantised(gguf.write(saved, None, target.pre), how)


def _quantised(source: Source, how: gguf.Mix) -> Converted:
    """A GGUF file as another, of which nothing but types changes."""
    if source.settings or not source.has_own_tokenizer:
        raise UsageError(
            f"{source.where}: a GGUF file whose types change keeps its parameters and its tokenizer",
            hint="leave out --set, --tokenizer and --no-tokenizer",
        )
    return Converted(gguf.quantised(source.checkpoint, how), "gguf", {})


def _dequantised(source: Source, *, is_exact: bool) -> Source:
    """The source with plain weights; in float32, where they are to be rounded to another type.

    gpt-oss keeps its MXFP4, of which GGUF has blocks.
    """
    config = source.checkpoint.config()
    if config.get("model_type") == "gpt_oss" and (config.get(CONFIG_KEY) or {}).get("quant_method") == "mxfp4":
        return source
    found = find_weights(source.checkpoint, lambda tensors: [source.evaluate(tensor) for tensor in tensors])
    if not found:
        return source
    made = plain(source.checkpoint, found, DType.F32 if is_exact else None)
    return replace(source, checkpoint=made, read_file=lambda n: made.sidecar(n) if n == CONFIG else source.read_file(n))


def _read_saved(source: Source) -> gguf.Saved:
    """A folder of transformers as it is, its tensors in the order in which llama.cpp's converter takes them."""
    files = source.tokenizer_files(layout="hf")
    sidecars, notes = _sidecars(files, source, to="gguf", unchanged=())
    config, shards = source.parameters("config.json"), source.checkpoint.shards
    tensors = dict(source.checkpoint)
    in_file = {name: i for i, name in enumerate(tensors)}
    order = sorted(tensors, key=lambda n: (f := shards.get(n, ""), n if f.endswith(".safetensors") else "", in_file[n]))
    tied = config.get("tie_word_embeddings") and EMBEDDING.name("hf", 0), HEAD.name("hf", 0)
    if tied[0] in tensors and tied[1] in tensors and tensors[tied[0]] != tensors[tied[1]]:
        problem = f"{source.where}/config.json ties {tied[1]} to {tied[0]}, and they do not agree"
        tensors[tied[0]] = LazyTensor.make(Agreed(problem), tensors[tied[0]], tensors[tied[1]])
    return gguf.Saved(
        name=source.checkpoint.name,
        config=with_settings(config, source),
        tensors={name: tensors[name] for name in order},
        files=files,
        card=source.read_file("README.md"),
        sidecars=sidecars,
        warnings=notes,
    )


def _written(saved: gguf.Saved) -> Checkpoint:
    """What transformers loads: config.json, the tokenizer's files, tensors."""
    made = {name: Written(data) for name, data in saved.files.files.items()}
    sidecars = {CONFIG: written_json(saved.config), **made, **saved.sidecars}
    return Checkpoint(saved.name, saved.tensors, sidecars=sidecars, warnings=saved.warnings, dropped=saved.dropped)


def _as_hf(source: Source) -> Source:
    """A GGUF file as if transformers had saved its model."""
    checkpoint = replace(_written(gguf.read(source)), folder=None)
    return replace(source, checkpoint=checkpoint, read_file=beside(checkpoint, None))


def _check_target(to: str, target: Target) -> None:
    """Refuse options that the layout has no use for."""
    dtype = target.dtype
    if target.parts is not None and target.parts < 1:
        raise UsageError(f"a model cannot be divided among {target.parts} parts", hint="give another --model-parallel")
    if target.parts is not None and to != "meta":
        raise UsageError("only Meta's layout has parts", hint="leave --model-parallel out, or give --to meta")
    if dtype is not None and dtype.is_packed and to != "gguf":
        raise UsageError(f"{dtype.value} is a type of GGUF alone", hint="give --to gguf")


def _warnings(source: Source, result: Checkpoint, notes: Sequence[str], dropped: Mapping[str, str]) -> tuple[str, ...]:
    """What there is to say of the source, of what was derived, and of what is not in the result."""
    said = [*source.checkpoint.warnings, *notes, *result.warnings, *left_out(dropped)]
    keys = sorted(key for key, value in source.checkpoint.metadata.items() if key != "format" and not is_typed(value))
    if result.container == "gguf" and keys:
        said.append(f"{', '.join(map(escape, keys))} of the source's __metadata__: left out, as gguf has its own")
    return tuple(said)


def _on_tokens(n_tokens: int | None, rows: object) -> tuple[str, ...]:
    if n_tokens is None:
        return ("there is no tokenizer in the output; --tokenizer names one",)
    is_more = isinstance(rows, int) and n_tokens < rows
    return (f"the embedding has {rows} rows, the tokenizer {n_tokens} tokens",) if is_more else ()


def _in_dtype(checkpoint: Checkpoint, dtype: DType | None, layout: str) -> Checkpoint:
    """The checkpoint with all floating-point weights in `dtype`, and what that loses counted."""
    if dtype is None:
        return checkpoint
    tensors = checkpoint.items()
    converted = {name: counted_cast(t, dtype, name) if t.spec.dtype.is_float else t for name, t in tensors}
    return replace(checkpoint.with_dtype(dtype) if layout == "hf" else checkpoint, tensors=converted)


def _with_tokenizer(model: Model, source: Source, *, layout: str, to: str) -> Model:
    """The model with its tokenizer: as it is where the target takes Hugging Face's files, or else read.

    Raises `UsageError` for one that has more tokens than the embedding, or that the target cannot hold.
    """
    files, h = source.tokenizer_files(layout=layout), model.hyperparameters
    n_tokens = count_tokens(files, h.vocab_size) if files.is_hugging_face else None
    if to in ("gguf", "hf") and files.is_hugging_face:
        return replace(model, files=files, n_tokens=n_tokens)
    generation: Literal["3", "3.1"] = "3.1" if h.rope_scaling is not None else "3"
    tokenizer = read_tokenizer(files, generation=generation, instruct=source.settings.get("instruct"))
    if tokenizer is None:
        return replace(model, files=files)
    count, notes = len(tokenizer.tokens), model.notes
    refuse_larger(count, h.vocab_size, source.where)
    if n_tokens is not None and n_tokens > count:
        added = f"{n_tokens - count} tokens that were added have no place in tokenizer.model"
        notes = (*notes, f"{added}: they are in the files beside it")
    return replace(model, tokenizer=tokenizer, files=files, n_tokens=max(count, n_tokens or 0), notes=notes)


def _sidecars(
    files: TokenizerFiles, source: Source, *, to: str, unchanged: Sequence[str]
) -> tuple[dict[str, Sidecar], tuple[str, ...]]:
    """The files that go along as they are, and a note on those that have no place; `files` are the tokenizer's."""
    own = source.checkpoint.sidecars
    found = {name: own[name] for name in own if source.has_own_tokenizer or kind_of(name) is not Kind.TOKENIZER}
    if not source.has_own_tokenizer:
        given = {name: data for name, data in files.files.items() if kind_of(name) is Kind.TOKENIZER}
        found |= {name: Written(data) for name, data in given.items()}
    goes = {name for name in found if kind_of(name) in _PLACES[to] or name in unchanged}
    if not files.is_hugging_face:  # the layout makes its own
        goes -= {name for name in found if kind_of(name) is Kind.TOKENIZER}
    elif not files.files.get(PIECES, SENTENCEPIECE).startswith(SENTENCEPIECE) and to == "hf":
        goes -= {PIECES}  # Llama 3's ranks, which transformers takes for a sentencepiece model
    sidecars: dict[str, Sidecar] = {name: found[name] for name in found if name in goes}
    if to != "gguf" and GENERATION not in sidecars and CONFIG in files:
        config = files.document(CONFIG)
        if ids := {name: config[name] for name in _ENDS if name in config}:
            sidecars[GENERATION] = written_json({"_from_model_config": True, **ids})
    read = {*_REWRITTEN, *files.files} if to == "gguf" else {*_REWRITTEN, PIECES}
    lost = sorted(name for name in found if name not in goes and name not in read)
    notes = (f"{', '.join(map(escape, lost))}: left out, as {to} has no place for it",) if lost else ()
    return sidecars, notes
