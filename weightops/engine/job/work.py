"""One group of a job, done by whoever takes it: any number of times, anywhere, also twice at once.

The bytes are the same whoever writes them, each attempt writes under a name of its own, and a shard has its name once
it is whole and durable. The record of the group comes last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import msgspec

from weightops.engine.control import Control
from weightops.engine.digest import watch
from weightops.engine.finish import check_expected
from weightops.engine.job.documents import JOB, Group, GroupRecord, find_record, read_group, record_name
from weightops.engine.job.place import OpenJob
from weightops.engine.proof import prove_files
from weightops.engine.records import ShardRecord
from weightops.engine.run import write_group
from weightops.errors import CorruptInput, UploadGone, WeightopsError
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.plan import Plan, Shard

_LOG = logging.getLogger(__name__)


def work(place: str, number: int, control: Control, *, threads: int | None = None, roots: Iterable[str] = ()) -> bool:
    """Do a group of the job at `place`, unless it is done; whether there was anything to do.

    Outputs must lie beside the job, or below one of `roots`. Raises what reading and writing raises, and as
    `OpenJob`, `read_group` and `Output.refuse_lost` do; the record is there, or the group can be done again.
    """
    with control.stores.connected():
        job = OpenJob(place, control.stores)
        job.refuse_elsewhere(roots)
        return work_on(job, number, control, threads or os.cpu_count() or 1)


def work_on(job: OpenJob, number: int, control: Control, threads: int) -> bool:
    """As `work`, in a job that is open."""
    record = find_record(job.store, job.document, number)
    if record is not None and stands(job, record):
        _LOG.info("group %d of %s is done already", number, escape(job.place))
        return False
    group = read_group(job.store, job.document, number)
    try:
        done = _carry_out(job, group, number, control, threads)
    except UploadGone:
        # Whoever did the same meanwhile, and ended the job, has given up what came too late.
        record = find_record(job.store, job.document, number)
        if (record is None or not stands(job, record)) and not all(output.manifest() for output in job.outputs):
            raise
        return False
    job.store.put(record_name(number), msgspec.json.encode(done))
    if job.is_own and job.store.find(JOB) is None:
        job.store.remove(record_name(number))  # too late: another process has ended the job, and removed it
    return True


def stands(job: OpenJob, record: GroupRecord) -> bool:
    """Whether the shards of a record are there, by their sizes; what was published is."""
    return all(job.outputs[output].has(shard) for output, shards in record.shards.items() for shard in shards)


def _carry_out(job: OpenJob, group: Group, number: int, control: Control, threads: int) -> GroupRecord:
    try:
        plans, watched = group.plans, group.watched
        nbytes = sum(plan.total_nbytes for plan in plans.values())
        for shard in (shard for plan in plans.values() for shard in plan.shards):
            check_relative(shard.name, escape(job.place))
    except WeightopsError:
        raise
    except Exception as error:  # whatever an op raises for inputs that no plan gives it
        what = f"{type(error).__name__}: {error}"
        raise CorruptInput(f"{escape(job.place)}: group {number} is not well-formed ({escape(what)})") from None
    for output in plans:
        if output not in range(len(job.outputs)):
            raise CorruptInput(f"{escape(job.place)}: group {number} is of output {output}, and there is none")
        job.outputs[output].refuse_lost()
    witnesses = watch("checking", watched, threads, control) if watched else {}
    if group.prove:
        prove_files(group.prove, control)
    control.progress.start("writing", nbytes)
    try:
        shards = _write(job, plans, control, threads)
    except (WeightopsError, MemoryError):
        raise
    except Exception as error:  # an op that nobody has planned like that
        what = f"{type(error).__name__}: {error}"
        raise WeightopsError(f"{escape(job.place)}: group {number} cannot be computed ({escape(what)})") from error
    control.progress.stop()
    return GroupRecord(job=job.document.fingerprint, shards=shards, witnesses=witnesses)


def _write(job: OpenJob, plans: dict[int, Plan], control: Control, threads: int) -> dict[int, tuple[ShardRecord, ...]]:
    """Write the shards of a group, and give them their names when all are right."""
    members: list[tuple[int, Plan, Shard]] = [(o, plan, shard) for o, plan in plans.items() for shard in plan.shards]
    if not members:
        return {}
    written = write_group([(plan, shard, job.outputs[o].store) for o, plan, shard in members], control, threads)
    records: dict[int, tuple[ShardRecord, ...]] = {}
    try:
        for (_, plan, _), (_, record) in zip(members, written, strict=True):
            check_expected(plan.expect, {record.name: record.digests}, record.tensors)
        for (output, _, _), (target, record) in zip(members, written, strict=True):
            target.commit()
            control.progress.finish_file(record.name, record.nbytes, resumed=False)
            records[output] = (*records.get(output, ()), record)
    except BaseException:
        for target, _ in written:
            target.abandon()
        raise
    return records
