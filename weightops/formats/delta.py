"""`weightops-delta.json`: what an exact delta was made from and what it gives, down to each tensor's digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from weightops.checkpoint import Checkpoint, Digests, Document
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.proofs.manifest import content_id
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.spec import DType, TensorSpec

NAME = "weightops-delta.json"
SCHEMA: Final = "weightops-delta/1"
FORMAT = "weightops-delta"
"""What the metadata of its files calls their format."""


class DeltaTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of raw or tuned. `shard` is the file of tuned that held it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    xxh3_128: str
    shard: str = ""

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)


class DeltaSide(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raw or tuned: its identity, and its tensors in their order."""

    content_id: str
    tensors: tuple[DeltaTensor, ...]

    def find(self, name: str) -> DeltaTensor | None:
        """The tensor of that name, if this side has it."""
        return next((t for t in self.tensors if t.name == name), None)


class Delta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document. `carried` are tensors of tuned that the delta holds as they are."""

    schema: Literal["weightops-delta/1"]
    method: Literal["exact"]
    raw: DeltaSide
    tuned: DeltaSide
    carried: tuple[str, ...]
    versions: dict[str, str]


class DeltaDocument(Document, frozen=True):
    """The delta's document before the digests are known: specs by name, in order."""

    raw: dict[str, TensorSpec]
    tuned: dict[str, TensorSpec]
    shards: dict[str, str]
    carried: tuple[str, ...]
    versions: dict[str, str]

    @property
    def name(self) -> str:
        return NAME

    def render(
        self,
        tensors: Mapping[str, tuple[TensorSpec, str]],
        witnesses: Digests,
        files: Mapping[str, Mapping[str, str]],
    ) -> bytes:
        sides = {
            side: DeltaSide(
                content_id=content_id({n: (spec, witnesses[label(side, n)]) for n, spec in specs.items()}),
                tensors=tuple(
                    DeltaTensor(
                        name=n,
                        dtype=spec.dtype,
                        shape=spec.shape,
                        xxh3_128=witnesses[label(side, n)],
                        shard=self.shards.get(n, "") if side == "tuned" else "",
                    )
                    for n, spec in specs.items()
                ),
            )
            for side, specs in (("raw", self.raw), ("tuned", self.tuned))
        }
        delta = Delta(schema=SCHEMA, method="exact", carried=self.carried, versions=self.versions, **sides)
        return strict_json.dumps(msgspec.to_builtins(delta))


def label(side: str, name: str) -> str:
    """The witness label of a tensor of raw or tuned."""
    return f"{side}:{name}"


def is_delta(checkpoint: Checkpoint) -> bool:
    """Whether it is an exact delta, or files of one, which say so where the document is not beside them."""
    return NAME in checkpoint.sidecars or checkpoint.metadata.get("format") == FORMAT


def find_delta(checkpoint: Checkpoint) -> Delta | None:
    """The document of an exact delta, None for anything else; raises `CorruptInput` if it is missing or malformed."""
    data = checkpoint.sidecar(NAME)
    if data is None:
        if is_delta(checkpoint):
            raise CorruptInput(
                f"{escape(checkpoint.name)}: is part of an exact delta, without {NAME}, which says what it belongs to",
                hint="name the folder that the delta was published as, with all its files",
            )
        return None
    where = f"{escape(checkpoint.name)}/{NAME}"
    try:
        return msgspec.convert(strict_json.load_object(data, where), Delta)
    except msgspec.ValidationError as error:
        raise CorruptInput(f"{where}: not a delta that this version reads ({escape(str(error))})") from None


def refuse_delta(checkpoint: Checkpoint, role: str) -> None:
    """A delta is not a model, whatever its files look like."""
    if is_delta(checkpoint):
        raise IncompatibleInputs(f"{role} {escape(checkpoint.name)} is a delta, not a model", hint="recover it first")
