"""Verify: hold a folder against its manifest, another one, or a checksum list.

Bad manifests and requests raise; whatever is wrong with the folder itself is part of the report.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weightops.engine.control import Control
from weightops.errors import CorruptInput, Interrupted, SourceMissing, UsageError, WeightopsError
from weightops.formats.places import repository_hint
from weightops.formats.proofs import bundle
from weightops.formats.proofs import manifest as own
from weightops.formats.proofs.checksums import is_checksum_list, read_checksums
from weightops.formats.proofs.manifest import Manifest, read_manifest
from weightops.io.digests import HEX_DIGITS, FileDigests, hash_files
from weightops.io.escape import escape
from weightops.io.paths import files_below, inside
from weightops.operations.verify.files import decoded, in_words, look
from weightops.operations.verify.report import FileResult, Status, VerifyReport
from weightops.spec import TensorSpec

if TYPE_CHECKING:
    from weightops.formats.hub_places import Snapshot

_LOG = logging.getLogger(__name__)
EXTRA_POLICIES = ("fail", "warn", "ignore")
DEFAULT_MANIFESTS = (own.NAME, "checklist.chk", "MD5SUMS", "SHA256SUMS", "XXH128SUMS")

TensorDigests = Callable[[Path], Mapping[str, tuple[TensorSpec, str]]]
"""Reads a checkpoint folder: spec and xxh3_128 of each tensor."""

StructureCheck = Callable[[Path], Sequence[str]]
"""Reads a checkpoint folder's headers and index only: what is wrong with them, in sentences."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a listing says about one file; checksum lists know no sizes."""

    digests: dict[str, str]
    nbytes: int | None = None


def verify(
    folder: Path,
    manifest: Path | None = None,
    *,
    quick: bool = False,
    content: bool = False,
    extra: str = "warn",
    algorithm: str | None = None,
    workers: int | None = None,
    tensors: TensorDigests | None = None,
    structure: StructureCheck | None = None,
    snapshot: Snapshot | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Compare `folder`, or a single file, with `manifest`: our own when its name ends in .json, else a checksum list.

    Without `manifest` the folder's own `weightops-manifest.json`, `checklist.chk` or `...SUMS` serves, or the file's
    `FILE.weightops-manifest.json`; of a file, only what is said of it counts. By default
    every file is read; when some are not as listed and the manifest knows the tensors, these are compared too, for
    the same tensors may well lie in other files. `quick` compares sizes and asks `structure`; `content` compares
    only tensors, through `tensors`. `extra` is the policy on files that are not listed: fail, warn or ignore.
    `snapshot` is what `folder` is the copy of in a cache: without `manifest` its files are held against their digests
    on the hub. `algorithm` picks one of several digests of a manifest, and overrules the name of a checksum list.
    Raises `UsageError`, `SourceMissing` for the folder or manifest, `CorruptInput` for a malformed manifest.
    """
    started = time.monotonic()
    if extra not in EXTRA_POLICIES:
        raise UsageError(f"unknown policy {extra!r} for extra files, expected one of {', '.join(EXTRA_POLICIES)}")
    if quick and content:
        raise UsageError("quick reads no tensors, and content nothing else", hint="choose one of them")
    if content and algorithm is not None:
        raise UsageError("content compares tensors, whose digests have one algorithm", hint="leave algorithm out")
    file = folder.name if os.path.isfile(folder) else None
    if file is None and not os.path.isdir(folder):
        raise SourceMissing(f"{escape(str(folder))}: no such folder or file", hint=repository_hint(folder))
    root = folder if file is None else folder.parent
    path = manifest
    if path is None and (snapshot is None or content):
        path = _default_manifest(folder) if file is None else _manifest_beside(folder)
    known = read_manifest(path) if path is not None and path.name.endswith(".json") else None
    mode: Literal["full", "quick", "content"] = "quick" if quick else "content" if content else "full"
    name, by = (snapshot.name, snapshot.by) if snapshot else (str(folder), "")
    report = VerifyReport(name, str(path or by), mode, extra, warnings=snapshot.notes if snapshot else ())
    if path is None:
        assert snapshot is not None
        expected = {n: Expected(dict(each.digests), each.nbytes) for n, each in snapshot.files.items()}
    elif known is not None:
        expected = from_manifest(known, escape(str(path)), algorithm)
    else:
        found = read_checksums(path, algorithm, root)
        expected = {name: Expected(digests) for name, digests in found.by_file().items()}
        report = replace(report, warnings=(*report.warnings, *found.notes))
    _LOG.info("comparing %s with %s: %d files", escape(str(folder)), escape(str(path)), len(expected))
    if file is not None:
        expected, report = of_file(expected, file, escape(report.manifest)), replace(report, extra="ignore")
    control = control or Control()
    if content:
        if known is None or tensors is None:
            raise UsageError(
                f"{escape(report.manifest)}: only a manifest of weightops knows tensors, which content compares",
                hint="leave content out to compare files",
            )
        report = with_content(report, folder, known, tensors)
    else:
        report = _with_files(report, root, path, expected, workers, control)
        if quick and structure is not None:
            report = replace(report, problems=tuple(structure(folder)))
        differs = any(file.status not in ("ok", "extra") for file in report.files)
        if not quick and differs and tensors is not None and known is not None and known.tensors:
            report = with_content(report, folder, known, tensors)
    return replace(report, elapsed_s=time.monotonic() - started)


def _default_manifest(folder: Path) -> Path:
    for name in DEFAULT_MANIFESTS:
        if os.path.lexists(folder / name):
            return inside(folder, name, escape(str(folder)))
    raise SourceMissing(
        f"{escape(str(folder))}: holds no manifest (looked for {', '.join(DEFAULT_MANIFESTS)})",
        hint="name a manifest, a checksum list or a published list; `weightops manifest` makes one",
    )


def _manifest_beside(file: Path) -> Path:
    path = own.beside(file)
    if not os.path.lexists(path):
        raise SourceMissing(
            f"{escape(str(file))}: there is no {escape(path.name)} beside it",
            hint="name a manifest or checksum list that lists it: --manifest FILE",
        )
    return path


def of_file(expected: Mapping[str, Expected], file: str, shown: str) -> dict[str, Expected]:
    """What a listing says of one file. If it lists no other, it is of this one, whatever that is called now."""
    if file in expected:
        return {file: expected[file]}
    if len(expected) == 1:
        return {file: next(iter(expected.values()))}
    raise UsageError(f"{shown} does not list {escape(file)}", hint="verify the folder that it lists")


def from_manifest(manifest: Manifest, shown: str, algorithm: str | None) -> dict[str, Expected]:
    """Sizes and all digests of our own manifest, or the digest by `algorithm` only."""
    if not manifest.files:
        raise CorruptInput(f"{shown}: lists no files")
    expected = {}
    for name, entry in manifest.files.items():
        if not entry.digests:
            raise CorruptInput(f"{shown}: gives no digest for {escape(name)!r}")
        for key, digest in entry.digests.items():
            if len(digest) != HEX_DIGITS.get(key) or digest.strip("0123456789abcdef"):
                raise CorruptInput(f"{shown}: {escape(digest)!r} for {escape(name)!r} is no {escape(key)} digest")
        if algorithm is not None and algorithm not in entry.digests:
            raise UsageError(
                f"{shown}: has no {escape(algorithm)} digest for {escape(name)!r}, only {', '.join(entry.digests)}"
            )
        chosen = entry.digests if algorithm is None else {algorithm: entry.digests[algorithm]}
        expected[name] = Expected(chosen, entry.nbytes)
    return expected


def _with_files(
    report: VerifyReport,
    folder: Path,
    manifest: Path | None,
    expected: Mapping[str, Expected],
    workers: int | None,
    control: Control,
) -> VerifyReport:
    """The report with a result for each listed file, in the manifest's order, then for each extra one."""
    shown = escape(str(manifest or folder))
    seen = {
        name: look(folder, name, wanted.nbytes, in_words(wanted.digests), shown) for name, wanted in expected.items()
    }
    present = {name: at for name, at in seen.items() if not isinstance(at, FileResult)}
    hashed: dict[str, FileDigests | WeightopsError] = {}
    if report.mode == "full":
        control.progress.start("verifying", sum(nbytes for _, nbytes in present.values()))
        outcomes = hash_files(
            [(path, expected[name].digests) for name, (path, _) in present.items()],
            workers=workers,
            on_bytes=control.progress.advance,
            cancelled=control.check,
        )
        control.progress.stop()
        hashed = dict(zip(present, outcomes, strict=True))
    files = [
        at if isinstance(at, FileResult) else compared(name, expected[name], at[1], hashed.get(name))
        for name, at in seen.items()
    ]
    if report.extra != "ignore":
        files += sorted(_extras(folder, manifest, expected.keys()), key=lambda file: file.name)
    nbytes = sum(found.nbytes for found in hashed.values() if isinstance(found, FileDigests))
    return replace(report, files=tuple(files), nbytes=nbytes)


def compared(name: str, expected: Expected, nbytes: int, found: FileDigests | WeightopsError | None) -> FileResult:
    """The result for a file of the right size, with what hashing gave if it was hashed."""
    if isinstance(found, SourceMissing):
        return FileResult(name, "missing", in_words(expected.digests))
    if isinstance(found, WeightopsError):
        return FileResult(name, "unreadable", detail=str(found))
    if found is None:
        listed = "" if expected.nbytes is None else f"{expected.nbytes} bytes"
        return FileResult(name, "ok", listed, f"{nbytes} bytes")
    status: Status = "ok" if found.digests == expected.digests else "differs"
    return FileResult(name, status, in_words(expected.digests), in_words(found.digests))


def _extras(folder: Path, manifest: Path | None, listed: Collection[str]) -> list[FileResult]:
    """Files below `folder` that are neither listed nor lists themselves, and subfolders that cannot be searched."""
    found: list[FileResult] = []

    def unreadable(name: str, error: OSError) -> None:
        found.append(FileResult(decoded(name), "unreadable", detail=f"cannot be searched ({error.strerror})"))

    expected = {*listed, *(name[:i] for name in listed for i, character in enumerate(name) if character == "/")}
    manifest = manifest.resolve() if manifest is not None else None
    for name in files_below(folder, unreadable):
        if name not in expected and not is_listing(name) and (folder / name).resolve() != manifest:
            found.append(FileResult(decoded(name), "extra", detail="not listed"))
    return found


def is_listing(name: str) -> bool:
    """Whether a file lists others: a manifest, a checksum list or a signature."""
    base = name.rpartition("/")[2]
    return own.is_manifest_name(base) or is_checksum_list(base) or base == bundle.NAME


def with_content(report: VerifyReport, folder: Path, manifest: Manifest, tensors: TensorDigests) -> VerifyReport:
    """The report with the tensors compared, wherever they lie; why they cannot be read is a problem."""
    try:
        found = tensors(folder)
    except Interrupted:
        raise
    except WeightopsError as error:
        return replace(report, problems=(*report.problems, str(error)))
    expected = {name: (entry.spec, entry.xxh3_128) for name, entry in manifest.tensors.items()}
    differ = tuple(name for name in expected if name in found and found[name] != expected[name])
    missing = tuple(name for name in expected if name not in found)
    extra = tuple(name for name in found if name not in expected)
    return replace(
        report,
        tensors_differ=differ,
        tensors_missing=missing,
        tensors_extra=extra,
        content_equal=not (differ or missing or extra),
        nbytes=report.nbytes + sum(spec.nbytes for spec, _ in found.values()),
    )
