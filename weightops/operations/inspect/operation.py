"""Inspect: what a checkpoint holds and what looks wrong with it, from headers alone; on demand from values too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.examine import examine, unread
from weightops.engine.proof import unproven
from weightops.engine.values import values
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError
from weightops.formats.adapter.files import is_gguf_adapter
from weightops.formats.containers import find_aliases
from weightops.formats.delta import is_delta
from weightops.formats.gguf.metadata import ARCHITECTURE_KEY, kind_of, text
from weightops.formats.proofs import manifest
from weightops.formats.quantized.table import Quantized, find_weights
from weightops.io.escape import escape
from weightops.io.names import listed, matching
from weightops.io.source_file import SourceFile
from weightops.operations.dequantize import shapes_of
from weightops.operations.inspect.adapter import AdapterReport, report_adapter
from weightops.operations.inspect.report import Inspection
from weightops.ops.compressed import Compressed
from weightops.stores.store import Store

_SHOWN = 5
"""Parts of an adapter whose problems are warnings; the report has all."""


def inspect(
    checkpoint: Checkpoint,
    place: Store | SourceFile,
    path: str,
    *,
    include: Sequence[str] = (),
    stats: bool = False,
    adapter: Checkpoint | None = None,
    base: Checkpoint | None = None,
    base_path: str | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> Inspection:
    """The inventory of the checkpoint at `place`, which the user called `path`.

    `content_id` and `recipe` are what the folder's manifest says, if it has one. `include`: globs of the tensors to
    look at, default all. With `stats` each of these is read once, by one thread per core unless `workers` says
    otherwise, for its digest and statistics. `adapter` is the same as a LoRA adapter, of which ranks, scales and
    targets are told, and with `stats` the singular values of what it adds; held against `base`, if there is one.

    Raises `UsageError` where no tensor matches, or for a base without an adapter; with `stats` as `examine` does.
    """
    control = control or Control()
    found = None
    if not isinstance(place, SourceFile) and place.has(manifest.NAME):
        found = manifest.parse_manifest(place.get(manifest.NAME), f"{place.shown}/{manifest.NAME}")
    has_other_names = adapter is None and base is not None and is_gguf_adapter(checkpoint)
    if has_other_names and base is not None:
        from weightops.layouts import gguf  # imported here because few adapters are in GGUF

        adapter = gguf.read_adapter(checkpoint, gguf.Base(base.config(), escape(base.name)))
    if adapter is None and base is not None:
        raise UsageError(f"{escape(path)} is no adapter, which a base could be for", hint="leave the base out")
    everything, checkpoint = checkpoint, _included(checkpoint, include)
    said: tuple[str, ...] = unproven(set(checkpoint.values())) if stats else ()
    reports = examine(checkpoint, workers, control, what="reading") if stats else unread(checkpoint)
    report: AdapterReport | None = None
    if adapter is not None:
        try:
            report, notes = report_adapter(
                adapter,
                wanted=set(checkpoint.values()) if include and not has_other_names else None,
                base=base,
                base_path=base_path,
                evaluate=partial(values, control=control) if stats else None,
            )
            said = (*said, *notes, *_some(report.problems))
        except (IncompatibleInputs, CorruptInput, SourceMissing) as error:
            if base is not None:
                raise
            said = (*said, str(error))
    quantised, problems = _quantised(everything, control)
    model_type = everything.config().get("model_type") or text(everything.metadata, ARCHITECTURE_KEY)
    return Inspection(
        path=path,
        kind="LoRA adapter" if report else _kind(everything),
        tensors={name: tensor.spec for name, tensor in checkpoint.items()},
        shards=dict(checkpoint.shards),
        aliases=find_aliases(checkpoint.tensors),
        sidecars=tuple(sorted(checkpoint.sidecars)),
        warnings=(*checkpoint.warnings, *said, *quantised.notes, *problems),
        model_type=model_type if isinstance(model_type, str) else None,
        content_id=found.content_id if found else None,
        recipe=found.recipe if found else {},
        sources=found.sources if found else {},
        reports=reports,
        adapter=report,
        quantised=quantised,
    )


def _quantised(checkpoint: Checkpoint, control: Control) -> tuple[Quantized, tuple[str, ...]]:
    """The quantised weights of a checkpoint, or what is wrong with them."""
    try:
        evaluate = partial(values, control=control)
        return find_weights(checkpoint, evaluate, shape_of=shapes_of(checkpoint), shapes_only=True), ()
    except (IncompatibleInputs, CorruptInput) as error:
        return Quantized(), (str(error),)


def _kind(checkpoint: Checkpoint) -> str:
    """What a checkpoint is; GGUF files may be adapters, parts of models that see, or none at all."""
    if is_delta(checkpoint):
        is_compressed = any(isinstance(tensor.op, Compressed) for tensor in checkpoint.values())
        return f"exact delta{', compressed' if is_compressed else ''}"
    kind = kind_of(checkpoint.metadata)
    return "checkpoint" if kind == "model" else f"GGUF file, {kind}"


def _some(problems: Sequence[str]) -> tuple[str, ...]:
    """Problems, the first of many."""
    more = len(problems) - _SHOWN
    return (*problems[:_SHOWN], *([f"and {more} more parts of the adapter alike"] if more > 0 else []))


def _included(checkpoint: Checkpoint, include: Sequence[str]) -> Checkpoint:
    """The checkpoint with those of its tensors that match one of the globs; with all if there are none."""
    if not include:
        return checkpoint
    wanted = matching(checkpoint, include)
    if not wanted:
        raise UsageError(
            f"{escape(checkpoint.name)}: no tensor matches {' or '.join(map(escape, include))}",
            hint=f"its tensors are {listed(checkpoint, 3)}",
        )
    return replace(
        checkpoint,
        tensors={name: tensor for name, tensor in checkpoint.items() if name in wanted},
        shards={name: file for name, file in checkpoint.shards.items() if name in wanted},
    )
