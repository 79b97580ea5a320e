"""Whose an output is that many processes write, and where in a bucket that lies: what writes asks, and what reads."""

from __future__ import annotations

import msgspec

from weightops.errors import Claimed, SourceMissing
from weightops.io.escape import escape

WORK = ".weightops"
"""The folder in an output in a bucket, or for a file at the end of its name, that is there only while it is written."""


DOWNLOAD = f"{WORK}/download.json"
"""What is being downloaded into a folder in a bucket."""


class JobOwner(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-job-owner/1"):
    """Whose a partial output is that many processes write: a job, by its place and the fingerprint of what it does."""

    job: str
    fingerprint: str

    @classmethod
    def parse(cls, data: bytes) -> JobOwner | None:
        """What `encode` wrote, None for anything else."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @property
    def hint(self) -> str:
        """What ends the job."""
        job = escape(self.job)
        return f"`weightops finish {job}` ends it, `weightops finish {job} --abandon` gives it up"

    def claimed(self, shown: str) -> Claimed:
        """The error for another run that would write here."""
        return Claimed(f"{shown} is being written by the job {escape(self.job)}", hint=self.hint)

    def lost(self, shown: str) -> SourceMissing:
        """The error for who is to write here for this job, whose it is no more."""
        return SourceMissing(
            f"{shown}: nothing is being made here any more: its job has ended, or was given up",
            hint=f"see what `weightops finish {escape(self.job)}` says",
        )


def owner_name(file: str = "") -> str:
    """Where it is said whose an output in a bucket is: from its folder, or for a `file` in one."""
    return f"{file}{WORK}/owner.json"


def own_job(out: str, *, is_file: bool) -> str:
    """The place of the job that nobody asked for, by which an output in a bucket is written."""
    return f"{out}{'' if is_file else '/'}{WORK}/job"
