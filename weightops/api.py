"""The Python API: one function per command, over the same objects, plus the pieces they are made of.

    import weightops
    weightops.recover("./llama-13b", "./zhixi-diff", "./zhixi", format="torch-1.12", max_shard_size="10GB")

Commands that write take the keywords of `Output`; they raise `weightops.errors` and print nothing. Each imports its
operation when it is called, because starting takes longer than many of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.digest import digest_tensors
from weightops.engine.run import run
from weightops.errors import Differs, NoWeights, SourceMissing, UsageError, WeightopsError
from weightops.formats import checklist, checksums
from weightops.formats import manifest as manifest_format
from weightops.formats.folder import find_place, is_remote, open_checkpoint, read_place, refuse_parts
from weightops.formats.manifest import Manifest
from weightops.io.escape import escape
from weightops.manifests import find_manifest
from weightops.plan import DEFAULT_SHARD_NBYTES, Expectation, Plan, make_plan, parse_size
from weightops.spec import parse_dtype

if TYPE_CHECKING:
    from weightops.operations.download import Download
    from weightops.operations.inspect import Inspection
    from weightops.operations.verify_report import VerifyReport
    from weightops.remote.web import Web

StrPath = str | os.PathLike[str]


class Output(TypedDict, total=False):
    """How to write a result.

    `format`: safetensors, torch (byte-identical to torch.save) or torch-1.12 (to that of 2022 and 2023).
    `max_shard_size`: bytes, `"5GB"`, or `"source"` for the grouping of the source's files.
    `expect`: a manifest, checksum list or published name that the result must match to be published.
    `digests`: more algorithms to record per file than xxh3_128.
    `workers`: shards in work at once. `overwrite`: replace an existing output once the new one is whole.
    `restart`: throw a partial output of another plan away. `dry_run`: plan only. `control`: progress and stop, and
    the `web` to read sources on servers through; one with defaults is opened if it has none.
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
        container=_container(checkpoint.container, output.get("format", "safetensors")),
        max_shard_nbytes=None if size == "source" else size if isinstance(size, int) else parse_size(size),
        digests=tuple(output.get("digests", ())),
        expect=read_expectation(expect) if expect is not None else None,
    )
    if output.get("dry_run"):
        return Result(_local(out), plan, None, (), checkpoint.warnings)
    with _connected(output, plan.is_remote):
        outcome = run(
            plan,
            _local(out),
            workers=output.get("workers"),
            overwrite=output.get("overwrite", False),
            restart=output.get("restart", False),
            control=output.get("control"),
        )
    return Result(outcome.out, plan, outcome.manifest, outcome.resumed, (*checkpoint.warnings, *outcome.warnings))


def _container(own: str | None, wanted: str) -> str:
    """The container that a layout demands, or else the one that is wanted; raises `UsageError` if they differ."""
    if own is None or wanted == own or (own, wanted) == ("torch", "torch-1.12"):
        return wanted
    if wanted != "safetensors":
        raise UsageError(f"this layout is always written as {own} files, not {wanted}", hint="leave out --format")
    return own


@contextmanager
def _connected(output: Output, remote: bool) -> Iterator[Web | None]:
    """The web of the control in `output`; if there is none and something is remote, one with defaults."""
    control = output.get("control") or Control()
    if control.web is not None or not remote:
        yield control.web
        return
    from weightops.remote.web import Web

    output["control"] = control
    with Web() as web:
        control.web = web
        try:
            yield web
        finally:
            control.web = None


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
    with _connected(output, is_remote(raw) or is_remote(diff)) as web:
        base, delta = open_checkpoint(raw, web), open_checkpoint(diff, web)
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

    if method == "exact" and output.get("format", "safetensors") != "safetensors":
        raise UsageError("an exact delta is always safetensors", hint="leave out --format")
    with _connected(output, is_remote(raw) or is_remote(tuned)) as web:
        base, target = open_checkpoint(raw, web), open_checkpoint(tuned, web)
        result = operation(base, target, method=method, dtype=parse_dtype(dtype))
        return save(result, out, _recipe("diff", {"method": method, "dtype": dtype}, raw=base, tuned=target), **output)


def download(
    source: str,
    out: StrPath,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    digests: Mapping[str, str] | None = None,
    checksums: str | None = None,
    workers: int | None = None,
    prune: bool = False,
    offline: bool = False,
    dry_run: bool = False,
    control: Control | None = None,
) -> Download:
    """Fetch a repository, URL, list of URLs or published name into a folder, and prove every file right.

    `digests` by algorithm, and `checksums` (a list at a path or URL), are for one URL. The same call continues what
    an earlier one began. See `weightops.operations.download`; the control's `web` knows hub, token, proxies and limits.
    """
    from weightops.operations import download as operation
    from weightops.operations import download_source as sources
    from weightops.remote.web import Web

    control, out = control or Control(), Path(out)
    include, exclude = tuple(include), tuple(exclude)
    target = sources.find_target(source, revision)
    if offline:
        found = operation.offline(out, str(target.place), sources.known_version(target) or target.revision)
        return operation.from_manifest(out, found)
    with ExitStack() as stack:
        web = control.web or stack.enter_context(Web())
        target = sources.with_digests(target, digests or {}, checksums, web)
        version = sources.find_version(target, web)
        request = operation.request_of(str(target.place), version, target.expected_by, include, exclude)
        earlier = operation.recorded(out / manifest_format.NAME)
        if version and earlier is not None and operation.is_complete(out, earlier, request):
            done = operation.from_manifest(out, earlier)
            if not (prune and done.stale):
                return done
        listing = sources.list_target(target, version, web)
        listing = operation.with_expected(listing, target.expected, target.expected_by)
        chosen, warnings = operation.select(listing, include, exclude)
        planned = operation.plan_download(out, listing, chosen, warnings)
        if dry_run or planned.manifest is not None:
            return planned
        return operation.fetch(planned, request, web, workers or operation.DEFAULT_WORKERS, prune, control)


def shard(source: StrPath, out: StrPath, **output: Unpack[Output]) -> Result:
    """Write the same tensors into files of another size or format."""
    with _connected(output, is_remote(source)) as web:
        checkpoint = open_checkpoint(source, web)
        refuse_parts(checkpoint)
        return save(checkpoint, out, _recipe("shard", {}, source=checkpoint), **output)


def convert(
    source: StrPath,
    out: StrPath,
    *,
    to: str,
    layout: str | None = None,
    model_parallel: int | None = None,
    dtype: str | None = None,
    settings: Mapping[str, str] | None = None,
    tokenizer: StrPath | Literal[False] | None = None,
    check: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Convert a LLaMA model into another layout; see `weightops.operations.convert`.

    `to`: hf, meta, tencentpretrain, llama_inference or gguf; safetensors or torch change the container alone.
    `layout`: that of the source, found from its tensors by default. `settings`: what its files leave unsaid.
    `tokenizer`: a tokenizer.model or tokenizer.json elsewhere, or False for none. `check`: hold the source first
    against its checklist.chk.
    """
    from weightops.layouts.source import Source, beside, parse_settings
    from weightops.lazy import Evaluator
    from weightops.operations import convert as operation
    from weightops.ops.stored import without_shared_checks

    if check:
        _check_list(_local(source))
    if to in ("safetensors", "torch"):
        chosen: Output = {**output, "format": to}
        return shard(source, out, **chosen)
    known = parse_settings(settings or {})
    if to not in operation.WRITERS:
        raise UsageError(f"unknown layout {to!r}", hint=f"known are {', '.join(operation.WRITERS)}")
    with _connected(output, is_remote(source)) as web:
        place = find_place(source, web)
        checkpoint = read_place(place, web, operation.WEIGHTS.get(layout or ""))
        with Evaluator(web) as read:
            files = beside(place, Path(tokenizer) if tokenizer else None if tokenizer is None else False)
            opened = Source(checkpoint, files, lambda t: read.whole(without_shared_checks(t)), known)
            target = operation.Target(model_parallel, parse_dtype(dtype), output.get("format") == "torch-1.12")
            result = operation.convert(opened, to, target, layout)
        options = {"to": to, "from": result.layout, "model_parallel": model_parallel, "dtype": dtype}
        recipe = _recipe("convert", {**options, "set": dict(settings or {}) or None}, source=checkpoint)
        return save(result.checkpoint, out, {**recipe, "dropped": dict(result.dropped)}, **output)


def _check_list(folder: Path) -> None:
    """Hold a folder against its own checklist.chk; raises `Differs`."""
    report = verify(folder, folder / checklist.NAME)
    if not report.verdict:
        raise Differs(
            f"{escape(str(folder))} is not what its {checklist.NAME} lists", hint="`weightops verify` says more"
        )


def inspect(path: StrPath, *, web: Web | None = None) -> Inspection:
    """What a checkpoint holds, from its headers alone; one on a server is read through `web`."""
    from weightops.operations.inspect import inspect as operation

    with _connected({"control": Control(web=web)}, is_remote(path)) as web:
        place = find_place(path, web)
        return operation(read_place(place, web), place, os.fspath(path))


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
        _local(folder),
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

    control, folder = control or Control(), _local(folder)
    if not folder.is_dir():
        raise SourceMissing(f"{escape(str(folder))}: no such folder")
    try:
        checkpoint = open_checkpoint(folder)
    except NoWeights:
        checkpoint = Checkpoint(folder.name, {})
    return make_manifest(folder, checkpoint, digest_tensors(checkpoint, workers, control), digests, workers, control)


def _local(path: StrPath) -> Path:
    """A path on this machine; raises `UsageError` for a URL, which `Path` would quietly take for one."""
    if is_remote(path):
        raise UsageError(f"{escape(os.fspath(path))}: expected a folder on this machine", hint="weightops download")
    return Path(path)


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
    except (NoWeights, UsageError):
        return ()  # nothing that is read here, such as other quantised types
    except WeightopsError as error:
        return (str(error),)
    return ()


def _recipe(operation: str, options: Mapping[str, Any], **sources: Checkpoint) -> dict[str, Any]:
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v not in (None, (), "")}
    return {"operation": operation, "options": chosen, "sources": {k: c.name for k, c in sources.items()}}
