"""A download from its request to its report: find, list, select, plan, fetch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightops.engine.control import Control
from weightops.errors import UsageError
from weightops.formats.proofs import manifest as manifest_format
from weightops.operations.download import operation as operation
from weightops.operations.download import record as record
from weightops.operations.download import source as sources
from weightops.operations.download.operation import Download
from weightops.stores.s3.places import BucketPlace

_LOG = logging.getLogger(__name__)


def download_into(
    source: str,
    out: Path,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    digests: Mapping[str, str],
    checksums: str | None,
    workers: int | None,
    prune: bool,
    overwrite: bool,
    offline: bool,
    dry_run: bool,
    control: Control,
) -> Download:
    """What `weightops.api.prove.download` does, with all its options."""
    include, exclude = tuple(include), tuple(exclude)
    target = sources.find_target(source, revision, control.stores.web.endpoint)
    if offline:
        given = {**digests, "checksums": checksums, "prune": prune, "overwrite": overwrite}
        for name in (name for name, value in given.items() if value):
            raise UsageError(f"{name} has no use offline, where no server is asked", hint="leave it out")
        found = record.offline(
            out, str(target.place), sources.known_version(target) or target.revision, include, exclude
        )
        return operation.from_manifest(out, found)
    operation.check_out(out)
    with control.stores.connected() as stores:
        web = stores.s3 if isinstance(target.place, BucketPlace) else stores.web
        target = sources.with_digests(target, digests, checksums, web)
        version = sources.find_version(target, web)
        request = record.request_of(str(target.place), version, target.expected_by, include, exclude)
        earlier = record.recorded(out / manifest_format.NAME)
        if version and earlier is not None and record.is_complete(out, earlier, request):
            done = operation.from_manifest(out, earlier)
            if not (prune and done.stale):
                return done
        listing = sources.list_target(target, version, web)
        listing = operation.with_expected(listing, target.expected, target.expected_by)
        chosen, warnings = operation.select(listing, include, exclude)
        planned = operation.plan_download(out, listing, chosen, warnings, overwrite=overwrite)
        here, nbytes = len(planned.have), f"{planned.nbytes:,}"
        _LOG.info("%s: %d files, %s bytes; %d are here", listing.source, len(chosen), nbytes, here)
        if dry_run or planned.manifest is not None:
            return planned
        return operation.fetch(planned, request, web, workers or operation.DEFAULT_WORKERS, prune, control)
