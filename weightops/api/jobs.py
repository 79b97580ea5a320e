"""Jobs that many processes share: a group at a time, and the end."""

from __future__ import annotations

from collections.abc import Sequence

from weightops.engine.control import Control
from weightops.engine.job.finish import Published
from weightops.engine.job.finish import abandon as abandon_job
from weightops.engine.job.finish import finish as finish_job
from weightops.engine.job.work import work as work_group
from weightops.recipes.planning import StrPath, several
from weightops.stores.places import Out, as_out


def work(
    job: StrPath,
    group: int,
    *,
    output_root: StrPath | Sequence[StrPath] = (),
    workers: int | None = None,
    control: Control | None = None,
) -> bool:
    """Do one group of a job, counted from 0; False if it was done already. Any number may be done at once, also twice.

    What writes the job is any function that writes, with `job=`. Outputs must lie beside the job, or below an
    `output_root`: who does a group need not have written the job. `workers` are threads for its arithmetic.
    """
    roots = [str(root) for root in several(output_root)]
    return work_group(str(job), group, control or Control(), threads=workers, roots=roots)


def finish(
    job: StrPath,
    *,
    abandon: bool = False,
    output_root: StrPath | Sequence[StrPath] = (),
    control: Control | None = None,
) -> dict[Out, Published]:
    """Prove a job whose groups are done, and give its outputs their names; any number of times, also at once.

    Raises `weightops.errors.Unfinished`, which has the `groups` that are missing. With `abandon` nothing is finished,
    and what the job has made is removed, but for outputs that have their names.
    """
    roots = [str(root) for root in several(output_root)]
    if abandon:
        abandon_job(str(job), control or Control(), roots=roots)
        return {}
    return {as_out(each.out): each for each in finish_job(str(job), control or Control(), roots=roots)}
