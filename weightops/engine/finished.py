"""Outputs that are there already: whether this very plan made them, of sources that held what they hold, and whole.

The manifest of an output says by what it was made: `plan` in its provenance is a digest of the plan, and `sources` one
of samples of all that it was made of. Neither depends on where sources lie, or on their dates.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightops.checkpoint import Copied
from weightops.engine.sample import sample
from weightops.engine.targets import FileTarget, FolderTarget
from weightops.errors import OutputExists, WeightopsError
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.io.digests import hash_file
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.plan import Plan, digest_of
from weightops.stores.reader import FileReader

PLAN, SOURCES = "plan", "sources"
_OF_A_MOMENT = {"mtime_ns", "digest", "etag"}
"""What of a source file is no part of a plan: when it was written, and what is recorded of its content."""


def plan_mark(plan: Plan) -> str:
    """A digest of what the plan does, whatever its sources hold."""
    pieces = ({k: v for k, v in each.items() if k not in ("origins", "provenance")} for each in plan.identities())
    return digest_of(map(lasting, pieces))


def sources_mark(samples: Mapping[str, str], remote: tuple[SourceFile, ...]) -> str:
    """A digest of what the sources hold: samples by shard, and of files on servers what is known of their content."""
    return digest_of([sorted(samples.items()), *([file.name, file.digest or file.etag] for file in remote)])


def remote_sources(plan: Plan) -> tuple[SourceFile, ...]:
    """The files of the plan that something is known of without reading them."""
    return tuple(file for file in plan.sources if file.is_remote)


def lasting(value: Any) -> Any:
    """A plan's JSON without what may change while what it does stays the same."""
    if isinstance(value, list):
        return [lasting(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("op") == "witness" and not value.get("is_needed", True):
        # It watches what streams by, and knows what a manifest beside the source says, if there is one.
        return lasting(value["inputs"][0])
    is_file = value.keys() >= {"path", "nbytes", "mtime_ns"}
    return {key: lasting(each) for key, each in value.items() if not (is_file and key in _OF_A_MOMENT)}


def find_made(out: Path, plan: Plan, *, may_differ: bool = False) -> Manifest | None:
    """The manifest of what the plan has made at `out`; None if nothing is there.

    Looked at are the plan, samples of the sources, config and tokenizer files, and the sizes of all files. Raises
    `OutputExists`, saying what is wrong, for anything else that is there, unless it `may_differ`: then None.
    """
    try:
        return _find_made(out, plan)
    except OutputExists:
        if may_differ:
            return None
        raise


def _find_made(out: Path, plan: Plan) -> Manifest | None:

    def made_of() -> str:
        with FileReader() as files:
            samples = {shard.name: sample(shard.tensors.values(), files) for shard in plan.shards}
        return sources_mark(samples, remote_sources(plan))

    target = (FileTarget if plan.is_file else FolderTarget)(out, overwrite=False)
    found = _find_marked(out, target.manifest, plan_mark(plan), made_of)
    if found is None:
        return None
    for name, sidecar in plan.sidecars.items():
        if isinstance(sidecar, Copied) and not sidecar.file.is_remote:
            right = hash_file(Path(sidecar.file.path), ["xxh3_128"]).digests["xxh3_128"]
            if name not in found.files or found.files[name].digests.get("xxh3_128") != right:
                raise _other(out, f"its {escape(name)} is not the one that lies with the source now")
    missing = next((n for n in sorted(plan.file_names) if not plan.is_file and not (out / n).is_file()), None)
    if missing is not None:
        raise _other(out, f"it lacks {escape(missing)}")
    return found


def find_marked(
    out: Path, at: Path, mark: str, made_of: Callable[[], str], *, may_differ: bool = False
) -> Manifest | None:
    """The manifest `at` of an output with this mark, whose sources have the one of `made_of`; else as `find_made`."""
    try:
        return _find_marked(out, at, mark, made_of)
    except OutputExists:
        if may_differ:
            return None
        raise


def _find_marked(out: Path, at: Path, mark: str, made_of: Callable[[], str]) -> Manifest | None:
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return None
    try:
        found = manifest.read_manifest(at)
    except WeightopsError:
        raise _other(out, f"it has no {at.name} that can be read") from None
    if PLAN not in found.provenance:
        raise _other(out, "its manifest does not say by which plan it was made")
    if found.provenance[PLAN] != mark:
        raise _other(out, "it was made by another plan, or by another version of weightops")
    if found.provenance.get(SOURCES) != made_of():
        raise _other(out, "its sources held something else when it was made")
    for name, entry in found.files.items():
        size = _size(out.parent / name if at.parent == out.parent else out / name)
        if size != entry.nbytes:
            there = "is missing" if size is None else f"has {size} bytes"
            raise _other(out, f"{escape(name)} {there}, and its manifest says {entry.nbytes}")
    return found


def _size(path: Path) -> int | None:
    """The size of a regular file; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _other(out: Path, why: str) -> OutputExists:
    return OutputExists(
        f"{escape(str(out))} exists, and is not what this command makes: {why}",
        hint="choose another --out, or give --overwrite to replace it when done",
    )
