"""What has been done of a run, a value for each thing: lines of a journal, or files of a job."""

from __future__ import annotations

import msgspec

from weightops.ops.measures.loss import Loss


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="shard"):
    """A committed shard; `sample` is of all that it was made of."""

    name: str
    nbytes: int
    sample: str
    digests: dict[str, str]
    tensors: dict[str, str]
    witnesses: dict[str, str]
    losses: dict[str, Loss] = {}
    notes: dict[str, dict[str, float]] = {}


class WatchRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="watch"):
    """The tensors to be watched first have been, and were as expected; `sample` is of what they are made of."""

    sample: str
    witnesses: dict[str, str]


class ProofRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="done", tag="proof"):
    """Remote files, by digest, that have been read and had that digest."""

    digests: list[str]


Record = ShardRecord | WatchRecord | ProofRecord
