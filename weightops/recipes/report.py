"""What commands that write print with `--json`, when they are done or of what they would do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from weightops.engine.limits import peak_memory
from weightops.engine.preflight import default_workers
from weightops.engine.proof import fetched_nbytes
from weightops.io.strict_json import as_json
from weightops.ops.measures.loss import Loss
from weightops.recipes.execute import Result


class FileDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A weight file of the output."""

    name: str
    nbytes: int


class WriteDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-write/2"):
    """What a command that writes a checkpoint prints with `--json`.

    `written` is false after a dry run, and if the output was there already and was left alone: then `skipped` is true.
    `nbytes` are those of the weight files, and after a dry run the most that compressed ones can have;
    `fetched_nbytes` what comes over the network, `peak_memory_nbytes` the most memory that the run needs. Equal
    fingerprints are of plans that write equal files. `resumed` are the files that an earlier run had finished.
    `losses` tells of every tensor that was cast what that cost, `notes` what else there is to say of tensors in
    numbers. `content_id` is that of the manifest, null before anything is written. `done` says in sentences what
    operations do to make the result. `job` is where the job lies that makes it, of so many `groups`.
    """

    out: str
    written: bool
    skipped: bool
    fingerprint: str
    nbytes: int
    fetched_nbytes: int
    peak_memory_nbytes: int
    files: tuple[FileDocument, ...]
    resumed: tuple[str, ...]
    losses: dict[str, Loss]
    notes: dict[str, dict[str, float]]
    content_id: str | None
    warnings: tuple[str, ...]
    done: tuple[str, ...]
    job: str | None
    groups: int | None


class RunDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-run/2"):
    """What `run --json` prints: of each output what a command that writes it alone would, and the job of all."""

    outputs: tuple[WriteDocument, ...]
    job: str | None
    groups: int | None


def write_document(result: Result, workers: int | None) -> WriteDocument:
    """The document on one output that `workers` threads have written, or would write."""
    plan, made = result.plan, result.manifest
    return WriteDocument(
        out=str(result.out),
        written=made is not None and not result.skipped,
        skipped=result.skipped,
        fingerprint=plan.fingerprint,
        nbytes=result.nbytes,
        fetched_nbytes=fetched_nbytes(plan),
        peak_memory_nbytes=peak_memory([plan], workers or default_workers([plan])),
        files=tuple(FileDocument(name=name, nbytes=nbytes) for name, nbytes in result.file_nbytes.items()),
        resumed=result.resumed,
        losses=dict(made.losses) if made else {},
        notes={name: dict(note) for name, note in made.notes.items()} if made else {},
        content_id=made.content_id if made else None,
        warnings=result.warnings,
        done=result.done,
        job=result.job,
        groups=result.groups,
    )


def write_json(result: Result, workers: int | None) -> dict[str, Any]:
    """`write_document` as JSON has it."""
    return as_json(write_document(result, workers))


def run_json(results: Iterable[Result], workers: int | None) -> dict[str, Any]:
    """A document of schema `weightops-run/2`."""
    documents = tuple(write_document(result, workers) for result in results)
    first = next(iter(documents), None)
    job, groups = (first.job, first.groups) if first is not None else (None, None)
    return as_json(RunDocument(outputs=documents, job=job, groups=groups))
