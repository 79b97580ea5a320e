"""Running a plan to its end: checks, shards, index, sidecars, manifest, publication."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path

from weightops.checkpoint import Copied, Written
from weightops.engine.control import Control
from weightops.engine.digest import in_threads, watch
from weightops.engine.limits import available_memory, peak_memory
from weightops.engine.proof import fetch_sidecars, note_proven, prove
from weightops.engine.staging import Record, ShardRecord, Staging, WatchRecord
from weightops.engine.stream import BLOCK_NBYTES, write_file
from weightops.errors import CorruptInput, Differs, NoRoom, UsageError, WeightopsError
from weightops.formats import manifest
from weightops.io.atomic import write_whole
from weightops.io.digests import hash_bytes, hash_file
from weightops.io.escape import escape
from weightops.io.source import read_source
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.loss import Loss
from weightops.ops.witness import Witness
from weightops.plan import Plan, Shard
from weightops.spec import TensorSpec
from weightops.versions import library_versions

_SPARE_NBYTES = 16 << 20
"""Disk kept free beyond the output: file system metadata, index, manifest."""


@dataclass(frozen=True)
class Outcome:
    """A published output."""

    out: Path
    manifest: manifest.Manifest
    resumed: tuple[str, ...]
    """Shards that an earlier run had committed."""
    warnings: tuple[str, ...] = ()


def default_workers(plan: Plan) -> int:
    """Shards in work at once: two keep a fast disk busy, four the fastest; more only cost memory.

    One if anything comes from a server: then its files are read in the order of their bytes, as their digests need.
    """
    return 1 if plan.is_remote else min(4, os.cpu_count() or 1)


def preflight(plan: Plan, out: Path, workers: int) -> None:
    """Refuse what is known to fail: an output among the inputs, too little disk, too little memory."""
    target = out.resolve()
    for file in plan.sources:
        if file.is_remote:
            continue
        folder = Path(file.path).resolve().parent
        if folder == target or folder in target.parents or target in folder.parents:
            raise UsageError(
                f"the output {escape(str(out))} and the input {escape(str(folder))} lie inside one another",
                hint="choose an --out outside the inputs",
            )
    free = free_disk(out)
    needed = plan.total_nbytes + _SPARE_NBYTES - taken_disk(target.with_name(target.name + ".partial"), "*")
    if needed > free:
        raise NoRoom(f"{escape(str(out))}: the output needs {needed} bytes of disk, {free} are free")
    memory, available = peak_memory(plan, workers), available_memory()
    if memory > available:
        raise NoRoom(
            f"{workers} workers need {memory} bytes of memory, {available} are available", hint="give fewer --workers"
        )


def free_disk(out: Path) -> int:
    """Bytes free where `out` will be, also when its folders do not exist yet."""
    return shutil.disk_usage(next(p for p in out.resolve().parents if p.exists())).free


def taken_disk(folder: Path, pattern: str) -> int:
    """Bytes on disk of the files that match; another run may rename any of them while this one counts."""
    nbytes = 0
    for name in glob(pattern, root_dir=folder):
        with suppress(FileNotFoundError):
            nbytes += (folder / name).stat().st_blocks * 512
    return nbytes


def run(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    control: Control | None = None,
) -> Outcome:
    """Write what `plan` describes to the folder `out`, which appears only when it is whole.

    After a crash the same call continues: committed shards are checked against the journal and kept. Files on
    servers are read through the control's `web`.
    Raises any of `weightops.errors`; `out` is untouched then.
    """
    control = control or Control()
    workers = workers or default_workers(plan)
    if plan.is_remote and control.web is None:
        raise UsageError("a source is on a server", hint="give the control a Web to read it through")
    preflight(plan, out, workers)
    with Staging(out, plan, overwrite=overwrite, restart=restart) as staging:
        try:
            fetched = fetch_sidecars(plan, control)
            watched = _watch(plan, staging, workers, control)
            records, resumed = _write_shards(plan, staging, workers, control)
            warnings = prove(plan, staging, control)
            finished = _finish(plan, staging, records, watched, fetched)
        except WeightopsError as error:
            if not staging.has_shards or isinstance(error, Differs):
                staging.discard()
            raise
        finally:
            _forget(plan, control)
        staging.publish()
    return Outcome(out, finished, resumed, warnings)


def _forget(plan: Plan, control: Control) -> None:
    """The next run reads the files anew, and has to prove them anew."""
    if control.web is not None:
        for file in plan.sources:
            control.web.ranges.forget(file)


def _watch(plan: Plan, staging: Staging, workers: int, control: Control) -> dict[str, str]:
    """Evaluate the tensors to be watched first; nothing is written before they are as expected."""
    for record in staging.records:
        if isinstance(record, WatchRecord):
            return record.witnesses
    witnesses: dict[str, str] = {}
    if plan.watch:
        witnesses = watch("checking", plan.watch, workers, control)
        staging.note(WatchRecord(witnesses=witnesses))
        note_proven(plan, staging, control.web)
    return witnesses


def _write_shards(
    plan: Plan, staging: Staging, workers: int, control: Control
) -> tuple[dict[str, ShardRecord], tuple[str, ...]]:
    """Write the shards that are not committed yet; records of all, and the names of those that were."""
    control.progress.start("writing", plan.total_nbytes)
    records = _committed(plan, staging.records, staging.folder, control)
    resumed = tuple(records)

    def write(shard: Shard, control: Control) -> None:
        control.check()
        temporary = staging.folder / f".{shard.name}.tmp"
        record = write_shard(plan, shard, temporary, control)
        _check_expected(plan, {record.name: record.digests}, record.tensors)
        staging.commit(temporary, record)
        note_proven(plan, staging, control.web)
        records[shard.name] = record
        control.progress.finish_file(shard.name, record.nbytes, resumed=False)

    in_threads(workers, control, [partial(write, shard) for shard in plan.shards if shard.name not in records])
    control.progress.stop()
    return records, resumed


def _committed(plan: Plan, journal: Iterable[Record], folder: Path, control: Control) -> dict[str, ShardRecord]:
    """The journalled shards that really are there, by size and digest."""
    found = {}
    for record in journal:
        path = folder / record.name if isinstance(record, ShardRecord) else None
        if path is None or not isinstance(record, ShardRecord) or not path.is_file():
            continue
        if path.stat().st_size != record.nbytes or record.nbytes != plan.shard_nbytes.get(record.name):
            continue
        _, digests = hash_file(path, ("xxh3_128",))
        if digests["xxh3_128"] == record.digests["xxh3_128"]:
            found[record.name] = record
            control.progress.advance(record.nbytes)
            control.progress.finish_file(record.name, record.nbytes, resumed=True)
    return found


def write_shard(plan: Plan, shard: Shard, path: Path, control: Control) -> ShardRecord:
    """Write one shard to `path`: the unit of work, which depends on the plan and the shard's name alone."""
    with Evaluator(control.web, control.once) as read:
        written = write_file(path, plan.layout(shard), shard.tensors, read, plan.digests, control)
        _witness_rest(shard.tensors.values(), read, control)
        read.files.check_unchanged()
        return ShardRecord(
            name=shard.name,
            nbytes=written.nbytes,
            digests=written.digests,
            tensors=written.tensors,
            witnesses=read.witnesses,
            losses=read.losses,
            notes=read.notes,
        )


def _witness_rest(tensors: Iterable[LazyTensor], read: Evaluator, control: Control) -> None:
    """Read to their end the watched tensors of which the output needed only a part."""
    for tensor in tensors:
        for node in tensor.walk():
            if isinstance(node.op, Witness) and node.op.label not in read.witnesses:
                read.running.pop(node, None)
                for _ in read.drain(node, BLOCK_NBYTES):
                    control.check()


def _check_expected(plan: Plan, files: Mapping[str, Mapping[str, str]], tensors: Mapping[str, str]) -> None:
    """Hold the digests of files and tensors that were written against the expected ones."""
    if plan.expect is None:
        return
    wrong = [
        f"{escape(name)} has {algorithm} {found[algorithm]}, expected {digest}"
        for name, found in files.items()
        for algorithm, digest in plan.expect.files.get(name, {}).items()
        if found[algorithm] != digest
    ]
    wrong += [
        f"{escape(name)} has xxh3_128 {found}, expected {plan.expect.tensors[name]}"
        for name, found in tensors.items()
        if plan.expect.tensors.get(name, found) != found
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise Differs(
            f"not as {escape(plan.expect.source)} expects: {wrong[0]}{more}; nothing was published",
            hint="check raw and diff against their own lists with `weightops verify`",
        )


def _finish(
    plan: Plan,
    staging: Staging,
    records: Mapping[str, ShardRecord],
    watched: Mapping[str, str],
    fetched: Mapping[str, bytes],
) -> manifest.Manifest:
    """Write everything but the shards, the manifest last."""
    specs = {name: tensor.spec for name, tensor in plan.tensors}
    digests = {name: digest for record in records.values() for name, digest in record.tensors.items()}
    tensors: dict[str, tuple[TensorSpec, str]] = {name: (spec, digests[name]) for name, spec in specs.items()}
    witnesses = dict(watched)
    losses: dict[str, Loss] = {}
    notes: dict[str, dict[str, float]] = {}
    for record in records.values():
        witnesses |= record.witnesses
        losses |= {label: losses.get(label, Loss()) + loss for label, loss in record.losses.items()}
        notes |= record.notes
    small: dict[str, bytes] = {}
    index = plan.index()
    if index is not None and plan.index_name is not None:
        small[plan.index_name] = index
    for name, sidecar in plan.sidecars.items():
        small[name] = fetched[name] if name in fetched else _sidecar_bytes(sidecar)
    small_digests = {name: hash_bytes(data, plan.digests) for name, data in small.items()}
    file_digests = {record.name: record.digests for record in records.values()} | small_digests
    for document in plan.documents:
        small[document.name] = document.render(tensors, witnesses, file_digests)
        small_digests[document.name] = hash_bytes(small[document.name], plan.digests)
    for name, data in sorted(small.items()):
        write_whole(staging.folder / name, data)
    _check_expected(plan, small_digests, {})
    finished = manifest.Manifest(
        schema=manifest.SCHEMA,
        content_id=manifest.content_id(tensors),
        files={
            **{r.name: manifest.FileEntry(nbytes=r.nbytes, digests=r.digests) for r in records.values()},
            **{n: manifest.FileEntry(nbytes=len(data), digests=small_digests[n]) for n, data in small.items()},
        },
        tensors={
            name: manifest.TensorEntry(dtype=spec.dtype, shape=spec.shape, xxh3_128=digests[name], file=shard.name)
            for shard in plan.shards
            for name, spec in ((n, t.spec) for n, t in shard.tensors.items())
        },
        losses=losses,
        notes=notes,
        recipe=dict(plan.recipe),
        provenance=library_versions(),
    )
    write_whole(staging.folder / manifest.NAME, finished.to_bytes())
    return finished


def _sidecar_bytes(sidecar: Copied | Written) -> bytes:
    if isinstance(sidecar, Written):
        return sidecar.data
    file, data = read_source(Path(sidecar.file.path))
    if file != sidecar.file:
        raise CorruptInput(f"{file.shown}: changed since the plan was made")
    return data
