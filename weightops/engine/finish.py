"""The end of a run: expectations, index, sidecars, documents, and the manifest, which is written last."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from weightops.checkpoint import Sidecar, Written
from weightops.engine.finished import marks
from weightops.engine.staging import ShardRecord, Staging
from weightops.errors import CorruptInput, Differs
from weightops.formats.proofs import manifest
from weightops.io.digests import FileDigests, hash_bytes, new_hasher
from weightops.io.escape import escape
from weightops.ops.measures.loss import Loss
from weightops.plan import Plan
from weightops.spec import TensorSpec
from weightops.stores.reader import FileReader
from weightops.stores.store import WritableStore
from weightops.version import library_versions

_PIECE_NBYTES = 1 << 20


def finish(
    plan: Plan,
    staging: Staging,
    records: Mapping[str, ShardRecord],
    watched: Mapping[str, str],
    fetched: Mapping[str, FileDigests],
) -> manifest.Manifest:
    """Write everything but the shards, the manifest last.

    `watched` are digests by label, also those that other outputs of the run have seen; `fetched` are the sidecars from
    servers, which are there already.
    """
    specs = {name: tensor.spec for name, tensor in plan.tensors}
    digests = {name: digest for record in records.values() for name, digest in record.tensors.items()}
    tensors: dict[str, tuple[TensorSpec, str]] = {name: (spec, digests[name]) for name, spec in specs.items()}
    samples = {name: record.sample for name, record in records.items()}
    witnesses = dict(watched)
    losses: dict[str, Loss] = {}
    notes: dict[str, dict[str, float]] = {}
    for record in records.values():
        witnesses |= record.witnesses
        losses |= {label: losses.get(label, Loss()) + loss for label, loss in record.losses.items()}
        notes |= record.notes
    small = dict(fetched)
    for name, sidecar in plan.sidecars.items():
        if name not in fetched:
            small[name] = _write_sidecar(sidecar, staging.store, name, plan.digests)
    index = plan.index()
    if index is not None and plan.index_name is not None:
        small[plan.index_name] = write_small(staging.store, plan.index_name, index, plan.digests)
    for document in plan.documents:
        so_far = {r.name: r.digests for r in records.values()} | {n: f.digests for n, f in small.items()}
        data = document.render(tensors, witnesses, so_far)
        small[document.name] = write_small(staging.store, document.name, data, plan.digests)
    loose = {document.name for document in plan.documents if not document.is_listed}
    check_expected(plan, {name: file.digests for name, file in small.items()}, {})
    finished = manifest.Manifest(
        schema=manifest.SCHEMA,
        content_id=manifest.content_id(tensors),
        files={
            **{r.name: manifest.FileEntry(nbytes=r.nbytes, digests=r.digests) for r in records.values()},
            **{n: manifest.FileEntry(nbytes=f.nbytes, digests=f.digests) for n, f in small.items() if n not in loose},
        },
        tensors={
            name: manifest.TensorEntry(dtype=spec.dtype, shape=spec.shape, xxh3_128=digests[name], file=shard.name)
            for shard in plan.shards
            for name, spec in ((n, t.spec) for n, t in shard.tensors.items())
        },
        losses=losses,
        notes=notes,
        recipe=dict(plan.recipe),
        sources={o.role: manifest.SourceEntry(name=o.name, content_id=o.identify(witnesses)) for o in plan.origins},
        provenance={**library_versions(), **(plan.provenance or marks(plan, samples))},
    )
    staging.store.put(manifest.NAME, finished.to_bytes())
    return finished


def check_expected(plan: Plan, files: Mapping[str, Mapping[str, str]], tensors: Mapping[str, str]) -> None:
    """Hold the digests of files and tensors that were written against the expected ones; raises `Differs`."""
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


def seen(plan: Plan, records: Iterable[ShardRecord]) -> dict[str, str]:
    """Digests by label of the sources that these shards have read, or hold as they were; raises `CorruptInput`."""
    found: dict[str, str] = {}
    written: dict[str, str] = {}
    for record in records:
        found |= record.witnesses
        written |= record.tensors
    for origin in plan.origins:
        for name, tensor in origin.tensors.items():
            if tensor.kept_as in written:
                found[tensor.label] = written[tensor.kept_as]
                if tensor.expect not in (None, written[tensor.kept_as]):
                    raise CorruptInput(
                        f"{escape(origin.name)}: {escape(name)} is not what {manifest.NAME} beside it says: "
                        f"expected xxh3_128 {tensor.expect}, found {written[tensor.kept_as]}",
                        hint="`weightops verify` says more",
                    )
    return found


def write_small(store: WritableStore, name: str, data: bytes, algorithms: Collection[str]) -> FileDigests:
    """Write a small file; its size and digests."""
    store.put(name, data)
    return FileDigests(len(data), hash_bytes(data, algorithms))


def _write_sidecar(sidecar: Sidecar, store: WritableStore, name: str, algorithms: Collection[str]) -> FileDigests:
    if isinstance(sidecar, Written):
        return write_small(store, name, sidecar.data, algorithms)
    file, hashers = sidecar.file, {algorithm: new_hasher(algorithm) for algorithm in algorithms}
    with FileReader() as reader, store.putting(name) as write:
        for start in range(0, file.nbytes, _PIECE_NBYTES):
            piece = reader.read(file, start, min(_PIECE_NBYTES, file.nbytes - start))
            for hasher in hashers.values():
                hasher.update(memoryview(piece))
            write(piece)
        reader.check_unchanged()
    return FileDigests(file.nbytes, {algorithm: hasher.hexdigest() for algorithm, hasher in hashers.items()})
