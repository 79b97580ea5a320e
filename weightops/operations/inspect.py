"""Inspect: what a checkpoint holds and what looks wrong with it, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.formats import delta
from weightops.formats.containers import find_aliases
from weightops.formats.proofs import manifest
from weightops.formats.quantized.gptq import PARTS, packed_shapes
from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.source_file import SourceFile
from weightops.io.strict_json import as_json
from weightops.spec import DType, TensorSpec
from weightops.stores.store import Store


class ShardDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A weight file: how many tensors it holds, and their bytes."""

    tensors: int
    nbytes: int


class TensorDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor, and the file that holds it."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    file: str


class InspectDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-inspect/1"):
    """What `inspect --json` prints.

    `dtypes` are bytes by element type. `aliases` are names of tensors that share the bytes of another, with its name.
    `content_id`, `recipe` and `sources` are what the manifest beside it says.
    """

    path: str
    kind: str
    model_type: str | None
    nbytes: int
    parameters: int
    dtypes: dict[str, int]
    shards: dict[str, ShardDocument]
    aliases: dict[str, str]
    sidecars: tuple[str, ...]
    warnings: tuple[str, ...]
    content_id: str | None
    recipe: dict[str, Any]
    sources: dict[str, manifest.SourceEntry]
    tensors: dict[str, TensorDocument]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's inventory."""

    path: str
    kind: str
    tensors: dict[str, TensorSpec]
    shards: dict[str, str]
    aliases: dict[str, str]
    sidecars: tuple[str, ...]
    warnings: tuple[str, ...]
    model_type: str | None
    content_id: str | None
    recipe: dict[str, Any]
    sources: dict[str, manifest.SourceEntry]

    __repr__ = brief

    def _repr_html_(self) -> str:
        facts = {"kind": self.kind, "model_type": self.model_type, "tensors": len(self.tensors)}
        facts |= {"parameters": self.parameters, "size": in_units(self.nbytes), "content": self.content_id}
        rows = [(n, s.dtype.value, list(s.shape), self.shards.get(n, "")) for n, s in self.tensors.items()]
        return card(self.path, facts, ("tensor", "dtype", "shape", "file"), rows, what="tensors")

    @property
    def history(self) -> list[str]:
        """How it was made, in lines, if its manifest knows."""
        return manifest.history(self.recipe, self.sources)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements, shared ones once, and of packed modules the weights that they stand for."""
        packed = packed_shapes(self.tensors)
        parts = {f"{prefix}.{part}" for prefix in packed for part in PARTS}
        plain = (s.numel for name, s in self.tensors.items() if name not in self.aliases and name not in parts)
        return sum(plain) + sum(inputs * outputs for inputs, outputs in packed.values())

    def by_dtype(self) -> dict[str, int]:
        """Bytes by dtype, most first."""
        count: Counter[str] = Counter()
        for spec in self.tensors.values():
            count[spec.dtype.value] += spec.nbytes
        return dict(count.most_common())

    def by_shard(self) -> dict[str, tuple[int, int]]:
        """Number of tensors and their bytes in each file."""
        result: dict[str, tuple[int, int]] = {}
        for name, spec in self.tensors.items():
            count, nbytes = result.get(self.shards[name], (0, 0))
            result[self.shards[name]] = (count + 1, nbytes + spec.nbytes)
        return dict(sorted(result.items()))

    def to_json(self) -> dict[str, Any]:
        """The whole of it as one document."""
        document = InspectDocument(
            path=self.path,
            kind=self.kind,
            model_type=self.model_type,
            nbytes=self.nbytes,
            parameters=self.parameters,
            dtypes=self.by_dtype(),
            shards={n: ShardDocument(tensors=c, nbytes=b) for n, (c, b) in self.by_shard().items()},
            aliases=self.aliases,
            sidecars=self.sidecars,
            warnings=self.warnings,
            content_id=self.content_id,
            recipe=self.recipe,
            sources=self.sources,
            tensors={
                name: TensorDocument(dtype=spec.dtype, shape=spec.shape, nbytes=spec.nbytes, file=self.shards[name])
                for name, spec in self.tensors.items()
            },
        )
        return as_json(document)


def inspect(checkpoint: Checkpoint, place: Store | SourceFile, path: str) -> Inspection:
    """The inventory of the checkpoint at `place`, which the user called `path`.

    `content_id` and `recipe` are what the folder's manifest says, if it has one.
    """
    found = None
    if not isinstance(place, SourceFile) and place.has(manifest.NAME):
        found = manifest.parse_manifest(place.get(manifest.NAME), f"{place.shown}/{manifest.NAME}")
    model_type = checkpoint.config().get("model_type")
    return Inspection(
        path=path,
        kind="exact delta" if delta.NAME in checkpoint.sidecars else "checkpoint",
        tensors={name: tensor.spec for name, tensor in checkpoint.items()},
        shards=dict(checkpoint.shards),
        aliases=find_aliases(checkpoint.tensors),
        sidecars=tuple(sorted(checkpoint.sidecars)),
        warnings=checkpoint.warnings,
        model_type=model_type if isinstance(model_type, str) else None,
        content_id=found.content_id if found else None,
        recipe=found.recipe if found else {},
        sources=found.sources if found else {},
    )
