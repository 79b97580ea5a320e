"""Random scripts of faults, stops and rivals: no wrong byte ever stands under a final name.

Chunks are small here, so that small files take many of them, and several streams share a file from the beginning.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fetching import assert_complete, content
from hub import Fault, Faults, Hub
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from weightops import api
from weightops.engine.control import Control
from weightops.errors import Interrupted, WeightopsError
from weightops.stores.transfer.fetch import Fetch
from weightops.stores.transfer.partial import STATE
from weightops.stores.transfer.transfer import Transfer
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

numbers, write = itertools.count(), Fetch._write
CHUNK = 64 << 10
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 9 * CHUNK, 14 * CHUNK - 4096, 20 * CHUNK)
POLICY = Policy(connect_timeout_s=1, timeout_s=0.1, attempts=3, first_delay_s=0.001, max_delay_s=0.01)
ALONE = ("cut", "reset", "stall", "trickle", "status", "flip", "other_content", "longer", "shorter", "gzip", "html")
ALONE += ("lfs_pointer", "wrong_offset", "wrong_total", "ignore_range", "redirect")
TOGETHER = ("etag", "chunked", "no_length", "ignore_if_range")


class Other(bytes):
    """Content with a short name, for scripts are printed when a test fails."""

    def __repr__(self) -> str:
        return f"other({len(self)})"


OTHERS = {nbytes: Fault("other_content", value=Other(content(nbytes, seed=99))) for nbytes in SIZES}


@dataclass(frozen=True)
class Run:
    """One `weightops download`, or two at once; stopped after so many blocks of content went out.

    After it, a byte of each partial file and journal may change on disk.
    """

    workers: int
    stop_after: int | None = None
    twice: bool = False
    rot: int | None = None


@dataclass(frozen=True)
class Script:
    sizes: tuple[int, ...]
    faults: tuple[tuple[Faults, ...], ...]
    hub_faults: tuple[Faults, ...]
    runs: tuple[Run, ...]


@st.composite
def fault(draw: st.DrawFn, nbytes: int) -> Faults:
    kind = draw(st.sampled_from(ALONE + TOGETHER))
    at = draw(st.integers(0, max(nbytes, 1)))
    made = {
        "cut": Fault("cut", draw(st.sampled_from((-1, at)))),
        "stall": Fault("stall", draw(st.sampled_from((-1, at))), 0.3),
        "trickle": Fault("trickle", at, 0.03),
        "status": Fault("status", draw(st.sampled_from((416, 429, 500, 503, 403, 404)))),
        "other_content": OTHERS[nbytes],
        "longer": Fault("longer", value=b"more"),
        "shorter": Fault("shorter", min(at, nbytes)),
        "wrong_offset": Fault("wrong_offset", draw(st.integers(1, 9))),
        "wrong_total": Fault("wrong_total", draw(st.integers(1, 9))),
        "redirect": Fault("redirect", value=draw(st.sampled_from((None, "file:///etc/passwd")))),
        "etag": Fault("etag", value=draw(st.sampled_from((None, '"other"', 'W/"weak"')))),
    }.get(kind, Fault(kind, min(at, max(nbytes - 1, 0))))
    if kind in TOGETHER and draw(st.booleans()):
        return (made, *(other for other in [draw(fault(nbytes))] if isinstance(other, Fault)))
    return made


def faulty(nbytes: int) -> st.SearchStrategy[Faults]:
    return st.integers(0, 4).flatmap(lambda i: fault(nbytes) if i else st.none())


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    sizes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=4)))
    run = st.builds(
        Run,
        st.integers(1, 4),
        st.none() | st.none() | st.integers(0, 30),
        st.sampled_from((False, False, True)),
        st.none() | st.integers(0, 1 << 20),
    )
    return Script(
        sizes=sizes,
        faults=tuple(tuple(draw(st.lists(faulty(nbytes), min_size=1, max_size=5))) for nbytes in sizes),
        hub_faults=tuple(
            draw(st.lists(st.none() | st.sampled_from([Fault("cut", -1), Fault("status", 503)]), max_size=3))
        ),
        runs=tuple(draw(st.lists(run, min_size=1, max_size=3))),
    )


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with pytest.MonkeyPatch.context() as patched, Hub() as hub:
        for module in ("fetch", "partial", "pipe"):
            patched.setattr(f"weightops.stores.transfer.{module}.CHUNK_NBYTES", CHUNK)
        patched.setattr("weightops.stores.transfer.fetch._MIN_SEGMENT", 1)
        patched.setattr("weightops.stores.transfer.transfer._streams", lambda files: 64)
        patched.setattr(Fetch, "_write", slow_write)
        patched.setattr(Transfer, "_measure", lambda self: setattr(self, "_rate", (0.0, 0, 1.0)))
        for name, seconds in {
            "transfer.transfer._TICK_S": 0.002,
            "transfer.transfer._WAIT_S": 0.01,
            "web.http._TICK_S": 0.01,
        }.items():
            patched.setattr(f"weightops.stores.{name}", seconds)
        yield hub


class Watch:
    """Looks at what stands under final names, whenever the hub sends something, and after each run."""

    def __init__(self, out: Path, expected: dict[str, bytes]) -> None:
        self._out, self._expected = out, expected
        self.wrong: list[str] = []
        self.blocks = 0
        self.stop_after: int | None = None
        self.controls: list[Control] = []

    def look(self) -> None:
        for name, data in self._expected.items():
            path = self._out / name
            if path.exists() and path.read_bytes() != data:
                self.wrong.append(name)

    def on_body(self, name: str, offset: int) -> None:
        self.blocks += 1
        self.look()
        if self.stop_after is not None and self.blocks > self.stop_after:
            for control in self.controls:
                control.cancel()


def rot(out: Path, seed: int) -> None:
    for path in (out / STATE).glob("*.part/*"):
        data = bytearray(path.read_bytes())
        if data:
            data[seed % len(data)] ^= 1
            path.write_bytes(data)


def slow_write(self: Fetch, *arguments: Any) -> None:
    """Writes that lag behind, some more than others."""
    time.sleep(random.choice((0, 0, 0.001, 0.004)))
    write(self, *arguments)


def download(
    hub: Hub, out: Path, source: str, run: Run, watch: Watch, errors: list[BaseException], policy: Policy = POLICY
) -> None:
    with Web(policy, endpoint=hub.endpoint) as web:
        control = Control(web=web)
        watch.controls.append(control)
        try:
            api.download(source, out, workers=run.workers, control=control)
        except BaseException as error:
            errors.append(error)


LIMITS: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@given(script=scripts())
@settings(max_examples=30, **LIMITS)
def test_whatever_happens_no_wrong_byte_gets_a_name(
    hub: Hub, tmp_path_factory: pytest.TempPathFactory, script: Script
) -> None:
    follow(hub, tmp_path_factory, script)


@pytest.mark.slow
@given(script=scripts())
@settings(max_examples=400, **LIMITS)
def test_nor_in_many_more_scripts(hub: Hub, tmp_path_factory: pytest.TempPathFactory, script: Script) -> None:
    follow(hub, tmp_path_factory, script)


def follow(hub: Hub, tmp_path_factory: pytest.TempPathFactory, script: Script) -> None:
    number = next(numbers)
    out = tmp_path_factory.mktemp("random") / "out"
    repo = f"org/{number}"
    expected = {
        f"{number}-{i}.{'safetensors' if i % 2 else 'json'}": content(nbytes, seed=i)
        for i, nbytes in enumerate(script.sizes)
    }
    commit = hub.add(repo, expected)
    hub.faults = {name: list(faults) for name, faults in zip(expected, script.faults, strict=True)}
    hub.faults["api"] = list(script.hub_faults)
    watch = Watch(out, expected)
    hub.on_body = watch.on_body
    for run in script.runs:
        watch.stop_after, watch.blocks, watch.controls = run.stop_after, 0, []
        errors: list[BaseException] = []
        threads = [
            threading.Thread(target=download, args=(hub, out, repo, run, watch, errors)) for _ in range(1 + run.twice)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.look()
        assert watch.wrong == []
        assert all(isinstance(error, WeightopsError) for error in errors), errors
        assert run.stop_after is not None or not any(isinstance(error, Interrupted) for error in errors)
        if not errors:
            assert_complete(out, expected)
        if run.rot is not None:
            rot(out, run.rot)
    hub.faults = {}
    watch.stop_after = None
    errors = []
    download(hub, out, f"{repo}@{commit}", Run(workers=3), watch, errors, Policy())
    assert errors == []
    assert watch.wrong == []
    assert_complete(out, expected)
