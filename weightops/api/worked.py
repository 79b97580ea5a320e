"""Outputs that are worked out on this machine first, block by block, in a folder beside them: what is known before."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightops.engine.finished import Lying, lying_at
from weightops.engine.job.bucket import refuse_begun
from weightops.engine.preflight import refuse_among
from weightops.engine.staging import Staging, refuse_target
from weightops.engine.targets import FileTarget
from weightops.engine.work_folder import refuse_others
from weightops.errors import OutputExists
from weightops.io.source_file import SourceFile
from weightops.stores.places import Out, as_out
from weightops.stores.s3.places import parse_place
from weightops.stores.stores import Stores


@dataclass(frozen=True)
class Worked:
    """An output; `here` is the path beside which it is worked at: its own, or for one in a bucket a name from here."""

    out: Out
    here: Path
    is_file: bool

    @classmethod
    def at(cls, place: str | os.PathLike[str], *, is_file: bool = False) -> Worked:
        out = as_out(place)
        if isinstance(out, Path):
            return cls(out, out, is_file)
        found = parse_place(out)
        return cls(out, Path(found.key.rpartition("/")[2] or found.bucket), is_file)

    def refuse(self, sources: Iterable[SourceFile], stores: Stores, *, may_replace: bool) -> None:
        """Raise, before there is work, what would be raised after it for a place that cannot be written to."""
        from weightops.quantization.work import SCHEMA, blocks_of  # imported here because it imports torch

        if isinstance(self.out, Path):
            refuse_among(self.out, sources)
            try:
                if self.is_file:
                    FileTarget(self.out, overwrite=may_replace).refuse_existing()
                else:
                    refuse_target(self.out, overwrite=may_replace)
            except OutputExists:
                Staging.clean_up_after(self.out)
                raise
        else:
            refuse_begun(self.out, stores, is_file=self.is_file, may_exist=may_replace)
        refuse_others(blocks_of(self.here), SCHEMA)

    def lying(self, stores: Stores) -> Lying:
        """What lies there."""
        return lying_at(self.out, stores, is_file=self.is_file)
