"""Plans: a checkpoint packed into named files, every byte of which is accounted for before one is read.

A plan is a value and goes to JSON and back. Its fingerprint says whether a partial output was made by it;
its shards can be written in any order, by any thread, process or machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from weightops.checkpoint import Checkpoint, Copied, Document, Sidecar
from weightops.errors import UsageError
from weightops.formats.containers import CONTAINERS, FORMATS, find_aliases, metadata_in
from weightops.formats.index import render_index
from weightops.formats.layout import Layout
from weightops.formats.proofs import manifest
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.spec import DType, TensorSpec

DEFAULT_SHARD_NBYTES = 5_000_000_000
_INDEX = re.compile(r"-\d+(?:-of-\d+)?(\.\w+)$")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB` or `1000000`. Raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise UsageError(f"cannot read the size {text!r}", hint="write it as 5GB, 500MB or 2GiB")
    unit = (_BINARY_UNITS if match[3] else _UNITS)[match[2].upper()]
    nbytes = int(float(match[1]) * unit)
    if nbytes < 1:
        raise UsageError(f"a shard size of {text!r} holds nothing")
    return nbytes


@dataclass(frozen=True)
class Shard:
    """One file of the output and the tensors in it, in state-dict order."""

    name: str
    tensors: Mapping[str, LazyTensor]

    __repr__ = brief


class Expectation(msgspec.Struct, frozen=True):
    """Digests that the output must have: of files by name and algorithm, of tensors by name."""

    source: str
    files: dict[str, dict[str, str]]
    tensors: dict[str, str]


class OriginTensor(msgspec.Struct, frozen=True):
    """A tensor of a source. Its digest is recorded under `label`, or is that of `kept_as` in the output.

    `expect` is what the manifest beside the source says it is.
    """

    dtype: DType
    shape: tuple[int, ...]
    label: str
    kept_as: str | None = None
    expect: str | None = None


class Origin(msgspec.Struct, frozen=True):
    """A source of the recipe: the name it has there, that of its folder or repository, and its tensors."""

    role: str
    name: str
    tensors: dict[str, OriginTensor]
    content_id: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(TensorSpec(t.dtype, t.shape).nbytes for t in self.tensors.values())

    def identify(self, digests: Mapping[str, str]) -> str | None:
        """Its content id: what its manifest says, or from digests by label; None unless all are there."""
        if self.content_id is not None:
            return self.content_id
        found = {n: (TensorSpec(t.dtype, t.shape), digests.get(t.label)) for n, t in self.tensors.items()}
        known = {name: (spec, digest) for name, (spec, digest) in found.items() if digest is not None}
        return manifest.content_id(known) if len(known) == len(found) else None


@dataclass(frozen=True)
class Plan:
    """What will be written, and from what."""

    recipe: Mapping[str, Any]
    container: str
    metadata: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index_name: str | None
    sidecars: Mapping[str, Sidecar]
    documents: tuple[Document, ...] = ()
    watch: tuple[LazyTensor, ...] = ()
    origins: tuple[Origin, ...] = ()
    digests: tuple[str, ...] = ()
    expect: Expectation | None = None
    is_file: bool = False
    """Whether the output is its one shard alone, and no folder."""
    reflink: bool = False
    """Whether shards are laid out to share blocks with the sources, and then do where the file system can."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """What the manifest is to say of how it was made, if that is not to be told from the plan."""

    __repr__ = brief

    def layout(self, shard: Shard) -> Layout:
        """The bytes of one shard, up to the values of its tensors."""
        container = CONTAINERS[self.container]
        layout = container.sharing if self.reflink and container.sharing else container.layout
        return layout(shard.name, shard.tensors, self.metadata)

    @cached_property
    def shard_nbytes(self) -> dict[str, int]:
        """Bytes of the output's weight files by name: of compressed ones the most that they can have."""
        return {name: most for name, (_, most) in self.shard_bounds.items()}

    @cached_property
    def shard_bounds(self) -> dict[str, tuple[int, int]]:
        """The least and the most bytes of the output's weight files by name: one number unless they are compressed."""
        return {shard.name: ((made := self.layout(shard)).least_nbytes, made.nbytes) for shard in self.shards}

    @property
    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        for shard in self.shards:
            yield from shard.tensors.items()

    @cached_property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file that will be read, in order of first use."""
        return sources_of((*self.watch, *(t for _, t in self.tensors)))

    @cached_property
    def is_remote(self) -> bool:
        """Whether anything comes from a server or a cache, and is proven as it passes."""
        copied = (sidecar.file for sidecar in self.sidecars.values() if isinstance(sidecar, Copied))
        return any(file.is_remote for file in (*self.sources, *copied))

    @cached_property
    def file_names(self) -> frozenset[str]:
        """All files of the output."""
        index = {self.index_name} if self.index_name is not None else set()
        documents = {document.name for document in self.documents}
        return frozenset({s.name for s in self.shards} | self.sidecars.keys() | documents | index | {manifest.NAME})

    @property
    def total_nbytes(self) -> int:
        """Bytes of the output's weight files: of compressed ones the most that they can have."""
        return sum(self.shard_nbytes.values())

    @property
    def least_nbytes(self) -> int:
        """Bytes that the output's weight files have in any case."""
        return sum(least for least, _ in self.shard_bounds.values())

    def index(self) -> bytes | None:
        """The index file, or None for a single shard."""
        if self.index_name is None:
            return None
        weight_map = {name: shard.name for shard in self.shards for name in shard.tensors}
        # Aliases count once where they are stored once; transformers 4.28 counted them twice even so.
        container = CONTAINERS[self.container]
        aliases = find_aliases(dict(self.tensors)) if container.shares else {}
        counted = [tensor for name, tensor in self.tensors if name not in aliases]
        parameters = sum(t.spec.numel for t in counted) if container.counts else None
        return render_index(weight_map, sum(t.nbytes for t in counted), parameters)

    def part(self, shards: Sequence[Shard]) -> Plan:
        """What of it these shards need to be written, and no more."""
        expect = self.expect
        if expect is not None:
            names = {name for shard in shards for name in shard.tensors}
            files = {s.name: expect.files[s.name] for s in shards if s.name in expect.files}
            expect = Expectation(expect.source, files, {n: d for n, d in expect.tensors.items() if n in names})
        return Plan(
            recipe={},
            container=self.container,
            metadata=self.metadata,
            shards=tuple(shards),
            index_name=None,
            sidecars={},
            digests=self.digests,
            expect=expect,
            reflink=self.reflink,
        )

    def pieces(self) -> Iterator[dict[str, Any]]:
        """The plan as JSON data, piece by piece: what is not in shards, then each shard; a whole one may be large."""
        yield {
            "recipe": dict(self.recipe),
            "container": self.container,
            "metadata": dict(self.metadata),
            "index_name": self.index_name,
            "digests": list(self.digests),
            "expect": msgspec.to_builtins(self.expect),
            "is_file": self.is_file,
            "reflink": self.reflink,
            "provenance": dict(self.provenance),
            "sidecars": {n: msgspec.to_builtins(s) for n, s in self.sidecars.items()},
            "documents": [msgspec.to_builtins(d) for d in self.documents],
            "watch": [t.to_json() for t in self.watch],
            "origins": msgspec.to_builtins(self.origins),
        }
        for s in self.shards:
            yield {"name": s.name, "tensors": [[n, t.to_json()] for n, t in s.tensors.items()]}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data."""
        head, *shards = self.pieces()
        return {**head, "shards": shards}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` described."""
        return Plan(
            recipe=document["recipe"],
            container=document["container"],
            metadata=document["metadata"],
            index_name=document["index_name"],
            digests=tuple(document["digests"]),
            expect=msgspec.convert(document["expect"], Expectation | None),
            is_file=document["is_file"],
            reflink=document["reflink"],
            provenance=document["provenance"],
            sidecars=msgspec.convert(document["sidecars"], dict[str, Sidecar]),
            documents=tuple(msgspec.convert(d, Document.registry[d["document"]]) for d in document["documents"]),
            origins=msgspec.convert(document["origins"], tuple[Origin, ...]),
            watch=tuple(LazyTensor.from_json(d) for d in document["watch"]),
            shards=tuple(
                Shard(s["name"], {n: LazyTensor.from_json(t) for n, t in s["tensors"]}) for s in document["shards"]
            ),
        )

    def identities(self) -> Iterator[Any]:
        """The pieces as far as they depend on what is read and written, not on where the sources lie."""
        for piece in self.pieces():
            yield identity_of(json.loads(json.dumps(piece)))

    @property
    def identity(self) -> Any:
        """All of them in one."""
        head, *shards = self.identities()
        return {**head, "shards": shards}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the identities: equal plans write equal files."""
        return digest_of(self.identities())


def digest_of(values: Iterable[Any]) -> str:
    """SHA-256 of JSON values, a line each."""
    state = hashlib.sha256()
    for value in values:
        state.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return state.hexdigest()


def sources_of(tensors: Iterable[LazyTensor]) -> tuple[SourceFile, ...]:
    """Every file that the tensors are read from, in order of first use."""
    found = (node.op.source for tensor in tensors for node in tensor.walk())
    return tuple(dict.fromkeys(source for source in found if source is not None))


def identity_of(plan: Any) -> Any:
    """A plan's JSON with the folders of its sources left out, and the queries of URLs, which hold signatures."""
    if isinstance(plan, dict):
        return {k: _last_part(v) if k == "path" and isinstance(v, str) else identity_of(v) for k, v in plan.items()}
    return [identity_of(v) for v in plan] if isinstance(plan, list) else plan


def _last_part(path: str) -> str:
    return Path(path.partition("?")[0] if "://" in path else path).name


def first_difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Where two JSON values first differ and how, as text; None if they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(k for k in theirs if k not in ours)]:
            found = first_difference(ours.get(key), theirs.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{where}[{i}]"))), None)
    if ours == theirs:
        return None
    shown = [escape(json.dumps(v)[:80]) for v in (theirs, ours)]
    return f"{escape(where) or 'the plan'} was {shown[0]}, now {shown[1]}"


def make_plan(
    checkpoint: Checkpoint,
    recipe: Mapping[str, Any],
    *,
    container: str = "safetensors",
    max_shard_nbytes: int | None = DEFAULT_SHARD_NBYTES,
    digests: Sequence[str] = (),
    expect: Expectation | None = None,
    origins: Sequence[Origin] = (),
    reflink: bool = False,
    is_file: bool = False,
) -> Plan:
    """Pack `checkpoint` into files. `max_shard_nbytes=None` keeps the grouping of the source's files.

    With `reflink` files are laid out to share blocks with the sources.
    Raises `UsageError` for a container that cannot hold the tensors or share blocks, or files that `expect` does not
    list.
    """
    if container not in CONTAINERS:
        raise UsageError(f"unknown format {container!r}, expected one of {', '.join(FORMATS)}")
    files = CONTAINERS[container].files(checkpoint, max_shard_nbytes)
    indexed = CONTAINERS[container].has_index and len(files) > 1
    needed = {algorithm for document in checkpoint.documents for algorithm in document.algorithms}
    plan = Plan(
        recipe=recipe,
        container=container,
        metadata=metadata_in(container, checkpoint.metadata, len(checkpoint) if len(files) > 1 else None),
        shards=tuple(Shard(file, {name: checkpoint[name] for name in names}) for file, names in files),
        index_name=_INDEX.sub(r"\1.index.json", files[0][0]) if indexed else None,
        sidecars=checkpoint.sidecars,
        documents=checkpoint.documents,
        watch=checkpoint.watch,
        origins=tuple(origins),
        digests=tuple(sorted({"xxh3_128", *digests, *expected_algorithms(expect), *needed})),
        expect=expect,
        is_file=is_file,
        reflink=reflink,
    )
    if reflink:
        _check_sharing(plan)
    _check_expected_names(plan)
    return plan


def expected_algorithms(expect: Expectation | None) -> set[str]:
    """The digest algorithms that an expectation needs."""
    return {a for d in expect.files.values() for a in d} if expect else set()


def _check_sharing(plan: Plan) -> None:
    if CONTAINERS[plan.container].sharing is None:
        raise UsageError(
            f"{plan.container} files cannot share blocks with the source: only safetensors leaves room in its header",
            hint="leave out --reflink, or write safetensors",
        )
    if plan.expect is not None and plan.expect.files:
        raise UsageError(
            f"{escape(plan.expect.source)} lists digests of files, and to share blocks with the source headers are "
            "padded, so that files differ from the publisher's while all tensors are the same",
            hint="leave out --reflink, or give a manifest to --expect: it lists tensors",
        )


def _check_expected_names(plan: Plan) -> None:
    if plan.expect is None:
        return
    names = {name for name, _ in plan.tensors}
    if plan.expect.tensors and names != plan.expect.tensors.keys():
        odd = min(names ^ plan.expect.tensors.keys())
        side = "would not be written" if odd in plan.expect.tensors else "is not in it"
        raise UsageError(f"{escape(plan.expect.source)}: the tensor {escape(odd)} {side}")
    written = {s.name for s in plan.shards} | plan.sidecars.keys() | {plan.index_name}
    missing = [n for n in plan.expect.files if n not in written]
    if missing:
        raise UsageError(
            f"{escape(plan.expect.source)} lists {escape(missing[0])}, which would not be written "
            f"(the first of {len(plan.shards)} shards is {plan.shards[0].name})",
            hint="choose --format and --max-shard-size as the publisher did; 2023's .bin files: "
            "--format torch-1.12 --max-shard-size 10GB",
        )
