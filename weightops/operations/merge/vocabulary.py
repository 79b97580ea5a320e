"""Rows of embeddings in the order of one tokenizer, where a merge file asks for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightops.checkpoint import Checkpoint, Sidecar
from weightops.errors import UsageError
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.merge.stage import Stage


@dataclass(frozen=True)
class Vocabulary:
    """What replaces tensors of the models and files of the result.

    `tensors`: by model and name, embeddings and heads with one row per token of the result. `sidecars`: the files of
    its tokenizer and its template, instead of those of the donor.
    """

    tensors: Mapping[str, Mapping[str, LazyTensor]]
    sidecars: Mapping[str, Sidecar]
    notes: tuple[str, ...] = field(default=())


def aligned(stage: Stage, models: Mapping[str, Checkpoint], evaluate: Evaluate) -> Vocabulary | None:
    """The vocabulary that a stage asks for, from its models in the type in which they are merged; None if for none.

    Raises `UsageError`.
    """
    if stage.tokenizer is None and stage.chat_template is None:
        return None
    raise UsageError("tokenizer, tokenizer_source and chat_template are not supported", hint="leave them out")
