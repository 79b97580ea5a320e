"""What was signed, as a value and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.strict_json import as_json


class SignDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-sign/1"):
    """What `sign --json` prints: a `Signed` as it stands. `bytes` were read in `elapsed_s` seconds."""

    folder: str
    signature: str
    signer: str
    files: tuple[str, ...]
    bytes: int
    elapsed_s: float
    dry_run: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Signed:
    """The files that the bundle at `signature` lists, or with `dry_run` would list.

    `nbytes` is their size, and with `dry_run` nothing of it has been read; `signer` says who has signed.
    """

    folder: str
    signature: str
    signer: str
    files: tuple[str, ...]
    nbytes: int
    elapsed_s: float = 0.0
    dry_run: bool = False
    warnings: tuple[str, ...] = ()

    __repr__ = brief

    def _repr_html_(self) -> str:
        facts = {"signed by": self.signer, "files": len(self.files), "size": in_units(self.nbytes)}
        return card(self.signature, facts, ("file",), [(name,) for name in self.files], what="files")

    def to_json(self) -> dict[str, Any]:
        """A document of schema `weightops-sign/1`."""
        document = SignDocument(
            folder=self.folder,
            signature=self.signature,
            signer=self.signer,
            files=self.files,
            bytes=self.nbytes,
            elapsed_s=round(self.elapsed_s, 3),
            dry_run=self.dry_run,
            warnings=self.warnings,
        )
        return as_json(document)
