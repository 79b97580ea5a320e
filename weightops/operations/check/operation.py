"""Check: what is wrong with a checkpoint, from one pass over its tensors, its headers and the files beside them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.examine import TensorReport, examine, unread
from weightops.engine.values import values as values_of
from weightops.errors import CorruptInput, UsageError
from weightops.formats.adapter.files import is_adapter
from weightops.formats.delta import is_delta
from weightops.formats.quantized.table import Quantized
from weightops.formats.quantized.weights import without_quantization
from weightops.io.escape import escape
from weightops.layouts.embeddings import embedding_and_head, vocabulary_rows
from weightops.layouts.source import beside
from weightops.lazy import Evaluate
from weightops.operations.check import gptq as check_gptq
from weightops.operations.check import values as check_values
from weightops.operations.check.architecture import Held, architecture_findings, held_against
from weightops.operations.check.config import config_findings, dtype_findings, rope_findings, tie_findings
from weightops.operations.check.files import file_findings, leftover_findings, opening_findings, token_findings
from weightops.operations.check.quantized import Understood, quantised_findings, understand
from weightops.operations.check.report import CODES, SEVERITIES, CheckReport, Finding


def check(
    checkpoint: Checkpoint,
    *,
    values: bool = True,
    max_abs: float | None = None,
    ignore: Sequence[str] = (),
    architecture: bool = True,
    cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> CheckReport:
    """Everything that looks wrong with a checkpoint, and the statistics of each of its tensors.

    With `values` every tensor is read once, by one thread per core unless `workers` says otherwise; without, headers
    and the files beside them are all that is looked at. Magnitudes above `max_abs` are findings. Those of the codes in
    `ignore` are left out. Names, shapes and ties are held against transformers' class for config.json, unless
    `architecture` is False; importing that takes seconds, which `cache`, a folder for what it says, saves next time.
    Raises `UsageError` for unknown codes or a `max_abs` that is no bound, `CorruptInput` for tensors that cannot be
    read, `Differs` for files on servers or in a cache whose digest is wrong; whatever else is wrong is in the report.
    """
    unknown = sorted(set(ignore) - CODES.keys())
    if unknown:
        raise UsageError(f"unknown code {escape(unknown[0])!r} to ignore", hint=f"known are {', '.join(CODES)}")
    if max_abs is not None and not 0 < max_abs < math.inf:
        raise UsageError(f"max_abs is {max_abs}, expected a number above zero")
    if max_abs is not None and not values:
        raise UsageError("max_abs is a bound on values, which are not read", hint="leave out --no-values")
    control = control or Control()
    tensors = examine(checkpoint, workers, control) if values else unread(checkpoint)
    evaluate = partial(values_of, control=control)
    subject = _Subject.of(checkpoint, None if cache is None else Path(cache), evaluate, architecture=architecture)
    findings = list(_findings(subject, tensors, max_abs, evaluate if values else None))
    kept = [finding for finding in findings if finding.code not in ignore]
    return CheckReport(
        name=checkpoint.name,
        findings=tuple(sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity))),
        tensors=tensors,
        examined=values,
        nbytes=checkpoint.nbytes,
        ignored=tuple(ignore),
        ignored_count=len(findings) - len(kept),
        held_against=subject.held.by,
        not_held=subject.held.reason,
    )


@dataclass(frozen=True)
class _Subject:
    """A checkpoint with its config, as the model that it stands for, and what this is held against."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    understood: Understood
    """With the weights of a model that is quantised in a way that is understood."""
    plain_config: dict[str, Any]
    held: Held
    errors: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, cache: Path | None, evaluate: Evaluate, *, architecture: bool) -> _Subject:
        errors: tuple[Finding, ...] = ()
        config: dict[str, Any] = {}
        try:
            config = checkpoint.config()
        except CorruptInput as error:
            errors = (Finding("error", "config", "config.json", str(error), error.hint or ""),)
        if is_delta(checkpoint) or is_adapter(checkpoint):
            kind = "an exact delta" if is_delta(checkpoint) else "an adapter"
            return cls(
                checkpoint,
                config,
                Understood(checkpoint, Quantized()),
                config,
                Held(reason=f"it is {kind}, no model"),
                errors,
            )
        understood = Understood(checkpoint, Quantized()) if errors else understand(checkpoint, evaluate)
        own = without_quantization(config) if understood.found else config
        held = held_against(understood.checkpoint, own, cache, wanted=architecture)
        return cls(checkpoint, config, understood, own, held, errors)

    @property
    def plain(self) -> Checkpoint:
        """The model that the checkpoint stands for, by names and shapes."""
        return self.understood.checkpoint

    @property
    def is_model(self) -> bool:
        return not is_delta(self.checkpoint) and not is_adapter(self.checkpoint)


def _findings(
    subject: _Subject, tensors: dict[str, TensorReport], max_abs: float | None, evaluate: Evaluate | None
) -> Iterator[Finding]:
    checkpoint, config = subject.checkpoint, subject.config
    yield from opening_findings(checkpoint)
    if checkpoint.folder is not None:
        yield from file_findings(checkpoint.folder.names())
    yield from subject.errors
    if not checkpoint:
        text = f"{escape(checkpoint.name)} holds no tensor"
        yield Finding("error", "missing", checkpoint.name, text, "was it saved before it was filled?")
    yield from leftover_findings(checkpoint, config)
    yield from check_values.empty_findings(checkpoint)
    yield from check_values.unexamined_findings(checkpoint)
    if not subject.is_model:
        text = f"{escape(checkpoint.name)}: {subject.held.reason}: its shapes are held against nothing"
        yield Finding("note", "unchecked", "config.json", text)
    else:
        of_gptq = list(check_gptq.gptq_findings(checkpoint, tensors, evaluate))
        yield from of_gptq
        yield from quantised_findings(subject.understood, tensors, is_told=bool(of_gptq))
        yield from rope_findings(config)
        yield from _held_findings(subject, tensors)
        yield from token_findings(checkpoint, config, beside(checkpoint, None), vocabulary_rows(checkpoint))
        yield from tie_findings(subject.plain, config, tensors, missing=subject.held.architecture is None)
    for name, report in tensors.items():
        if report.statistics is not None:
            yield from check_values.value_findings(name, report.spec, report.statistics, max_abs)
    yield from check_values.manifest_findings(checkpoint, tensors)
    yield from check_values.shared_findings(checkpoint)
    pair = frozenset(name for name in embedding_and_head(checkpoint) if name)
    yield from check_values.duplicate_findings(checkpoint, tensors, [pair])


def _held_findings(subject: _Subject, tensors: dict[str, TensorReport]) -> Iterator[Finding]:
    """Names, shapes and dtypes, against an architecture where there is one and else by what tables say."""
    plain, config, held = subject.plain, subject.plain_config, subject.held
    if held.architecture is not None:
        zeros = check_gptq.biases_of_zeros(subject.checkpoint, tensors)
        yield from dtype_findings(plain, config)
        was_quantised = bool(subject.understood.found)
        yield from architecture_findings(plain, config, held.architecture, zeros, was_quantised=was_quantised)
        return
    found = list(config_findings(plain, config))
    yield from found
    if held.is_beyond_files and not any((f.severity, f.code) == ("error", "config-layers") for f in found):
        hint = "are config.json and the weights of one model?"
        yield Finding("error", "config-layers", "config.json", held.reason, hint)
