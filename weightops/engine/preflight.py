"""What is known to fail is refused before work starts: outputs among inputs, too little disk, too little memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path

from weightops.checkpoint import Copied
from weightops.engine.limits import peak_memory
from weightops.engine.publishing import partial
from weightops.engine.work_folder import OUTPUT
from weightops.errors import NoRoom, UsageError
from weightops.formats.choose import SINGLE_SUFFIXES
from weightops.io.escape import escape
from weightops.io.paths import check_names
from weightops.io.platform.files import taken_nbytes
from weightops.io.platform.machine import available_memory
from weightops.io.platform.names import place_of
from weightops.io.source_file import SourceFile
from weightops.plan import Plan
from weightops.stores.places import Out

_UPLOAD_NBYTES = 32 << 20
"""Parts of an object in a bucket that are in memory while they are sent."""
_SPARE_NBYTES = 16 << 20
"""Disk kept free beyond the output: file system metadata, index, manifest."""


def default_workers(plans: Sequence[Plan]) -> int:
    """Shards in work at once: two keep a fast disk busy, four the fastest; more only cost memory.

    One if anything comes from a server or a cache: then its files are read in the order of their bytes, as their
    digests need.
    """
    return 1 if any(plan.is_remote for plan in plans) else min(4, os.cpu_count() or 1)


def preflight(plans: Mapping[Out, Plan], workers: int) -> None:
    """Refuse outputs that lie inside one another or among the inputs; too little disk; too little memory.

    And, with `CorruptInput`, names that a system or file system cannot hold, or takes for one. Of an output in a bucket
    it is the memory that counts here.
    """
    here = {out: plan for out, plan in plans.items() if isinstance(out, Path)}
    _check_places(here)
    _check_disk(here)
    uploads = _UPLOAD_NBYTES if len(here) < len(plans) else 0
    memory, available = peak_memory(list(plans.values()), workers) + workers * uploads, available_memory()
    if memory > available:
        raise NoRoom(
            f"{workers} workers need {memory} bytes of memory, {available} are available", hint="give fewer --workers"
        )


def _check_places(plans: Mapping[Path, Plan]) -> None:
    targets = {place_of(out): _real(out) for out in plans}
    for out, plan in plans.items():
        refuse_among(out, plan.sources)
        _refuse_nested(out, (path for place, path in targets.items() if place != place_of(out)), "another output")
        check_names(partial(out) / OUTPUT, plan.file_names, escape(str(out)))
    if len(targets) < len(plans):
        raise UsageError("two outputs are the same folder", hint="choose another --out")


def _real(path: Path) -> Path:
    """Where a path leads; one of links that lead to each other is left as it is, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def refuse_among(out: Path, sources: Iterable[SourceFile]) -> None:
    """Raise `UsageError` for an output in the folder of a source, or around it.

    A file that needs none beside it may have an output there, which then must not be or hold the file itself.
    """
    paths = {_real(Path(f.path)) for f in sources if not f.is_remote}
    _refuse_nested(out, {p if p.suffix.lower() in SINGLE_SUFFIXES else p.parent for p in paths}, "the input")


def _refuse_nested(out: Path, others: Iterable[Path], what: str) -> None:
    target, around = place_of(out), _places_around(_real(out))
    for other in others:
        if place_of(other) in around or target in _places_around(other):
            raise UsageError(
                f"the output {escape(str(out))} and {what} {escape(str(other))} lie inside one another",
                hint="choose an --out outside the inputs",
            )


def _places_around(path: Path) -> list[tuple[object, ...]]:
    return [place_of(folder) for folder in (path, *path.parents)]


def _check_disk(plans: Mapping[Path, Plan]) -> None:
    """Raise `NoRoom` unless every disk has room for all that goes onto it."""
    needed: dict[int, int] = {}
    for out, plan in plans.items():
        target = _real(out)
        disk = next(p for p in target.parents if p.exists()).stat().st_dev
        there = taken_disk(partial(target) / OUTPUT, "*")
        sidecars = sum(s.file.nbytes for s in plan.sidecars.values() if isinstance(s, Copied))
        needed[disk] = needed.get(disk, 0) + plan.least_nbytes + sidecars + _SPARE_NBYTES - there
        free = free_disk(out)
        if needed[disk] > free:
            raise NoRoom(f"{escape(str(out))}: the output needs {needed[disk]} bytes of disk, {free} are free")


def free_disk(out: Path) -> int:
    """Bytes free where `out` will be, also when its folders do not exist yet."""
    return shutil.disk_usage(next(p for p in _real(out).parents if p.exists())).free


def taken_disk(folder: Path, pattern: str) -> int:
    """Bytes on disk of the files that match; another run may rename any of them while this one counts."""
    nbytes = 0
    for name in glob(pattern, root_dir=folder):
        with suppress(FileNotFoundError):
            nbytes += taken_nbytes((folder / name).stat())
    return nbytes
