"""Files on their way: partial data and a journal of its chunks, each pair owned by one process at a time.

    OUT/.weightops-partial/KEY.part/           free: whoever renames it first has it
    OUT/.weightops-partial/KEY.part.OWNER/     in work by OWNER
        data                                   the file, chunks in any order
        journal                                what it is part of, then one line per chunk that is on disk
    OUT/.weightops-partial/KEY.done            what is known of a file that has its final name

A rename has one winner on every file system, network ones included, which cannot be said of locks. An owner that is
dead, or on another machine and silent, loses its claim by the same means. The journal is never flushed on purpose:
a chunk counts only if its digest is right when it is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from weightops.io.atomic import fsync_folder, write_all, write_whole
from weightops.io.direct import write_failure
from weightops.io.owner import Owner
from weightops.io.platform.entries import TAKEN, is_link, rename
from weightops.io.platform.files import open_to_write, read_at

STATE = ".weightops-partial"
CHUNK_NBYTES = 4 << 20
SILENCE_S = 30.0
"""How long an owner on another machine may leave its claim untouched."""
_TOUCH_S = 5.0
_OURS = re.compile(r"(?:\w+\.(?:part(?:\..*)?|done)|previous\.json|\..*\.tmp)(?:\.gone\..*)?|\w+\.gone\..*")
"""What a run puts into the state folder."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the data is part of; `etag` is the one of the server that sent it."""

    url: str
    nbytes: int | None
    digests: dict[str, str]
    etag: str = ""
    chunk_nbytes: int = CHUNK_NBYTES

    def continues(self, other: Header) -> bool:
        """Whether chunks of `other` are chunks of this: the same content by digest, or by URL and ETag."""
        if (self.nbytes, self.chunk_nbytes) != (other.nbytes, other.chunk_nbytes) or self.nbytes is None:
            return False
        if self.digests or other.digests:
            return self.digests == other.digests
        return self.url == other.url and bool(other.etag) and self.etag in ("", other.etag)


def key_of(name: str) -> str:
    """A file's name in the state folder, whatever characters it has."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Claim:
    """Exclusive hold on the partial data of one file."""

    def __init__(self, folder: Path, free: Path) -> None:
        self.folder, self._free = folder, free
        self.data, self.journal = folder / "data", folder / "journal"

    def touch(self) -> None:
        """Show other machines that somebody is at work."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)

    @property
    def is_held(self) -> bool:
        """Whether nobody has taken it over."""
        return self.folder.is_dir()

    def release(self) -> None:
        """Leave what there is to the next run."""
        try:
            rename(self.folder, self._free)
        except OSError as error:
            if error.errno in TAKEN:
                self.remove()  # somebody has begun anew meanwhile

    def remove(self) -> None:
        """Throw it away."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Claims:
    """The state folder of one output, as seen by one run."""

    def __init__(self, out: Path) -> None:
        self.folder = out / STATE
        self._name = f"{Owner.here()}-{os.urandom(3).hex()}"
        self._held: dict[str, Claim] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._touched_s = time.monotonic()

    def take(self, key: str) -> Claim | None:
        """The partial data of a file, perhaps empty; None while another run is at work on it."""
        free = self.folder / f"{key}.part"
        mine = self.folder / f"{free.name}.{self._name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in (*self._others(free), free):
                if path is None:
                    return None
                if _renamed(path, mine):
                    break
            else:
                free.mkdir(exist_ok=True)
                if not _renamed(free, mine):
                    return None
        except FileNotFoundError:
            return None  # another run has just finished, and removed the folder
        except OSError as error:
            raise write_failure(self.folder, error) from None
        if None in self._others(free):
            # Both had looked before either began. Who sees this now yields; it may be both, but one at the least.
            Claim(mine, free).release()
            return None
        claim = Claim(mine, free)
        with self._lock:
            self._held[key] = claim
        return claim

    def _owners(self, free: Path) -> list[str]:
        return [entry.name for entry in self.folder.iterdir() if entry.name.startswith(f"{free.name}.")]

    def _others(self, free: Path) -> Iterator[Path | None]:
        """Claims on a file other than ours: the path of each whose owner is dead, None for each that is alive."""
        for name in sorted(self._owners(free)):
            owner = name.removeprefix(f"{free.name}.")
            if owner != self._name:
                yield None if self._is_alive(self.folder / name, owner) else self.folder / name

    def _is_alive(self, path: Path, name: str) -> bool:
        owner = Owner.parse(name.rpartition("-")[0])
        alive = owner.is_alive() if owner else None
        if alive is not None:
            return alive
        # On another machine: its clock is not ours, but we can see whether the time on the folder moves.
        try:
            touched_ns = path.stat().st_mtime_ns
        except OSError:
            return False
        before, since_s = self._seen.get(path.name, (-1, 0.0))
        now_s = time.monotonic()
        if before != touched_ns:
            self._seen[path.name] = (touched_ns, now_s)
            return True
        return now_s - since_s < SILENCE_S

    def touch(self) -> None:
        """To be called often: keeps the claims of this run alive."""
        if time.monotonic() - self._touched_s < _TOUCH_S:
            return
        self._touched_s = time.monotonic()
        with self._lock:
            held = list(self._held.values())
        for claim in held:
            claim.touch()

    def drop(self, key: str) -> None:
        """Throw a claim and its data away; the file is done, or not to be continued."""
        with self._lock:
            claim = self._held.pop(key)
        claim.remove()

    def release_all(self) -> None:
        """Leave what is held to the next run."""
        with self._lock:
            held, self._held = list(self._held.values()), {}
        for claim in held:
            claim.release()

    def clear(self) -> None:
        """Remove the state folder; what other runs hold in it, or none made, stays, and so does the folder then."""
        try:
            entries = list(self.folder.iterdir())
        except FileNotFoundError:
            return
        for entry in filter(lambda entry: _OURS.fullmatch(entry.name), entries):
            owner = entry.name.partition(".part.")[2]
            if owner and self._is_alive(entry, owner):
                continue
            # Renamed first, so that nobody continues what is being removed, to what nobody takes for a claim.
            doomed = entry.with_name(f"{entry.name.partition('.part')[0]}.gone.{self._name}")
            if _renamed(entry, doomed):
                is_folder = doomed.is_dir() and not is_link(doomed)
                shutil.rmtree(doomed) if is_folder else doomed.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            fsync_folder(self.folder.parent)


def _renamed(source: Path, target: Path) -> bool:
    """Whether it was this process that renamed it."""
    try:
        rename(source, target)
    except FileNotFoundError:
        return False
    return True


class Journal:
    """What is on disk of one file: xxh3_128 by chunk number."""

    def __init__(self, claim: Claim, wanted: Header) -> None:
        """Continue what an earlier run left if it belongs to `wanted`, else begin anew; digests are not checked yet."""
        self._path = claim.journal
        self._fd = -1
        self.header = wanted
        self.chunks: dict[int, str] = {}
        found, chunks = _read_journal(self._path)
        if found is not None and wanted.continues(found):
            self.header = msgspec.structs.replace(found, url=wanted.url)
            self.chunks = chunks
            self._fd = self._open()
        else:
            self.begin(wanted)

    def begin(self, header: Header, chunks: dict[int, str] | None = None) -> None:
        """Forget all chunks but the given ones."""
        self.close()
        self.header, self.chunks = header, chunks or {}
        lines = [msgspec.json.encode(header), *(msgspec.json.encode(item) for item in self.chunks.items())]
        write_whole(self._path, b"\n".join([*lines, b""]))
        self._fd = self._open()

    def _open(self) -> int:
        try:
            return open_to_write(self._path, append=True)
        except OSError as error:
            raise write_failure(self._path, error) from None

    def add(self, index: int, digest: str) -> None:
        """Note a chunk that is on disk."""
        try:
            write_all(self._fd, msgspec.json.encode((index, digest)) + b"\n")
        except OSError as error:
            raise write_failure(self._path, error) from None
        self.chunks[index] = digest

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _read_journal(path: Path) -> tuple[Header | None, dict[int, str]]:
    """Header and chunks, up to the first line that a crash cut short."""
    try:
        first, *lines = path.read_bytes().split(b"\n")
        header = msgspec.json.decode(first, type=Header)
    except (OSError, msgspec.MsgspecError):
        return None, {}
    chunks = {}
    for line in lines[:-1]:
        try:
            index, digest = msgspec.json.decode(line, type=tuple[int, str])
        except msgspec.MsgspecError:
            break
        chunks[index] = digest
    return header, chunks


def right_chunks(path: Path, journal: Journal, nbytes: int) -> Iterator[tuple[int, memoryview | None]]:
    """Each journalled chunk in order of its place, with its bytes if their digest is right, else None.

    The bytes are valid up to the next step.
    """
    buffer = memoryview(bytearray(min(CHUNK_NBYTES, nbytes)))
    try:
        with path.open("rb", buffering=0) as file:
            for index, digest in sorted(journal.chunks.items()):
                start = index * CHUNK_NBYTES
                part = buffer[: max(0, min(CHUNK_NBYTES, nbytes - start))]
                count = read_at(file.fileno(), part, start) if part else 0
                right = part and count == len(part) and xxhash.xxh3_128_hexdigest(part) == digest
                yield index, part if right else None
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_failure(path, error) from None
