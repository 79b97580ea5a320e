"""Running plans to their end: checks, shards, index, sidecars, manifest, publication."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightops.engine.control import Control
from weightops.engine.digest import in_threads, watch
from weightops.engine.ending import ending_of
from weightops.engine.finish import check_expected, finish, seen
from weightops.engine.joint import group
from weightops.engine.preflight import default_workers, preflight
from weightops.engine.proof import fetch_sidecars, note_proven, prove
from weightops.engine.records import Record, ShardRecord, WatchRecord
from weightops.engine.sample import sample
from weightops.engine.staging import Staging, published
from weightops.engine.stream import BLOCK_NBYTES, File, write_files
from weightops.engine.work_folder import WorkFolder
from weightops.errors import Differs, OutputExists, WeightopsError
from weightops.formats.proofs import manifest
from weightops.io.brief import brief
from weightops.io.digests import FileDigests, hash_file
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.measures.loss import losses_of
from weightops.ops.measures.witness import Witness
from weightops.plan import Plan, Shard, sources_of
from weightops.stores.reader import FileReader
from weightops.stores.store import Target, WritableStore

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A published output."""

    out: Path
    manifest: manifest.Manifest
    resumed: tuple[str, ...]
    """Shards that an earlier run had committed."""
    warnings: tuple[str, ...] = ()

    __repr__ = brief


class _Job:
    """One output in work: its plan, its partial folder, and what has been written so far."""

    def __init__(self, plan: Plan, staging: Staging) -> None:
        self.plan, self.staging = plan, staging
        self.records: dict[str, ShardRecord] = {}
        self.resumed: tuple[str, ...] = ()
        self.watched: dict[str, str] = {}
        self.fetched: dict[str, FileDigests] = {}
        self.warnings = staging.warnings
        self.is_wrong = False

    @property
    def missing(self) -> list[Shard]:
        """The shards that are still to be written."""
        return [shard for shard in self.plan.shards if shard.name not in self.records]


def run(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    control: Control | None = None,
) -> Outcome:
    """Write what `plan` describes to the folder `out`, as `run_all` does."""
    return run_all({out: plan}, workers=workers, overwrite=overwrite, restart=restart, control=control)[0]


def run_all(
    plans: Mapping[Path, Plan],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    control: Control | None = None,
    beside: Mapping[Path, WorkFolder] = {},
) -> list[Outcome]:
    """Write what each plan describes to its folder; all folders appear when all are whole.

    Shards of several outputs that are made of the same tensors are written side by side from one read.
    After a crash the same call continues: committed shards are checked against the journal and kept, and so is an
    output that got its name before the crash. Files on servers are read through the control's `stores`.
    `beside` are folders in which sources of an output were made, which are removed when it has its name.
    Raises any of `weightops.errors`; no folder is touched then.
    """
    control = control or Control()
    workers = workers or default_workers(list(plans.values()))
    preflight({out: plan for out, plan in plans.items() if published(out, plan) is None}, workers)
    with ExitStack() as stack:
        try:
            stagings = {
                out: stack.enter_context(
                    Staging(out, plan, overwrite=overwrite, restart=restart, beside=beside.get(out))
                )
                for out, plan in plans.items()
            }
        except OutputExists:
            for out in plans:
                Staging.clean_up_after(out)
            raise
        jobs = {out: _Job(plans[out], each) for out, each in stagings.items() if each.published is None}
        manifests = dict(zip(jobs, _write(list(jobs.values()), workers, control), strict=True))
        # Once the first has its name, the others are known to be whole.
        for job in jobs.values():
            job.staging.finish()
        for job in jobs.values():
            job.staging.publish()
            _LOG.info("%s is complete, and has its name", escape(str(job.staging.out)))
        for staging in stagings.values():
            staging.clean()
        outcomes = []
        for out, staging in stagings.items():
            if staging.published is not None:
                outcomes.append(Outcome(out, staging.published, tuple(s.name for s in plans[out].shards)))
            else:
                outcomes.append(Outcome(out, manifests[out], jobs[out].resumed, jobs[out].warnings))
    return outcomes


def _write(jobs: Sequence[_Job], workers: int, control: Control) -> list[manifest.Manifest]:
    """Write everything into the partial folders; where nothing in one is worth keeping, a failure leaves none."""
    try:
        for job in jobs:
            job.fetched = fetch_sidecars(job.plan.sidecars, job.plan.digests, job.staging.store, control)
        _watch(jobs, workers, control)
        _write_shards(jobs, workers, control)
        digests: dict[str, str] = {}
        for job in jobs:
            with _at_fault(job):
                job.warnings += prove(job.plan, job.staging, control)
                digests |= job.watched | seen(job.plan.origins, job.records.values())
        manifests = []
        for job in jobs:
            with _at_fault(job):
                made = finish(ending_of(job.plan), job.staging.store, job.records, digests, job.fetched)
                job.staging.store.put(manifest.NAME, made.to_bytes())
                manifests.append(made)
        return manifests
    except WeightopsError as error:
        is_source_wrong = isinstance(error, Differs) and not any(job.is_wrong for job in jobs)
        for job in jobs:
            if job.is_wrong or is_source_wrong or not job.staging.has_shards:
                job.staging.discard()
        raise
    finally:
        for job in jobs:
            _forget(job.plan, control)


@contextmanager
def _at_fault(job: _Job) -> Iterator[None]:
    """Of an output that differs from what it should be nothing is kept; others may be continued."""
    try:
        yield
    except Differs:
        job.is_wrong = True
        raise


def _forget(plan: Plan, control: Control) -> None:
    """The next run reads the files anew, and has to prove them anew."""
    for file in plan.sources:
        control.stores.forget(file)


def _watch(jobs: Sequence[_Job], workers: int, control: Control) -> None:
    """Evaluate the tensors to be watched first; nothing is written before they are as expected."""
    wanted: dict[LazyTensor, None] = {}
    for job in jobs:
        noted = next((r.witnesses for r in job.staging.records if isinstance(r, WatchRecord)), None)
        if noted is not None:
            job.watched = noted
        else:
            wanted |= dict.fromkeys(job.plan.watch)
    if not wanted:
        return
    witnesses = watch("checking", list(wanted), workers, control)
    for job in jobs:
        if job.plan.watch and not job.watched:
            job.watched = witnesses
            with FileReader() as files:
                made_of = sample(job.plan.watch, files)
            job.staging.note(WatchRecord(sample=made_of, witnesses=witnesses))
            note_proven(job.plan, job.staging, control.stores)


def _write_shards(jobs: Sequence[_Job], workers: int, control: Control) -> None:
    """Write the shards that are not committed yet, those of several outputs that go together side by side."""
    control.progress.start("writing", sum(job.plan.total_nbytes for job in jobs))
    for job in jobs:
        job.records = _committed(job.plan, job.staging.records, job.staging.folder, control)
        job.resumed = tuple(job.records)
    missing = [job.missing for job in jobs]
    groups = group([[shard.tensors.values() for shard in shards] for shards in missing])
    threads = (os.cpu_count() or 1) // max(1, min(workers, len(groups)))

    def write(members: Sequence[tuple[_Job, Shard]], control: Control) -> None:
        control.check()
        for _, shard in members:
            files = ", ".join(escape(file.name) for file in sources_of(shard.tensors.values())) or "no file"
            _LOG.info("writing %s: %d tensors from %s", escape(shard.name), len(shard.tensors), files)
        written = write_group([(job.plan, shard, job.staging.store) for job, shard in members], control, threads)
        for (job, shard), (target, record) in zip(members, written, strict=True):
            with _at_fault(job):
                check_expected(job.plan.expect, {record.name: record.digests}, record.tensors)
            job.staging.commit(target, record)
            note_proven(job.plan, job.staging, control.stores)
            job.records[shard.name] = record
            control.progress.finish_file(shard.name, record.nbytes, resumed=False)

    in_threads(workers, control, [partial(write, [(jobs[i], missing[i][j]) for i, j in members]) for members in groups])
    control.progress.stop()


def _committed(plan: Plan, journal: Iterable[Record], folder: Path, control: Control) -> dict[str, ShardRecord]:
    """The journalled shards that really are there, by size and digest."""
    found = {}
    for record in journal:
        path = folder / record.name if isinstance(record, ShardRecord) else None
        if path is None or not isinstance(record, ShardRecord) or not path.is_file():
            continue
        if path.stat().st_size != record.nbytes or record.name not in plan.shard_nbytes:
            continue
        _, digests = hash_file(path, ("xxh3_128",))
        if digests["xxh3_128"] == record.digests["xxh3_128"]:
            found[record.name] = record
            control.progress.advance(record.nbytes)
            control.progress.finish_file(record.name, record.nbytes, resumed=True)
    return found


def write_group(
    shards: Sequence[tuple[Plan, Shard, WritableStore]], control: Control, threads: int
) -> list[tuple[Target, ShardRecord]]:
    """Write shards to stores, side by side: the unit of work, which depends on their plans alone."""
    with Evaluator(control.stores, control.once, threads) as read:
        files = [File(to, each.name, plan.layout(each), each.tensors, plan.digests) for plan, each, to in shards]
        written = write_files(files, read, control)
        _witness_rest((t for _, shard, _ in shards for t in shard.tensors.values()), read, control)
        read.files.check_unchanged()
        return [
            (
                result.target,
                ShardRecord(
                    name=shard.name,
                    nbytes=result.nbytes,
                    sample=sample(shard.tensors.values(), read.files),
                    digests=result.digests,
                    tensors=result.tensors,
                    witnesses=read.witnesses,
                    losses=losses_of(shard.tensors.values(), read),
                    notes=read.noted(shard.tensors.values()),
                ),
            )
            for (_, shard, _), result in zip(shards, written, strict=True)
        ]


def _witness_rest(tensors: Iterable[LazyTensor], read: Evaluator, control: Control) -> None:
    """Read to their end the watched tensors of which the output needed only a part."""
    for tensor in tensors:
        for node in tensor.walk():
            if isinstance(node.op, Witness) and node.op.is_needed and node.op.label not in read.witnesses:
                read.running.pop(node, None)
                for _ in read.drain(node, BLOCK_NBYTES):
                    control.check()
