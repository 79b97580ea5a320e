"""The end of a job: every record there, all of it as it has to be, the rest of the files, and names."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from weightops.engine.control import Control
from weightops.engine.ending import Ending
from weightops.engine.finish import finish as finish_files
from weightops.engine.finish import seen
from weightops.engine.job.documents import (
    FINISHED,
    JOB,
    Finished,
    decode,
    ending_name,
    find_record,
    is_of_job,
    read_ending,
    record_name,
)
from weightops.engine.job.outputs import Output
from weightops.engine.job.place import OpenJob
from weightops.engine.job.work import stands
from weightops.engine.proof import fetch_sidecars
from weightops.engine.records import ShardRecord
from weightops.errors import Claimed, CorruptInput, Differs, Locked, Unfinished, WeightopsError
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.io.escape import escape
from weightops.stores.store import WritableStore

_WAIT_S, _PATIENCE_S = 0.2, 120.0


@dataclass(frozen=True)
class Published:
    """An output of a job that has its name."""

    out: str
    manifest: Manifest


@dataclass
class _Work:
    """An output on its way to its name."""

    output: Output
    ending: Ending
    records: dict[str, ShardRecord]
    store: WritableStore | None = None


def finish(place: str, control: Control, *, roots: Iterable[str] = ()) -> list[Published]:
    """Prove a job, and give its outputs their names; any number of times, also by several at once.

    Raises `Unfinished` if groups are missing, `CorruptInput` and `Differs` for what is not as it should be, and what
    writing raises.
    """
    with control.stores.connected() as stores:
        job = OpenJob(place, stores)
        job.refuse_elsewhere(roots)
        give_up = time.monotonic() + _PATIENCE_S
        while True:
            control.check()
            done = job.store.find(FINISHED)
            if done is not None:
                return _published(job, decode(job.store, FINISHED, done, Finished))
            try:
                finished = _finish(job, control)
                if finished is not None:
                    return finished
            except Claimed:
                raise
            except Locked:
                if time.monotonic() > give_up:
                    raise
                time.sleep(_WAIT_S)  # another process finishes it


def _finish(job: OpenJob, control: Control) -> list[Published] | None:
    """Finish the job, and note that; what is published if another process has, and has removed the job since."""
    try:
        works, witnesses = _collect(job)
    except WeightopsError:
        there = [output.manifest() for output in job.outputs] if job.is_own else [None]
        if None in there:
            raise
        return [Published(each.out, m) for each, m in zip(job.document.outputs, there, strict=True) if m is not None]
    with ExitStack() as stack:
        for work in works:
            work.store = stack.enter_context(work.output.ending(work.ending.file_names, work.ending.shards))
        for work in works:
            witnesses |= seen(work.ending.origins, work.records.values())
        finished = [_complete(work, witnesses, control) for work in works]
        # Once the first has its name, the others are known to be whole.
        for work, made in zip(works, finished, strict=True):
            if work.store is not None:
                work.output.publish(made)
    done = Finished(job=job.document.fingerprint, content_ids=tuple(made.content_id for made in finished))
    job.store.put(FINISHED, msgspec.json.encode(done))
    return None


def _collect(job: OpenJob) -> tuple[list[_Work], dict[str, str]]:
    """What has been done, by output, and digests by label; raises `Unfinished`."""
    document = job.document
    works = [_Work(o, read_ending(job.store, document, i), {}) for i, o in enumerate(job.outputs)]
    witnesses: dict[str, str] = {}
    missing = []
    there = set(job.store.listed("records"))
    for number in range(document.groups):
        record = find_record(job.store, document, number) if record_name(number) in there else None
        if record is None or not stands(job, record):
            missing.append(number)
            continue
        witnesses |= record.witnesses
        for output, shards in record.shards.items():
            works[output].records |= {shard.name: shard for shard in shards}
    if missing:
        shown, listed = escape(job.place), _ranges(missing)
        raise Unfinished(
            f"{shown}: {len(missing)} of {document.groups} groups are not done: {listed}",
            tuple(missing),
            hint=f"do them, `weightops work {shown} --group K` or `sbatch --array={listed}`, and finish once more",
        )
    for work in works:
        _hold(job, work)
    return works, witnesses


def _hold(job: OpenJob, work: _Work) -> None:
    """Raise `CorruptInput` unless the records are of the very shards that the output has."""
    odd = min(work.records.keys() ^ work.ending.shards.keys(), default=None)
    if odd is not None:
        raise CorruptInput(f"{escape(job.place)}: its records and its plan differ in {escape(odd)}")
    for name, record in work.records.items():
        shard = work.ending.shards[name]
        if not shard.least_nbytes <= record.nbytes <= shard.nbytes or record.tensors.keys() != shard.tensors.keys():
            raise CorruptInput(f"{escape(job.place)}: the record of {escape(name)} is not of the file that was planned")


def _complete(work: _Work, witnesses: dict[str, str], control: Control) -> Manifest:
    """Write what is not shards, and say what is in the output; of one that has its name already, its manifest."""
    if work.store is None:
        return _made(work)
    for name, record in work.records.items():
        nbytes = work.store.identity(name).nbytes
        if nbytes != record.nbytes:
            raise Differs(f"{work.output.shown}: {escape(name)} has {nbytes} bytes, its record says {record.nbytes}")
    fetched = fetch_sidecars(work.ending.sidecars, work.ending.digests, work.store, control)
    return finish_files(work.ending, work.store, work.records, witnesses, fetched)


def made_already(job: OpenJob) -> frozenset[int]:
    """The outputs that have their names, as the job has made them; none as long as groups are not done."""
    there, document = set(job.store.listed("")), job.document
    if FINISHED in there:
        return frozenset(range(len(job.outputs)))
    needed = {*map(record_name, range(document.groups)), *map(ending_name, range(len(job.outputs)))}
    if not needed <= there:
        return frozenset()
    try:
        works, _ = _collect(job)
    except Unfinished:
        return frozenset()
    return frozenset(number for number, work in enumerate(works) if _find_made(work) is not None)


def _find_made(work: _Work) -> Manifest | None:
    """The manifest of what has the output's name, if that is what the records say."""
    digests = {name: digest for record in work.records.values() for name, digest in record.tensors.items()}
    expected = manifest.content_id({name: (spec, digests[name]) for name, spec in work.ending.specs.items()})
    made = work.output.manifest()
    return made if made is not None and made.content_id == expected else None


def _made(work: _Work) -> Manifest:
    """As `_find_made`, for an output that is no longer being made."""
    made = _find_made(work)
    if made is None:
        raise Differs(
            f"{work.output.shown}: is no longer being made by this job, and is not what it makes",
            hint="give the job up with `weightops finish JOB --abandon`, and write it anew",
        )
    return made


def _published(job: OpenJob, done: Finished) -> list[Published]:
    """The outputs of a job that is finished, without its traces; raises `Differs` if they have been changed since."""
    found = []
    for output, each, content_id in zip(job.outputs, job.document.outputs, done.content_ids, strict=True):
        output.clean()
        made = output.manifest()
        if made is None or made.content_id != content_id:
            raise Differs(
                f"{output.shown}: the job {escape(job.place)} was finished, and is not what is there now",
                hint="remove the job's folder, and write the job anew to make it again",
            )
        found.append(Published(each.out, made))
    if job.is_own:
        _remove(job)
    return found


def abandon(place: str, control: Control, *, roots: Iterable[str] = ()) -> None:
    """Give a job up: remove what it has made, and its own files; outputs that have their names stay."""
    with control.stores.connected() as stores:
        job = OpenJob(place, stores)
        job.refuse_elsewhere(roots)
        for number, output in enumerate(job.outputs):
            is_written = job.store.find(ending_name(number)) is not None
            output.abandon(read_ending(job.store, job.document, number).file_names if is_written else ())
        _remove(job)


def _remove(job: OpenJob) -> None:
    """Remove the files of a job, what says what it is last: without it the rest would be nobody's."""
    names = [name for name in job.store.listed("") if is_of_job(name) and name not in (FINISHED, JOB)]
    for name in (*names, FINISHED, JOB):
        job.store.remove(name)


def _ranges(numbers: list[int]) -> str:
    """Numbers in order as schedulers write them: 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
