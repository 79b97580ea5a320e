"""The Python API: one function per command, over the same objects, plus the pieces they are made of.

    import weightops
    weightops.recover("./llama-13b", "./zhixi-diff", "./zhixi", format="torch-1.12", max_shard_size="10GB")

Commands that write take the keywords of `Output`; they raise `weightops.errors` and print nothing. Each imports its
operation when it is called, because starting takes longer than many of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.digest import digest_tensors
from weightops.engine.run import run
from weightops.errors import NoWeights, SourceMissing, UsageError, WeightopsError
from weightops.formats import checksums
from weightops.formats import manifest as manifest_format
from weightops.formats.folder import open_checkpoint
from weightops.formats.manifest import Manifest
from weightops.io.escape import escape
from weightops.manifests import find_manifest
from weightops.plan import DEFAULT_SHARD_NBYTES, Expectation, Plan, make_plan, parse_size
from weightops.spec import DType

if TYPE_CHECKING:
    from weightops.operations.inspect import Inspection
    from weightops.operations.verify_report import VerifyReport

StrPath = str | os.PathLike[str]


class Output(TypedDict, total=False):
    """How to write a result.

    `format`: safetensors, torch (byte-identical to torch.save) or torch-1.12 (to that of 2022 and 2023).
    `max_shard_size`: bytes, `"5GB"`, or `"source"` for the grouping of the source's files.
    `expect`: a manifest, checksum list or published name that the result must match to be published.
    `digests`: more algorithms to record per file than xxh3_128.
    `workers`: shards in work at once. `overwrite`: replace an existing output once the new one is whole.
    `restart`: throw a partial output of another plan away. `dry_run`: plan only. `control`: progress and stop.
    """

    format: str
    max_shard_size: str | int
    expect: StrPath | None
    digests: Sequence[str]
    workers: int | None
    overwrite: bool
    restart: bool
    dry_run: bool
    control: Control | None


@dataclass(frozen=True)
class Result:
    """What was written, or with `dry_run` would be: then `manifest` is None."""

    out: Path
    plan: Plan
    manifest: Manifest | None
    resumed: tuple[str, ...]
    warnings: tuple[str, ...]


def save(
    checkpoint: Checkpoint, out: StrPath, recipe: Mapping[str, Any] | None = None, **output: Unpack[Output]
) -> Result:
    """Write any checkpoint, opened or derived, to a folder, with index, sidecars and manifest."""
    size = output.get("max_shard_size", DEFAULT_SHARD_NBYTES)
    expect = output.get("expect")
    plan = make_plan(
        checkpoint,
        recipe or {"operation": "save", "sources": {"checkpoint": checkpoint.name}},
        container=output.get("format", "safetensors"),
        max_shard_nbytes=None if size == "source" else size if isinstance(size, int) else parse_size(size),
        digests=tuple(output.get("digests", ())),
        expect=read_expectation(expect) if expect is not None else None,
    )
    if output.get("dry_run"):
        return Result(Path(out), plan, None, (), checkpoint.warnings)
    outcome = run(
        plan,
        Path(out),
        workers=output.get("workers"),
        overwrite=output.get("overwrite", False),
        restart=output.get("restart", False),
        control=output.get("control"),
    )
    return Result(outcome.out, plan, outcome.manifest, outcome.resumed, checkpoint.warnings)


def recover(
    raw: StrPath,
    diff: StrPath,
    out: StrPath,
    *,
    vocab: str = "refuse",
    dtype: str | None = None,
    carry: Iterable[str] = (),
    drop: Iterable[str] = (),
    **output: Unpack[Output],
) -> Result:
    """Recover the tuned checkpoint from `raw` and a delta of either kind; see `weightops.operations.recover`."""
    from weightops.operations.recover import recover as operation

    carry, drop = tuple(carry), tuple(drop)
    base, delta = open_checkpoint(raw), open_checkpoint(diff)
    result = operation(base, delta, vocab=vocab, dtype=parse_dtype(dtype), carry=carry, drop=drop)
    options = {"vocab": vocab, "dtype": dtype, "carry": carry, "drop": drop}
    return save(result, out, _recipe("recover", options, raw=base, diff=delta), **output)


def diff(
    raw: StrPath,
    tuned: StrPath,
    out: StrPath,
    *,
    method: str = "exact",
    dtype: str | None = None,
    **output: Unpack[Output],
) -> Result:
    """Make a delta from which holders of `raw` recover `tuned`; see `weightops.operations.diff`."""
    from weightops.operations.diff import diff as operation

    base, target = open_checkpoint(raw), open_checkpoint(tuned)
    result = operation(base, target, method=method, dtype=parse_dtype(dtype))
    if method == "exact" and output.get("format", "safetensors") != "safetensors":
        raise UsageError("an exact delta is always safetensors", hint="leave out --format")
    return save(result, out, _recipe("diff", {"method": method, "dtype": dtype}, raw=base, tuned=target), **output)


def shard(source: StrPath, out: StrPath, **output: Unpack[Output]) -> Result:
    """Write the same tensors into files of another size or format."""
    checkpoint = open_checkpoint(source)
    return save(checkpoint, out, _recipe("shard", {}, source=checkpoint), **output)


def inspect(path: StrPath) -> Inspection:
    """What a checkpoint holds, from its headers alone."""
    from weightops.operations.inspect import inspect as operation

    return operation(open_checkpoint(path), Path(path))


def verify(
    folder: StrPath,
    manifest: StrPath | None = None,
    *,
    quick: bool = False,
    content: bool = False,
    extra: str = "warn",
    algorithm: str | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Hold a folder against its own manifest, another one, a checksum list or a published name.

    A folder that differs is a report whose verdict is False, not an error.
    """
    from weightops.operations.verify import verify as operation

    control = control or Control()
    return operation(
        Path(folder),
        find_manifest(os.fspath(manifest)) if manifest is not None else None,
        quick=quick,
        content=content,
        extra=extra,
        algorithm=algorithm,
        workers=workers,
        control=control,
        tensors=lambda path: digest_tensors(open_checkpoint(path), workers, control),
        structure=_structure,
    )


def manifest(
    folder: StrPath, *, digests: Sequence[str] = (), workers: int | None = None, control: Control | None = None
) -> Manifest:
    """Digest every file and tensor of a folder; the caller decides where to keep the result."""
    from weightops.operations.manifest import make_manifest

    control = control or Control()
    if not Path(folder).is_dir():
        raise SourceMissing(f"{escape(str(folder))}: no such folder")
    try:
        checkpoint = open_checkpoint(folder)
    except NoWeights:
        checkpoint = Checkpoint(Path(folder).name, {})
    return make_manifest(
        Path(folder), checkpoint, digest_tensors(checkpoint, workers, control), digests, workers, control
    )


def parse_dtype(name: str | None) -> DType | None:
    """A dtype by torch's name or safetensors' code; raises `UsageError` for names that are neither."""
    if name is None:
        return None
    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
    found = next((d for d in DType if short.get(name.lower(), name.lower()) in (d.value, d.name.lower())), None)
    if found is None:
        raise UsageError(f"unknown dtype {name!r}", hint="for example float16, bfloat16 or float32")
    return found


def read_expectation(name_or_path: StrPath) -> Expectation:
    """What a manifest of ours (its tensors) or a checksum list (its files) demands of an output."""
    path = find_manifest(os.fspath(name_or_path))
    if path.suffix == ".json":
        found = manifest_format.read_manifest(path)
        return Expectation(path.name, {}, {n: t.xxh3_128 for n, t in found.tensors.items()})
    files: dict[str, dict[str, str]] = {}
    for entry in checksums.read_checksums(path).entries:
        files.setdefault(entry.name, {})[entry.algorithm] = entry.hex
    return Expectation(path.name, files, {})


def _structure(path: Path) -> Sequence[str]:
    try:
        open_checkpoint(path)
    except NoWeights:
        return ()
    except WeightopsError as error:
        return (str(error),)
    return ()


def _recipe(operation: str, options: Mapping[str, Any], **sources: Checkpoint) -> dict[str, Any]:
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v not in (None, (), "")}
    return {"operation": operation, "options": chosen, "sources": {k: c.name for k, c in sources.items()}}
