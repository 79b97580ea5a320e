"""The end of a run: expectations, index, sidecars, documents, and the manifest, which is written last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from weightops.checkpoint import Sidecar, Written
from weightops.engine.staging import ShardRecord, Staging
from weightops.errors import CorruptInput, Differs
from weightops.formats import manifest
from weightops.io.atomic import write_whole
from weightops.io.digests import hash_bytes
from weightops.io.escape import escape
from weightops.io.source import read_source
from weightops.ops.loss import Loss
from weightops.plan import Plan
from weightops.spec import TensorSpec
from weightops.versions import library_versions


def finish(
    plan: Plan,
    staging: Staging,
    records: Mapping[str, ShardRecord],
    watched: Mapping[str, str],
    fetched: Mapping[str, bytes],
) -> manifest.Manifest:
    """Write everything but the shards, the manifest last.

    `watched` are digests by label, also those that other outputs of the run have seen; `fetched` sidecars that came
    from servers.
    """
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
    loose = {document.name for document in plan.documents if not document.is_listed}
    for name, data in sorted(small.items()):
        write_whole(staging.folder / name, data)
    check_expected(plan, small_digests, {})
    finished = manifest.Manifest(
        schema=manifest.SCHEMA,
        content_id=manifest.content_id(tensors),
        files={
            **{r.name: manifest.FileEntry(nbytes=r.nbytes, digests=r.digests) for r in records.values()},
            **{n: manifest.FileEntry(nbytes=len(small[n]), digests=small_digests[n]) for n in small if n not in loose},
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
        provenance=library_versions(),
    )
    write_whole(staging.folder / manifest.NAME, finished.to_bytes())
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


def _sidecar_bytes(sidecar: Sidecar) -> bytes:
    if isinstance(sidecar, Written):
        return sidecar.data
    file, data = read_source(Path(sidecar.file.path))
    if file != sidecar.file:
        raise CorruptInput(f"{file.shown}: changed since the plan was made")
    return data
