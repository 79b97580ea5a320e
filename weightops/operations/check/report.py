"""What check found, as a value and as JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import msgspec

from weightops.engine.examine import TensorDocument, TensorReport
from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.strict_json import as_json

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

CODES: Mapping[str, str] = {
    "nan": "a tensor holds NaN",
    "infinite": "a tensor holds infinities",
    "range": "a magnitude is above --max-abs",
    "zero": "a tensor is all zero",
    "constant": "all elements of a tensor are equal",
    "empty": "a tensor has no elements",
    "fp16-range": "a magnitude would overflow float16",
    "subnormal": "a tensor has many subnormal numbers",
    "zero-rows": "an embedding has rows that are all zero",
    "not-examined": "the values of some tensors are not looked at",
    "manifest": "a tensor is not the one that the manifest beside it lists",
    "duplicate": "tensors hold the same",
    "shared": "tensors are the same bytes of a file",
    "tie": "input and output embedding, and what config.json says of them",
    "config": "config.json is missing, or cannot be understood",
    "config-shape": "a shape is not what config.json says",
    "config-layers": "the number of layers is not what config.json says",
    "config-dtype": "the dtype is not what config.json says",
    "mixed-dtype": "weights have several dtypes",
    "layers": "layers differ in their tensors, or one is missing",
    "missing": "a tensor of the model is missing",
    "unexpected": "a tensor is no part of the model",
    "unchecked": "names and shapes are held against nothing but one another",
    "token-id": "a special token has an id without a row in the embedding",
    "tokenizer": "the tokenizer has more tokens than the embedding has rows, or cannot be read",
    "padding": "the embedding has more rows than the tokenizer has tokens",
    "leftover": "a tensor is left over from training, wrapping or quantising",
    "quantization": "a module quantised by GPTQ is damaged, or not what the config says",
    "zero-convention": "zero points are stored in another way than the config says, or one that readers differ in",
    "lora": "tensors of a LoRA lie among those of a model",
    "index": "the index is wrong about the files",
    "file": "a file is not part of the checkpoint, or not what it should be",
}
"""Every code that a finding may have; part of the interface."""


class CheckOptions(TypedDict, total=False):
    """What there is to choose for a check; see `weightops.operations.check`."""

    values: bool
    max_abs: float | None
    ignore: Sequence[str]
    architecture: bool
    cache: str | os.PathLike[str] | None
    workers: int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or worth knowing: of which tensor or file, in a sentence, and what to do about it.

    An error is a model that does not load or does not work, a warning is probably a mistake, a note is neither.
    Names in `message` are safe for a terminal; `subject` is as in the checkpoint.
    """

    severity: Severity
    code: str
    subject: str
    message: str
    hint: str = ""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The architecture that names, shapes and ties were held against, or why there was none."""

    held_against: str | None
    not_held: str | None


class Ignored(msgspec.Struct, frozen=True, kw_only=True):
    """The codes that were to be left out, and how many findings that were."""

    codes: tuple[str, ...]
    findings: int


class CheckDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-check/1"):
    """What `check --json` prints: a `CheckReport`, with all findings and every tensor by name."""

    checkpoint: str
    verdict: bool
    counts: dict[Severity, int]
    examined: bool
    nbytes: int
    architecture: Held
    ignored: Ignored
    findings: tuple[Finding, ...]
    tensors: dict[str, TensorDocument]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The outcome of one check: findings, gravest first, and every tensor in state-dict order.

    `examined` says whether values were read; `nbytes` are those of all tensors. Findings of `ignored` codes are
    counted in `ignored_count`, and left out. `held_against` is the architecture that names, shapes and ties were held
    against; where there is none `not_held` says why.
    """

    name: str
    findings: tuple[Finding, ...]
    tensors: Mapping[str, TensorReport]
    examined: bool
    nbytes: int
    ignored: tuple[str, ...] = ()
    ignored_count: int = 0
    held_against: str | None = None
    not_held: str = ""

    __repr__ = brief

    def _repr_html_(self) -> str:
        counts = {f"{severity}s": number for severity, number in self.counts.items()}
        facts = {"tensors": len(self.tensors), "size": in_units(self.nbytes), **counts}
        rows = [(f.severity, f.code, f.message, f.hint or "") for f in self.findings]
        title = f"{self.name}: {'nothing wrong' if self.verdict else 'look at this'}"
        return card(title, facts, ("severity", "code", "what was found", "hint"), rows, what="findings")

    @property
    def verdict(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def counts(self) -> dict[Severity, int]:
        """The number of findings of each severity."""
        counted = Counter(finding.severity for finding in self.findings)
        return {severity: counted[severity] for severity in SEVERITIES}

    def to_json(self) -> dict[str, Any]:
        """A document of schema `weightops-check/1`."""
        document = CheckDocument(
            checkpoint=self.name,
            verdict=self.verdict,
            counts=self.counts,
            examined=self.examined,
            nbytes=self.nbytes,
            architecture=Held(held_against=self.held_against, not_held=self.not_held or None),
            ignored=Ignored(codes=self.ignored, findings=self.ignored_count),
            findings=self.findings,
            tensors={name: tensor.document for name, tensor in self.tensors.items()},
        )
        return as_json(document)
