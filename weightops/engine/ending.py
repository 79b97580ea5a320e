"""What is left to do when all shards of an output are there, as a value that outlives the plan and its tensors."""

from __future__ import annotations

from typing import Any

import msgspec

from weightops.checkpoint import Document, Sidecar
from weightops.engine.finished import plan_mark, remote_sources
from weightops.engine.kinds import import_kinds, modules_of
from weightops.io.source_file import SourceFile
from weightops.plan import Expectation, Origin, Plan
from weightops.spec import DType, TensorSpec


class ShardEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A weight file as it has to be: the least and the most bytes it has, and dtype and shape of its tensors."""

    least_nbytes: int
    nbytes: int
    tensors: dict[str, tuple[DType, tuple[int, ...]]]


class Ending(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-job-output/1"):
    """The files of an output but its shards, and what its manifest says that is known before.

    `mark` is `plan_mark` of its plan; `provenance` is said instead of that and of the sources, if there is any.
    """

    recipe: dict[str, Any]
    shards: dict[str, ShardEnd]
    digests: tuple[str, ...]
    index_name: str | None
    index: bytes | None
    sidecars: dict[str, Sidecar]
    described: tuple[dict[str, Any], ...]
    """Its documents as data, whose kinds `modules` know."""
    modules: tuple[str, ...]
    origins: tuple[Origin, ...]
    remote: tuple[SourceFile, ...]
    expect: Expectation | None
    file_names: tuple[str, ...]
    mark: str
    provenance: dict[str, str]

    @property
    def documents(self) -> tuple[Document, ...]:
        """Raises `CorruptInput`, and what msgspec raises."""
        import_kinds(self.modules)
        return tuple(msgspec.convert(d, Document.registry[d["document"]]) for d in self.described)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Of every tensor of the output, in their order."""
        return {n: TensorSpec(*spec) for shard in self.shards.values() for n, spec in shard.tensors.items()}


def ending_of(plan: Plan) -> Ending:
    """What is left to do of a plan when its shards are there."""
    return Ending(
        recipe=dict(plan.recipe),
        shards={
            shard.name: ShardEnd(
                least_nbytes=plan.shard_bounds[shard.name][0],
                nbytes=plan.shard_bounds[shard.name][1],
                tensors={n: (t.spec.dtype, t.spec.shape) for n, t in shard.tensors.items()},
            )
            for shard in plan.shards
        },
        digests=plan.digests,
        index_name=plan.index_name,
        index=plan.index(),
        sidecars=dict(plan.sidecars),
        described=tuple(msgspec.to_builtins(document) for document in plan.documents),
        modules=modules_of(plan.documents),
        origins=plan.origins,
        remote=remote_sources(plan),
        expect=plan.expect,
        file_names=tuple(sorted(plan.file_names)),
        mark=plan_mark(plan),
        provenance=dict(plan.provenance),
    )
