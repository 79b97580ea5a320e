"""`weightops download` into a bucket: the same files with the same manifest as in a folder, and nothing half there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import pytest
from fetching import FINAL, MIB, QUICK, REPO, WEIGHTS, content, fetch, files
from hub import Fault, Hub

from weightops import api
from weightops.engine.control import Control
from weightops.errors import CorruptInput, Differs, NoRoom, OutputExists, PlanDiffers, UsageError
from weightops.operations.download.operation import Download
from weightops.stores.s3.store import S3Store
from weightops.stores.stores import BUCKETS, WEB, Stores
from weightops.stores.web.http import Http
from weightops.stores.web.web import Web

MODEL = {"config.json": b"{}", "sub/empty.txt": b"", WEIGHTS: content(20 * MIB)}
NEWER = {**MODEL, "config.json": b"[]"}


class Place:
    """A folder in a bucket, and a hub with a model to be downloaded into it."""

    def __init__(self, hub: Hub, endpoint: str, connection: buckets.S3) -> None:
        self.hub, self._endpoint = hub, endpoint
        self.bucket = buckets.new_bucket(connection)
        self.store = S3Store(self.bucket, "out", connection)

    def download(self, source: str = REPO, **options: Any) -> Download:
        connect = {
            WEB: lambda: Web(QUICK, endpoint=self.hub.endpoint),
            BUCKETS: lambda: buckets.connect(self._endpoint),
        }
        control = Control(stores=Stores(connect=connect))
        return api.download(source, self.store.shown, control=control, **options)


@pytest.fixture
def place(store_endpoint: str) -> Iterator[Place]:
    with Hub() as hub, buckets.connect(store_endpoint) as connection:
        hub.add(REPO, MODEL)
        yield Place(hub, store_endpoint, connection)


def test_a_bucket_gets_what_a_folder_gets(place: Place, tmp_path: Path) -> None:
    here = tmp_path / "here"
    fetch(place.hub, here)
    assert place.download(dry_run=True).manifest is None
    assert place.store.listed("") == []
    assert place.download().is_complete
    assert {name: place.store.get(name) for name in place.store.listed("")} == {
        **files(here),
        FINAL: (here / FINAL).read_bytes(),
    }
    assert place.hub.bytes_sent() == 2 * sum(map(len, MODEL.values()))
    again = place.download()
    assert again.is_complete
    assert again.have.keys() == MODEL.keys()
    assert place.hub.bytes_sent() == 2 * sum(map(len, MODEL.values()))


def test_a_file_with_a_wrong_digest_never_has_its_name_and_the_next_run_goes_on(place: Place) -> None:
    place.hub.faults[WEIGHTS] = [Fault("flip", at=19 * MIB)] * 9
    with pytest.raises(Differs, match="sha256"):
        place.download()
    assert not place.store.has(WEIGHTS)
    assert buckets.uploads(place.store._connection, place.bucket) == []
    with pytest.raises(CorruptInput, match="not finished"):
        place.download(place.store.shown)
    place.hub.faults.clear()
    found = place.download()
    assert found.have.keys() == {"config.json", "sub/empty.txt"}
    assert place.store.get(WEIGHTS) == MODEL[WEIGHTS]
    assert place.store.listed("") == sorted([*MODEL, FINAL])


@pytest.mark.parametrize("is_made", [False, True])
def test_a_run_that_died_at_any_request_is_finished(
    place: Place, monkeypatch: pytest.MonkeyPatch, is_made: bool
) -> None:
    request = Http.request
    place.hub.add(REPO, small := {**MODEL, WEIGHTS: content(1000)})
    fatal, count = 0, 0

    def dying(self: Http, method: str, url: str, *rest: Any, **options: Any) -> object:
        nonlocal count
        if url.startswith(place.hub.endpoint):
            return request(self, method, url, *rest, **options)
        count += 1
        if count == fatal and is_made:
            request(self, method, url, *rest, **options).close()
        if count >= fatal:
            raise NoRoom("dead")
        return request(self, method, url, *rest, **options)

    made = set()
    for fatal in range(1, 200, 3):
        place.store = S3Store(place.bucket, f"out-{fatal}", place.store._connection)
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(Http, "request", dying)
            try:
                place.download(workers=1)
            except NoRoom:
                is_over = False
            else:
                is_over = True
        place.download()
        assert place.store.listed("") == sorted([*small, FINAL])
        made.add(place.store.get(FINAL))
        if is_over:
            break
    assert len(made) == 1


def test_nothing_in_a_bucket_is_replaced(place: Place) -> None:
    place.store.put("theirs", b"theirs")
    with pytest.raises(OutputExists, match="out exists"):
        place.download()
    place.store.remove("theirs")
    place.download()
    place.hub.add(REPO, NEWER)
    with pytest.raises(OutputExists, match="out exists"):
        place.download()
    for option in ("overwrite", "prune", "offline"):
        with pytest.raises(UsageError, match=option):
            place.download(**{option: True})


def test_another_download_does_not_go_on_with_a_part_of_one(place: Place) -> None:
    place.hub.faults[WEIGHTS] = [Fault("flip", at=19 * MIB)] * 9
    with pytest.raises(Differs, match="sha256"):
        place.download()
    place.hub.add(REPO, NEWER)
    with pytest.raises(PlanDiffers, match="part of another download"):
        place.download()
