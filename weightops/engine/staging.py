"""The partial output beside the final one: lock, plan, journal, and the rename that publishes it.

    OUT.partial/.lock            held by the run that writes; says who that is
    OUT.partial/.plan.json       the plan, written before any shard
    OUT.partial/.journal.jsonl   one flushed line per thing done
    OUT.partial/<shards, ...>    each under its final name only once it is whole and on disk

If OUT exists it is whole: it appears by one rename, after everything in it has been flushed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from weightops.errors import Locked, OutputExists, PlanDiffers, UsageError
from weightops.formats import manifest
from weightops.formats.manifest import Manifest
from weightops.io.atomic import exchange, fsync_folder, publish, write_all, write_whole
from weightops.io.digests import hash_file
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.ops.loss import Loss
from weightops.plan import Plan, first_difference, identity_of

LOCK, PLAN, JOURNAL = ".lock", ".plan.json", ".journal.jsonl"


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="shard"):
    """A committed shard."""

    name: str
    nbytes: int
    digests: dict[str, str]
    tensors: dict[str, str]
    witnesses: dict[str, str]
    losses: dict[str, Loss] = {}
    notes: dict[str, dict[str, float]] = {}


class WatchRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="watch"):
    """The tensors to be watched first have been, and were as expected."""

    witnesses: dict[str, str]


class ProofRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="proof"):
    """Remote files, by digest, that have been read and had that digest."""

    digests: list[str]


class FinishedRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="finished"):
    """All outputs of the run are whole and about to get their names: xxh3_128 of each manifest by fingerprint."""

    manifests: dict[str, str]


Record = ShardRecord | WatchRecord | ProofRecord | FinishedRecord


class Staging:
    """Exclusive hold on the partial output of one run; a context manager."""

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool, restart: bool) -> None:
        """Take the lock and find what an earlier run of this plan has done.

        Raises `OutputExists`, `Locked`, or `PlanDiffers` naming the field in which the plans differ.
        """
        self.out = out = Path(os.path.abspath(out))
        if not out.name:
            raise UsageError(f"{out} cannot be an output")
        self.folder = _partial(out)
        self._overwrite = overwrite
        self._refuse_existing()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_failure(self.folder, error) from None
        self._lock = take_lock(self.folder / LOCK)
        try:
            self._refuse_existing()
            self.records = self._resume(plan, restart)
            self._journal = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except BaseException:
            self._release()
            raise

    def _refuse_existing(self) -> None:
        if self.folder.is_symlink():
            raise OutputExists(f"{escape(str(self.folder))} is a link; the partial output must be a folder here")
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise OutputExists(f"{escape(str(self.out))} exists and is not a folder")
        _clean_published(self.out)
        refuse_existing(self.out, overwrite=self._overwrite)

    def _resume(self, plan: Plan, restart: bool) -> list[Record]:
        """The journal of an earlier run of the same plan; an empty one after clearing the folder otherwise."""
        found = self._earlier_plan()
        if found is not None and not restart:
            if found.get("fingerprint") == plan.fingerprint:
                return _read_journal(self.folder)
            difference = first_difference(plan.identity, identity_of(found.get("plan")))
            raise PlanDiffers(
                f"{escape(str(self.folder))} is the partial output of another plan: {difference}",
                hint="run the earlier command again to finish it, or give --restart to throw it away",
            )
        self._clear()
        document = {"fingerprint": plan.fingerprint, "plan": plan.to_json()}
        write_whole(self.folder / PLAN, json.dumps(document).encode())
        return []

    def _earlier_plan(self) -> Mapping[str, Any] | None:
        try:
            found = json.loads((self.folder / PLAN).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _clear(self) -> None:
        """Empty the folder of whatever an abandoned run left."""
        for entry in self.folder.iterdir():
            if entry.name == LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def commit(self, temporary: Path, record: ShardRecord) -> None:
        """Give a finished, flushed shard its name, then note it."""
        publish(temporary, self.folder / record.name)
        self.note(record)

    def note(self, record: Record) -> None:
        """Append a line to the journal and flush it."""
        try:
            write_all(self._journal, msgspec.json.encode(record) + b"\n")
            os.fsync(self._journal)
        except OSError as error:
            raise write_failure(self.folder / JOURNAL, error) from None
        self.records.append(record)

    def publish(self) -> None:
        """Rename the folder, which must be complete, to the output's name."""
        os.close(self._journal)
        self._journal = -1
        try:
            fsync_folder(self.folder)
            self._swap()
            fsync_folder(self.out.parent)
            _remove_own(self.out)
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
        except OSError as error:
            raise write_failure(self.out, error) from None

    def _swap(self) -> None:
        """The folder becomes the output; an output that stood there moves aside until that is durable."""
        if self.out.exists() and self._replaced.exists():
            shutil.rmtree(self._replaced)
        if not self.out.exists() or not any(self.out.iterdir()):
            os.rename(self.folder, self.out)
        elif exchange(self.folder, self.out):
            os.rename(self.folder, self._replaced)
        else:
            os.rename(self.out, self._replaced)
            os.rename(self.folder, self.out)

    @property
    def _replaced(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial.replaced")

    @property
    def has_shards(self) -> bool:
        """Whether there is work here that a later run can keep."""
        return any(isinstance(r, ShardRecord) for r in _read_journal(self.folder))

    def discard(self) -> None:
        """Throw the partial output away."""
        self._clear()
        (self.folder / LOCK).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return  # another run has just taken the folder over

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal >= 0:
            os.close(self._journal)
        self._release()


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise `OutputExists` for a folder that holds something and is not to be replaced."""
    if out.exists() and not overwrite and any(out.iterdir()):
        raise OutputExists(
            f"{escape(str(out))} exists", hint="choose another --out, or give --overwrite to replace it when done"
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _read_journal(folder: Path) -> list[Record]:
    """The records up to the first line that a crash cut short."""
    records: list[Record] = []
    try:
        lines = (folder / JOURNAL).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return records
    for line in lines[:-1]:
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except msgspec.MsgspecError:
            break
    return records


def already_published(plans: Mapping[Path, Plan]) -> dict[Path, Manifest]:
    """The outputs that an earlier run gave their names before it was killed, while others still waited for theirs."""
    finished: dict[str, str] = {}
    for out in plans if len(plans) > 1 else ():
        for record in (*_read_journal(_partial(Path(os.path.abspath(out)))), *_read_journal(out)):
            if isinstance(record, FinishedRecord):
                finished |= record.manifests
    found = {}
    for out, plan in plans.items():
        path = out / manifest.NAME
        _clean_published(out)
        if plan.fingerprint not in finished or not path.is_file():
            continue
        if hash_file(path, ("xxh3_128",))[1]["xxh3_128"] == finished[plan.fingerprint]:
            found[out] = manifest.read_manifest(path)
    return found


def _clean_published(out: Path) -> None:
    """After a crash right after the rename the output is whole, only our own files are still in it."""
    if (out / LOCK).exists():
        os.close(take_lock(out / LOCK))
        _remove_own(out)


def _remove_own(folder: Path) -> None:
    for name in (JOURNAL, PLAN, LOCK):
        (folder / name).unlink(missing_ok=True)
    fsync_folder(folder)


def take_lock(path: Path) -> int:
    """An exclusive lock on `path`, let go by the kernel when this process ends; raises `Locked`.

    Where the file system has no locks, the process named in the file is asked for instead.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_failure(path, error) from None
    holder = os.pread(fd, 4096, 0)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except OSError as error:
        no_locks = error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
        held = not no_locks or _is_alive(holder)
    if held or not _is_linked(fd, path):
        os.close(fd)
        raise Locked(
            f"{escape(str(path.parent))} is being written by {_describe(holder)}",
            hint="wait for it, or stop it; the same command continues where it stops",
        )
    try:
        os.ftruncate(fd, 0)
        write_all(fd, json.dumps({"pid": os.getpid(), "host": platform.node(), "boot": _boot_id()}).encode())
    except OSError as error:
        os.close(fd)
        raise write_failure(path, error) from None
    return fd


def _is_linked(fd: int, path: Path) -> bool:
    """Whether the locked file still is the one at `path`, not one that a finished run has moved away."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_alive(holder: bytes) -> bool:
    try:
        found = json.loads(holder)
        if found["host"] != platform.node():
            return True
        if found["boot"] != _boot_id():
            return False
        os.kill(int(found["pid"]), 0)
    except (ValueError, KeyError, TypeError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _describe(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f"process {int(found['pid'])} on {escape(str(found['host']))}"
    except (ValueError, KeyError, TypeError):
        return "another process"
