"""Check: what is wrong with a checkpoint, from one pass over its tensors, its headers and the files beside them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.digest import watch_all
from weightops.engine.values import values as values_of
from weightops.errors import CorruptInput, UsageError
from weightops.formats.adapter_files import is_adapter
from weightops.formats.delta import NAME as DELTA_NAME
from weightops.io.escape import escape
from weightops.layouts.source import beside
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations import check_gptq, check_values
from weightops.operations.check_config import config_findings, embedding_and_head, tie_findings, vocabulary_rows
from weightops.operations.check_files import file_findings, leftover_findings, opening_findings, token_findings
from weightops.operations.check_report import CODES, SEVERITIES, CheckReport, Finding, TensorReport
from weightops.ops.statistics import TensorStatistics, has_statistics, statistics
from weightops.ops.witness import witness


def check(
    checkpoint: Checkpoint,
    *,
    values: bool = True,
    max_abs: float | None = None,
    ignore: Sequence[str] = (),
    workers: int | None = None,
    control: Control | None = None,
) -> CheckReport:
    """Everything that looks wrong with a checkpoint, and the statistics of each of its tensors.

    With `values` every tensor is read once, by one thread per core unless `workers` says otherwise; without, headers
    and the files beside them are all that is looked at. Magnitudes above `max_abs` are findings. Those of the codes in
    `ignore` are left out.
    Raises `UsageError` for unknown codes or a `max_abs` that is no bound, `CorruptInput` for tensors that cannot be
    read; whatever else is wrong with the checkpoint is part of the report.
    """
    unknown = sorted(set(ignore) - CODES.keys())
    if unknown:
        raise UsageError(f"unknown code {escape(unknown[0])!r} to ignore", hint=f"known are {', '.join(CODES)}")
    if max_abs is not None and not 0 < max_abs < math.inf:
        raise UsageError(f"max_abs is {max_abs}, expected a number above zero")
    if max_abs is not None and not values:
        raise UsageError("max_abs is a bound on values, which are not read", hint="leave out --no-values")
    control = control or Control()
    tensors = _examine(checkpoint, workers, control) if values else _unread(checkpoint)
    evaluate = partial(values_of, control=control) if values else None
    findings = list(_findings(checkpoint, tensors, max_abs, evaluate))
    kept = [finding for finding in findings if finding.code not in ignore]
    return CheckReport(
        name=checkpoint.name,
        findings=tuple(sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity))),
        tensors=tensors,
        examined=values,
        nbytes=checkpoint.nbytes,
        ignored=tuple(ignore),
        ignored_count=len(findings) - len(kept),
    )


def _unread(checkpoint: Checkpoint) -> dict[str, TensorReport]:
    return {name: TensorReport(tensor.spec, checkpoint.shards.get(name)) for name, tensor in checkpoint.items()}


def _examine(checkpoint: Checkpoint, workers: int | None, control: Control) -> dict[str, TensorReport]:
    """Digest and statistics of every tensor; names that stand for one tensor share what is said of it."""
    labels: dict[LazyTensor, str] = {}
    for name, tensor in checkpoint.items():
        labels.setdefault(tensor, name)
    watched = [
        witness(
            statistics(tensor, name, rows=check_values.has_rows_of_tokens(name))
            if has_statistics(tensor.spec.dtype)
            else tensor,
            name,
        )
        for tensor, name in labels.items()
    ]
    remote = any(node.op.source is not None and node.op.source.is_remote for t in labels for node in t.walk())
    found = watch_all("checking", watched, workers or (1 if remote else os.cpu_count() or 1), control)
    reports = {
        tensor: TensorReport(
            tensor.spec,
            checkpoint.shards.get(name),
            found.witnesses[name],
            TensorStatistics.from_note(found.notes[name]) if name in found.notes else None,
        )
        for tensor, name in labels.items()
    }
    return {name: reports[tensor] for name, tensor in checkpoint.items()}


def _findings(
    checkpoint: Checkpoint, tensors: dict[str, TensorReport], max_abs: float | None, evaluate: Evaluate | None
) -> Iterator[Finding]:
    yield from opening_findings(checkpoint)
    if checkpoint.folder is not None:
        yield from file_findings(checkpoint.folder.names())
    config: dict[str, Any] = {}
    try:
        config = checkpoint.config()
    except CorruptInput as error:
        yield Finding("error", "config", "config.json", str(error), error.hint or "")
    yield from leftover_findings(checkpoint, config)
    yield from check_values.empty_findings(checkpoint)
    yield from check_values.unexamined_findings(checkpoint)
    if DELTA_NAME in checkpoint.sidecars or is_adapter(checkpoint):
        kind = "an exact delta" if DELTA_NAME in checkpoint.sidecars else "an adapter"
        text = f"{escape(checkpoint.name)} is {kind}, no model: its shapes are held against nothing"
        yield Finding("note", "unchecked", "config.json", text)
    else:
        yield from check_gptq.gptq_findings(checkpoint, tensors, evaluate)
        yield from _held_against_config(checkpoint, config)
        yield from token_findings(checkpoint, config, beside(checkpoint, None), vocabulary_rows(checkpoint))
        yield from tie_findings(checkpoint, config, tensors)
    for name, report in tensors.items():
        if report.statistics is not None:
            yield from check_values.value_findings(name, report.spec, report.statistics, max_abs)
    yield from check_values.manifest_findings(checkpoint, tensors)
    yield from check_values.shared_findings(checkpoint)
    pair = frozenset(name for name in embedding_and_head(checkpoint) if name)
    yield from check_values.duplicate_findings(checkpoint, tensors, [pair])


def _held_against_config(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[Finding]:
    """Names, shapes and dtypes; those of the plain model, if it is quantised in a way that is understood."""
    plain = check_gptq.as_plain(checkpoint)
    if plain is not checkpoint:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    yield from config_findings(plain, config)
