"""What lies beside the weights of a merged model: config.json true to them, and the files of one donor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar, Written
from weightops.errors import IncompatibleInputs
from weightops.formats.sidecars import Kind, is_tokenizer_file, kind_of
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import embeddings_and_heads, vocabulary_rows
from weightops.layouts.layer_config import TEXT_CONFIGS, count_layers, edit_config, layer_settings
from weightops.lazy import LazyTensor
from weightops.operations.merge.arrangement import Chosen
from weightops.operations.merge.inputs import TIE
from weightops.operations.merge.vocabulary import Vocabulary
from weightops.operations.shard import hold

MERGE_FILE = "mergekit_config.yml"
"""What mergekit calls the copy of the merge file beside a result."""


def finished(
    donor: Checkpoint,
    models: Mapping[str, Checkpoint],
    tensors: Mapping[str, LazyTensor],
    chosen: Chosen | None,
    vocabulary: Vocabulary | None,
    text: str,
) -> Checkpoint:
    """A checkpoint of merged tensors, with the files of `donor`, as it was before anything was made of it.

    config.json is the donor's, with the number of layers, the types, the rows of embeddings and the tie that the
    tensors have. Its card stays behind, for it tells of another model; `text` is the merge file. Raises
    `IncompatibleInputs` and `UsageError` for layers that config.json cannot describe.
    """
    result = replace(
        donor,
        tensors=tensors,
        sidecars=_sidecars(donor, vocabulary, text),
        shards=dict.fromkeys(tensors, next(reversed(list(donor.shards.values())), "")) | _known(donor.shards, tensors),
        total_size=None,
        content_id=None,
        digests={},
        prefix=None,
        left={},
    )
    own = vocabulary.settings if vocabulary is not None else {}
    result = result.with_config(lambda config: {**_edited(config, donor, result), **own})
    return _with_layers(donor, models, result, chosen) if chosen is not None and donor.config() else result


def _known(shards: Mapping[str, str], tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    return {name: shards[name] for name in tensors if name in shards}


def _sidecars(donor: Checkpoint, vocabulary: Vocabulary | None, text: str) -> dict[str, Sidecar]:
    files = {name: file for name, file in donor.sidecars.items() if kind_of(name) is not Kind.CARD}
    if vocabulary is not None:
        files = {name: file for name, file in files.items() if not is_tokenizer_file(name)} | dict(vocabulary.sidecars)
    return files | {MERGE_FILE: Written(text.encode())}


def _edited(config: dict[str, Any], donor: Checkpoint, result: Checkpoint) -> dict[str, Any]:
    """config.json with what the tensors say of it, in the part for the language model too."""
    dtype = _dtype(result)
    rows = vocabulary_rows(result)
    is_resized = rows is not None and rows != vocabulary_rows(donor)
    heads = {head for _, candidates in embeddings_and_heads(result) for head in candidates}

    def part(document: Mapping[str, Any], *, is_top: bool) -> dict[str, Any]:
        edited = dict(document)
        named = [key for key in ("dtype", "torch_dtype") if key in edited] or (["dtype"] if is_top else [])
        edited |= dict.fromkeys(named if dtype is not None else [], dtype)
        if is_resized and "vocab_size" in edited:
            edited["vocab_size"] = rows
        if any(head in result for head in heads) and edited.get(TIE, None if is_top else False) is not False:
            edited[TIE] = False
        return edited

    nested = [key for key in TEXT_CONFIGS if isinstance(config.get(key), Mapping)]
    parts = {key: part(config[key], is_top=False) for key in nested}
    return {**part(config, is_top=True), **parts}


def _dtype(result: Checkpoint) -> str | None:
    """The type of most of the floating-point numbers."""
    counts: Counter[str] = Counter()
    for tensor in result.values():
        if tensor.spec.dtype.is_float:
            counts[tensor.spec.dtype.value] += tensor.spec.numel
    return counts.most_common(1)[0][0] if counts else None


def _with_layers(donor: Checkpoint, models: Mapping[str, Checkpoint], result: Checkpoint, chosen: Chosen) -> Checkpoint:
    """With the settings of single layers in the order in which they were chosen."""
    config, where = donor.config(), f"{escape(donor.name)}/config.json"
    order = [number for _, number in chosen.layers]
    count, _ = count_layers(config, escape(donor.name))
    if order == list(range(count)):
        return result
    settings = {name: layer_settings(models[name].config()) for name, _ in chosen.layers}
    settings[""] = layer_settings(config)
    for name, own in settings.items():
        differ = [key for key in {*own, *settings[""]} if own.get(key) != settings[""].get(key)]
        if differ:
            raise IncompatibleInputs(
                f"{where} and that of {escape(name)} differ in what they say of single layers: {listed(differ)}",
                hint="slices take layers of models whose layers are of the same kinds in the same order",
            )
    further = range(count, count + chosen.stack.n_mtp)
    edited, notes = edit_config(result.config(), [*order, *further], chosen.stack.n_mtp, where)
    result = replace(result.with_config(lambda _: edited), warnings=(*result.warnings, *notes))
    if max(order) < count:
        hold(donor, result, order)
    return result
