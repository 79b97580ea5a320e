"""The partial output beside the final one: what is done, noted, and the rename that publishes it.

    OUT.partial/weightops.lock   held by the run that writes; says who that is
    OUT.partial/run.json         the plan, its fingerprint and the names of its files; at the end also what OUT will be
    OUT.partial/journal.jsonl    one flushed line per thing done
    OUT.partial/output/          what becomes OUT: each shard under its final name only once it is whole and on disk
    OUT.partial/replaced/        with --overwrite what was OUT, until the new one is durable

If OUT exists it is whole: it appears by one rename, after everything in it has been flushed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from weightops.engine.lock import is_lock
from weightops.engine.publishing import (
    SCHEMA,
    Beside,
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
from weightops.engine.records import Record, ShardRecord, WatchRecord
from weightops.engine.sample import sample
from weightops.engine.targets import FolderTarget
from weightops.engine.work_folder import OUTPUT, WorkFolder, read_document, refuse_others
from weightops.errors import Locked, OutputExists, PlanDiffers, WeightopsError
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.io.atomic import write_all
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.platform.entries import is_link
from weightops.io.platform.files import flush, open_to_write
from weightops.lazy import LazyTensor
from weightops.plan import Plan, first_difference
from weightops.stores.local import LocalStore
from weightops.stores.reader import FileReader
from weightops.stores.store import Target

JOURNAL = "journal.jsonl"


class Staging:
    """Exclusive hold on the partial output of one run; a context manager.

    `folder` takes the files. `published` is the manifest of an output that an earlier run of this plan had finished
    when it was killed; there is nothing left to do then but `clean`. `warnings` tell why work was not kept.
    """

    def __init__(
        self, out: Path, plan: Plan, beside: WorkFolder | None = None, *, overwrite: bool, restart: bool
    ) -> None:
        """Take the lock and find what an earlier run of this plan has done.

        `beside` is another folder of the run, in which it made sources of the plan: done with when `out` has its name.

        Raises `OutputExists`, `Locked`, or `PlanDiffers` naming the field in which the plans differ.
        """
        self.out = out = Path(os.path.abspath(out))
        self._plan, self._beside = plan, beside
        self._target = target_of(out, is_file=plan.is_file, overwrite=overwrite)
        self.warnings: tuple[str, ...] = ()
        self.records: list[Record] = []
        self._journal = -1
        if published(out, plan) is None:
            self._target.refuse_existing()
        self._work = WorkFolder(partial(out), SCHEMA)
        self.folder = self._work.path / OUTPUT
        self.store = LocalStore(self.folder)
        try:
            self.published = published(out, plan)
            if self.published is None:
                restore_replaced(out, self._work)
                self._target = target_of(out, is_file=plan.is_file, overwrite=overwrite)  # of what is there now
                self._target.refuse_existing()
                self._begin(restart)
        except BaseException:
            self._work.close()
            raise

    @staticmethod
    def clean_up_after(out: Path) -> None:
        """Remove what a run left beside its finished output that was killed when it had all but done so."""
        out = Path(os.path.abspath(out))
        folder = partial(out)
        if is_link(folder) or not folder.is_dir():
            return
        document = read_document(folder, SCHEMA)
        is_over = document is not None and is_published(out, document)
        if is_over or all(is_lock(entry.name) for entry in folder.iterdir()):
            with suppress(Locked, OutputExists), WorkFolder(folder, SCHEMA) as work:
                remove_published(work)

    def _begin(self, restart: bool) -> None:
        """Go on where an earlier run of the same plan stopped, or anew."""
        document, plan = self._work.document, self._plan
        records: list[Record] = []
        nbytes = 0
        if document is not None and is_published(self.out, document):
            remove_replaced(self._work)
        elif document is not None and not restart:
            if document.get("fingerprint") != plan.fingerprint:
                difference = first_difference(self._identity, document.get("plan"))
                raise PlanDiffers(
                    f"{escape(str(self._work.path))} is the partial output of another plan: {difference}",
                    hint="run the earlier command again to finish it, or give --restart to throw it away",
                )
            records, nbytes = read_journal(self._work.path)
            if not is_made_of(records, plan):
                records, nbytes = [], 0
                self.warnings = (
                    f"{escape(str(self._work.path))} was begun with source files of the same names, sizes and dates, "
                    "but other contents: begun anew",
                )
        kept = {self.folder / record.name for record in records if isinstance(record, ShardRecord)}
        kept |= {self._work.path / JOURNAL} if records else set()
        try:
            for path in self._work.own_files():
                if path not in kept:
                    path.unlink()
            if not records:
                self._work.begin(self._run())
            self.folder.mkdir(exist_ok=True)
            self._journal = open_to_write(self._work.path / JOURNAL, append=True)
            os.ftruncate(self._journal, nbytes)
        except OSError as error:
            raise write_failure(self._work.path, error) from None
        self.records = records

    @cached_property
    def _identity(self) -> Any:
        """The plan without places: the queries of URLs, which hold secrets, are none of a file's business."""
        return self._plan.identity

    def _run(self, **more: Any) -> PartialRun:
        plan = self._plan
        files = (JOURNAL, *(f"{OUTPUT}/{name}" for name in sorted(plan.file_names)))
        return PartialRun(fingerprint=plan.fingerprint, files=files, plan=self._identity, **more)

    def commit(self, target: Target, record: ShardRecord) -> None:
        """Give a finished, durable shard its name, then note it."""
        target.commit()
        self.note(record)

    def note(self, record: Record) -> None:
        """Append a line to the journal and flush it."""
        try:
            write_all(self._journal, msgspec.json.encode(record) + b"\n")
            flush(self._journal)
        except OSError as error:
            raise write_failure(self._work.path / JOURNAL, error) from None
        self.records.append(record)

    def finish(self) -> None:
        """Note that everything is there, and what will be `out`; raises `OutputExists` if anything else is there."""
        self._work.own_files()
        try:
            flush_names(self.folder)
            staged = self.folder / self.out.name if self._plan.is_file else self.folder
            other = self._beside
            beside = msgspec.UNSET if other is None else Beside(name=other.path.name, schema=other.schema)
            self._work.begin(self._run(finished=inode_of(staged), replaces=inode_of(self.out), beside=beside))
        except OSError as error:
            raise write_failure(self.folder, error) from None

    def publish(self) -> None:
        """Give the output, which must be finished, its name."""
        if self.published is None:
            give_name(self._work, self._target, self.folder)

    def clean(self) -> None:
        """Remove what is left beside an output that has its name, and what that took the place of."""
        self._close_journal()
        remove_published(self._work, self._beside)

    @property
    def has_shards(self) -> bool:
        """Whether there is work here that a later run can keep."""
        return any(isinstance(r, ShardRecord) for r in self.records)

    def discard(self) -> None:
        """Throw the partial output away, unless anything else is in it."""
        if self.published is None:
            self._close_journal()
            with suppress(WeightopsError):  # what has failed before is the one to tell
                self._work.remove()

    def _close_journal(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_journal()
        self._work.close()


def refuse_target(out: Path, *, overwrite: bool) -> None:
    """Raise `OutputExists` for what is in the way of a run that makes a folder, before it works."""
    out = Path(os.path.abspath(out))
    FolderTarget(out, overwrite=overwrite).refuse_existing()
    refuse_others(partial(out), SCHEMA)


def read_journal(folder: Path) -> tuple[list[Record], int]:
    """The records up to the first line that is none, as a crash may leave it; and the bytes of their lines."""
    records: list[Record] = []
    nbytes = 0
    try:
        lines = (folder / JOURNAL).read_bytes().split(b"\n")
    except OSError:
        return records, nbytes
    for line in lines[:-1]:
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            break
        nbytes += len(line) + 1
    return records, nbytes


def is_made_of(records: Iterable[Record], plan: Plan) -> bool:
    """Whether the plan's sources hold what earlier runs of it read; raises as `FileReader.read_into`."""
    shards = {shard.name: shard.tensors.values() for shard in plan.shards}
    with FileReader() as files:
        for record in records:
            tensors: Iterable[LazyTensor]
            match record:
                case ShardRecord(name=name):
                    tensors = shards.get(name, ())
                case WatchRecord():
                    tensors = plan.watch
                case _:
                    continue
            if sample(tensors, files) != record.sample:
                return False
    return True


def published(out: Path, plan: Plan) -> Manifest | None:
    """The manifest of an output that an earlier run of this plan gave its name, if it was killed before it ended."""
    out = Path(os.path.abspath(out))
    document = read_document(partial(out), SCHEMA)
    if document is None or document.get("fingerprint") != plan.fingerprint or not is_published(out, document):
        return None
    if not is_made_of(read_journal(partial(out))[0], plan):
        return None
    return manifest.read_manifest(target_of(out, is_file=plan.is_file, overwrite=False).manifest)
