"""A folder beside an output in which one run works, `OUT.partial` or `OUT.blocks`.

    FOLDER/weightops.lock    held by the run that works here; says who that is
    FOLDER/weightops-job.json  if it belongs to a job of many processes, which one; no other run works here then
    FOLDER/run.json          what the run is, and the files that it makes; written before anything else
    FOLDER/output/           what becomes the output
    FOLDER/...               what else the run makes, under names that can be told from run.json

Whose a folder is is shown before anything in it is touched: it holds a run.json of this kind and nothing that such a
run does not make. Any other is somebody else's, whatever it is called, and refused. Links are never followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from weightops.engine.lock import Lock, is_lock
from weightops.errors import OutputExists
from weightops.formats.job_owner import JobOwner
from weightops.io.atomic import final_of, write_whole
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.platform.entries import is_link

RUN, OWNER, OUTPUT = "run.json", "weightops-job.json", "output"


class WorkFolder:
    """Exclusive hold on a folder; a context manager.

    `document` is the run.json that an earlier run left there, None if there is none.
    """

    def __init__(self, path: Path, schema: str, job: JobOwner | None = None) -> None:
        """Make the folder, or take over what a run that ended, or this `job`, has left.

        Raises `OutputExists` for a folder that is not ours, `Locked`, `Claimed`.
        """
        self.path, self.schema = path, schema
        refuse_others(path, schema, job)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failure(path, error) from None
        self._lock = Lock(path)
        try:
            refuse_others(path, schema, job)  # which a job may have claimed meanwhile
        except BaseException:
            self._lock.release()
            raise
        self.document = read_document(path, schema)

    def begin(self, document: msgspec.Struct) -> None:
        """Say what the run is: of its schema, with the `files` that it makes here, by their names from here."""
        data = json.dumps(msgspec.to_builtins(document)).encode()
        self.document = json.loads(data)
        write_whole(self.path / RUN, data)

    def own_files(self) -> list[Path]:
        """What the run, or an earlier one like it, has made here; raises `OutputExists` for anything else."""
        files = (self.document or {}).get("files")
        names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
        own = set(names)
        found = []
        for name, path in _walk(self.path):
            final = final_of(name)
            if is_lock(name) or name in (RUN, OWNER):
                continue
            if (final or name) not in own and final not in (RUN, OWNER):
                raise OutputExists(
                    f"{escape(str(self.path))} holds {escape(name)}, which weightops did not make",
                    hint="move it away, and run the same command again",
                )
            found.append(path)
        return found

    def clear(self) -> None:
        """Remove what the run has made; raises as `own_files` does, with nothing removed."""
        found = self.own_files()
        try:
            for path in found:
                path.unlink()
            _remove_empty_folders(self.path)
        except OSError as error:
            raise write_failure(self.path, error) from None

    def remove(self) -> None:
        """Clear and remove the folder itself; run.json last, which shows whose it is."""
        self.clear()
        try:
            for name in (OWNER, RUN):
                (self.path / name).unlink(missing_ok=True)
            self._lock.remove()
            self.path.rmdir()
        except OSError:
            return  # another run has just taken the folder over

    def close(self) -> None:
        """Let go."""
        self._lock.release()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_owner(path: Path) -> JobOwner | None:
    """The job that a folder belongs to, if it belongs to one."""
    try:
        return JobOwner.parse((path / OWNER).read_bytes())
    except OSError:
        return None


def refuse_others(path: Path, schema: str, job: JobOwner | None = None) -> None:
    """Raise `OutputExists` unless a run can work at `path`: nothing is there, or what such a run, or `job`, has left.

    Raises `Claimed` for a folder of another job.
    """
    shown = escape(str(path))
    if is_link(path) or (path.exists() and not path.is_dir()):
        what = "a link" if is_link(path) else "no folder"
        raise OutputExists(
            f"{shown} is {what}, and weightops works in a folder of that name",
            hint="move it away, or choose another --out",
        )
    if not path.exists():
        return
    owner = read_owner(path)
    if owner is not None:
        if owner != job:
            raise owner.claimed(shown)
        return
    if any(map(_is_more, path.iterdir())) and read_document(path, schema) is None:
        raise OutputExists(
            f"{shown} is there, and weightops cannot tell that it made it", hint="move it away, or choose another --out"
        )


def is_left(path: Path) -> bool:
    """Whether there is a folder in which nothing is but what is left of a run that was killed right away."""
    return path.is_dir() and not is_link(path) and not any(map(_is_more, path.iterdir()))


def _is_more(entry: Path) -> bool:
    """Whether it is more than what is left of a run, or a job, that was killed right away."""
    if is_lock(entry.name) or final_of(entry.name) in (RUN, OWNER):
        return False
    return entry.name != OUTPUT or is_link(entry) or not entry.is_dir() or any(entry.iterdir())


def read_document(path: Path, schema: str) -> dict[str, Any] | None:
    """The run.json in a folder, None if there is none of this schema."""
    try:
        found = json.loads((path / RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == schema else None


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Whatever is in a folder but folders, by its name from there; links are not followed."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False) and not is_link(folder / entry.name):
            yield from _walk(folder / entry.name, f"{name}/")
        else:
            yield name, folder / entry.name


def _remove_empty_folders(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not is_link(entry):
            _remove_empty_folders(entry)
            entry.rmdir()
