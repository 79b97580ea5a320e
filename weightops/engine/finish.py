"""The end of a run: expectations, index, sidecars, documents, and the manifest, which is written last."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from weightops.checkpoint import Sidecar, Written
from weightops.engine.ending import Ending
from weightops.engine.finished import PLAN, SOURCES, sources_mark
from weightops.engine.records import ShardRecord
from weightops.errors import CorruptInput, Differs
from weightops.formats.proofs import manifest
from weightops.io.digests import FileDigests, hash_bytes, new_hasher
from weightops.io.escape import escape
from weightops.ops.measures.loss import Loss
from weightops.plan import Expectation, Origin
from weightops.spec import TensorSpec
from weightops.stores.reader import FileReader
from weightops.stores.store import WritableStore
from weightops.version import library_versions

_PIECE_NBYTES = 1 << 20


def finish(
    ending: Ending,
    store: WritableStore,
    records: Mapping[str, ShardRecord],
    watched: Mapping[str, str],
    fetched: Mapping[str, FileDigests],
) -> manifest.Manifest:
    """Write everything but the shards and the manifest, which is to be written last, and is given back.

    `watched` are digests by label, also those that other outputs of the run have seen; `fetched` are the sidecars from
    servers, which are there already.
    """
    specs = ending.specs
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
    for name, sidecar in ending.sidecars.items():
        if name not in fetched:
            small[name] = _write_sidecar(sidecar, store, name, ending.digests)
    if ending.index is not None and ending.index_name is not None:
        small[ending.index_name] = write_small(store, ending.index_name, ending.index, ending.digests)
    documents = ending.documents
    for document in documents:
        so_far = {r.name: r.digests for r in records.values()} | {n: f.digests for n, f in small.items()}
        data = document.render(tensors, witnesses, so_far)
        small[document.name] = write_small(store, document.name, data, ending.digests)
    loose = {document.name for document in documents if not document.is_listed}
    check_expected(ending.expect, {name: file.digests for name, file in small.items()}, {})
    made_by = {PLAN: ending.mark, SOURCES: sources_mark(samples, ending.remote)}
    return manifest.Manifest(
        schema=manifest.SCHEMA,
        content_id=manifest.content_id(tensors),
        files={
            **{r.name: manifest.FileEntry(nbytes=r.nbytes, digests=r.digests) for r in records.values()},
            **{n: manifest.FileEntry(nbytes=f.nbytes, digests=f.digests) for n, f in small.items() if n not in loose},
        },
        tensors={
            name: manifest.TensorEntry(dtype=dtype, shape=shape, xxh3_128=digests[name], file=file)
            for file, shard in ending.shards.items()
            for name, (dtype, shape) in shard.tensors.items()
        },
        losses=losses,
        notes=notes,
        recipe=ending.recipe,
        sources={o.role: manifest.SourceEntry(name=o.name, content_id=o.identify(witnesses)) for o in ending.origins},
        provenance={**library_versions(), **(ending.provenance or made_by)},
    )


def check_expected(
    expect: Expectation | None, files: Mapping[str, Mapping[str, str]], tensors: Mapping[str, str]
) -> None:
    """Hold the digests of files and tensors that were written against the expected ones; raises `Differs`."""
    if expect is None:
        return
    wrong = [
        f"{escape(name)} has {algorithm} {found[algorithm]}, expected {digest}"
        for name, found in files.items()
        for algorithm, digest in expect.files.get(name, {}).items()
        if found[algorithm] != digest
    ]
    wrong += [
        f"{escape(name)} has xxh3_128 {found}, expected {expect.tensors[name]}"
        for name, found in tensors.items()
        if expect.tensors.get(name, found) != found
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise Differs(
            f"not as {escape(expect.source)} expects: {wrong[0]}{more}; nothing was published",
            hint="check raw and diff against their own lists with `weightops verify`",
        )


def seen(origins: Iterable[Origin], records: Iterable[ShardRecord]) -> dict[str, str]:
    """Digests by label of the sources that these shards have read, or hold as they were; raises `CorruptInput`."""
    found: dict[str, str] = {}
    written: dict[str, str] = {}
    for record in records:
        found |= record.witnesses
        written |= record.tensors
    for origin in origins:
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
        for piece in reader.blocks(file, _PIECE_NBYTES):
            for hasher in hashers.values():
                hasher.update(piece)
            write(bytes(piece))
        reader.check_unchanged()
    return FileDigests(file.nbytes, {algorithm: hasher.hexdigest() for algorithm, hasher in hashers.items()})
