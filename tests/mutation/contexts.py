"""A pytest plugin: which test runs which lines, and how long each takes.

coverage's contexts are switched to the test that runs; what runs for a fixture of several tests counts for all that use
it, and what runs in a child process for the test that started it. Used by `run.py` alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

FOLDER = Path(os.environ["MUTANTS_WORK"]) / "measured"
CONTEXT = "MUTANTS_CONTEXT"
_log = (FOLDER / f"tests-{os.getpid()}.jsonl").open("a", buffering=1)


def pytest_unconfigure() -> None:
    _log.close()


def _switch(context: str) -> str:
    before = os.environ.get(CONTEXT, "")
    os.environ[CONTEXT] = context
    current = coverage.Coverage.current()
    if current is not None:
        current.switch_context(context)
    return before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
    started_s = time.perf_counter()
    _switch(item.nodeid)
    result = yield
    _switch("")
    fixtures = [
        _name(definition, item.nodeid)
        for found in item._fixtureinfo.name2fixturedefs.values()
        for definition in found
        if definition.scope != "function"
    ]
    row = {"test": item.nodeid, "elapsed_s": round(time.perf_counter() - started_s, 3), "fixtures": fixtures}
    _log.write(json.dumps(row) + "\n")
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _log.write(json.dumps({"failed": report.nodeid}) + "\n")


def _name(definition: Any, nodeid: str) -> str:
    """A fixture's context; one of a module is told apart by the module."""
    where = "" if definition.scope == "session" else nodeid.partition("::")[0]
    return f"fixture {definition.argname} {where}"


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    if fixturedef.scope == "function":
        return (yield)
    before = _switch(_name(fixturedef, request.node.nodeid))
    try:
        return (yield)
    finally:
        _switch(before)
