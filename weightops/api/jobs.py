"""Jobs that many processes share: a group at a time, and the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightops.engine.control import Control
from weightops.recipes.planning import StrPath, several

if TYPE_CHECKING:
    from weightops.engine.job.finish import Published


def work(
    job: StrPath,
    group: int,
    *,
    output_root: StrPath | Sequence[StrPath] = (),
    workers: int | None = None,
    control: Control | None = None,
) -> bool:
    """Do one group of a job, counted from 0; False if it was done already. Any may be done at once, also one twice.

    What writes the job is any function that writes, with `job=`. Outputs must lie beside the job, or below an
    `output_root`: who does a group need not have written the job. `workers` are threads for its arithmetic.
    """
    from weightops.engine.job import work as groups

    roots = [os.fspath(root) for root in several(output_root)]
    return groups.work(os.fspath(job), group, control or Control(), threads=workers, roots=roots)


def finish(
    job: StrPath,
    *,
    abandon: bool = False,
    output_root: StrPath | Sequence[StrPath] = (),
    control: Control | None = None,
) -> list[Published]:
    """Prove a job whose groups are done, and give its outputs their names; any number of times, also at once.

    Raises `weightops.errors.Unfinished`, which has the `groups` that are missing. With `abandon` nothing is finished:
    what the job has made is removed, but for outputs that have their names.
    """
    from weightops.engine.job import finish as ends

    roots = [os.fspath(root) for root in several(output_root)]
    if abandon:
        ends.abandon(os.fspath(job), control or Control(), roots=roots)
        return []
    return ends.finish(os.fspath(job), control or Control(), roots=roots)
