"""Rows of embeddings in the order of one tokenizer, where a merge file asks for that.

Each model gets matrices with a row for every token of the result: its own row where it has the token, else a default
row, the same for all models that lack it. Then they are merged as any tensors. The rules are mergekit 0.1.5's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar, Written
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.sidecars import is_tokenizer_file
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.embeddings import has_rows_of_tokens, vocabulary_rows
from weightops.layouts.source import Source as Beside
from weightops.layouts.source import beside
from weightops.layouts.tokenizers.files import GENERATION, OLD_TEMPLATE, TEMPLATE, TOKENIZER_CONFIG, TokenizerFiles
from weightops.layouts.tokenizers.union import (
    LEFT,
    TokenizerDocument,
    new_token,
    tokenizer_document,
    tokenizer_files,
    union,
)
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.merge.chat_templates import chosen_template
from weightops.operations.merge.stage import Stage, TokenizerChoice, TokenRule
from weightops.ops.elementwise import cast
from weightops.ops.gather import ZEROS, Gather, MeanOfRows
from weightops.ops.rows import extend_by_mean
from weightops.spec import DType, promoted

_TEMPLATES = (TEMPLATE, OLD_TEMPLATE)
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """What replaces tensors of the models and files of the result.

    `tensors`: by model and name, embeddings and heads with one row per token of the result. `sidecars`: the files of
    its tokenizer and its template, instead of those of the donor. `settings` are those of config.json that name tokens.
    """

    tensors: Mapping[str, Mapping[str, LazyTensor]]
    sidecars: Mapping[str, Sidecar]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class _Owner:
    """A model with its tokenizer; `ids` are of tokens that it has rows for."""

    name: str
    checkpoint: Checkpoint
    files: TokenizerFiles
    tokenizer: TokenizerDocument
    rows: int

    @property
    def ids(self) -> Mapping[str, int]:
        return self.tokenizer.ids

    def row(self, token: str) -> int | None:
        """The row of a token, None where the model has none."""
        number = self.ids.get(token)
        return number if number is not None and number < self.rows else None


def aligned(stage: Stage, models: Mapping[str, Checkpoint], evaluate: Evaluate) -> Vocabulary | None:
    """The vocabulary that a stage asks for, from its models in the type in which they are merged; None if for none.

    Raises `UsageError` for rules that cannot be followed, `IncompatibleInputs` for tokenizers that cannot be read.
    """
    if stage.tokenizer is None and stage.chat_template is None:
        return None
    donor = stage.donor.model
    files = {name: _files(name, checkpoint) for name, checkpoint in models.items()}
    if stage.tokenizer is None:
        sidecars = {name: s for name, s in models[donor].sidecars.items() if is_tokenizer_file(name)}
        return Vocabulary({}, _with_template(stage, sidecars, files, donor))
    owners, notes = _owners(models, files, donor)
    source, made = _tokenizer(stage, stage.tokenizer, owners, donor)
    is_unchanged = made is owners[source].tokenizer
    own = {name: s for name, s in models[source].sidecars.items() if is_tokenizer_file(name)}
    if not is_unchanged:
        own = {name: sidecar for name, sidecar in own.items() if name not in LEFT}
        own |= {name: Written(data) for name, data in tokenizer_files(made, files[source]).items()}
    if source != donor and GENERATION in models[source].sidecars:
        own[GENERATION] = models[source].sidecars[GENERATION]
    config = models[source].config()
    return Vocabulary(
        _Rows(stage, stage.tokenizer, owners, made).tensors(),
        _with_template(stage, own, files, source),
        {key: config[key] for key in _ENDS if source != donor and key in config},
        tuple(notes),
    )


def _files(name: str, checkpoint: Checkpoint) -> TokenizerFiles:
    source = Beside(checkpoint, beside(checkpoint, None), lambda _: b"")
    return TokenizerFiles(source.tokenizer_files(layout="hf").files, escape(name))


def _owners(
    models: Mapping[str, Checkpoint], files: Mapping[str, TokenizerFiles], donor: str
) -> tuple[dict[str, _Owner], list[str]]:
    found: dict[str, _Owner] = {}
    notes: list[str] = []
    for name in (donor, *(name for name in models if name != donor)):
        rows = models[name].config().get("vocab_size") or vocabulary_rows(models[name])
        if not isinstance(rows, int):
            raise IncompatibleInputs(f"{escape(name)}: has no embedding, whose rows could be put in order")
        tokenizer = tokenizer_document(files[name])
        if tokenizer is None and name == donor:
            raise IncompatibleInputs(
                f"{escape(name)}: has no tokenizer, and the merge file asks for its tokens", hint="put its files there"
            )
        if tokenizer is None:
            notes.append(f"{escape(name)}: has no tokenizer, and is taken to have that of {escape(donor)}")
            tokenizer = found[donor].tokenizer
        found[name] = _Owner(name, models[name], files[name], tokenizer, rows)
        beyond = [token for token, number in tokenizer.ids.items() if number >= rows]
        if beyond:
            shown = ", ".join(map(escape, beyond[:_SHOWN]))
            is_one = len(beyond) == 1
            what = "a token without a row, which does" if is_one else f"{len(beyond)} tokens without rows, which do"
            notes.append(f"{escape(name)}: has {what} not count: {shown}")
    return found, notes


def _tokenizer(
    stage: Stage, choice: TokenizerChoice, owners: Mapping[str, _Owner], donor: str
) -> tuple[str, TokenizerDocument]:
    """Whose settings the result's tokenizer has, and what it is."""
    base = owners[donor]
    name = donor
    if choice.source == "union":
        others = [(owner.tokenizer, owner.rows) for other, owner in owners.items() if other != donor]
        kept = base.tokenizer.below(base.rows)
        made = union(kept, others) if any(o.ids.keys() - kept.ids.keys() for o, _ in others) else kept
    elif choice.source == "base":
        made = base.tokenizer.below(base.rows)
    else:
        name = choice.source.model
        made = owners[name].tokenizer
    return name, made.with_tokens(new_token(text) for text in choice.tokens if text not in made.ids)


def _with_template(
    stage: Stage, sidecars: Mapping[str, Sidecar], files: Mapping[str, TokenizerFiles], source: str
) -> dict[str, Sidecar]:
    if stage.chat_template is None:
        return dict(sidecars)
    names = list(dict.fromkeys(model.model for model in stage.references))
    own = [template for name in names if (template := _template(files[name])) is not None]
    template = chosen_template(stage.document, stage.chat_template, own)
    kept = {name: sidecar for name, sidecar in sidecars.items() if name not in _TEMPLATES}
    config = files[source].document(TOKENIZER_CONFIG)
    written = kept.get(TOKENIZER_CONFIG)
    if isinstance(written, Written):
        config = strict_json.load_object(written.data, TOKENIZER_CONFIG)
    if "chat_template" in config:
        edited = {key: value for key, value in config.items() if key != "chat_template"}
        kept[TOKENIZER_CONFIG] = Written(strict_json.dumps(edited))
    return {**kept, TEMPLATE: Written(template.encode())}


def _template(files: TokenizerFiles) -> str | None:
    """A model's own template, the default one of several."""
    if TEMPLATE in files:
        return files.files[TEMPLATE].decode("utf-8", "replace")
    found = files.document(TOKENIZER_CONFIG).get("chat_template") or files.document(OLD_TEMPLATE).get("chat_template")
    if isinstance(found, list):
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    return found if isinstance(found, str) else None


class _Rows:
    """Matrices with a row for every token of `made`, for each model that a tensor is merged of."""

    def __init__(
        self, stage: Stage, choice: TokenizerChoice, owners: Mapping[str, _Owner], made: TokenizerDocument
    ) -> None:
        self._stage, self._rules, self._owners = stage, choice.tokens, owners
        self._tokens = [""] * (max(made.ids.values(), default=-1) + 1)
        for token, number in made.ids.items():
            self._tokens[number] = token
        self._has = [False] * len(self._tokens)
        for number in made.ids.values():
            self._has[number] = True
        multiple = choice.pad_to_multiple_of or 1
        self._n_rows = -(-len(self._tokens) // multiple) * multiple
        self._base = stage.base.model if stage.base is not None else None

    def tensors(self) -> dict[str, dict[str, LazyTensor]]:
        """By model and name."""
        found: dict[str, dict[str, LazyTensor]] = {name: {} for name in self._owners}
        names = {n: None for owner in self._owners.values() for n in owner.checkpoint if has_rows_of_tokens(n)}
        for tensor in names:
            models = self._merged(tensor)
            there = [name for name in self._owners if tensor in self._owners[name].checkpoint]
            dtype = _promoted([self._owners[name].checkpoint[tensor].spec.dtype for name in there])
            matrices = {name: cast(self._owners[name].checkpoint[tensor], dtype) for name in there}
            for name, matrix in self._matrices([m for m in models if m in matrices], matrices).items():
                found[name][tensor] = matrix
        return found

    def _merged(self, tensor: str) -> list[str]:
        """The models that a tensor is merged of: those of the first slice, of a head those of the last."""
        modules = [m for m in self._stage.modules if tensor.startswith(f"{m.name}.")] or list(self._stage.modules)
        piece = modules[0].slices[-1 if "head" in tensor or "embed_out" in tensor else 0]
        return list(dict.fromkeys(source.model.model for source in piece.sources))

    def _matrices(self, models: Sequence[str], matrices: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        order = list(matrices)
        defaults, means = self._defaults(models, order)
        inputs = [matrices[name] for name in order]
        if means:
            inputs.append(_mean_rows(means, inputs))
        found = {}
        for name in models:
            own, places = order.index(name), []
            for number, token in enumerate(self._tokens):
                row = self._owners[name].row(token) if self._has[number] and number not in self._forced else None
                places.append((own, row) if row is not None else defaults.get(number, (ZEROS, 0)))
            found[name] = self._gathered(places, own, inputs)
        return found

    @cached_property
    def _forced(self) -> set[int]:
        return {i for i, t in enumerate(self._tokens) if self._has[i] and self._rules.get(t, _NO_RULE).force}

    def _gathered(self, places: Sequence[tuple[int, int]], own: int, inputs: Sequence[LazyTensor]) -> LazyTensor:
        matrix = inputs[own]
        if list(places) != [(own, row) for row in range(matrix.spec.shape[0])]:
            used = list(dict.fromkeys(source for source, _ in places if source != ZEROS)) or [own]
            renamed = {source: i for i, source in enumerate(used)} | {ZEROS: ZEROS}
            data = _pairs((renamed[source], row) for source, row in places)
            matrix = LazyTensor.make(Gather(data), *(inputs[source] for source in used))
        return matrix if self._n_rows == len(places) else extend_by_mean(matrix, self._n_rows)

    def _defaults(
        self, models: Sequence[str], order: Sequence[str]
    ) -> tuple[dict[int, tuple[int, int]], list[list[tuple[int, int]]]]:
        """By token: from which matrix and row it comes where a model lacks it; and the rows that means are made of."""
        found: dict[int, tuple[int, int]] = {}
        means: list[list[tuple[int, int]]] = []
        for number, token in enumerate(self._tokens):
            if not self._has[number]:
                continue
            rule = self._rules.get(token, _NO_RULE)
            rows = {name: row for name in models if (row := self._owners[name].row(token)) is not None}
            if len(rows) == len(models) and not rule.force:
                continue
            if rule.kind == "zero" or (rule.kind == "default" and not rows):
                found[number] = (ZEROS, 0)
            elif rule.kind == "model":
                assert rule.model is not None
                found[number] = self._ruled(token, rule, order)
            elif len(rows) == 1 or self._base in rows:
                name = next(iter(rows)) if len(rows) == 1 else str(self._base)
                found[number] = (order.index(name), rows[name])
            else:
                found[number] = (len(order), len(means))
                means.append([(order.index(name), row) for name, row in rows.items()])
        return found, means

    def _ruled(self, token: str, rule: TokenRule, order: Sequence[str]) -> tuple[int, int]:
        assert rule.model is not None
        name, place = rule.model.model, ("tokenizer", "tokens", token, "source")
        owner = self._owners[name]
        if name not in order:
            self._stage.document.fail(place, f"{escape(name)} has no such tensor to take a row of")
        row = rule.token if isinstance(rule.token, int) else owner.row(rule.token if rule.token is not None else token)
        if row is None or row >= owner.rows:
            what = f"the row {row}" if isinstance(rule.token, int) else f"the token {escape(rule.token or token)}"
            self._stage.document.fail(place, f"{escape(name)} has not {what}", hint=f"it has {owner.rows} rows")
        return order.index(name), row


_NO_RULE = TokenRule("default")


def _mean_rows(means: Sequence[Sequence[tuple[int, int]]], inputs: Sequence[LazyTensor]) -> LazyTensor:
    import numpy as np

    counts = np.array([len(rows) for rows in means], "<i4").tobytes()
    return LazyTensor.make(MeanOfRows(_pairs(place for rows in means for place in rows), counts), *inputs)


def _pairs(places: Iterable[tuple[int, int]]) -> bytes:
    import numpy as np

    return np.array(list(places), "<i4").tobytes()


def _promoted(dtypes: Sequence[DType]) -> DType:
    """The type that holds the values of all; raises `UsageError` where there is none."""
    found = promoted(dtypes)
    if found is None:
        raise UsageError(
            f"embeddings of {', '.join(sorted(d.value for d in set(dtypes)))} are not mixed", hint="dtype: bfloat16"
        )
    return found
