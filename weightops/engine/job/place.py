"""The place of a job: a folder or a prefix of its own, given as text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from weightops.engine.job.documents import Job, JobOutput, read_job
from weightops.engine.job.outputs import Output, open_output
from weightops.errors import UsageError
from weightops.formats.choose import SINGLE_SUFFIXES
from weightops.formats.job_owner import JobOwner, own_job
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.stores.places import is_url
from weightops.stores.store import WritableStore
from weightops.stores.stores import Stores


def absolute(place: str | os.PathLike[str]) -> str:
    """A place as every process knows it, whatever folder it is in."""
    text = os.fspath(place)
    return text.rstrip("/") if is_url(text) else os.path.abspath(text)


class OpenJob:
    """A job at its place: its files, and its outputs."""

    def __init__(self, place: str, stores: Stores, store: WritableStore | None = None) -> None:
        """Raises as `read_job` does."""
        self.place = absolute(place)
        self.store = store or stores.writable(self.place)
        self.document: Job = read_job(self.store)
        self.outputs = open_outputs(self.place, self.document, stores)

    @property
    def is_own(self) -> bool:
        """Whether it lies in an output of its own, and goes when that has its name."""
        return any(is_own(self.place, output) for output in self.document.outputs)

    def refuse_elsewhere(self, roots: Iterable[str]) -> None:
        """Raise `UsageError` unless all outputs lie beside the job or below `roots`: others may have written it."""
        allowed = [_parent(self.place), *map(absolute, roots)]
        for output in self.document.outputs:
            if not is_own(self.place, output) and not any(_is_below(output.out, root) for root in allowed):
                raise UsageError(
                    f"the job {escape(self.place)} writes to {escape(output.out)}, which does not lie beside it",
                    hint=f"if that is right, say so: --output-root {escape(_parent(output.out))}",
                )


def open_outputs(place: str, document: Job, stores: Stores) -> tuple[Output, ...]:
    """The outputs of the job at a place."""
    owner = JobOwner(job=place, fingerprint=document.fingerprint)
    return tuple(open_output(output, owner, stores) for output in document.outputs)


def is_own(place: str, output: JobOutput) -> bool:
    """Whether this is the place of the job that nobody asked for, by which an output in a bucket is written."""
    return place == own_job(output.out, is_file=output.is_file)


def _parent(place: str) -> str:
    return place.rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def _is_below(place: str, root: str) -> bool:
    if is_url(place) or is_url(root):
        return f"{place}/".startswith(f"{root.rstrip('/')}/")
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(root))


def refuse_places(place: str, outputs: Sequence[JobOutput], sources: Iterable[SourceFile]) -> None:
    """Raise `UsageError` for a job in or around an output or a source, and for sources that carry secrets."""
    for output in outputs:
        if _touch(place, output.out) and not is_own(place, output):
            raise UsageError(
                f"the job {escape(place)} and the output {escape(output.out)} lie inside one another",
                hint="give the job a folder of its own",
            )
    for file in sources:
        if file.is_on_server:
            _refuse_secrets(file)
            _refuse_around(outputs, file)
        elif _touch(place, _parent(str(file.local_path))):
            raise UsageError(
                f"the job {escape(place)} and the input {file.shown} lie inside one another",
                hint="give the job a folder of its own",
            )


def _refuse_around(outputs: Sequence[JobOutput], file: SourceFile) -> None:
    """Raise `UsageError` for an output in the folder of a source, or around it, as `refuse_among` does on disks."""
    place = file.path if file.path.endswith(SINGLE_SUFFIXES) else _parent(file.path)
    for output in outputs:
        if _touch(output.out, place) and not (output.is_file and output.out != file.path):
            raise UsageError(
                f"the output {escape(output.out)} and the input {file.shown} lie inside one another",
                hint="choose an --out outside the inputs",
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
