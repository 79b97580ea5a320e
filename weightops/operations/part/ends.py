"""What stands at the end of a model: layers that predict further tokens, and heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
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
_DEVIATION = 0.02
"""transformers' initializer_range where config.json gives none."""


def without_mtp(source: Checkpoint) -> Checkpoint:
    """The model without the layers that predict further tokens, and with their count 0; raises `UsageError`."""
    where, config = escape(source.name), source.config()
    names = list(filter(is_mtp(config), source))
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


def with_mtp(source: Checkpoint, original: Checkpoint) -> Checkpoint:
    """The model with the layers that predict further tokens of `original`, and their count.

    They follow the last layer, also where the model has another number of them. Raises `UsageError` for an original
    without them, `IncompatibleInputs` for one of another width, and for a model that has such layers already.
    """
    where, shown = escape(source.name), escape(original.name)
    config, theirs = source.config(), original.config()
    names = list(filter(is_mtp(theirs), original))
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
    taken: dict[str, LazyTensor] = {}
    for name in names:
        before, dot, rest = name.partition("layers.")
        number, _, leaf = rest.partition(".")
        numbered = bool(dot) and number.isdecimal() and "mtp." not in before
        taken[f"{before}layers.{int(number) - count + ours}.{leaf}" if numbered else name] = original[name]
    known = {key: value for key, value in stated(theirs, MTP_COUNTS).items() if value}
    result = source.with_tensors({**source.tensors, **taken}).with_config(lambda config: _with_counts(config, known))
    return result.did(f"{len(taken)} tensors of layers that predict further tokens are those of {shown}")


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
    deviation = float(config.get("initializer_range") or _DEVIATION)
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
