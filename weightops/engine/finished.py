"""Outputs that are there already: whether this very plan made them, of sources that held what they hold, and whole.

The manifest of an output says by what it was made: `plan` in its provenance is a digest of the plan, and `sources` one
of samples of all that it was made of. Neither depends on where sources lie, or on their dates.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightops.checkpoint import Copied
from weightops.engine.sample import sample
from weightops.engine.targets import FileTarget, FolderTarget
from weightops.errors import OutputExists, WeightopsError
from weightops.formats.job_owner import owner_name
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.io.digests import hash_file
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.plan import Plan, digest_of
from weightops.stores.places import Out
from weightops.stores.reader import FileReader
from weightops.stores.s3.places import BucketPlace, parse_place
from weightops.stores.stores import Stores

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


@dataclass(frozen=True)
class Lying:
    """What lies where an output is to be: its manifest, read when it is asked for, and the sizes of files by name."""

    shown: str
    is_there: bool
    manifest_name: str
    read: Callable[[], Manifest]
    size: Callable[[str], int | None]


def find_made(out: Out, plan: Plan, stores: Stores, *, may_differ: bool = False) -> Manifest | None:
    """The manifest of what the plan has made at `out`; None if nothing is there, or a job in a bucket still writes it.

    Looked at are the plan, samples of the sources, config and tokenizer files, and the sizes of all files. Raises
    `OutputExists`, saying what is wrong, for anything else that is there, unless it `may_differ`: then None.
    """
    try:
        return _find_made(lying_at(out, stores, is_file=plan.is_file), plan)
    except OutputExists:
        if may_differ:
            return None
        raise


def lying_at(out: Out, stores: Stores, *, is_file: bool) -> Lying:
    """What lies at `out`, a folder or a file."""
    if not isinstance(out, Path):
        return _in_bucket(out, stores, is_file=is_file)
    at = (FileTarget if is_file else FolderTarget)(out, overwrite=False).manifest
    is_there = os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir()))
    folder = out.parent if is_file else out
    return Lying(
        escape(str(out)), is_there, at.name, lambda: manifest.read_manifest(at), lambda name: _size(folder / name)
    )


def _in_bucket(out: str, stores: Stores, *, is_file: bool) -> Lying:
    place = parse_place(out)
    above, _, name = place.key.rpartition("/")
    store = stores.bucket(BucketPlace(place.bucket, above) if is_file else place)
    names = [each for each in store.listed("") if not is_file or each.startswith(name)]
    own = {each: each.removeprefix(name) if is_file else each for each in names}
    at = f"{name}.{manifest.NAME}" if is_file else manifest.NAME
    is_there = at in own or (owner_name() not in own.values() and bool(own))
    sizes = {each: store.identity(each).nbytes for each in names} if is_there else {}
    return Lying(str(place), is_there, at, lambda: manifest.parse_manifest(store.get(at), str(place)), sizes.get)


def _find_made(there: Lying, plan: Plan) -> Manifest | None:

    def made_of() -> str:
        with FileReader() as files:
            samples = {shard.name: sample(shard.tensors.values(), files) for shard in plan.shards}
        return sources_mark(samples, remote_sources(plan))

    found = _find_marked(there, plan_mark(plan), made_of)
    if found is None:
        return None
    for name, sidecar in plan.sidecars.items():
        if isinstance(sidecar, Copied) and not sidecar.file.is_remote:
            right = hash_file(Path(sidecar.file.path), ["xxh3_128"]).digests["xxh3_128"]
            if name not in found.files or found.files[name].digests.get("xxh3_128") != right:
                raise _other(there, f"its {escape(name)} is not the one that lies with the source now")
    missing = next((n for n in sorted(plan.file_names) if not plan.is_file and there.size(n) is None), None)
    if missing is not None:
        raise _other(there, f"it lacks {escape(missing)}")
    return found


def find_marked(there: Lying, mark: str, made_of: Callable[[], str], *, may_differ: bool = False) -> Manifest | None:
    """The manifest of an output with this mark, whose sources have the one of `made_of`; else as `find_made`."""
    try:
        return _find_marked(there, mark, made_of)
    except OutputExists:
        if may_differ:
            return None
        raise


def _find_marked(there: Lying, mark: str, made_of: Callable[[], str]) -> Manifest | None:
    if not there.is_there:
        return None
    try:
        found = there.read()
    except WeightopsError:
        raise _other(there, f"it has no {there.manifest_name} that can be read") from None
    if PLAN not in found.provenance:
        raise _other(there, "its manifest does not say by which plan it was made")
    if found.provenance[PLAN] != mark:
        raise _other(there, "it was made by another plan, or by another version of weightops")
    if found.provenance.get(SOURCES) != made_of():
        raise _other(there, "its sources held something else when it was made")
    for name, entry in found.files.items():
        size = there.size(name)
        if size != entry.nbytes:
            what = "is missing" if size is None else f"has {size} bytes"
            raise _other(there, f"{escape(name)} {what}, and its manifest says {entry.nbytes}")
    return found


def _size(path: Path) -> int | None:
    """The size of a regular file; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _other(there: Lying, why: str) -> OutputExists:
    return OutputExists(
        f"{there.shown} exists, and is not what this command makes: {why}",
        hint="choose another --out, or give --overwrite to replace it when done",
    )
