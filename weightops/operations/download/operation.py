"""Download: what a source lists, held against names, lists and disk; fetched; and recorded in a manifest.

The folder may hold other files. Files of the source replace those of the same name once the new ones are right.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightops.engine.control import Control
from weightops.engine.preflight import free_disk, taken_disk
from weightops.errors import (
    CorruptInput,
    Differs,
    IncompatibleInputs,
    NoRoom,
    OutputExists,
    SourceMissing,
)
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import FileEntry, Manifest
from weightops.formats.sniff import check_answer, check_head
from weightops.io.atomic import check_folder
from weightops.io.brief import brief
from weightops.io.digests import HEX_DIGITS
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.paths import check_names, check_relative
from weightops.io.platform.entries import replace_file
from weightops.operations.download.record import manifest_of, recorded
from weightops.stores.places import Out
from weightops.stores.transfer.partial import STATE, Claims
from weightops.stores.transfer.places import check_place, note_of, refuse_other, stamp_of
from weightops.stores.transfer.transfer import Done, Transfer
from weightops.stores.web.listing import Listing, RemoteFile
from weightops.stores.web.web import Web

_LOG = logging.getLogger(__name__)
DEFAULT_WORKERS = 4
_PREVIOUS = f"{STATE}/previous.json"
_SPARE_NBYTES = 16 << 20
_DROPPINGS = re.compile(rf"(?:.*/)?(?:\.cache/huggingface|{re.escape(STATE)})(?:/.*)?", re.DOTALL)
"""What clients keep for themselves in a folder, and people upload with it: no part of a model, wherever it lies."""
WEIGHTS = (".safetensors", ".wdelta", ".bin", ".pt", ".pth", ".gguf")


Files = tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Download:
    """What was fetched, or would be: `files` are all of them, `have` the bytes of each that were there before.

    `manifest` is None as long as the folder is not complete; a cache has none, and `is_cached` says that it has all.
    `stale` are files of an earlier version that the source no longer has, `unproven` those that the source gives no
    digest of, `ours` those that may be replaced.
    """

    out: Out
    listing: Listing
    files: tuple[RemoteFile, ...]
    have: Mapping[str, int]
    manifest: Manifest | None = None
    stale: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()
    ours: frozenset[str] = frozenset()
    is_cached: bool = False

    __repr__ = brief

    @property
    def is_complete(self) -> bool:
        """Whether every file is there, and was proven."""
        return self.manifest is not None or self.is_cached

    @property
    def nbytes(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(file.nbytes or 0 for file in self.files)


def select(listing: Listing, include: Sequence[str], exclude: Sequence[str]) -> tuple[Files, list[str]]:
    """The files to fetch, and what there is to say about them.

    A glob that ends in a slash means all below. The source's own manifest is none of them: the folder gets one that
    says what was fetched. Nor are what clients left. Raises `CorruptInput` for chosen names that would leave the
    folder or stand in each other's way, `SourceMissing` when nothing is left.
    """
    files, notes = select_all(listing, include, exclude, lambda name: name != manifest.NAME and not _is_dropping(name))
    dropped = sum(map(_is_dropping, _chosen(listing, include, exclude)))
    said = [f"{listing.source}: what a client left there is passed over (files: {dropped})"] if dropped else []
    return files, said + notes


def select_all(
    listing: Listing, include: Sequence[str], exclude: Sequence[str], is_wanted: Callable[[str], bool] = lambda _: True
) -> tuple[Files, list[str]]:
    """As `select`, with nothing passed over but what is not wanted by its name."""
    chosen = _chosen(listing, include, exclude)
    files = [file for file in listing.files if file.name in chosen and is_wanted(file.name)]
    if not files:
        raise SourceMissing(f"{listing.source}: no file" + (" matches" if include or exclude else ""))
    for file in files:
        try:
            check_relative(file.name, listing.source)
        except CorruptInput as error:
            raise CorruptInput(str(error), hint="--exclude leaves it out") from None
    return tuple(files), _check_together([file.name for file in files], listing.source)


def _chosen(listing: Listing, include: Sequence[str], exclude: Sequence[str]) -> frozenset[str]:
    """The names that --include and --exclude leave."""
    names = (file.name for file in listing.files)
    return frozenset(n for n in names if (not include or _matches(n, include)) and not _matches(n, exclude))


def _is_dropping(name: str) -> bool:
    return _DROPPINGS.fullmatch(name) is not None


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, f"{glob}*" if glob.endswith("/") else glob) for glob in globs)


def _check_together(names: Sequence[str], source: str) -> list[str]:
    """Refuse names of which one is the folder of another; warn of those that some file systems take for one."""
    present = set(names)
    if len(present) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise CorruptInput(f"{source}: lists {escape(twice)!r} twice")
    for name in names:
        folders = (name[:i] for i, character in enumerate(name) if character == "/")
        if clash := next((folder for folder in folders if folder in present), None):
            raise CorruptInput(f"{source}: {escape(clash)!r} is a file, and the folder of {escape(name)!r}")
    folded = Counter(name.casefold() for name in names)
    alike = sorted(escape(name) for name in names if folded[name.casefold()] > 1)
    return [f"{source}: {' and '.join(alike)} differ in case only"] if alike else []


def with_expected(listing: Listing, expected: Mapping[str, Mapping[str, str]], shown: str) -> Listing:
    """The listing with the digests of a list added; raises `Differs` for a name that only the list has."""
    missing = sorted(expected.keys() - {file.name for file in listing.files})
    if missing:
        raise Differs(f"{escape(shown)} lists {escape(missing[0])}, which the source does not have")
    files = (replace(file, digests={**file.digests, **expected.get(file.name, {})}) for file in listing.files)
    return replace(listing, files=tuple(files))


def _previous(out: Path) -> Manifest | None:
    """The manifest of an earlier download, also when a later one has begun to replace its files."""
    return recorded(out / manifest.NAME) or recorded(out / _PREVIOUS)


def _set_aside(out: Path) -> None:
    """The manifest is no longer true once the first file is replaced, but still says what was there."""
    try:
        replace_file(out / manifest.NAME, out / _PREVIOUS)
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_failure(out / manifest.NAME, error) from None


def check_out(out: Path) -> None:
    """Refuse what is no folder, or cannot become one; raises `OutputExists`, or what `check_folder` raises."""
    if os.path.lexists(out) and not out.is_dir():
        raise OutputExists(f"{escape(str(out))} exists and is not a folder")
    if not os.path.isdir(out):
        check_folder(out)


def plan_download(
    out: Path, listing: Listing, files: Files, warnings: Sequence[str], *, overwrite: bool = False
) -> Download:
    """What is there already and what is not; refuses what cannot end well before anything is fetched.

    Raises `OutputExists` for a folder that something else made, and for a file that no download brought and that is
    not the one wanted, unless it may `overwrite`; `CorruptInput` for links in the way, `NoRoom`.
    """
    previous = _previous(out)
    if previous is None and os.path.lexists(out / manifest.NAME):
        raise OutputExists(
            f"{escape(str(out))} holds a checkpoint that was not downloaded", hint="choose another --out"
        )
    _check_names(out, listing, files)
    check_place(out, f"{STATE}/data")
    have = {}
    for file in files:
        check_place(out, file.name)
        if _stands(out, file, previous):
            have[file.name] = file.nbytes or 0
    ours = frozenset(file.name for file in files) if overwrite else frozenset(_ever_fetched(previous))
    for file in files:
        refuse_other(out, file, ours)
    there = {file.name for file in listing.files}
    complete = recorded(out / manifest.NAME) if len(have) == len(files) else None
    if complete is not None and complete.recipe.get("commit") not in ("", listing.commit):
        complete = None  # the same files, of another version: that is to be recorded
    stale = tuple(name for name in _ever_fetched(previous) if name not in there and _is_file(out, name))
    if complete is None:
        check_folder(out)
    check_room(out, sum(file.nbytes or 0 for file in files if file.name not in have))
    unproven = tuple(file.name for file in files if not file.digests)
    notes = (*warnings, *name_unproven(unproven))
    return Download(out, listing, files, have, None if stale else complete, stale, notes, unproven, ours)


def _check_names(out: Path, listing: Listing, files: Files) -> None:
    """Refuse names that the place of the download cannot hold beside one another, and beside our own."""
    try:
        check_names(out, [*(file.name for file in files), manifest.NAME, STATE], listing.source)
    except CorruptInput as error:
        hint = f"{error.hint}, or leave one out with --exclude" if error.hint else "--exclude leaves it out"
        raise CorruptInput(str(error), hint=hint) from None


def check_room(out: Path, missing_nbytes: int) -> None:
    """Raise `NoRoom` unless the disk has room for so many bytes more, less what has arrived of them already."""
    needed, free = missing_nbytes - taken_disk(out / STATE, "*/data") + _SPARE_NBYTES, free_disk(out / STATE)
    if missing_nbytes and needed > free:
        raise NoRoom(f"{escape(str(out))}: {needed} more bytes are needed, {free} are free")


def _ever_fetched(previous: Manifest | None) -> list[str]:
    """The files that an earlier download brought, and those that it found to be of a still earlier one."""
    return [*previous.recipe.get("etags", ()), *previous.recipe.get("stale", ())] if previous else []


def _is_file(out: Path, name: str) -> bool:
    """Whether the name is that of a file inside, with no link on the way."""
    try:
        check_place(out, check_relative(name, str(out)))
    except CorruptInput:
        return False
    return (out / name).is_file()


def from_manifest(out: Path, found: Manifest) -> Download:
    """A folder that is complete already, but for what a run that was killed last of all did not remove."""
    Claims(out).clear()
    recipe = found.recipe
    files = tuple(RemoteFile(name, "", entry.nbytes, entry.digests) for name, entry in found.files.items())
    listing = Listing(recipe["source"], files, recipe["commit"], recipe["revision"])
    stale = tuple(recipe.get("stale", ()))
    have = {name: entry.nbytes for name, entry in found.files.items()}
    unproven = tuple(recipe.get("unproven", ()))
    return Download(out, listing, files, have, found, stale, (*_name_stale(stale), *name_unproven(unproven)), unproven)


def name_unproven(names: Sequence[str]) -> list[str]:
    """What there is to say of files that the source gives no digest of."""
    if not names:
        return []
    some = ", ".join(map(escape, names[:3])) + (", ..." if len(names) > 3 else "")
    return [f"the source gives no digest of {some}, so nothing proves what arrived right (--sha256 does for a URL)"]


def _name_stale(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        f"{escape(name)} is of an earlier version and not part of this one; --prune removes it" for name in names
    )


def _stands(out: Path, file: RemoteFile, previous: Manifest | None) -> bool:
    """Whether an earlier download brought this very content, and it still has its size."""
    if previous is None or file.name not in previous.files or not file.identity:
        return False
    entry = previous.files[file.name]
    unknown = any(entry.digests.get(name) != digest for name, digest in file.digests.items() if name in HEX_DIGITS)
    if unknown or previous.recipe.get("etags", {}).get(file.name) != file.identity:
        return False
    if os.path.lexists(note_of(out, file.name)):
        return False  # a later run has replaced it, and did not come to its end
    try:
        return (out / file.name).lstat().st_size == entry.nbytes
    except OSError:
        return False


def fetch(
    planned: Download, request: Mapping[str, Any], web: Web, workers: int, prune: bool, control: Control
) -> Download:
    """Bring what is missing, then write the manifest; with `prune` remove the stale files."""
    out = Path(planned.out)
    previous = _previous(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(out, error) from None
    _check_names(out, planned.listing, planned.files)  # of a disk that was empty, only now can be said what it tells
    missing = [file for file in planned.files if file.name not in planned.have]
    control.progress.start("downloading", sum(file.nbytes or 0 for file in missing))
    transfer = Transfer(out, web, Reporter(control), workers, planned.ours)
    stamps = {name: stamp_of(out / name) for name in planned.have}
    done = transfer.run(missing, lambda: _set_aside(out))
    control.progress.stop()
    files = {name: _entry(file) for name, file in done.items()}
    etags = {name: file.identity for name, file in done.items()}
    for name in planned.have:
        assert previous is not None
        files[name], etags[name] = previous.files[name], previous.recipe["etags"][name]
    stale = () if prune else planned.stale
    for name in set(planned.stale) - set(stale):
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise write_failure(out / name, error) from None
    made = manifest_of(planned.listing, files, etags, request, web, stale, planned.unproven)
    stamps |= {name: file.stamp for name, file in done.items()}
    changed = next((name for name, stamp in stamps.items() if stamp_of(out / name) != stamp), None)
    if changed is not None:
        raise IncompatibleInputs(
            f"{escape(str(out))}: {escape(changed)} was replaced or removed by somebody else meanwhile",
            hint="run the same command again, and one version at a time",
        )
    transfer.seal(manifest.NAME, made.to_bytes(), control.check)
    return replace(planned, manifest=made, stale=stale, warnings=(*planned.warnings, *_name_stale(stale)))


def _entry(done: Done) -> FileEntry:
    return FileEntry(nbytes=done.nbytes, digests={k: v for k, v in done.digests.items() if k in HEX_DIGITS})


class Reporter:
    """Passes what a transfer says on to the progress of a command."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._progress = control.progress

    def started(self, name: str, nbytes: int, done_nbytes: int) -> None:
        _LOG.info("fetching %s: %s bytes, of which %s are here", escape(name), f"{nbytes:,}", f"{done_nbytes:,}")
        self._progress.start_file(name, nbytes, done_nbytes)

    def advanced(self, name: str, nbytes: int) -> None:
        self._progress.advance(nbytes, name)

    def finished(self, done: Done) -> None:
        self._progress.finish_file(done.name, done.nbytes, resumed=done.resumed_nbytes == done.nbytes)

    def waiting(self, name: str) -> None:
        self._progress.note(f"{escape(name)} is being fetched by another run: waiting for it")

    def look(self, file: RemoteFile, head: bytes, content_type: str, *, doubtful: bool) -> None:
        if doubtful or not file.digests:
            check_answer(head, file.name, content_type)
        elif file.name.endswith(WEIGHTS):
            check_head(head, escape(file.name))

    def tick(self) -> None:
        self._control.check()
