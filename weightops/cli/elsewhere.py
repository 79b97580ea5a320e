"""What a worker of a cluster does: a group, with the network and the cache that its own environment describes."""

from __future__ import annotations

from weightops.cli.hub_cache import hub_cache, is_offline
from weightops.engine.control import Control, Progress
from weightops.engine.job.work import work
from weightops.stores.stores import BUCKETS, WEB, Stores


def do_group(place: str, number: int, roots: tuple[str, ...], progress: Progress) -> None:
    """Do a group of a job; raises as `work` does."""
    from weightops.cli.network import open_buckets, open_web  # imported here because many jobs need no network

    stores = Stores(connect={WEB: open_web, BUCKETS: open_buckets}, cache=hub_cache(), offline=is_offline())
    work(place, number, Control(progress, stores=stores), roots=roots)
