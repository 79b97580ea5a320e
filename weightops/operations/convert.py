"""Convert: a LLaMA model from any layout into any other.

Source layouts are read into a `Model`, target layouts written from one. What a layout does not hold is dropped by
name and with the reason, or the conversion is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from weightops.checkpoint import Checkpoint, Written, written_json
from weightops.errors import CorruptInput, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.sidecars import Kind, kind_of
from weightops.io.escape import escape
from weightops.layouts import gguf, hf, meta, tencentpretrain
from weightops.layouts.model import Model
from weightops.layouts.names import find_layout
from weightops.layouts.source import Source, beside, parse_settings
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, PIECES, SENTENCEPIECE
from weightops.layouts.tokenizers.read import count_tokens, read_tokenizer, refuse_larger
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.measures.loss import counted_cast
from weightops.spec import DType


@dataclass(frozen=True)
class Target:
    """How to write. `parts`: files among which Meta's layout divides each tensor. `dtype`: of all weights, None to
    keep theirs. `as_in_2023`: see `weightops.layouts.hf.write`.
    """

    parts: int | None = None
    dtype: DType | None = None
    as_in_2023: bool = False


READERS: Mapping[str, Callable[[Source], Model]] = {
    "hf": hf.read,
    "meta": meta.read,
    "tencentpretrain": lambda source: tencentpretrain.read(source, "tencentpretrain"),
    "llama_inference": lambda source: tencentpretrain.read(source, "llama_inference"),
}
WRITERS: Mapping[str, Callable[[Model, Target], Checkpoint]] = {
    "hf": lambda model, target: hf.write(model, as_in_2023=target.as_in_2023),
    "meta": lambda model, target: meta.write(model, target.parts or 1),
    "tencentpretrain": lambda model, target: tencentpretrain.write(model, "tencentpretrain"),
    "llama_inference": lambda model, target: tencentpretrain.write(model, "llama_inference"),
    "gguf": lambda model, target: gguf.write(model, target.dtype),
}
GGUF_DTYPES = (DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0)
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
    dtype: DType | None = None,
    set: Mapping[str, str] | None = None,
    tokenizer: str | bool | None = None,
    as_in_2023: bool = False,
    evaluate: Evaluate,
) -> Checkpoint:
    """A LLaMA model in the layout `to`: hf, meta, tencentpretrain, llama_inference or gguf.

    `from_` is the layout of the source, found from its tensors by default. `model_parallel`: parts in Meta's layout.
    `set`: what its files leave unsaid. `tokenizer`: the path of one elsewhere, or False for none.
    `as_in_2023`: see `weightops.layouts.hf.write`. Raises as `convert_model` does.
    """
    known = parse_settings(set or {})
    if to not in WRITERS:
        raise UsageError(f"unknown layout {to!r}", hint=f"known are {', '.join(WRITERS)}")
    if tokenizer is True:
        raise UsageError("a tokenizer is given by its path", hint="leave it out for the one that lies with the source")
    files = beside(source, Path(tokenizer) if isinstance(tokenizer, str) else tokenizer)
    opened = Source(source, files, lambda tensor: evaluate([tensor])[0], known, has_own_tokenizer=tokenizer is None)
    converted = convert_model(opened, to, Target(model_parallel, dtype, as_in_2023), from_)
    return replace(converted.checkpoint, dropped=converted.dropped)


def convert_model(source: Source, to: str, target: Target, layout: str | None = None) -> Converted:
    """`source` in the layout `to`; its own is found from the names of its tensors unless it is given.

    Without `parts`, Meta's layout gets as many as the source has. Raises `UsageError` for what has to be asked or is
    not converted, `CorruptInput` for files that do not fit.
    """
    refuse_adapter(source.checkpoint, "the source")
    layout = layout or find_layout(source.checkpoint)
    if layout is None or layout not in READERS:
        raise UsageError(
            f"{source.where}: no layout that is known", hint=f"its tensors are named as in none of {', '.join(READERS)}"
        )
    _check_target(to, target)
    if to == layout and to != "meta":
        return Converted(_in_dtype(source.checkpoint, target.dtype, to), layout, {})
    own_parts = len(set(source.checkpoint.shards.values())) if layout == "meta" else None
    target = replace(target, parts=target.parts or own_parts)
    model = READERS[layout](source)
    _check_settings(model, source)
    _check_norms(model, source)
    unchanged = ("params.json",) if to == layout and target.parts == own_parts else ()
    model = _with_files(_with_tokenizer(model, source, layout=layout, to=to), source, to=to, unchanged=unchanged)
    result = WRITERS[to](model, target)
    if to != "gguf":  # which has types and metadata of its own
        metadata = {**result.metadata, **source.checkpoint.metadata}
        result = replace(_in_dtype(result, target.dtype, to), metadata=metadata)
    return Converted(replace(result, warnings=_warnings(source, model, result)), layout, model.dropped)


def _check_target(to: str, target: Target) -> None:
    """Refuse options that the layout has no use for."""
    dtype = target.dtype
    if target.parts is not None and target.parts < 1:
        raise UsageError(f"a model cannot be divided among {target.parts} parts", hint="give another --model-parallel")
    if target.parts is not None and to != "meta":
        raise UsageError("only Meta's layout has parts", hint="leave --model-parallel out, or give --to meta")
    if dtype is not None and dtype not in GGUF_DTYPES and to == "gguf":
        hint = f"choose one of {', '.join(known.value for known in GGUF_DTYPES)}"
        raise UsageError(f"GGUF weights are not written in {dtype.value}", hint=hint)
    if dtype in (DType.Q8_0, DType.Q4_0) and to != "gguf":
        raise UsageError(f"{dtype.value} is a type of GGUF alone", hint="give --to gguf")


def _warnings(source: Source, model: Model, result: Checkpoint) -> tuple[str, ...]:
    """What there is to say of the source, of what was derived, and of what is not in the result."""
    said = [*source.checkpoint.warnings, *model.notes, *result.warnings]
    said += [f"{escape(name)} is left out: {reason}" for name, reason in sorted(model.dropped.items())[:1]]
    if len(model.dropped) > 1:
        said.append(f"and {len(model.dropped) - 1} more are left out; the manifest names them")
    if result.container == "gguf" and (keys := sorted(source.checkpoint.metadata.keys() - {"format"})):
        said.append(f"{', '.join(map(escape, keys))} of the source's __metadata__: left out, as gguf has its own")
    rows = model.hyperparameters.vocab_size
    if model.n_tokens is None:
        said.append("there is no tokenizer in the output; --tokenizer names one")
    elif model.n_tokens < rows:
        said.append(f"the embedding has {rows} rows, the tokenizer {model.n_tokens} tokens")
    return tuple(said)


def _in_dtype(checkpoint: Checkpoint, dtype: DType | None, layout: str) -> Checkpoint:
    """The checkpoint with all floating-point weights in `dtype`, and what that loses counted."""
    if dtype is None:
        return checkpoint
    tensors = checkpoint.items()
    converted = {name: counted_cast(t, dtype, name) if t.spec.dtype.is_float else t for name, t in tensors}
    return replace(checkpoint.with_dtype(dtype) if layout == "hf" else checkpoint, tensors=converted)


def _check_settings(model: Model, source: Source) -> None:
    """Refuse what the user says of a model whose files say something else."""
    h = model.hyperparameters
    found = {
        "context_length": h.context_length,
        "n_heads": h.n_heads,
        "norm_eps": h.norm_eps,
        "rope_theta": h.rope_theta,
        "rope_factor": h.rope_scaling.factor if h.rope_scaling else None,
    }
    for name, value in found.items():
        given = source.settings.get(name)
        if given is not None and given != value:
            raise UsageError(f"{source.where}: by its own files, {name} is {value}, not {given}")


def _check_norms(model: Model, source: Source) -> None:
    """Refuse norms with values that are no numbers: they are small, and a model with one says nothing."""
    for name, tensor in model.tensors.items():
        if len(tensor.spec.shape) == 1 and not np.isfinite(_values(tensor, source)).all():
            raise CorruptInput(
                f"{source.where}: {escape(name)} holds values that are no numbers",
                hint="the file was damaged, or saved from a training run that had failed",
            )


def _values(tensor: LazyTensor, source: Source) -> np.ndarray:
    return np.frombuffer(source.evaluate(cast(tensor, DType.F32)), dtype=np.float32)


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


def _with_files(model: Model, source: Source, *, to: str, unchanged: Sequence[str]) -> Model:
    """The model with the files that go along as they are, and a note on those that have no place."""
    own = source.checkpoint.sidecars
    found = {name: own[name] for name in own if source.has_own_tokenizer or kind_of(name) is not Kind.TOKENIZER}
    if not source.has_own_tokenizer:
        given = {name: data for name, data in model.files.files.items() if kind_of(name) is Kind.TOKENIZER}
        found |= {name: Written(data) for name, data in given.items()}
    goes = {name for name in found if kind_of(name) in _PLACES[to] or name in unchanged}
    if not model.files.is_hugging_face:  # the layout makes its own
        goes -= {name for name in found if kind_of(name) is Kind.TOKENIZER}
    elif not model.files.files.get(PIECES, SENTENCEPIECE).startswith(SENTENCEPIECE) and to == "hf":
        goes -= {PIECES}  # Llama 3's ranks, which transformers takes for a sentencepiece model
    sidecars = {name: found[name] for name in found if name in goes}
    if to != "gguf" and GENERATION not in sidecars and CONFIG in model.files:
        config = model.files.document(CONFIG)
        if ids := {name: config[name] for name in _ENDS if name in config}:
            sidecars[GENERATION] = written_json({"_from_model_config": True, **ids})
    read = {*_REWRITTEN, *model.files.files} if to == "gguf" else {*_REWRITTEN, PIECES}
    lost = sorted(name for name in found if name not in goes and name not in read)
    notes = (f"{', '.join(map(escape, lost))}: left out, as {to} has no place for it",) if lost else ()
    return replace(model, sidecars=sidecars, notes=(*model.notes, *notes))
