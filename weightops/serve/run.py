"""Serving until somebody ends it: the socket first, then the models, and at the end no text is waited for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.serve.app import Server, make_app
from weightops.serve.engine import Engine
from weightops.serve.guard import Rules

_TICK_S = 0.05
_GRACE_S = 2
"""How long connections may take to close once their texts have been stopped."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free. Raises `UsageError` where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Where it is had, the other option would let a second server take the port from the first.
            if not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {escape(host)}:{port} ({said})", hint="name another --port") from None
    return found


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose texts are stopped before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._served = server

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command line's."""
        yield

    def end(self) -> None:
        """End, from any thread or a signal handler."""
        if self._served.engine is not None:
            self._served.engine.stop()
        self.should_exit = True


def run(
    server: Server,
    rules: Rules,
    sock: socket.socket,
    open_engine: Callable[[], Engine],
    ready: Callable[[Engine], object],
    is_over: Callable[[], bool],
) -> None:
    """Serve on a socket until `is_over` says so, which is asked all the time.

    The models are opened while /health says that they are being; `ready` is called once they are. What `open_engine`
    raises ends the server, and is raised.
    """
    config = uvicorn.Config(
        make_app(server, rules),
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        lifespan="off",
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=256,
        timeout_keep_alive=15,
    )
    running = _Uvicorn(config, server)
    failures: list[BaseException] = []

    def opening() -> None:
        try:
            engine = open_engine()
            server.engine = engine
            ready(engine)
        except BaseException as error:
            failures.append(error)
            running.end()

    thread = threading.Thread(target=opening, name="opening", daemon=True)
    thread.start()
    ended = threading.Event()

    def watching() -> None:
        while not ended.wait(_TICK_S):
            if is_over():
                running.end()

    threading.Thread(target=watching, name="watching", daemon=True).start()
    try:
        running.run(sockets=[sock])
    finally:
        ended.set()
    thread.join(_GRACE_S)
    if server.engine is not None:
        server.engine.close()
    if failures:
        raise failures[0]
