"""A download into a bucket: each file goes there as it comes, and nothing of it lies on this machine.

    OUT/.weightops/download.json       what is being downloaded; created before anything else
    OUT/.weightops/downloaded/NAME.json  a file that is there and right
    OUT/FILE                           there when it is whole and has its digest
    OUT/weightops-manifest.json        created once, last; what is in .weightops goes then

A file of which a part has come is fetched anew by the next run: its digest has to follow the bytes from the first on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from weightops.engine.control import Control
from weightops.engine.digest import in_threads
from weightops.errors import Differs, OutputExists, PlanDiffers, UsageError
from weightops.formats.job_owner import DOWNLOAD, WORK
from weightops.formats.proofs import manifest as manifest_format
from weightops.formats.proofs.manifest import FileEntry, Manifest
from weightops.formats.sniff import check_answer, check_head
from weightops.io.digests import HEX_DIGITS
from weightops.io.escape import escape
from weightops.operations.download import operation as operation
from weightops.operations.download import record as record
from weightops.operations.download import source as sources
from weightops.operations.download.operation import Download, Files
from weightops.stores.hashing import FileHasher
from weightops.stores.listed import on_server
from weightops.stores.reader import FileReader
from weightops.stores.s3.places import BucketPlace, parse_place
from weightops.stores.s3.store import S3Store
from weightops.stores.store import PROBES
from weightops.stores.stores import Stores
from weightops.stores.web.listing import Listing, RemoteFile
from weightops.stores.web.web import Web

_LOG = logging.getLogger(__name__)
_RECORDS = f"{WORK}/downloaded"
_BLOCK_NBYTES = 4 << 20
_HEAD_NBYTES = 4096


class _Downloaded(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is in its place: its size in bytes, its digests, and what its source knew it by."""

    nbytes: int
    digests: dict[str, str]
    identity: str


def download_into_bucket(
    source: str,
    out: str,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    digests: Mapping[str, str],
    checksums: str | None,
    workers: int | None,
    dry_run: bool,
    control: Control,
) -> Download:
    """What `weightops.api.prove.download` does into a bucket.

    Raises `OutputExists` for a place with anything else in it, `PlanDiffers` for one into which something else is being
    downloaded, `UsageError` for files whose size no server says, and what reading and writing raises.
    """
    place = parse_place(out)
    with control.stores.connected() as stores:
        target = sources.find_target(source, revision, stores.web.endpoint)
        web = stores.s3 if isinstance(target.place, BucketPlace) else stores.web
        target = sources.with_digests(target, digests, checksums, web)
        version = sources.find_version(target, web)
        request = record.request_of(str(target.place), version, target.expected_by, include, exclude)
        listing = operation.with_expected(
            sources.list_target(target, version, web), target.expected, target.expected_by
        )
        chosen, warnings = operation.select(listing, include, exclude)
        filling = _Filling(stores.bucket(place), listing, chosen, request, stores)
        made = filling.made()
        have = {file.name: file.nbytes or 0 for file in chosen} if made else filling.have()
        unproven = _unproven(chosen)
        notes = (*warnings, *operation.name_unproven(unproven))
        if dry_run or made is not None:
            if not dry_run:
                filling.clean()
            return Download(out, listing, chosen, have, made, (), notes, unproven)
        made = filling.fill(web, workers or operation.DEFAULT_WORKERS, control)
    return Download(out, listing, chosen, have, made, (), notes, unproven)


@dataclass(frozen=True)
class _Filling:
    """A place in a bucket, and the files that are to be there."""

    store: S3Store
    listing: Listing
    files: Files
    request: Mapping[str, Any]
    stores: Stores

    def made(self) -> Manifest | None:
        """The manifest of this very download, if it is there; raises `OutputExists` for what is in the way."""
        data = self.store.find(manifest_format.NAME)
        if data is not None:
            found = manifest_format.parse_manifest(data, f"{self.store.shown}/{manifest_format.NAME}")
            asked = {**self.request, "etags": dict(sorted((file.name, file.identity) for file in self.files))}
            if all(found.recipe.get(key) == value for key, value in asked.items()):
                return found
        else:
            names = [name for name in self.store.listed("") if not name.startswith(PROBES)]
            if not names or DOWNLOAD in names:
                return None
        raise OutputExists(
            f"{self.store.shown} exists, and nothing in a bucket is replaced",
            hint="choose another --out, or remove what is there first",
        )

    @property
    def _mark(self) -> bytes:
        """What is downloaded, of whatever source it says itself to be."""
        files = [[file.name, file.nbytes, file.identity] for file in self.files]
        return msgspec.json.encode({"source": self.listing.source, "commit": self.listing.commit, "files": files})

    def have(self) -> dict[str, int]:
        """The bytes of files that are in their places."""
        found = {file.name: self._record(file) for file in self.files}
        return {name: done.nbytes for name, done in found.items() if done is not None}

    def _record(self, file: RemoteFile) -> _Downloaded | None:
        data = self.store.find(f"{_RECORDS}/{file.name}.json")
        if data is None:
            return None
        done = msgspec.json.decode(data, type=_Downloaded)
        return done if done.identity == file.identity and self.store.has(file.name) else None

    def fill(self, web: Web, workers: int, control: Control) -> Manifest:
        """Bring what is missing, then create the manifest."""
        unknown = next((file for file in self.files if file.nbytes is None), None)
        if unknown is not None:
            raise UsageError(
                f"{escape(unknown.name)}: the server does not say how large it is",
                hint="download it into a folder on this machine",
            )
        self._begin()
        done = {file.name: self._record(file) for file in self.files}
        missing = [file for file in self.files if done[file.name] is None]
        control.progress.start("downloading", sum(file.nbytes or 0 for file in missing))

        def bring(file: RemoteFile, control: Control) -> None:
            done[file.name] = self._bring(file, control)

        in_threads(min(workers, max(1, len(missing))), control, [partial(bring, file) for file in missing])
        control.progress.stop()
        self.store.abort_uploads([file.name for file in self.files])  # of runs that died
        files = {name: _entry(each) for name, each in done.items() if each is not None}
        etags = {name: each.identity for name, each in done.items() if each is not None}
        made = record.manifest_of(self.listing, files, etags, self.request, web, unproven=_unproven(self.files))
        try:
            self.store.create(manifest_format.NAME, made.to_bytes())
        except OutputExists:
            if self.store.find(manifest_format.NAME) != made.to_bytes():
                raise
        self.clean()
        return made

    def _begin(self) -> None:
        found = self.store.find(DOWNLOAD)
        if found is None:
            self.store.probe()
            try:
                self.store.create(DOWNLOAD, self._mark)
            except OutputExists:
                found = self.store.find(DOWNLOAD)
        if found not in (None, self._mark):
            raise PlanDiffers(
                f"{self.store.shown} holds a part of another download",
                hint="run the command that began it again, or remove what is there first",
            )

    def _bring(self, file: RemoteFile, control: Control) -> _Downloaded:
        """A file from its source into its place, held against its digests before it has its name."""
        source = on_server(file)
        _LOG.info("fetching %s: %s bytes", escape(file.name), f"{source.nbytes:,}")
        hasher = FileHasher(dict.fromkeys(("xxh3_128", *file.digests)), source.nbytes)
        target = self.store.target(file.name, source.nbytes)
        position = 0
        control.progress.start_file(file.name, source.nbytes, 0)
        try:
            with FileReader(self.stores) as reader:
                for part in reader.blocks(source, _BLOCK_NBYTES):
                    control.check()
                    if position == 0:
                        _look(file, bytes(part[:_HEAD_NBYTES]))
                    hasher.update(part)
                    target.write(position, part, len(part))
                    position += len(part)
                    control.progress.advance(len(part), file.name)
            found = hasher.digests()
            for algorithm, expected in file.digests.items():
                if found[algorithm] != expected:
                    raise Differs(f"{escape(file.name)}: {algorithm} is {found[algorithm]}, expected {expected}")
            target.close()
        except BaseException:
            target.abandon()
            raise
        target.commit()
        done = _Downloaded(nbytes=source.nbytes, digests=found, identity=file.identity)
        self.store.put(f"{_RECORDS}/{file.name}.json", msgspec.json.encode(done))
        control.progress.finish_file(file.name, source.nbytes, resumed=False)
        return done

    def clean(self) -> None:
        """Remove what is there only as long as the download is not whole."""
        for name in self.store.listed(WORK):
            self.store.remove(name)


def _unproven(files: Files) -> tuple[str, ...]:
    return tuple(file.name for file in files if not file.digests)


def _look(file: RemoteFile, head: bytes) -> None:
    """Refuse what stands in for a file, as a page for people does."""
    if not file.digests:
        check_answer(head, file.name, "")
    elif file.name.endswith(operation.WEIGHTS):
        check_head(head, escape(file.name))


def _entry(done: _Downloaded) -> FileEntry:
    return FileEntry(nbytes=done.nbytes, digests={k: v for k, v in done.digests.items() if k in HEX_DIGITS})
