"""The files of a job, which any machine that sees them can work from.

    JOB/job.json             what it is: fingerprint, outputs, number of groups
    JOB/groups/00017.json    a group: the shards of one or several outputs that are written side by side, and all that
                             these need; or tensors to be checked, or files to be proven, that no shard reads whole
    JOB/outputs/0.json       of an output what is left to do when all its shards are there
    JOB/records/00017.json   a group that is done, whole or absent; written after its shards are durable
    JOB/finished.json        all outputs have their names

A task is two texts, the job's place and a group's number. A worker reads job.json and its own group.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import msgspec

from weightops.engine.ending import Ending
from weightops.engine.kinds import import_kinds
from weightops.engine.records import ShardRecord
from weightops.errors import CorruptInput, SourceMissing, UsageError, WeightopsError
from weightops.io.atomic import final_of
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.plan import Plan
from weightops.stores.places import is_url
from weightops.stores.store import PROBES, WritableStore
from weightops.version import __version__

JOB, FINISHED = "job.json", "finished.json"
_MAX_GROUPS = 1_000_000
"""More than any model has files."""
_FOLDERS = ("groups/", "outputs/", "records/")
_Document = TypeVar("_Document", bound=msgspec.Struct)


class JobOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What the job makes, and where: an absolute path, or the URL of a bucket and prefix."""

    out: str
    is_file: bool
    overwrite: bool
    fingerprint: str


class Job(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-job/1"):
    """`job.json`. Only the version that wrote it works on a job: another may write other bytes."""

    fingerprint: str
    version: str
    outputs: tuple[JobOutput, ...]
    groups: int
    warnings: tuple[str, ...] = ()


class Group(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-job-group/1"):
    """A unit of work: parts of plans by the number of their output, and what else has to be read to its end.

    `modules` know the ops.
    """

    job: str
    modules: tuple[str, ...] = ()
    parts: dict[int, dict[str, Any]] = {}
    watch: tuple[dict[str, Any], ...] = ()
    prove: tuple[SourceFile, ...] = ()

    @property
    def plans(self) -> dict[int, Plan]:
        import_kinds(self.modules)
        return {output: Plan.from_json(part) for output, part in self.parts.items()}

    @property
    def watched(self) -> list[LazyTensor]:
        import_kinds(self.modules)
        return [LazyTensor.from_json(document) for document in self.watch]


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-job-record/1"):
    """A group that is done: its shards by the number of their output, and digests of what it watched, by label."""

    job: str
    shards: dict[int, tuple[ShardRecord, ...]] = {}
    witnesses: dict[str, str] = {}


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-job-finished/1"):
    """All outputs have their names; their content ids in the order of the outputs."""

    job: str
    content_ids: tuple[str | None, ...]


def group_name(number: int) -> str:
    """The file that says what a group is."""
    return f"groups/{number:05}.json"


def record_name(number: int) -> str:
    """The file that says what a group has made."""
    return f"records/{number:05}.json"


def ending_name(output: int) -> str:
    """The file that says how an output ends."""
    return f"outputs/{output}.json"


def is_of_job(name: str) -> bool:
    """Whether a job makes a file of this name in its folder, for good or for a while."""
    name = final_of(name) or name
    return name in (JOB, FINISHED) or name.startswith(PROBES) or (name.startswith(_FOLDERS) and name.endswith(".json"))


def read_job(store: WritableStore) -> Job:
    """The job in a store; raises `SourceMissing`, `CorruptInput`, `UsageError` for one of another version."""
    data = store.find(JOB)
    if data is None:
        raise SourceMissing(f"{store.shown}: there is no job", hint="`weightops run RECIPE --job JOB` writes one")
    job = decode(store, JOB, data, Job)
    if job.version != __version__:
        raise UsageError(
            f"{store.shown}: the job was written by weightops {escape(job.version)}, this is {__version__}",
            hint="use one version on all machines",
        )
    if not 0 <= job.groups <= _MAX_GROUPS:
        raise CorruptInput(f"{store.shown}/{JOB}: {job.groups} groups, at most {_MAX_GROUPS} are read")
    for output in job.outputs:
        if "\0" in output.out or not (is_url(output.out) or os.path.isabs(output.out)):
            raise CorruptInput(f"{store.shown}/{JOB}: {escape(output.out)!r} is no place of an output")
    return job


def read_group(store: WritableStore, job: Job, number: int) -> Group:
    """A group of the job; raises as `read_job` does."""
    if not 0 <= number < job.groups:
        raise UsageError(f"{store.shown}: there is no group {number}", hint=f"groups are 0 to {job.groups - 1}")
    return _of_job(store, job, group_name(number), Group)


def read_ending(store: WritableStore, job: Job, output: int) -> Ending:
    """How an output ends; raises as `read_job` does."""
    name = ending_name(output)
    return decode(store, name, _written(store, name), Ending)


def find_record(store: WritableStore, job: Job, number: int) -> GroupRecord | None:
    """What a group has made, if it is done."""
    name = record_name(number)
    data = store.find(name)
    if data is None:
        return None
    record = decode(store, name, data, GroupRecord)
    return _held(store, job, name, record)


def _of_job(store: WritableStore, job: Job, name: str, kind: type[Group]) -> Group:
    return _held(store, job, name, decode(store, name, _written(store, name), kind))


_Owned = TypeVar("_Owned", Group, GroupRecord)


def _held(store: WritableStore, job: Job, name: str, found: _Owned) -> _Owned:
    if found.job != job.fingerprint:
        raise CorruptInput(f"{store.shown}/{name}: belongs to another job than {JOB} beside it")
    return found


def _written(store: WritableStore, name: str) -> bytes:
    data = store.find(name)
    if data is None:
        raise WeightopsError(
            f"{store.shown}/{name}: is missing, so that the job is not written to its end",
            hint="run the command that writes the job once more: it adds what is missing",
        )
    return data


def decode(store: WritableStore, name: str, data: bytes, kind: type[_Document]) -> _Document:
    """The document in a job's file; raises `CorruptInput`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptInput(f"{store.shown}/{name}: is no such file of a job ({escape(str(error))})") from None
