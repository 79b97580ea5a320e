"""Verify what is in a bucket: every object is read there, several at a time, and nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weightops.engine.control import Control
from weightops.engine.digest import digest_tensors, in_threads
from weightops.errors import CorruptInput, NoWeights, SourceMissing, UsageError, WeightopsError
from weightops.formats.folder import read_place
from weightops.formats.proofs import manifest as own
from weightops.formats.proofs.checksums import parse_checksums
from weightops.io.digests import FileDigests
from weightops.io.escape import escape
from weightops.operations.verify.operation import (
    DEFAULT_MANIFESTS,
    EXTRA_POLICIES,
    Expected,
    compared,
    from_manifest,
    is_listing,
    of_file,
    with_content,
)
from weightops.operations.verify.report import FileResult, VerifyReport
from weightops.stores.hashing import FileHasher
from weightops.stores.listed import ListedStore, on_server
from weightops.stores.local import read_source
from weightops.stores.reader import FileReader
from weightops.stores.s3.places import BucketPlace, parse_place
from weightops.stores.stores import Stores

if TYPE_CHECKING:
    from weightops.stores.web.listing import Listing, RemoteFile

_BLOCK_NBYTES = 4 << 20
_WORKERS = 4


def verify_bucket(
    place: str,
    manifest: Path | None = None,
    *,
    quick: bool = False,
    content: bool = False,
    extra: str = "warn",
    algorithm: str | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Compare a folder or object in a bucket with `manifest`, or with the list that lies there; see `verify`.

    Raises as that does, and `NetworkFailed` and `AuthenticationFailed` where the store does not answer.
    """
    started = time.monotonic()
    if extra not in EXTRA_POLICIES:
        raise UsageError(f"unknown policy {extra!r} for extra files, expected one of {', '.join(EXTRA_POLICIES)}")
    if quick and content:
        raise UsageError("quick reads no tensors, and content nothing else", hint="choose one of them")
    control = control or Control()
    with control.stores.connected() as stores:
        listing, file = _find(place, stores)
        name, shown, data = _list_to_go_by(listing, file, manifest, stores)
        known = own.parse_manifest(data, shown) if name.endswith(".json") else None
        if content and known is None:
            raise UsageError(
                f"{shown}: only a manifest of weightops knows tensors, which content compares",
                hint="leave content out to compare files",
            )
        mode: Literal["full", "quick", "content"] = "quick" if quick else "content" if content else "full"
        report = VerifyReport(place, shown, mode, extra if file is None else "ignore")
        if known is not None:
            expected = from_manifest(known, shown, algorithm)
        else:
            found = parse_checksums(data, shown, name, algorithm, name if manifest is None else None)
            expected = {each: Expected(digests) for each, digests in found.by_file().items()}
            report = replace(report, warnings=found.notes)
        chosen = ListedStore(listing, on_server, stores)
        if file is not None:
            expected = of_file(expected, file, shown)
            chosen = ListedStore(
                replace(listing, files=tuple(f for f in listing.files if f.name == file)), on_server, stores
            )
        if not content:
            report = _with_files(report, listing, expected, workers or _WORKERS, control)
            if quick:
                report = replace(report, problems=_structure(chosen, stores))
        differs = any(each.status not in ("ok", "extra") for each in report.files)
        if known is not None and (content or (not quick and differs and known.tensors)):
            report = with_content(
                report, Path(place), known, lambda _: digest_tensors(read_place(chosen, stores), workers, control)
            )
    return replace(report, elapsed_s=time.monotonic() - started)


def _find(text: str, stores: Stores) -> tuple[Listing, str | None]:
    """A folder's files; of a single object those beside it, and its own name."""
    from weightops.formats.bucket_places import list_bucket  # imported here because most folders need no network

    place = parse_place(text)
    try:
        return list_bucket(place, stores.s3), None
    except SourceMissing:
        above, _, name = place.key.rpartition("/")
        listing = None if place.is_folder else list_bucket(BucketPlace(place.bucket, above), stores.s3)
        if listing is None or all(file.name != name for file in listing.files):
            raise
        return listing, name


def _list_to_go_by(listing: Listing, file: str | None, manifest: Path | None, stores: Stores) -> tuple[str, str, bytes]:
    """Name, place and bytes of what says how the files should be."""
    from weightops.stores.web.small import read_whole  # imported here because most folders need no network

    if manifest is not None:
        return manifest.name, escape(str(manifest)), read_source(manifest)[1]
    usual = DEFAULT_MANIFESTS if file is None else (f"{file}.{own.NAME}", *DEFAULT_MANIFESTS)
    there = {each.name: each for each in listing.files}
    name = next((each for each in usual if each in there), None)
    if name is None:
        raise SourceMissing(
            f"{listing.source}: holds no manifest (looked for {', '.join(usual)})",
            hint="name a manifest, a checksum list or a published list: --manifest FILE",
        )
    return name, f"{listing.source}/{escape(name)}", read_whole(there[name].url, stores.s3)


def _with_files(
    report: VerifyReport, listing: Listing, expected: Mapping[str, Expected], workers: int, control: Control
) -> VerifyReport:
    """The report with a result for each listed file, in the manifest's order, then for each extra one."""
    there = {file.name: file for file in listing.files}
    hashed: dict[str, FileDigests | WeightopsError] = {}
    same = {n: there[n] for n, e in expected.items() if n in there and e.nbytes in (None, there[n].nbytes)}
    if report.mode == "full":
        control.progress.start("verifying", sum(file.nbytes or 0 for file in same.values()))

        def hash_one(name: str) -> Callable[[Control], None]:
            def job(own: Control) -> None:
                hashed[name] = _digests(same[name], expected[name], control.stores, own)

            return job

        in_threads(workers, control, map(hash_one, same))
        control.progress.stop()
    files = []
    for name, wanted in expected.items():
        found = there.get(name)
        if found is None:
            files.append(compared(name, wanted, 0, SourceMissing(name)))
        elif name not in same:
            files.append(FileResult(name, "differs", f"{wanted.nbytes} bytes", f"{found.nbytes} bytes"))
        else:
            files.append(compared(name, wanted, found.nbytes or 0, hashed.get(name)))
    if report.extra != "ignore":
        others = (n for n in sorted(there) if n not in expected and not is_listing(n) and not f"/{n}".count("/."))
        files += [FileResult(name, "extra", detail="not listed") for name in others]
    nbytes = sum(each.nbytes for each in hashed.values() if isinstance(each, FileDigests))
    return replace(report, files=tuple(files), nbytes=nbytes)


def _digests(file: RemoteFile, expected: Expected, stores: Stores, control: Control) -> FileDigests | WeightopsError:
    """The digests of an object; as a value what is wrong with it, while what is wrong with the store is raised."""
    source = on_server(file)
    hasher = FileHasher(expected.digests, source.nbytes)
    try:
        with FileReader(stores) as reader:
            for part in reader.blocks(source, _BLOCK_NBYTES):
                control.check()
                hasher.update(part)
                control.progress.advance(len(part))
    except (CorruptInput, SourceMissing) as error:
        return error
    return FileDigests(source.nbytes, hasher.digests())


def _structure(store: ListedStore, stores: Stores) -> tuple[str, ...]:
    """What is wrong with headers and index, in sentences."""
    try:
        read_place(store, stores)
    except (NoWeights, UsageError):
        return ()  # nothing that is read here, such as other quantised types
    except (CorruptInput, SourceMissing) as error:
        return (str(error),)
    return ()
