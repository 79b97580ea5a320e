"""From a checkpoint that is wanted to the plan of its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from weightops.checkpoint import Checkpoint
from weightops.engine.work_folder import WorkFolder
from weightops.errors import UsageError
from weightops.formats.choose import SINGLE_SUFFIXES
from weightops.formats.choose import WEIGHT_SUFFIXES as _FILES
from weightops.formats.containers import CONTAINERS
from weightops.formats.proofs import checksums
from weightops.formats.proofs import manifest as manifest_format
from weightops.formats.proofs.published import find_manifest
from weightops.io.escape import escape
from weightops.plan import DEFAULT_SHARD_NBYTES, Expectation, Plan, make_plan, parse_size
from weightops.recipes.observe import observe
from weightops.stores.places import Out

CARD = "README.md"
StrPath = str | os.PathLike[str]


Item = TypeVar("Item", str, float, StrPath)


def several(given: Item | Iterable[Item]) -> tuple[Item, ...]:
    """What was given where there may be several: one by itself counts as one, not as its letters."""
    return (given,) if isinstance(given, str | os.PathLike | int | float) else tuple(given)


class Files(TypedDict, total=False):
    """How a checkpoint is laid out in files.

    `format`: safetensors, torch (byte-identical to torch.save) or torch-1.12 (to that of 2022 and 2023).
    `max_shard_size`: bytes, `"5GB"`, or `"source"` for the grouping of the source's files.
    `expect`: a manifest, checksum list or published name that the result must match to be published.
    `digest`: more algorithms to record per file than xxh3_128. `card`: write a model card, README.md.
    `reflink`: share the blocks of unchanged tensors with the source where the file system can (btrfs, XFS); headers are
    padded for that, so that files are not byte-identical to those of `save_file`.
    """

    format: str
    max_shard_size: str | int
    expect: StrPath | None
    digest: str | Sequence[str]
    card: bool
    reflink: bool


@dataclass(frozen=True)
class Wanted:
    """A checkpoint to be written, to a folder or one file; the sources it comes from by role; how it was made.

    `beside` is a folder in which a part of it was made, which nobody needs when it is written.
    `provenance` is what the manifest is to say of that if the plan does not tell; see `weightops.engine.finished`.
    """

    checkpoint: Checkpoint
    files: Files
    recipe: Mapping[str, Any]
    sources: Mapping[str, Checkpoint]
    is_file: bool = False
    beside: WorkFolder | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


def is_file(wanted: Wanted, out: Out) -> bool:
    """Whether the output is to be a single file, by its name."""
    return Path(out).suffix in _named(wanted)


def _named(wanted: Wanted) -> tuple[str, ...]:
    """How names of files end, and those of folders do not."""
    return (*_FILES, ".dat") if wanted.checkpoint.container == "imatrix.dat" else _FILES


def as_file(wanted: Wanted, place: Out) -> Wanted:
    """The same, to be written as the single file `out`; raises `UsageError` for what needs a folder."""
    checkpoint, out = wanted.checkpoint, Path(place)
    made = CONTAINERS[_container(checkpoint.container, wanted.files.get("format"))].suffix
    if out.suffix != made or made not in SINGLE_SUFFIXES:
        raise UsageError(
            f"{escape(str(out))} is the name of a file, and this writes a folder of {made} files with what goes along",
            hint=f"name a folder: --out {escape(str(out.with_suffix('')))}",
        )
    if wanted.files.get("max_shard_size") not in (None, "source"):
        raise UsageError(
            f"{escape(str(out))} is one file, which has no largest size",
            hint=f"name a folder for its parts: --out {escape(str(out.with_suffix('')))}",
        )
    if wanted.files.get("card"):
        raise UsageError("a model card needs a folder", hint="leave out --card, or name a folder: --out DIR")
    left = ", ".join(map(escape, checkpoint.sidecars))
    said = (f"a single file has no place for {left}: left out; --out DIR takes them along",) if left else ()
    return replace(
        wanted,
        checkpoint=replace(checkpoint, prefix=out.stem, sidecars={}, warnings=(*checkpoint.warnings, *said)),
        is_file=True,
    )


def plan_of(wanted: Wanted, out: Out) -> Plan:
    """What will be written for it."""
    checkpoint, files = wanted.checkpoint, wanted.files
    recipe = dict(wanted.recipe)
    if checkpoint.dropped:
        recipe["dropped"] = dict(checkpoint.dropped)
    checkpoint, origins = observe(checkpoint, wanted.sources)
    container = _container(checkpoint.container, files.get("format"))
    size = files.get("max_shard_size")
    if size not in (None, "source") and (checkpoint.in_one_file or not CONTAINERS[container].is_divided):
        raise UsageError(
            f"{escape(str(out))}: what is written here is not divided by size", hint="leave out --max-shard-size"
        )
    is_whole = container in CONTAINERS and CONTAINERS[container].is_whole
    default = "source" if is_whole else DEFAULT_SHARD_NBYTES
    expect = files.get("expect")
    if files.get("card"):
        checkpoint = replace(checkpoint, sidecars={n: s for n, s in checkpoint.sidecars.items() if n != CARD})
    plan = make_plan(
        checkpoint,
        recipe,
        container=container,
        max_shard_nbytes=_limit("source" if checkpoint.in_one_file else size or default),
        digests=several(files.get("digest", ())),
        expect=read_expectation(expect) if expect is not None else None,
        origins=origins,
        reflink=files.get("reflink", False),
        is_file=wanted.is_file,
    )
    plan = replace(plan, provenance=wanted.provenance)
    if not files.get("card"):
        return plan
    from weightops.recipes.card import card, quantization_of  # imported here because few runs write one

    names = {origin.role: origin.name for origin in origins}
    readme = card(
        Path(out).name,
        recipe,
        names,
        files=plan.shard_nbytes,
        warnings=checkpoint.warnings,
        quantization=quantization_of(checkpoint.config()),
    )
    return replace(plan, documents=(*plan.documents, readme))


def _limit(size: str | int) -> int | None:
    """Bytes per file; None for the grouping that the checkpoint has."""
    return None if size == "source" else size if isinstance(size, int) else parse_size(size)


def _container(own: str | None, wanted: str | None) -> str:
    """The container that a layout demands, or else the one that is wanted; raises `UsageError` if they differ."""
    if own is None or wanted in (None, own):
        return own or wanted or "safetensors"
    if (own, wanted) == ("torch", "torch-1.12"):
        return wanted
    raise UsageError(f"this layout is always written as {own} files, not {wanted}", hint="leave out --format")


def read_expectation(name_or_path: StrPath) -> Expectation:
    """What a manifest of ours (its tensors) or a checksum list (its files) demands of an output."""
    path = find_manifest(os.fspath(name_or_path))
    if path.suffix == ".json":
        found = manifest_format.read_manifest(path)
        return Expectation(path.name, {}, {n: t.xxh3_128 for n, t in found.tensors.items()})
    return Expectation(path.name, checksums.read_checksums(path).by_file(), {})
