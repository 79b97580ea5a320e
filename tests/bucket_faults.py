"""An object store on 127.0.0.1 that fails or lies: a proxy before one that does neither, with faults by request."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Asked:
    """A request, and its answer once there is one."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: dict[str, str]
    body: bytes
    status: int = 0
    answer: bytes = b""
    answered: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "partNumber" in self.query

    @property
    def is_complete(self) -> bool:
        """Whether it ends an upload."""
        return self.method == "POST" and "uploadId" in self.query

    @property
    def is_object(self) -> bool:
        """Whether it writes a small object."""
        return self.method == "PUT" and not self.query

    def refuse(self, status: int, code: str = "", **headers: str) -> None:
        """Answer with an error."""
        self.status = status
        self.answer = b"" if not code else f"<Error><Code>{code}</Code><Message>AKIATESTKEY</Message></Error>".encode()
        self.answered = {"x-amz-request-id": "1", **headers}


Fault = Callable[[Asked], None]
"""Called before a request goes on, which it does not if there is an answer then, and again after."""


class FaultyStore:
    """Passes on what it is asked to the server at `endpoint`, but for what `fault` does. A context manager."""

    def __init__(self, endpoint: str) -> None:
        self._upstream = urlsplit(endpoint).netloc
        self.fault: Fault = lambda asked: None
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                query = dict(parse_qsl(url.query, keep_blank_values=True))
                asked = Asked(self.command, url.path, query, dict(self.headers), body)
                with store._lock:
                    store.fault(asked)
                if not asked.status:
                    store._pass_on(asked, self.path)
                    with store._lock:
                        store.fault(asked)
                self.send_response_only(asked.status)
                asked.answered.setdefault("Content-Length", str(len(asked.answer)))
                for name, value in asked.answered.items():
                    self.send_header(name, value)
                self.end_headers()
                if asked.is_cut:
                    self.close_connection = True
                    self.wfile.write(asked.answer[: len(asked.answer) // 2])
                elif self.command != "HEAD":
                    self.wfile.write(asked.answer)

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

            def handle(self) -> None:
                with suppress(OSError):
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def _pass_on(self, asked: Asked, path: str) -> None:
        connection = http.client.HTTPConnection(self._upstream, timeout=10)
        connection.request(asked.method, path, asked.body or None, asked.headers)
        response = connection.getresponse()
        asked.answer, asked.status = response.read(), response.status
        gone = ("transfer-encoding", "connection") + (() if asked.method == "HEAD" else ("content-length",))
        asked.answered = {n: v for n, v in response.headers.items() if n.lower() not in gone}
        connection.close()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
