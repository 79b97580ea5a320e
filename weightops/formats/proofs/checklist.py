"""`checklist.chk`: MD5 of every file of a folder, as Meta publishes it with its weights, in md5sum's format."""

from __future__ import annotations

from collections.abc import Mapping

from weightops.checkpoint import Digests, Document
from weightops.spec import TensorSpec

NAME = "checklist.chk"


class Checklist(Document, frozen=True):
    """The list of the files written, itself excepted."""

    @property
    def name(self) -> str:
        return NAME

    @property
    def algorithms(self) -> tuple[str, ...]:
        return ("md5",)

    def render(
        self,
        tensors: Mapping[str, tuple[TensorSpec, str]],
        witnesses: Digests,
        files: Mapping[str, Mapping[str, str]],
    ) -> bytes:
        return "".join(f"{digests['md5']}  {name}\n" for name, digests in sorted(files.items())).encode()
