"""Writing results as a job: for other machines to do, or into a place without renames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from weightops.engine.control import Control
from weightops.engine.job.dask import Dask, Task, do_group
from weightops.engine.job.drive import Executor, Threads, drive
from weightops.engine.job.finish import finish
from weightops.engine.job.write import Wanted, write_job
from weightops.engine.preflight import default_workers, preflight
from weightops.errors import UsageError
from weightops.formats.job_owner import own_job
from weightops.formats.proofs.manifest import Manifest
from weightops.io.escape import escape
from weightops.plan import Plan
from weightops.stores.places import Out, is_url

_DASK = "dask:"
EXECUTORS = ("threads", "dask:ADDRESS")


@dataclass(frozen=True)
class Jobbed:
    """What became of a job: where it is, of how many groups; manifests by output, none if others are to do them."""

    place: str
    groups: int
    manifests: Mapping[Out, Manifest]
    warnings: tuple[str, ...]


def executor_of(given: str | Executor | None, workers: int | None, task: Task = do_group) -> Executor | None:
    """Who does the groups of a job, by name, and what they do if they are others; raises `UsageError`."""
    if given is None or not isinstance(given, str):
        return given
    if given == "threads":
        return Threads(workers)
    if given.startswith(_DASK) and given != _DASK:
        return Dask(given.removeprefix(_DASK), task)
    raise UsageError(f"there is no executor {escape(given)}", hint=f"there are {' and '.join(EXECUTORS)}")


def place_of_job(
    given: str | os.PathLike[str] | None, executor: Executor | None, outs: Mapping[Out, Plan]
) -> str | None:
    """Where the job is to lie, if there is to be one: others do the work, or an output is in a bucket."""
    if given is not None:
        return os.fspath(given)
    if executor is not None and executor.needs_job:
        raise UsageError(
            "workers elsewhere find what to do in files", hint="give --job a folder or prefix that all of them see"
        )
    bucket = next((out for out in outs if is_url(out)), None)
    return None if bucket is None else own_job(os.fspath(bucket), is_file=outs[bucket].is_file)


def write_as_job(
    place: str,
    plans: Mapping[Out, Plan],
    executor: Executor | None,
    control: Control,
    *,
    workers: int | None,
    overwrite: bool,
    restart: bool,
) -> Jobbed:
    """Write a job, and if there is somebody to do it, have it done and finished."""
    preflight(plans, workers or default_workers(list(plans.values())))
    wanted = [Wanted(os.fspath(out), plan, overwrite) for out, plan in plans.items()]
    with control.stores.connected():
        job = write_job(place, wanted, control, restart=restart)
        if executor is None:
            return Jobbed(job.place, job.document.groups, {}, job.document.warnings)
        try:
            drive(job, executor, control)
        finally:
            for file in {file for plan in plans.values() for file in plan.sources}:
                control.stores.forget(file)  # whoever reads it the next time proves it anew
        published = finish(job.place, control, roots=[each.out for each in job.document.outputs])
    manifests = {out: each.manifest for out, each in zip(plans, published, strict=True)}
    return Jobbed(job.place, job.document.groups, manifests, job.document.warnings)
