"""What inspect found, as a value and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from weightops.engine.examine import TensorDocument, TensorReport
from weightops.formats.proofs import manifest
from weightops.formats.quantized.table import Quantized
from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.strict_json import as_json
from weightops.operations.inspect.adapter import AdapterReport
from weightops.operations.inspect.tree import Node, make_tree
from weightops.spec import DType, TensorSpec


class ShardDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A weight file: how many tensors it holds, and their bytes."""

    tensors: int
    nbytes: int


class NodeDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A module, a run of modules that are alike such as `layers.[0-21]`, or with `dtype` and `shape` a tensor.

    `tensors`, `parameters` and `nbytes` are those of all that it stands for. `only` says in which of the runs around
    it there is such a one, outermost first, where not in all: `["1-3"]` of `layers.[0-21]`.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int
    only: tuple[str, ...] = ()
    dtype: DType | None = None
    shape: tuple[int, ...] | None = None
    children: tuple[NodeDocument, ...] = ()


class InspectDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-inspect/2"):
    """What `inspect --json` prints.

    `dtypes` are bytes by element type, `quantised` weights by how they are stored. `aliases` are names of tensors that
    share the bytes of another, with its name. `content_id`, `recipe` and `sources` are what the manifest beside it
    says. `adapter` is there for a LoRA adapter, `tree` where it was asked for. With `include` all numbers are those of
    the tensors that were looked at.
    """

    path: str
    kind: str
    model_type: str | None
    nbytes: int
    parameters: int
    dtypes: dict[str, int]
    quantised: dict[str, int]
    shards: dict[str, ShardDocument]
    aliases: dict[str, str]
    sidecars: tuple[str, ...]
    warnings: tuple[str, ...]
    content_id: str | None
    recipe: dict[str, Any]
    sources: dict[str, manifest.SourceEntry]
    adapter: AdapterReport | None
    tree: tuple[NodeDocument, ...] | None
    tensors: dict[str, TensorDocument]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's inventory, or that of some of its tensors; with their statistics where values were read."""

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
    reports: Mapping[str, TensorReport]
    adapter: AdapterReport | None = None
    quantised: Quantized = field(default_factory=Quantized)
    """The weights that several tensors make up, as far as they can be understood."""

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

    @cached_property
    def weights(self) -> dict[str, int]:
        """The weights that each tensor stands for: elements, shared ones once, and of packed modules what is packed."""
        counts = {name: 0 if name in self.aliases else spec.numel for name, spec in self.tensors.items()}
        for weight in self.quantised.weights.values():
            first, *others = [name for name in weight.parts.values() if name in counts] or [""]
            counts |= dict.fromkeys(others, 0) | ({first: weight.in_dtype().spec.numel} if first else {})
        return counts | {name: 0 for name in self.quantised.unused if name in counts}

    @property
    def parameters(self) -> int:
        """Elements, shared ones once, and of packed modules the weights that they stand for."""
        return sum(self.weights.values())

    @property
    def tree(self) -> tuple[Node, ...]:
        """The modules, those that are numbered and alike as one (`weightops.operations.inspect.tree`)."""
        return make_tree(self.tensors, self.weights)

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

    def to_json(self, *, tree: bool = False, depth: int | None = None) -> dict[str, Any]:
        """The whole of it as one document, with `tree` that of the modules too, `depth` levels of it."""
        document = InspectDocument(
            path=self.path,
            kind=self.kind,
            model_type=self.model_type,
            nbytes=self.nbytes,
            parameters=self.parameters,
            dtypes=self.by_dtype(),
            quantised=dict(self.quantised.schemes),
            shards={n: ShardDocument(tensors=c, nbytes=b) for n, (c, b) in self.by_shard().items()},
            aliases=self.aliases,
            sidecars=self.sidecars,
            warnings=self.warnings,
            content_id=self.content_id,
            recipe=self.recipe,
            sources=self.sources,
            adapter=self.adapter,
            tree=tuple(_document(node, depth) for node in self.tree) if tree else None,
            tensors={name: report.document for name, report in self.reports.items()},
        )
        return as_json(document)


def _document(node: Node, depth: int | None) -> NodeDocument:
    below = () if depth == 1 else node.children
    return NodeDocument(
        name=node.label,
        tensors=len(node.members),
        parameters=node.parameters,
        nbytes=node.nbytes,
        only=node.only,
        dtype=node.spec.dtype if node.spec else None,
        shape=node.spec.shape if node.spec else None,
        children=tuple(_document(child, depth and depth - 1) for child in below),
    )
