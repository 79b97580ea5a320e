"""A job's output in a bucket, where nothing can be renamed: shards have their names at once, and the manifest is last.

    OUT/.weightops/owner.json    whose it is; created before anything else, and removed when all is there
    OUT/SHARD                    there when it is whole, for what has been uploaded of it is not seen before
    OUT/weightops-manifest.json  created once: with it OUT is an output, and without it nothing of ours reads OUT

A single file FILE has these beside it, as FILE.weightops/owner.json and FILE.weightops-manifest.json.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from weightops.engine.job.documents import JobOutput
from weightops.engine.records import ShardRecord
from weightops.errors import CorruptInput, Differs, Locked, OutputExists, SourceMissing, UploadGone
from weightops.formats.job_owner import DOWNLOAD, WORK, JobOwner, own_job, owner_name
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.stores.s3.places import BucketPlace, parse_place
from weightops.stores.store import PROBES, WritableStore
from weightops.stores.stores import Stores

if TYPE_CHECKING:
    from weightops.stores.s3.store import S3Store


class BucketOutput:
    """A folder in a bucket, or an object. Nothing that is there is ever replaced."""

    def __init__(self, output: JobOutput, owner: JobOwner, stores: Stores) -> None:
        place = parse_place(output.out)
        self.shown = str(place)
        self._owner = owner
        above, _, name = place.key.rpartition("/")
        self._file = name if output.is_file else ""
        root = BucketPlace(place.bucket, above) if output.is_file else place
        self._bucket: S3Store = stores.bucket(root)
        self.store: WritableStore = self._bucket
        self._owner_name = owner_name(self._file)
        self._manifest_name = f"{self._file}.{manifest.NAME}" if self._file else manifest.NAME

    def refuse_taken(self) -> None:
        """Raise `OutputExists` and `Claimed` for what is in the way of a job that is to begin."""
        owner = self._found_owner()
        if owner not in (None, self._owner):
            raise owner.claimed(self.shown)
        if owner is None and self._has_files():
            raise OutputExists(
                f"{self.shown} exists, and nothing in a bucket is replaced",
                hint="choose another --out, or remove what is there first",
            )

    def refuse_others(self, *, may_exist: bool) -> None:
        """As `refuse_taken`, where what a job of this place has begun is no other one, whatever it makes."""
        owner = self._found_owner()
        if owner is not None and owner.job != self._owner.job:
            raise owner.claimed(self.shown)
        if owner is None and not may_exist:
            self.refuse_taken()

    def _has_files(self) -> bool:
        if self._file:
            return self.store.has(self._file) or self.store.has(self._manifest_name)
        return any(not name.startswith(f"{WORK}/") or name == DOWNLOAD for name in self.store.listed(""))

    def claim(self, *, restart: bool) -> None:
        self.refuse_taken()
        if self._found_owner() is not None:
            return
        self.store.probe()
        try:
            self.store.create(self._owner_name, self._owner.encode())
        except OutputExists:
            self.refuse_taken()  # another job has it since, if not this one
            return
        if self.store.has(self._manifest_name):  # another job has begun and ended since
            self.store.remove(self._owner_name)
            self.refuse_taken()

    def _found_owner(self) -> JobOwner | None:
        data = self.store.find(self._owner_name)
        if data is None:
            return None
        owner = JobOwner.parse(data)
        if owner is None:
            raise OutputExists(f"{self.shown}/{self._owner_name} is not of weightops", hint="choose another --out")
        return owner

    def refuse_lost(self) -> None:
        owner = self._found_owner()
        if owner is None:
            raise self._owner.lost(self.shown)
        if owner != self._owner:
            raise owner.claimed(self.shown)

    def has(self, shard: ShardRecord) -> bool:
        try:
            return self.store.identity(shard.name).nbytes == shard.nbytes
        except SourceMissing:
            return self.manifest() is not None

    def manifest(self) -> Manifest | None:
        data = self.store.find(self._manifest_name)
        if data is None:
            return None
        try:
            return manifest.parse_manifest(data, f"{self.shown}/{manifest.NAME}")
        except CorruptInput:
            return None

    @contextmanager
    def ending(self, files: Sequence[str], shards: Collection[str]) -> Iterator[WritableStore | None]:
        """As `Output.ending`. Several processes may hold it at a time: they write the same."""
        if self._found_owner() != self._owner or self.manifest() is not None:
            yield None
            return
        self._bucket.abort_uploads(shards)  # each shard is there: these are of attempts that came too late, or died
        try:
            yield self.store
        except UploadGone:
            if self.manifest() is None:
                raise
            raise Locked(f"{self.shown} has just been finished by another process") from None

    def publish(self, finished: Manifest) -> None:
        try:
            self.store.create(self._manifest_name, finished.to_bytes())
        except OutputExists:
            made = self.manifest()
            if made is None or _bare(made) != _bare(finished):
                raise Differs(
                    f"{self.shown}: another process has ended it as something else", hint="weightops verify says more"
                ) from None
        shards = {tensor.file for tensor in finished.tensors.values()}
        self._bucket.abort_uploads(finished.files.keys() - shards)  # of processes that died while they ended it

    def clean(self) -> None:
        if self._found_owner() == self._owner and self.manifest() is not None:
            self._remove_owner()

    def abandon(self, files: Sequence[str]) -> None:
        if self._found_owner() != self._owner:
            return
        if self.manifest() is None:
            self._bucket.abort_uploads(files)
            for name in files:
                self.store.remove(name)
        self._remove_owner()

    def _remove_owner(self) -> None:
        """Remove what says whose it is, and what probing has left that did not end."""
        for name in (name for name in self.store.listed(WORK) if name.startswith(PROBES)):
            self.store.remove(name)
        self.store.remove(self._owner_name)


def refuse_begun(out: str, stores: Stores, *, is_file: bool, may_exist: bool) -> None:
    """Raise what a job of its own would meet at `out`, for who works long before writing one; as `claim` raises.

    What such a job has begun may go on, and a whole output `may_exist` where it is looked at later.
    """
    output = JobOutput(out=out, is_file=is_file, overwrite=False, fingerprint="")
    found = BucketOutput(output, JobOwner(job=own_job(out, is_file=is_file), fingerprint=""), stores)
    found.refuse_others(may_exist=may_exist)
    found.store.probe()


def _bare(made: Manifest) -> Manifest:
    """The manifest without what it says of the machine that made it."""
    return msgspec.structs.replace(made, provenance={})
