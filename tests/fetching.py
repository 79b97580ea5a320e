"""What the tests of `weightops download` share: content, impatient downloads, and what is left afterwards."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from hub import Hub

from weightops import api
from weightops.engine.control import Control
from weightops.operations.download.operation import Download
from weightops.stores.transfer.partial import STATE
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

MIB = 1 << 20
REPO = "org/model"
WEIGHTS = "model.safetensors"
QUICK = Policy(connect_timeout_s=2, timeout_s=0.5, attempts=4, first_delay_s=0.01, max_delay_s=0.05)
FINAL = "weightops-manifest.json"


def content(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(hub: Hub, out: Path, source: str = REPO, *, policy: Policy = QUICK, **options: Any) -> Download:
    """`weightops download` with a policy that does not keep a test waiting."""
    with Web(policy, endpoint=hub.endpoint, token=hub.token) as web:
        return api.download(source, out, control=Control(web=web), **options)


def files(out: Path) -> dict[str, bytes]:
    """What lies in a folder under final names, the manifest apart."""
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {n: p.read_bytes() for n, p in found.items() if n != FINAL and not n.startswith(f"{STATE}/")}


def assert_complete(out: Path, expected: Mapping[str, bytes]) -> None:
    """The folder is a whole download of these files: no more, no less, rightly recorded, nothing kept for resuming."""
    found = files(out)
    assert found.keys() == expected.keys()
    assert [name for name, data in expected.items() if found[name] != data] == []
    recorded = json.loads((out / FINAL).read_bytes())["files"]
    right = {name: [len(data), xxhash.xxh3_128_hexdigest(data)] for name, data in expected.items()}
    assert {name: [entry["nbytes"], entry["digests"]["xxh3_128"]] for name, entry in recorded.items()} == right
    assert not (out / STATE).exists()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
