"""`weightops-manifest.json`: what a finished folder holds, down to the digest of each tensor.

Written last, so its presence means that the folder is complete. It holds no time, host or path: the same
operation on the same inputs gives the same manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.ops.measures.loss import Loss
from weightops.spec import DType, TensorSpec
from weightops.stores.local import read_source

NAME = "weightops-manifest.json"
SCHEMA: Final = "weightops-manifest/1"


def beside(file: Path) -> Path:
    """Where the manifest of an output lies that is a single file."""
    return file.with_name(f"{file.name}.{NAME}")


def is_manifest_name(name: str) -> bool:
    """Whether a file of this name is a manifest of ours: of its folder, or of the single file that it stands beside."""
    return name == NAME or name.endswith(f".{NAME}")


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file: its size in bytes and lower-case hexadecimal digests by algorithm name."""

    nbytes: int
    digests: dict[str, str]


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor: `xxh3_128` is over its contiguous little-endian bytes, whatever the container."""

    dtype: DType
    shape: tuple[int, ...]
    xxh3_128: str
    file: str

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A checkpoint that this one was made from: its name, and its content id if all of it was read."""

    name: str
    content_id: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder. `content_id` depends on the tensors alone: re-sharding or another container keeps it.

    A folder that was downloaded and not read since has neither tensors nor a content_id here. `losses` tells what
    each tensor lost that was cast, `notes` what else there is to say of it in numbers.
    """

    schema: Literal["weightops-manifest/1"]
    content_id: str | None = None
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry] = {}
    losses: dict[str, Loss] = {}
    notes: dict[str, dict[str, float]] = {}
    recipe: dict[str, Any] = {}
    sources: dict[str, SourceEntry] = {}
    provenance: dict[str, str] = {}

    __repr__ = brief

    def to_bytes(self) -> bytes:
        document = msgspec.to_builtins(self)
        for field in ("losses", "notes", "sources"):
            if not document[field]:
                del document[field]
        return strict_json.dumps(document)


def history(recipe: Mapping[str, Any], sources: Mapping[str, SourceEntry]) -> list[str]:
    """How a checkpoint was made, in lines: its sources, then the steps, each after those that it builds on."""
    lines = []
    for role, source in sources.items():
        content = f" (content {source.content_id})" if source.content_id else ""
        lines.append(f"{role} = {source.name}{content}")
    steps = recipe.get("tensors")
    waiting = {n: s for n, s in steps.items() if isinstance(s, Mapping)} if isinstance(steps, Mapping) else {}
    while waiting:
        name = next(
            (n for n, step in waiting.items() if not _names(step) & (waiting.keys() - {n})), next(iter(waiting))
        )
        lines += [f"{name} = {verb}({_fields(fields)})" for verb, fields in waiting.pop(name).items()]
    output = recipe.get("output")
    if isinstance(output, Mapping) and len(output) > 1:
        lines.append(f"cast({_fields({'source': output.get('from'), **output})})")
    return lines or ([str(recipe["operation"])] if "operation" in recipe else [])


def _names(step: Any) -> set[str]:
    """Every text in a step, among them the names of what it builds on."""
    if isinstance(step, str):
        return {step}
    inner = step.values() if isinstance(step, Mapping) else step if isinstance(step, list) else ()
    return set().union(*map(_names, inner))


def _fields(fields: Any) -> str:
    if not isinstance(fields, Mapping):
        return str(fields)
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in fields.items() if k != "from"}
    return ", ".join(v if k == v else f"{k}: {v}" for k, v in shown.items())


def content_id(tensors: Mapping[str, tuple[TensorSpec, str]]) -> str:
    """SHA-256 over the sorted lines `name NUL dtype NUL shape NUL xxh3_128 LF`."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        spec, digest = tensors[name]
        shape = ",".join(map(str, spec.shape))
        state.update(f"{name}\0{spec.dtype.value}\0{shape}\0{digest}\n".encode())
    return state.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; raises as `parse_manifest` does, and `SourceMissing` when there is none."""
    return parse_manifest(read_source(path)[1], escape(str(path)))


def parse_manifest(data: bytes, shown: str) -> Manifest:
    """Check a manifest's bytes; raises `CorruptInput`, beginning with `shown`, unless it is well-formed."""
    document = strict_json.load_object(data, shown)
    try:
        manifest = msgspec.convert(document, Manifest)
    except msgspec.ValidationError as error:
        raise CorruptInput(f"{shown}: not a weightops manifest ({escape(str(error))})") from None
    for name in manifest.files:
        check_relative(name, shown)
    found = content_id({n: (t.spec, t.xxh3_128) for n, t in manifest.tensors.items()})
    if found != manifest.content_id and (manifest.tensors or manifest.content_id is not None):
        raise CorruptInput(f"{shown}: content_id is {manifest.content_id}, its tensors give {found}")
    return manifest
