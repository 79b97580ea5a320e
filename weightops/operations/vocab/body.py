"""A model as `vocab` sees it: which tensors have an entry for each token, and the files that name tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.modules import NUMBERED
from weightops.formats.quantized.gguf import is_gguf
from weightops.formats.quantized.table import find_weights
from weightops.formats.sidecars import Kind, is_tokenizer_file, kind_of
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import DRAFT_MAPS, Holds, holds_tokens
from weightops.layouts.layer_config import OTHER_TOWERS
from weightops.layouts.token_ids import named_ids, text_parts
from weightops.layouts.tokenizers.files import CONFIG, GENERATION
from weightops.layouts.tokenizers.vocabulary import Files, FolderVocabulary, read_vocabulary
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.arrange import Agreed
from weightops.spec import DType

FLOATS = (DType.F64, DType.F32, DType.BF16, DType.F16)
ROW_KEYS = ("vocab_size", "padded_vocab_size")
PER_LAYER_KEY = "vocab_size_per_layer_input"
_TIE = "tie_word_embeddings"
_KINDS = (Kind.GENERATION, Kind.TOKENIZER, Kind.TEMPLATE, Kind.PROCESSOR)
_NO_ROWS = ("position", "wpe.", "token_type", "norm.")
"""In names of tensors whose first dimension has nothing to do with tokens, whatever its size."""


@dataclass(frozen=True)
class TokenTensor:
    """A tensor with an entry for each token along dimension `axis`."""

    name: str
    holds: Holds
    axis: int
    tensor: LazyTensor

    @property
    def entries(self) -> int:
        return self.tensor.spec.shape[self.axis]


@dataclass(frozen=True)
class Body:
    """A model apart from its vocabulary. `files` are those that name tokens, by name; `rows` is how many it has."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    files: Files
    tensors: tuple[TokenTensor, ...]
    rows: int

    @property
    def where(self) -> str:
        return escape(self.checkpoint.name)

    @cached_property
    def vocabulary(self) -> FolderVocabulary:
        """Its tokens; raises as `read_vocabulary` does."""
        return read_vocabulary(self.files, self.where)

    @property
    def embedding(self) -> TokenTensor:
        """The input embedding."""
        return next(each for each in self.tensors if each.holds == "input")

    @property
    def head(self) -> TokenTensor:
        """The output embedding, which is the input embedding where the two are tied."""
        return next((each for each in self.tensors if each.holds == "output"), self.embedding)

    @property
    def is_tied(self) -> bool:
        """Whether the output embedding is said to be the input embedding; the outermost setting counts."""
        stated = [part[_TIE] for _, part in text_parts(self.config) if _TIE in part]
        return bool(stated) and stated[0] is True

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file as an object, empty if there is none."""
        return strict_json.load_object(self.files[name], f"{self.where}/{name}") if name in self.files else {}

    def named(self) -> Iterator[tuple[str, int]]:
        """The ids that config.json, generation_config.json and the configs of processors name, with where."""
        yield from ((f"{CONFIG}: {key}", number) for key, number in named_ids(self.config))
        for name in self.files:
            if name == GENERATION or kind_of(name) is Kind.PROCESSOR:
                yield from ((f"{name}: {key}", number) for key, number in named_ids(self.document(name)))

    def agreed(self) -> list[LazyTensor]:
        """What must hold of tied embeddings that are stored twice, to be evaluated before anything is written."""
        checks = []
        for each in self.tensors:
            if self.is_tied and each.holds == "output" and each.tensor != self.embedding.tensor:
                if each.tensor.spec != self.embedding.tensor.spec:
                    raise IncompatibleInputs(
                        f"{self.where}: config.json ties {escape(each.name)}, which is {each.tensor.spec}, to "
                        f"{escape(self.embedding.name)}, which is {self.embedding.tensor.spec}",
                        hint="say `tie_word_embeddings: false` there",
                    )
                problem = f"{self.checkpoint.name}: config.json ties {each.name} to {self.embedding.name}"
                hint = "say `tie_word_embeddings: false` there, or leave the head out with `weightops shard --drop`"
                checks.append(
                    LazyTensor.make(Agreed(problem, "incompatible", hint), self.embedding.tensor, each.tensor)
                )
        return checks


def read_donor(source: Checkpoint) -> Body:
    """A model of which the files alone count: whatever its weights are, or without any."""
    return Body(source, source.config(), _files(source), (), 0)


def read_body(source: Checkpoint, evaluate: Evaluate) -> Body:
    """The model in a checkpoint; raises `IncompatibleInputs` or `UsageError` for what has no vocabulary to change."""
    refuse_delta(source, "the source")
    refuse_adapter(source, "the source")
    refuse_parts(source)
    where = escape(source.name)
    if source.documents:
        raise UsageError(f"{where}: a delta has no vocabulary of its own", hint="change the models that it is made of")
    if is_gguf(source):
        raise UsageError(
            f"{where}: is GGUF, which is not edited", hint="weightops convert --to hf makes a folder of it"
        )
    config = source.config()
    if not config:
        raise UsageError(f"{where}: has no config.json, which says how many rows there are", hint="give the folder")
    _refuse_quantised(source, evaluate)
    tensors, rows = _token_tensors(source)
    _hold_config(config, rows, tensors[0].name, where)
    return Body(source, config, _files(source), tensors, rows)


def _files(source: Checkpoint) -> Files:
    names = [CONFIG, *(name for name in source.sidecars if kind_of(name) in _KINDS or is_tokenizer_file(name))]
    return {name: data for name in names if (data := source.sidecar(name)) is not None}


def _refuse_quantised(source: Checkpoint, evaluate: Evaluate) -> None:
    found = find_weights(source, evaluate, shapes_only=True)
    odd = next(iter(found.weights), None)
    if odd is not None:
        raise IncompatibleInputs(
            f"{escape(source.name)}: {escape(odd)} is quantised ({listed(found.schemes, 2)}), and vocabularies are "
            "changed in plain models",
            hint="`weightops dequantize` first, and quantise the result",
        )


def _token_tensors(source: Checkpoint) -> tuple[tuple[TokenTensor, ...], int]:
    """The tensors with an entry for each token, embeddings first, and how many that are."""
    where = escape(source.name)
    found: list[TokenTensor] = []
    for name, tensor in source.items():
        if name.rpartition(".")[2] in DRAFT_MAPS:
            raise IncompatibleInputs(
                f"{where}: {escape(name)} maps tokens of a draft model, and is not edited",
                hint="change the model that it drafts for first, and train it anew",
            )
        held = holds_tokens(name)
        if held is not None and len(tensor.spec.shape) > held[1] and not _is_of_another_tower(name):
            found.append(TokenTensor(name, *held, tensor))
    inputs = [each for each in found if each.holds == "input" and len(each.tensor.spec.shape) == 2]
    if not inputs:
        raise IncompatibleInputs(
            f"{where}: has no input embedding that is known by its name",
            hint="known are model.embed_tokens, transformer.wte and their like; `weightops shard --rename` renames",
        )
    rows = inputs[0].entries
    for each in found:
        spec = each.tensor.spec
        if spec.dtype not in FLOATS:
            hint = "`weightops dequantize` or `weightops cast` makes floats of them"
            raise IncompatibleInputs(
                f"{where}: {escape(each.name)} is {spec}, expected floats of 16 bits or more", hint=hint
            )
        if each.holds != "per layer" and each.entries != rows:
            raise IncompatibleInputs(
                f"{where}: {escape(each.name)} is {spec}, expected {rows} rows as {escape(inputs[0].name)} has",
                hint="one of the two is of another model; `weightops check` says more",
            )
    _refuse_unknown(source, inputs[0], {each.name for each in found})
    return (*inputs, *(each for each in found if each not in inputs)), rows


def _is_of_another_tower(name: str) -> bool:
    matched = OTHER_TOWERS.search(name)
    return matched is not None and not matched[0].startswith("mtp")


def _refuse_unknown(source: Checkpoint, embedding: TokenTensor, known: set[str]) -> None:
    """Refuse a tensor outside the layers that looks like an embedding, and that nobody here knows."""
    for name, tensor in source.items():
        is_like = tensor.spec.shape[:1] == embedding.tensor.spec.shape[:1]
        if not is_like or name in known or NUMBERED.fullmatch(name) or _is_of_another_tower(name):
            continue
        if not any(part in name for part in _NO_ROWS) and tensor.spec.shape in (
            embedding.tensor.spec.shape,
            (embedding.entries,),
        ):
            raise IncompatibleInputs(
                f"{escape(source.name)}: {escape(name)} is {tensor.spec} and may have a row for each token as "
                f"{escape(embedding.name)} has, but it is not known",
                hint="`weightops shard --rename` gives it a name that is, or --drop leaves it out",
            )


def _hold_config(config: Mapping[str, Any], rows: int, name: str, where: str) -> None:
    for way, part in text_parts(config):
        for key in ROW_KEYS:
            if part.get(key) is not None and part[key] != rows:
                raise IncompatibleInputs(
                    f"{where}: config.json says {escape(way)}{key} {escape(str(part[key]))[:40]}, "
                    f"{escape(name)} has {rows} rows",
                    hint="`weightops check` says more; one of the two is of another model",
                )
