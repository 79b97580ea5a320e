"""Where a job's outputs are made and get their names; a kind of place more is one more class that answers this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from weightops.engine.job.bucket import BucketOutput
from weightops.engine.job.documents import JobOutput
from weightops.engine.publishing import (
    SCHEMA,
    WHOLE,
    PartialRun,
    flush_names,
    give_name,
    inode_of,
    is_published,
    partial,
    remove_published,
    remove_replaced,
    restore_replaced,
    target_of,
)
from weightops.engine.records import ShardRecord
from weightops.engine.work_folder import OUTPUT, OWNER, WorkFolder, is_left, read_document, read_owner
from weightops.errors import CorruptInput, Locked, OutputExists, PlanDiffers, SourceMissing, WeightopsError
from weightops.formats.job_owner import JobOwner
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.io.atomic import final_of, write_new
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.platform.entries import rename
from weightops.stores.local import LocalStore
from weightops.stores.places import is_url
from weightops.stores.store import WritableStore
from weightops.stores.stores import Stores


class Output(Protocol):
    """An output of a job, in whatever place."""

    shown: str
    store: WritableStore
    """Where its files go."""

    def refuse_taken(self) -> None:
        """Raise what `claim` would as far as that is known at once, where a job leaves traces as soon as it begins."""

    def claim(self, *, restart: bool) -> None:
        """Make it this job's, which it may be already.

        Raises `OutputExists` for what is in the way, `Locked` and `Claimed` for what another run or job makes here,
        `PlanDiffers` for what another run has begun, unless that is to be thrown away.
        """

    def refuse_lost(self) -> None:
        """Raise `SourceMissing` or `Claimed` unless it is this job's, and not yet published."""

    def has(self, shard: ShardRecord) -> bool:
        """Whether a shard of that name and size is there, or the output has its name already."""

    def manifest(self) -> Manifest | None:
        """The manifest of what has the output's name now, if that has one."""

    def ending(self, files: Sequence[str], shards: Collection[str]) -> AbstractContextManager[WritableStore | None]:
        """Hold it, for its `shards` are there: lends the store that takes the rest of its `files`.

        None if it has its name already, or is this job's no more. Raises `Locked` while another process holds it.
        """

    def publish(self, finished: Manifest) -> None:
        """Give it its name, with the manifest as the last of its files; only while it is held."""

    def clean(self) -> None:
        """Remove what is left beside an output that has its name."""

    def abandon(self, files: Sequence[str]) -> None:
        """Remove what the job has made here: those of its `files` that are there, and what was to become one."""


class LocalOutput:
    """A folder, or a file, on a file system that all workers see.

    OUT.partial/weightops-job.json   whose it is
    OUT.partial/output/              shards, each under its name once it is whole and on disk
    OUT.partial/whole/               the same folder when all are there, and the rest is added
    """

    def __init__(self, output: JobOutput, owner: JobOwner) -> None:
        self.out = Path(output.out)
        self.shown = escape(output.out)
        self._is_file, self._overwrite, self._owner = output.is_file, output.overwrite, owner
        self._fingerprint = output.fingerprint
        self._partial = partial(self.out)
        self.store: WritableStore = LocalStore(self._partial / OUTPUT, is_there=True)
        self._held: WorkFolder | None = None

    def refuse_taken(self) -> None:
        """Nothing: a job that lies elsewhere leaves no trace here before `claim`."""

    def claim(self, *, restart: bool) -> None:
        if read_owner(self._partial) == self._owner:
            return
        target_of(self.out, is_file=self._is_file, overwrite=self._overwrite).refuse_existing()
        self.clean()
        with WorkFolder(self._partial, SCHEMA, self._owner) as work:
            if work.document is not None:
                if not restart:
                    raise PlanDiffers(
                        f"{escape(str(self._partial))} is the partial output of a run that was interrupted",
                        hint="run its command again to finish it, or give --restart to throw it away",
                    )
                work.clear()
            try:
                (self._partial / OUTPUT).mkdir(exist_ok=True)
            except OSError as error:
                raise write_failure(self._partial, error) from None
            write_new(self._partial / OWNER, self._owner.encode())

    def refuse_lost(self) -> None:
        owner = read_owner(self._partial)
        if owner is None or not (self._partial / OUTPUT).is_dir():
            raise self._owner.lost(self.shown)
        if owner != self._owner:
            raise owner.claimed(self.shown)

    def has(self, shard: ShardRecord) -> bool:
        for folder in (OUTPUT, WHOLE):  # in the order in which another process gives them names meanwhile
            try:
                return LocalStore(self._partial / folder).identity(shard.name).nbytes == shard.nbytes
            except (SourceMissing, CorruptInput):
                continue
        document = read_document(self._partial, SCHEMA) or {}
        is_in_work = read_owner(self._partial) == self._owner and not is_published(self.out, document)
        return not is_in_work and self.manifest() is not None

    def manifest(self) -> Manifest | None:
        try:
            return manifest.read_manifest(target_of(self.out, is_file=self._is_file, overwrite=False).manifest)
        except WeightopsError:
            return None

    @contextmanager
    def ending(self, files: Sequence[str], shards: Collection[str]) -> Iterator[WritableStore | None]:
        if read_owner(self._partial) != self._owner:
            yield None
            return
        with WorkFolder(self._partial, SCHEMA, self._owner) as work:
            if read_owner(self._partial) is None:  # another process has just cleared up, and this made the folder
                work.remove()
                yield None
                return
            restore_replaced(self.out, work)
            if is_published(self.out, work.document or {}):
                yield None
                return
            whole = self._partial / WHOLE
            if not whole.is_dir():
                work.begin(self._run(tuple(f"{WHOLE}/{name}" for name in files)))
                rename(self._partial / OUTPUT, whole)  # a worker that wakes up late finds no folder to write into
            for path in work.own_files():
                if final_of(path.relative_to(self._partial).as_posix()) is not None:
                    path.unlink(missing_ok=True)
            self._held = work
            try:
                yield LocalStore(whole, is_there=True)
            finally:
                self._held = None

    def _run(self, files: tuple[str, ...], **more: Any) -> PartialRun:
        return PartialRun(fingerprint=self._fingerprint, files=files, plan={}, **more)

    def publish(self, finished: Manifest) -> None:
        assert self._held is not None
        work, whole = self._held, self._partial / WHOLE
        LocalStore(whole, is_there=True).put(manifest.NAME, finished.to_bytes())
        target = target_of(self.out, is_file=self._is_file, overwrite=self._overwrite)
        target.refuse_existing()
        try:
            flush_names(whole)
            staged = whole / self.out.name if self._is_file else whole
            files = tuple((work.document or {}).get("files", ()))
            work.begin(self._run(files, finished=inode_of(staged), replaces=inode_of(self.out)))
        except OSError as error:
            raise write_failure(whole, error) from None
        give_name(work, target, whole)

    def clean(self) -> None:
        if not self._partial.is_dir() or read_owner(self._partial) not in (None, self._owner):
            return
        with suppress(Locked, OutputExists), WorkFolder(self._partial, SCHEMA, self._owner) as work:
            if is_published(self.out, work.document or {}) or is_left(self._partial):
                remove_published(work)

    def abandon(self, files: Sequence[str]) -> None:
        if read_owner(self._partial) != self._owner:
            return
        with WorkFolder(self._partial, SCHEMA, self._owner) as work:
            restore_replaced(self.out, work)
            if is_published(self.out, work.document or {}):
                remove_published(work)
                return
            remove_replaced(work)
            work.begin(self._run(tuple(f"{folder}/{name}" for folder in (OUTPUT, WHOLE) for name in files)))
            work.remove()


_KINDS: Mapping[str, Callable[[JobOutput, JobOwner, Stores], Output]] = {
    "": lambda output, owner, stores: LocalOutput(output, owner),
    "s3": BucketOutput,
}
"""Outputs by what their place begins with."""


def open_output(output: JobOutput, owner: JobOwner, stores: Stores) -> Output:
    """The place of an output; raises `OutputExists` for one that nothing can be written to."""
    scheme = output.out.partition("://")[0] if is_url(output.out) else ""
    if scheme not in _KINDS:
        raise OutputExists(f"{escape(output.out)} is no place that weightops writes to")
    return _KINDS[scheme](output, owner, stores)
