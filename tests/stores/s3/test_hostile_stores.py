"""Object stores that fail or lie: one sentence each, nothing that looks whole, and a second run that finishes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import buckets
import pytest
import torch
from botocore.credentials import Credentials
from bucket_faults import Asked, Fault, FaultyStore
from support import write_checkpoint

import weightops
from weightops.engine.control import Control
from weightops.errors import AuthenticationFailed, CorruptInput, NetworkFailed, NoRoom, WeightopsError
from weightops.formats.proofs import manifest
from weightops.stores.s3 import target
from weightops.stores.s3.account import Account, Endpoint
from weightops.stores.s3.connection import S3
from weightops.stores.s3.store import S3Store
from weightops.stores.stores import BUCKETS, Stores

TOKEN = "token-of-the-session"


class Place:
    """A model on disk, a bucket behind a store that can fail, and what is in it really."""

    def __init__(self, faulty: FaultyStore, endpoint: str, connection: S3, folder: Path) -> None:
        self.faulty, self.folder, self._endpoint = faulty, folder, endpoint
        self.bucket = buckets.new_bucket(connection)
        self.really = S3Store(self.bucket, "", connection)

    def control(self) -> Control:
        credentials = Credentials(buckets.KEY, buckets.SECRET, TOKEN)
        account = Account(credentials, endpoint=Endpoint(self.faulty.endpoint, is_virtual=False))
        return Control(stores=Stores(connect={BUCKETS: lambda: S3(account, buckets.QUICK)}))

    def write(self, source: Path | str | None = None, out: str = "out") -> weightops.Result:
        place = f"s3://{self.bucket}/{out}"
        options = {"max_shard_size": "40KB", "workers": 1, "control": self.control()}
        return weightops.cast(source or self.folder / "raw", place, dtype="bfloat16", **options)

    def manifest(self) -> bytes | None:
        return self.really.find(f"out/{manifest.NAME}")


@pytest.fixture
def place(tmp_path: Path, store_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(target, "PART_NBYTES", 20_000)
    monkeypatch.setattr(target, "_STEP_NBYTES", 1)
    torch.manual_seed(0)
    write_checkpoint(tmp_path / "raw", {f"{n}.weight": torch.randn(64, 200) for n in "abc"})
    with buckets.connect(store_endpoint) as connection, FaultyStore(store_endpoint) as faulty:
        yield Place(faulty, store_endpoint, connection, tmp_path)


def each(applies: Callable[[Asked], bool], do: Callable[[Asked], object], first: int = 0, count: int = 10**9) -> Fault:
    """A fault of requests of a kind, from the `first` of them on, so many times; before they are passed on."""
    seen = 0

    def fault(asked: Asked) -> None:
        nonlocal seen
        if asked.status == 0 and applies(asked):
            seen += 1
            if first < seen <= first + count:
                do(asked)

    return fault


def after(applies: Callable[[Asked], bool], do: Callable[[Asked], object]) -> Fault:
    """A fault in the answers to requests of a kind."""

    def fault(asked: Asked) -> None:
        if 0 < asked.status < 300 and applies(asked):
            do(asked)

    return fault


def refusing(status: int, code: str = "", **headers: str) -> Callable[[Asked], None]:
    return lambda asked: asked.refuse(status, code, **headers)


def every(asked: Asked) -> bool:
    return True


def written(asked: Asked) -> bool:
    return asked.is_part or asked.is_complete or asked.is_object


def with_another_etag(asked: Asked) -> None:
    asked.answered = {n: '"0123"' if n.lower() == "etag" else value for n, value in asked.answered.items()}


def without_conditions(asked: Asked) -> None:
    asked.headers.pop("If-None-Match", None)


def cut(asked: Asked) -> None:
    asked.is_cut = True


FAILURES: dict[str, tuple[Fault, type[WeightopsError], str]] = {
    "throttles for ever": (each(written, refusing(503, "SlowDown")), NetworkFailed, "status 503, SlowDown; gave up"),
    "asks to wait too long": (
        each(written, refusing(429, **{"Retry-After": "9999"})),
        NetworkFailed,
        "asks to wait 9999 s",
    ),
    "200 with an error": (
        each(lambda asked: asked.is_complete, refusing(200, "InternalError")),
        NetworkFailed,
        "InternalError",
    ),
    "lies about the ETag of a part": (
        after(lambda asked: asked.is_part, with_another_etag),
        NetworkFailed,
        "status 400, InvalidPart",
    ),
    "drops a part": (
        each(lambda asked: asked.is_part, refusing(200, ETag='"0123"'), first=1, count=1),
        NetworkFailed,
        "status 400, InvalidPart",
    ),
    "drops a record": (
        each(lambda asked: "/records/" in asked.path and asked.is_object, refusing(200), first=1, count=1),
        WeightopsError,
        "1 of 3 groups are not done: 1",
    ),
    "refuses the clock": (
        each(every, refusing(403, "RequestTimeTooSkewed")),
        AuthenticationFailed,
        "refuses the clock of this machine",
    ),
    "expires the token in mid-job": (
        each(every, refusing(400, "ExpiredToken"), first=30),
        AuthenticationFailed,
        "session token has expired",
    ),
    "refuses to write": (each(written, refusing(403, "AccessDenied")), AuthenticationFailed, "refuses access"),
    "is full": (each(lambda asked: asked.is_part, refusing(403, "QuotaExceeded"), first=4), NoRoom, "is full"),
    "is full by its status": (each(written, refusing(507), first=6), NoRoom, "is full"),
    "keeps no conditions": (each(every, without_conditions), WeightopsError, "only pretends conditional writes"),
    "fails inside": (each(lambda asked: asked.is_complete, refusing(500)), NetworkFailed, "status 500"),
    "answers with a page": (each(every, lambda asked: page(asked)), NetworkFailed, "status 418"),
}
PATIENCE: dict[str, Fault] = {
    "throttles now and then": each(lambda asked: hash(asked.path) % 2 == 0, refusing(503, "SlowDown"), count=2),
    "cuts answers now and then": each(lambda asked: asked.method == "GET", cut, first=2, count=2),
    "an error in 200 once": each(lambda asked: asked.is_complete, refusing(200, "InternalError"), count=1),
    "a conflict once": each(lambda asked: asked.is_complete, refusing(409, "ConditionalRequestConflict"), count=1),
    "keeps no conditions where parts are joined": each(lambda asked: asked.is_complete, without_conditions),
    "lists no uploads": each(lambda asked: asked.method == "GET" and "uploads" in asked.query, refusing(501)),
    "lets nobody list uploads": each(
        lambda asked: asked.method == "GET" and "uploads" in asked.query, refusing(403, "AccessDenied")
    ),
    "loses the answer to the end of an upload": after(lambda asked: asked.is_complete, refusing(500)),
}


def page(asked: Asked) -> None:
    asked.status, asked.answer = 418, b"<html>no store</html>"


@pytest.mark.parametrize("name", FAILURES)
def test_a_store_that_fails(place: Place, name: str) -> None:
    fault, kind, said = FAILURES[name]
    place.faulty.fault = fault
    with pytest.raises(kind, match=said) as caught:
        place.write()
    assert "\n" not in str(caught.value)
    assert buckets.KEY not in str(caught.value)
    assert place.manifest() is None
    place.faulty.fault = lambda asked: None
    if any(not name.startswith(".weightops/") for name in place.really.listed("out")):
        with pytest.raises(CorruptInput, match="not finished"):
            weightops.inspect(f"s3://{place.bucket}/out", control=place.control())
    place.write()
    assert place.manifest() == expected(place)
    assert [name for name in place.really.listed("out") if ".weightops/" in name] == []
    assert buckets.uploads(place.really._connection, place.bucket) == []


def expected(place: Place) -> bytes:
    weightops.cast(place.folder / "raw", place.folder / "expected", dtype="bfloat16", max_shard_size="40KB")
    return (place.folder / "expected" / manifest.NAME).read_bytes()


@pytest.mark.parametrize("name", PATIENCE)
def test_a_store_that_is_to_be_borne_with(place: Place, name: str) -> None:
    place.faulty.fault = PATIENCE[name]
    place.write()
    assert place.manifest() == expected(place)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (after(lambda asked: asked.method == "GET" and "Range" in asked.headers, with_another_etag), "raw/model"),
        (after(lambda asked: asked.method == "GET" and "Range" in asked.headers, cut), "raw/model.*gave up"),
        (each(lambda asked: asked.method == "GET" and "Range" in asked.headers, refusing(503)), "raw/model.*503"),
    ],
    ids=["lies about ETags", "cuts for ever", "throttles for ever"],
)
def test_a_source_that_fails(place: Place, fault: Fault, said: str) -> None:
    for path in (place.folder / "raw").iterdir():
        place.really.put(f"raw/{path.name}", path.read_bytes())
    place.faulty.fault = fault
    with pytest.raises(WeightopsError, match=said) as caught:
        place.write(f"s3://{place.bucket}/raw")
    assert "\n" not in str(caught.value)
    assert place.manifest() is None
    place.faulty.fault = lambda asked: None
    place.write(f"s3://{place.bucket}/raw")
    assert place.manifest() is not None


def test_no_secret_is_written_or_said(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    place.faulty.fault = lambda asked: seen.append(asked.headers.get("Authorization", ""))
    with caplog.at_level(logging.DEBUG):
        place.write()
        options = {"dtype": "float16", "control": place.control(), "job": f"s3://{place.bucket}/job"}
        weightops.cast(f"s3://{place.bucket}/out", f"s3://{place.bucket}/more", **options)
    signatures = [each.rpartition("Signature=")[2] for each in seen if "Signature=" in each]
    assert len(signatures) > 20
    told = caplog.text.encode() + b"".join(
        place.really.get(name) for name in place.really.listed("") if name.endswith(".json")
    )
    for secret in (buckets.SECRET, TOKEN, "Signature=", *signatures):
        assert secret.encode() not in told
