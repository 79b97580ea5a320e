"""Checkpoints: read-only mappings from tensor names to lazy tensors, with their config and tokenizer files.

Opening one costs headers only. What an operation derives is a checkpoint too, so operations compose.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from weightops.errors import UsageError
from weightops.io import strict_json
from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.spec import DType, TensorSpec
from weightops.stores.local import read_source
from weightops.stores.store import Store

Digests = Mapping[str, str]
"""xxh3_128 of tensors, by tensor name or by witness label."""


class Copied(msgspec.Struct, frozen=True, tag="copied"):
    """A sidecar file taken over as it is."""

    file: SourceFile


class Written(msgspec.Struct, frozen=True, tag="written"):
    """A sidecar file whose bytes the plan holds."""

    data: bytes


Sidecar = Copied | Written


def written_json(document: Mapping[str, Any]) -> Written:
    """A JSON file as people read it: indented, in its own order."""
    return Written((json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


class Document(msgspec.Struct, frozen=True, tag_field="document", tag=str.lower):
    """A sidecar file that is written last, from the digests of what has been read and written."""

    registry: ClassVar[dict[str, type[Document]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Document.registry[cls.__name__.lower()] = cls

    @property
    @abstractmethod
    def name(self) -> str:
        """The file's name."""

    @property
    def is_listed(self) -> bool:
        """Whether it is one of the manifest's files; what people are to edit is not."""
        return True

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The digests of files that it needs."""
        return ()

    @abstractmethod
    def render(
        self,
        tensors: Mapping[str, tuple[TensorSpec, str]],
        witnesses: Digests,
        files: Mapping[str, Mapping[str, str]],
    ) -> bytes:
        """The file's bytes: from specs and digests of the tensors written, digests of witnesses and of other files."""


@dataclass(frozen=True)
class Checkpoint(Mapping[str, LazyTensor]):
    """Tensors in state-dict order, sidecar files by name, and what is known of where they came from.

    `shards` gives the source file of each tensor; `warnings` are what there is to be careful of, `done` what operations
    have done, a sentence each; `watch` are tensors to be evaluated before anything is
    written, for the checks and digests in them; `documents` are files that depend on digests. `container` is what it
    has to be written in, and `prefix` the first part of its files' names, where the layout leaves no choice;
    `in_one_file`, whatever its size, where loaders know no index.
    `dropped` are tensors that were left out, each with the reason. `left` are the files beside it that are no part of
    the model and stay where they are, with their sizes in bytes (folders None). Of one that was opened, `folder` is
    where it lies, `origin` where it was downloaded from, and `content_id` and `digests` (by tensor) are what the
    manifest there says.
    """

    name: str
    tensors: Mapping[str, LazyTensor]
    sidecars: Mapping[str, Sidecar] = field(default_factory=dict)
    shards: Mapping[str, str] = field(default_factory=dict)
    total_size: int | None = None
    warnings: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    watch: tuple[LazyTensor, ...] = ()
    documents: tuple[Document, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=lambda: {"format": "pt"})
    prefix: str | None = None
    container: str | None = None
    in_one_file: bool = False
    dropped: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, int | None] = field(default_factory=dict)
    folder: Store | None = None
    origin: str | None = None
    content_id: str | None = None
    digests: Digests = field(default_factory=dict)

    __repr__ = brief

    def _repr_html_(self) -> str:
        rows = [(name, t.spec.dtype.value, list(t.spec.shape), in_units(t.nbytes)) for name, t in self.items()]
        facts = {"tensors": len(self), "size": in_units(self.nbytes), "content": self.content_id}
        return card(self.name, facts, ("tensor", "dtype", "shape", "size"), rows, what="tensors")

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def sidecar(self, name: str) -> bytes | None:
        """The bytes of a sidecar file, if there is one of that name; raises `UsageError` for one on a server."""
        match self.sidecars.get(name):
            case Written(data):
                return data
            case Copied(file) if not file.is_remote:
                return read_source(Path(file.path))[1]
            case Copied(file):
                if self.folder is None:
                    raise UsageError(f"{file.shown}: is on a server or in a cache, and read only when it is written")
                return self.folder.get(name)
            case _:
                return None

    def config(self) -> dict[str, Any]:
        """config.json as data, empty when there is none; transformers 4 wrote Infinity into it (`time_step_limit`)."""
        data = self.sidecar("config.json")
        where = f"{self.name}: config.json"
        return strict_json.load_object(data, where, constants=True) if data is not None else {}

    def with_config(self, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Checkpoint:
        """This checkpoint with an edited config.json; nothing happens when there is none, or no change."""
        config = self.config()
        edited = edit(dict(config))
        if not config or edited == config:
            return self
        return replace(self, sidecars={**self.sidecars, "config.json": written_json(edited)})

    def warned(self, *notes: str) -> Checkpoint:
        """This checkpoint with more to say of it."""
        return replace(self, warnings=(*self.warnings, *notes)) if notes else self

    def did(self, *sentences: str) -> Checkpoint:
        """This checkpoint with more that was done to make it."""
        return replace(self, done=(*self.done, *sentences)) if sentences else self

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
        """This checkpoint with these tensors instead; what is known of those that it has stays."""
        names = {id(tensor): name for name, tensor in self.items()}
        origins = {new: names[id(tensor)] for new, tensor in tensors.items() if id(tensor) in names}
        return replace(
            self,
            tensors=dict(tensors),
            shards={new: self.shards[old] for new, old in origins.items() if old in self.shards},
            digests={new: self.digests[old] for new, old in origins.items() if old in self.digests},
            total_size=None,
            content_id=None,
        )

    def with_sidecars(self, sidecars: Mapping[str, Sidecar]) -> Checkpoint:
        """This checkpoint with these files beside it."""
        return replace(self, sidecars=dict(sidecars))

    def with_dropped(self, dropped: Mapping[str, str]) -> Checkpoint:
        """This checkpoint, of which these tensors were left out, each with the reason."""
        return replace(self, dropped={**self.dropped, **dict(sorted(dropped.items()))})

    def with_digests(self, digests: Digests) -> Checkpoint:
        """This checkpoint with these digests of its tensors."""
        return replace(self, digests=digests)

    def with_dtype(self, dtype: DType) -> Checkpoint:
        """This checkpoint with `dtype` named in its config.json, under the key that is there."""

        def edit(config: dict[str, Any]) -> dict[str, Any]:
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            return {**config, key: dtype.value}

        return self.with_config(edit)
