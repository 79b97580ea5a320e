"""Proxies: a stub that wants a user and password, refuses, or is not there."""

from __future__ import annotations

import base64
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fetching import MIB, QUICK, REPO, assert_complete, content
from hub import Hub

from weightops import api
from weightops.engine.control import Control
from weightops.errors import AuthenticationFailed, NetworkFailed, WeightopsError
from weightops.stores.web.policy import wished_wait_s
from weightops.stores.web.web import Web

MODEL = {"config.json": b"{}", "a.bin": content(MIB)}
PATIENT = replace(QUICK, first_delay_s=60, max_delay_s=60)


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards plain requests with the right credentials; answers `status` to the others, and to every CONNECT."""

    daemon_threads = allow_reuse_address = True
    credentials = "Basic " + base64.b64encode("usér:p@ss w%rd".encode()).decode()
    status = "407 Proxy Authentication Required"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.address = f"127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        import http.client
        from urllib.parse import urlsplit

        line = self.rfile.readline().decode().split()
        headers = dict(http.client.parse_headers(self.rfile).items())
        if not line:
            return
        self.server.asked.append((line[0], headers.get("Proxy-Authorization", "")))
        if headers.pop("Proxy-Authorization", "") != self.server.credentials or line[0] == "CONNECT":
            self.wfile.write(f"HTTP/1.1 {self.server.status}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        parts = urlsplit(line[1])
        connection = http.client.HTTPConnection(parts.netloc)
        connection.request(line[0], line[1].removeprefix(f"http://{parts.netloc}"), headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        head = "".join(f"{name}: {value}\r\n" for name, value in answer.getheaders() if name != "Connection")
        self.wfile.write(f"HTTP/1.1 {answer.status} OK\r\n{head}Connection: close\r\n\r\n".encode() + data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        yield proxy
        proxy.shutdown()


def fetch(endpoint: str, through: str, out: Path) -> None:
    with Web(PATIENT, endpoint=endpoint, proxy_for=lambda url: through) as web:
        api.download(REPO, out, control=Control(web=web))


def test_user_and_password_reach_the_proxy_and_no_server(proxy: Proxy, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add(REPO, MODEL)
        fetch(hub.endpoint, f"http://us%C3%A9r:p%40ss%20w%25rd@{proxy.address}", tmp_path)
        assert not any("proxy-authorization" in request.headers for request in hub.log)
    assert_complete(tmp_path, MODEL)
    assert {sent for _, sent in proxy.asked} == {proxy.credentials}


@pytest.mark.parametrize("endpoint", ["http://hub.example", "https://hub.example"])
@pytest.mark.parametrize("credentials", ["", "user:secret@"])
def test_a_proxy_that_wants_others_says_so_once(proxy: Proxy, tmp_path: Path, endpoint: str, credentials: str) -> None:
    with pytest.raises(AuthenticationFailed, match=r"status 407 \(Proxy Authentication Required\)$") as caught:
        fetch(endpoint, f"http://{credentials}{proxy.address}", tmp_path)
    assert proxy.address in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "user:password" in (caught.value.hint or "")
    assert len(proxy.asked) == 1


def test_a_proxy_that_forbids_a_host_is_not_asked_again(proxy: Proxy, tmp_path: Path) -> None:
    proxy.status = "403 Forbidden"
    with pytest.raises(NetworkFailed, match=r"status 403 \(Forbidden\)") as caught:
        fetch("https://hub.example", f"http://{proxy.address}", tmp_path)
    assert "NO_PROXY" in (caught.value.hint or "")
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("endpoint", ["http://hub.example", "https://hub.example"])
@pytest.mark.parametrize("through", ["http://user:secret@127.0.0.1:9", "http://user:secret@no.such.host.invalid:3128"])
def test_a_proxy_that_is_not_there_is_told_soon_and_by_name(tmp_path: Path, endpoint: str, through: str) -> None:
    with pytest.raises(NetworkFailed, match=f"the proxy {through.rpartition('@')[2]} cannot be reached") as caught:
        fetch(endpoint, through, tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"resolvers";r=0;t=40'}, 40),
        ({"ratelimit": '"api"; r=0; t=5, "resolvers"; t=9; r=0'}, 9),
        ({"RateLimit": '"api";r=3;t=40'}, 0),
        ({"RateLimit": '"api";r=3;t=40, "pages";r=0;t=2', "Retry-After": "1"}, 2),
        ({"RateLimit": '"resolvers";r=0;t=40', "Retry-After": "50"}, 50),
        ({"RateLimit": '"a";r=0'}, 0),
        ({"RateLimit": '"a";r=0;t=-1'}, 0),
        ({"RateLimit": '"a";r=0;t=1.5'}, 0),
        ({"RateLimit": '"a";r=0;t=²'}, 0),
        ({"RateLimit": '"a";r=0;t=' + "9" * 5000}, 0),
        ({"RateLimit": "limit=10"}, 0),
    ],
    ids=str,
)
def test_the_wait_that_a_server_wishes(headers: dict[str, str], expected: float) -> None:
    from urllib3 import HTTPHeaderDict

    assert wished_wait_s(HTTPHeaderDict(headers)) == expected


def test_a_limit_that_is_used_up_is_waited_for(tmp_path: Path) -> None:
    from hub import Fault

    with Hub() as hub:
        hub.add(REPO, MODEL)
        hub.faults["a.bin"] = [Fault("status", 429, headers={"RateLimit": '"resolvers";r=0;t=40'})]
        waited: list[float] = []
        told: list[str] = []
        with Web(QUICK, endpoint=hub.endpoint) as web:
            sleep = web.sleep
            web.sleep = lambda seconds: (waited.append(seconds), sleep(0.01))[1]  # type: ignore[method-assign]
            web.on_wait = told.append
            api.download(REPO, tmp_path, control=Control(web=web))
    assert 40 in waited
    assert ["status 429" in text and "trying again in 40 s" in text for text in told] == [True]
    assert_complete(tmp_path, MODEL)


def test_a_wait_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    from hub import Fault

    with Hub() as hub, Web(QUICK, endpoint=hub.endpoint) as web:
        hub.add(REPO, MODEL)
        hub.always["api"] = Fault("status", 429, headers={"RateLimit": '"api";r=0;t=86400'})
        with pytest.raises(WeightopsError, match="asks to wait 86400 s, at most 300 are waited"):
            api.download(REPO, tmp_path, control=Control(web=web))
