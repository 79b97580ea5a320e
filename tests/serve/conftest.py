"""A server in this process, on a free port of loopback, over whatever engine a test has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

pytest.importorskip("starlette", reason="the extra `web` is not installed")

import uvicorn
from scripted import Scripted

from weightops.serve.app import Server, make_app
from weightops.serve.engine import Engine
from weightops.serve.guard import Rules
from weightops.serve.run import bind


@dataclass
class Running:
    """A server that answers."""

    url: str
    port: int
    server: Server
    engine: Scripted


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Starts servers, which end with the test."""
    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(engine: Engine | None, rules: Rules | None = None) -> Running:
        server = Server(templates=("alpaca", "knowlm"), engine=engine)
        sock = bind("127.0.0.1", 0)
        config = uvicorn.Config(make_app(server, rules or Rules()), log_level="critical", lifespan="off")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        started.append((running, thread))
        thread.start()
        while not running.started:
            thread.join(0.01)
        port = sock.getsockname()[1]
        return Running(f"http://127.0.0.1:{port}", port, server, engine)  # type: ignore[arg-type]

    yield start
    for running, thread in started:
        running.should_exit = running.force_exit = True
        thread.join(5)
