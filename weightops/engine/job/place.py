"""The place of a job: a folder or a prefix of its own, given as text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from weightops.engine.job.documents import Job, JobOutput, read_job
from weightops.engine.job.outputs import Output, open_output
from weightops.engine.work_folder import JobOwner
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.stores.local import LocalStore
from weightops.stores.store import WritableStore
from weightops.stores.stores import Stores


def absolute(place: str | os.PathLike[str]) -> str:
    """A place as every process knows it, whatever folder it is in."""
    text = os.fspath(place)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)


def open_store(place: str, stores: Stores) -> WritableStore:
    """The files of a job."""
    return LocalStore(Path(place))


class OpenJob:
    """A job at its place: its files, and its outputs."""

    def __init__(self, place: str, stores: Stores, store: WritableStore | None = None) -> None:
        """Raises as `read_job` does."""
        self.place = absolute(place)
        self.store = store or open_store(self.place, stores)
        self.document: Job = read_job(self.store)
        self.owner = JobOwner(job=self.place, fingerprint=self.document.fingerprint)
        self.outputs: tuple[Output, ...] = tuple(open_output(o, self.owner, stores) for o in self.document.outputs)

    def refuse_elsewhere(self, roots: Iterable[str]) -> None:
        """Raise `UsageError` unless all outputs lie beside the job or below `roots`: others may have written it."""
        allowed = [_parent(self.place), *map(absolute, roots)]
        for output in self.document.outputs:
            if not any(_is_below(output.out, root) for root in allowed):
                raise UsageError(
                    f"the job {escape(self.place)} writes to {escape(output.out)}, which does not lie beside it",
                    hint=f"if that is right, say so: --output-root {escape(_parent(output.out))}",
                )


def _parent(place: str) -> str:
    return place.rpartition("/")[0] if "://" in place else str(Path(place).parent)


def _is_below(place: str, root: str) -> bool:
    if "://" in place or "://" in root:
        return f"{place}/".startswith(f"{root.rstrip('/')}/")
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(root))


def refuse_places(place: str, outputs: Iterable[JobOutput], sources: Iterable[SourceFile]) -> None:
    """Raise `UsageError` for a job in or around an output or a source, and for sources that carry secrets."""
    for output in outputs:
        if _touch(place, output.out):
            raise UsageError(
                f"the job {escape(place)} and the output {escape(output.out)} lie inside one another",
                hint="give the job a folder of its own",
            )
    for file in sources:
        if file.is_on_server:
            _refuse_secrets(file)
        elif _touch(place, _parent(str(file.local_path))):
            raise UsageError(
                f"the job {escape(place)} and the input {file.shown} lie inside one another",
                hint="give the job a folder of its own",
            )


def _touch(place: str, other: str) -> bool:
    return place == other or _is_below(place, other) or _is_below(other, place)


def _refuse_secrets(file: SourceFile) -> None:
    url = urlsplit(file.path)
    if url.query or "@" in url.netloc:
        what = "a query, which may be a signature" if url.query else "a user or password"
        raise UsageError(
            f"{file.shown}: its URL carries {what}, and the files of a job are read by others",
            hint="name the source without it, and give workers credentials by the environment (HF_TOKEN, AWS_...)",
        )
