"""What stands at the end of a model: layers that predict further tokens, and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.quantized.weights import stated as quantised
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import embeddings_and_heads
from weightops.layouts.experts import stated, with_numbers
from weightops.layouts.parts import MTP_COUNTS, is_mtp
from weightops.layouts.renamed import renamed, without_names
from weightops.lazy import LazyTensor
from weightops.ops.rows import NormalRows, Repeat
from weightops.spec import DType

Head = Literal["none", "classifier", "token-classifier"]
Init = Literal["zero", "normal"]
_MAPPINGS: Mapping[Head, str] = {
    "none": "MODEL_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classifier": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
_OF_HEADS = ("lm_head.", "embed_out.", "score.", "classifier.", "v_head.")
"""How names of heads begin: of language models, of classifiers, and TRL's value head."""
_BY_NAME = re.compile(r"\bmtp|\.(?:eh_proj|enorm|hnorm|shared_head)\b")
"""In names of layers that predict further tokens, what no other layer has."""
_DEVIATION = 0.02
"""transformers' initializer_range where config.json gives none."""


def without_mtp(source: Checkpoint) -> Checkpoint:
    """The model without the layers that predict further tokens, and with their count 0; raises `UsageError`."""
    where, config = escape(source.name), source.config()
    names = _further(source)
    known = stated(config, MTP_COUNTS)
    if not names and not any(known.values()):
        raise UsageError(
            f"{where}: has no layers that predict further tokens",
            hint="known are mtp.* and layers behind the last that config.json counts",
        )
    result = without_names(source, names, "predicts further tokens") if names else source
    result = result.with_config(lambda config: with_numbers(config, dict.fromkeys(known, 0)))
    counts = ", ".join(f"{key} is 0 now" for key in known)
    return result.did(f"{len(names)} tensors of layers that predict further tokens left out; {counts}")


def _further(source: Checkpoint) -> list[str]:
    """The tensors of layers that predict further tokens.

    Raises `UsageError` for layers that are only behind the last that config.json counts: nothing says what they do.
    """
    config = source.config()
    names = list(filter(is_mtp(config), source))
    numbered = [name for name in names if not _BY_NAME.search(name)]
    if len(numbered) == len(names) > 0 and not any(stated(config, MTP_COUNTS).values()):
        raise UsageError(
            f"{escape(source.name)}: {escape(numbered[0])} is behind the last layer that config.json counts, and "
            "nothing says that it predicts further tokens",
            hint="is num_hidden_layers right?",
        )
    return names


def with_mtp(source: Checkpoint, original: Checkpoint) -> Checkpoint:
    """The model with the layers that predict further tokens of `original`, and their count.

    They follow the last layer, also where the model has another number of them. Raises `UsageError` for an original
    without them, `IncompatibleInputs` for one of another width, and for a model that has such layers already.
    """
    where, shown = escape(source.name), escape(original.name)
    config, theirs = source.config(), original.config()
    names = _further(original)
    if not names:
        raise UsageError(
            f"{shown}: has no layers that predict further tokens", hint="name the model that still has them"
        )
    own = list(filter(is_mtp(config), source))
    if own:
        raise IncompatibleInputs(
            f"{where}: has such layers already: {listed(own, 3)}", hint="--drop mtp leaves them out"
        )
    for key in ("hidden_size", "vocab_size"):
        mine, other = stated(config, (key,)).get(key), stated(theirs, (key,)).get(key)
        if mine != other:
            raise IncompatibleInputs(f"{shown}: {key} is {other}, expected {mine} as in {where}")
    ours, count = (stated(c, ("num_hidden_layers",)).get("num_hidden_layers", 0) for c in (config, theirs))
    _refuse_packed(source, original, names)
    taken: dict[str, LazyTensor] = {}
    for name in names:
        before, dot, rest = name.partition("layers.")
        number, _, leaf = rest.partition(".")
        numbered = bool(dot) and number.isdecimal() and "mtp." not in before
        if numbered and not ours:
            raise UsageError(f"{where}/config.json does not say num_hidden_layers, behind which {escape(name)} goes")
        taken[f"{before}layers.{int(number) - count + ours}.{leaf}" if numbered else name] = original[name]
    there = next((name for name in taken if name in source), None)
    if there is not None:
        raise IncompatibleInputs(f"{where}: has a tensor {escape(there)} already, for one of {shown}")
    known = {key: value for key, value in stated(theirs, MTP_COUNTS).items() if value}
    result = source.with_tensors({**source.tensors, **taken}).with_config(lambda config: _with_counts(config, known))
    return result.did(f"{len(taken)} tensors of layers that predict further tokens are those of {shown}")


def _refuse_packed(source: Checkpoint, original: Checkpoint, names: Sequence[str]) -> None:
    """Raise `IncompatibleInputs` for quantised layers, unless the model that they go into is quantised in that way."""
    mine, theirs = quantised(source)[0], quantised(original)[0]
    if mine.get("quant_method") == theirs.get("quant_method"):
        return
    for name in names:
        dtype = original[name].spec.dtype
        if dtype.is_packed or dtype.is_block or dtype.bits < 16 or not dtype.is_float:
            raise IncompatibleInputs(
                f"{escape(original.name)}: {escape(name)} is {original[name].spec}, part of a quantised weight, and "
                f"{escape(source.name)} is not quantised so",
                hint="weightops dequantize makes plain weights of it",
            )


def _with_counts(config: dict[str, Any], known: Mapping[str, int]) -> dict[str, Any]:
    edited = with_numbers(config, known)
    there = stated(edited, known)
    return {**edited, **{key: value for key, value in known.items() if key not in there}}


def with_head(source: Checkpoint, head: Head, labels: int | None, init: Init, seed: int) -> Checkpoint:
    """The model with another head: none, or one that classifies texts or tokens into so many labels.

    The new head is zero, or drawn from N(0, initializer_range) with `seed`, the same on every machine; of its bias
    always zero. config.json names the class and the labels. Raises `UsageError` for models that have none such.
    """
    where, config = escape(source.name), source.config()
    kind = str(config.get("model_type"))
    if (labels is None) != (head == "none"):
        raise UsageError("labels are what a classifier chooses from", hint="--labels 2 with --head classifier")
    name = _class_name(kind, head, where)
    gone = [n for n in source if n.startswith(_OF_HEADS)]
    result = without_names(source, gone, "the head") if gone else source
    if head == "none":
        prefix = "model."
        names = {n: n.removeprefix(prefix) for n in result}
        result = renamed(result, names) if all(n.startswith(prefix) for n in result) else result
        edited = {**config, "architectures": [name]}
        return result.with_config(lambda _: edited).did(f"{listed(gone) or 'no head'} left out")
    assert labels is not None
    embedding = next((source[n] for n, _ in embeddings_and_heads(source)), None)
    if embedding is None or not 1 <= labels <= 1 << 20:
        raise UsageError(
            f"{where}: no head of {labels} labels can be made", hint="the model's embedding gives its width"
        )
    dtype, width = embedding.spec.dtype, embedding.spec.shape[1]
    deviation = config.get("initializer_range", _DEVIATION)
    if isinstance(deviation, bool) or not isinstance(deviation, int | float) or not 0 <= deviation < 1e6:
        raise UsageError(
            f"{where}/config.json: initializer_range is {escape(repr(deviation))[:80]}, expected a number above zero"
        )
    tensors = {**result.tensors, "score.weight": _fresh((labels, width), dtype, init, deviation, seed)}
    if head == "token-classifier":
        tensors["score.bias"] = LazyTensor.make(Repeat(dtype, (labels,), bytes(dtype.itemsize)))
    id2label = {str(i): f"LABEL_{i}" for i in range(labels)}
    edited = {**config, "architectures": [name], "id2label": id2label}
    edited["label2id"] = {label: int(number) for number, label in id2label.items()}
    said = "zero" if init == "zero" else f"random (seed {seed})"
    result = result.with_tensors(tensors).with_config(lambda _: edited)
    return result.did(f"the head for {labels} labels is {said}: it is to be trained")


def _fresh(shape: tuple[int, int], dtype: DType, init: Init, deviation: float, seed: int) -> LazyTensor:
    if init == "zero":
        return LazyTensor.make(Repeat(dtype, shape, bytes(dtype.itemsize)))
    return LazyTensor.make(NormalRows(dtype, shape, deviation, seed, "score.weight"))


def _class_name(kind: str, head: Head, where: str) -> str:
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, _MAPPINGS[head]).get(kind)
    if found is None:
        raise UsageError(f"{where}: transformers has no such class for model_type {escape(kind)[:80]}")
    return found[0] if isinstance(found, list | tuple) else str(found)
