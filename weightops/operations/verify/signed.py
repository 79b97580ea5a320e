"""Verify against a signature: the files are those that somebody signed, and there are no others."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightops.engine.control import Control
from weightops.errors import Differs, SourceMissing, UsageError, WeightopsError
from weightops.formats.places import repository_hint
from weightops.formats.proofs.bundle import GIT, SINGLE, Bundle, Part, SignedFile, read_bundle
from weightops.formats.proofs.signers import Trust, Verifier
from weightops.io.digests import FileDigests, ToHash, hash_files
from weightops.io.escape import escape
from weightops.io.paths import entries_below
from weightops.operations.verify.files import decoded, look
from weightops.operations.verify.operation import EXTRA_POLICIES
from weightops.operations.verify.report import FileResult, VerifyReport
from weightops.stores.local import read_source

_LOG = logging.getLogger(__name__)
_NO_FILES = {
    "linked folder": "a link to a folder, of whose files nothing is signed",
    "other": "neither a file nor a folder",
}


def verify_signature(
    folder: Path,
    signature: Path,
    trust: Trust,
    *,
    extra: str = "fail",
    name: str | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Hold `folder`, or a single file, against a bundle of OpenSSF model signing, by model-signing or by us.

    First the bundle has to be signed by whom `trust` says; then every file has to have the digest that it lists.
    `extra` is what to do about files that it does not list: all but the bundle itself, and `.git`, `.gitattributes`,
    `.github` and `.gitignore` at the top. Links are followed as far as they stay inside the folder, or in the Hugging
    Face cache that it is part of. `name` is what the folder is called in the report.
    Raises `Differs` if the bundle is of another signer or of a model of another kind, `CorruptInput` if it is
    malformed, `UsageError`, `SourceMissing` and `NetworkFailed` as `Verifier` does.
    """
    started = time.monotonic()
    control = control or Control()
    if extra not in EXTRA_POLICIES:
        raise UsageError(f"unknown policy {extra!r} for extra files, expected one of {', '.join(EXTRA_POLICIES)}")
    if not os.path.exists(folder):
        raise SourceMissing(f"{escape(str(folder))}: no such folder or file", hint=repository_hint(folder))
    shown = escape(str(signature))
    data = read_source(signature)[1]
    verifier = Verifier(trust)
    bundle = read_bundle(data, shown)
    who = verifier.check(signature, bundle)
    _LOG.info("%s: %d files, signed by %s", shown, len(bundle.files), who)
    report = VerifyReport(name or str(folder), str(signature), "full", extra, signer=who)
    is_file = os.path.isfile(folder)
    if is_file != (SINGLE in bundle.files):
        kind = "a single file" if SINGLE in bundle.files else "a folder"
        raise Differs(f"{shown}: is the signature of {kind}, which {escape(str(folder))} is not")
    files = {folder.name: bundle.files[SINGLE]} if is_file else bundle.files
    results, nbytes = _held(folder.parent if is_file else folder, files, shown, workers, control)
    if not is_file:
        results += [each for each in _others(folder, signature, bundle) if extra != "ignore" or each.status != "extra"]
    if not any(each.status == "ok" for each in results) and bundle.name:
        report = replace(report, problems=(f"none of its files is here as it was signed in {escape(bundle.name)!r}",))
    return replace(report, files=tuple(results), nbytes=nbytes, elapsed_s=time.monotonic() - started)


def _held(
    folder: Path, files: Mapping[str, SignedFile], shown: str, workers: int | None, control: Control
) -> tuple[list[FileResult], int]:
    """A result for each signed file, in order, and how many bytes were read for them."""
    seen = {
        name: look(folder, name, file.nbytes, _in_words(file.algorithm, file.parts[0]), shown)
        for name, file in files.items()
    }
    control.progress.start("verifying", sum(at[1] for at in seen.values() if not isinstance(at, FileResult)))
    wanted = [
        (name, part, ToHash(at[0], (files[name].algorithm,), part.start, part.stop))
        for name, at in seen.items()
        if not isinstance(at, FileResult)
        for part in files[name].parts
    ]
    hashed = hash_files(
        [each for _, _, each in wanted],
        workers=workers,
        on_bytes=control.progress.advance,
        cancelled=control.check,
    )
    control.progress.stop()
    found: dict[str, list[tuple[Part, FileDigests | WeightopsError]]] = {}
    for (name, part, _), outcome in zip(wanted, hashed, strict=True):
        found.setdefault(name, []).append((part, outcome))
    results = [
        at if isinstance(at, FileResult) else _compare(name, files[name].algorithm, found[name])
        for name, at in seen.items()
    ]
    return results, sum(each.nbytes for each in hashed if isinstance(each, FileDigests))


def _compare(name: str, algorithm: str, parts: Sequence[tuple[Part, FileDigests | WeightopsError]]) -> FileResult:
    """The result for a file, of its first part that is wrong if there is one."""
    for part, outcome in parts:
        if isinstance(outcome, SourceMissing):
            return FileResult(name, "missing", _in_words(algorithm, part))
        if isinstance(outcome, WeightopsError):
            return FileResult(name, "unreadable", detail=str(outcome))
        if outcome.digests[algorithm] != part.digest:
            found = replace(part, digest=outcome.digests[algorithm])
            return FileResult(name, "differs", _in_words(algorithm, part), _in_words(algorithm, found))
    words = _in_words(algorithm, parts[0][0]) if len(parts) == 1 else f"{algorithm} of {len(parts)} parts"
    return FileResult(name, "ok", words, words)


def _in_words(algorithm: str, part: Part) -> str:
    where = "" if part.stop is None else f"bytes {part.start} to {part.stop}: "
    return f"{where}{algorithm} {part.digest}"


def _others(folder: Path, signature: Path, bundle: Bundle) -> list[FileResult]:
    """What is in the folder and not in the bundle: files that nobody signed, and what is no file."""
    results: list[FileResult] = []

    def unreadable(name: str, error: OSError) -> None:
        results.append(FileResult(decoded(name), "unreadable", detail=f"cannot be searched ({error.strerror})"))

    itself = Path(os.path.realpath(signature.parent)) / signature.name
    root = Path(os.path.realpath(folder))
    for name, kind in entries_below(folder, GIT, unreadable):
        if kind in _NO_FILES:
            results.append(FileResult(decoded(name), "unreadable", detail=_NO_FILES[kind]))
        elif name not in bundle.files and root / name != itself:
            results.append(FileResult(decoded(name), "extra", detail="not signed"))
    return results
