"""The end of an output on this machine: what is staged gets its name, and then what it took the place of goes.

All of it may be killed at any moment and be done again: run.json says by which inodes what was staged, and what it
replaces, are known.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from weightops.engine.targets import FileTarget, FolderTarget, Place
from weightops.engine.work_folder import OUTPUT, WorkFolder, read_document
from weightops.errors import Locked, OutputExists, UsageError
from weightops.io.atomic import fsync_folder
from weightops.io.direct import write_failure
from weightops.io.platform.entries import rename

SCHEMA = "weightops-partial/1"
WHOLE, REPLACED = "whole", "replaced"
"""What a job calls `OUTPUT` when all shards are in it, and what the output takes the place of."""


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """Another folder of a run, by its name beside the output and what it is."""

    name: str
    schema: str


class PartialRun(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag=SCHEMA):
    """`run.json`: the plan without the places of its sources, its fingerprint and the files that it makes.

    When all is written it says also by which inode the output will be known, what it takes the place of, and which
    folder `beside` it the run needs no longer.
    """

    fingerprint: str
    files: tuple[str, ...]
    plan: dict[str, Any]
    finished: int | msgspec.UnsetType | None = msgspec.UNSET
    replaces: int | msgspec.UnsetType | None = msgspec.UNSET
    beside: Beside | msgspec.UnsetType = msgspec.UNSET


def restore_replaced(out: Path, work: WorkFolder) -> None:
    """Put back what a run that was killed between two renames had moved aside."""
    aside = work.path / REPLACED
    if not os.path.lexists(out) and is_replaced(aside, work):
        rename(aside, out)


def give_name(work: WorkFolder, target: Place, staged: Path) -> None:
    """Give what is finished in `staged` its name, durably."""
    try:
        target.publish(staged, work.path / REPLACED)
        fsync_folder(target.out.parent)
    except OSError as error:
        raise write_failure(target.out, error) from None


def flush_names(folder: Path) -> None:
    """Make the names in a folder, and in those in it, durable."""
    for each in {folder, *(path.parent for path in folder.rglob("*"))}:
        fsync_folder(each)


def remove_published(work: WorkFolder, beside: WorkFolder | None = None) -> None:
    """Remove what a run leaves beside its output; its own folder last, which says what the others are."""
    with suppress(OutputExists, Locked), ExitStack() as stack:
        remove_replaced(work)
        if beside is None and (path := _beside(work)) is not None:
            beside = stack.enter_context(WorkFolder(*path))
        if beside is not None:
            beside.remove()
        work.remove()


def _beside(work: WorkFolder) -> tuple[Path, str] | None:
    """Another folder of the run, and its schema: where the sources of its output lay."""
    found = (work.document or {}).get("beside")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("name", "schema")):
        return None
    path = work.path.with_name(Path(found["name"]).name)
    return (path, found["schema"]) if read_document(path, found["schema"]) is not None else None


def remove_replaced(work: WorkFolder) -> None:
    """Remove what a published output took the place of; after an exchange of names it may be in the output's own."""
    for name in (REPLACED, OUTPUT, WHOLE):
        if is_replaced(folder := work.path / name, work):
            shutil.rmtree(folder)


def is_replaced(folder: Path, work: WorkFolder) -> bool:
    """Whether this is the folder that the run was about to replace when it had all."""
    return folder.is_dir() and inode_of(folder) == (work.document or {}).get("replaces")


def inode_of(path: Path) -> int | None:
    """By what a file or folder is known whatever its name; None if there is none."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def target_of(out: Path, *, is_file: bool, overwrite: bool) -> Place:
    """The name `out`, and what may be done to what is there."""
    return (FileTarget if is_file else FolderTarget)(out, overwrite=overwrite)


def partial(out: Path) -> Path:
    """Where the run that makes `out` works; raises `UsageError` for what can be no output."""
    if not out.name:
        raise UsageError(f"{out} cannot be an output", hint="name a folder to be made: --out DIR")
    return out.with_name(f"{out.name}.partial")


def is_published(out: Path, document: Mapping[str, Any]) -> bool:
    """Whether what is at `out` is the very folder or file that the run has made."""
    return document.get("finished") is not None and inode_of(out) == document["finished"]
