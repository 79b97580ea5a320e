"""Who may ask: names of the server, pages of others, forms, keys, sizes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest
from scripted import Scripted

from weightops.serve.guard import HEADERS, MAX_BODY_NBYTES, Rules

Serve = Callable[..., Any]
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
JSON = {"content-type": "application/json"}


def ask(port: int, method: str, path: str, headers: dict[str, str], body: str | None = None) -> tuple[int, Any]:
    """A request with exactly these headers; status and document."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"content-length": str(len(body or "")), **headers}.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders((body or "").encode())
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    for name, value in HEADERS:
        assert answer.headers[name.decode()] == value.decode()
    return answer.status, json.loads(data) if data and answer.headers["content-type"] == "application/json" else data


@pytest.fixture
def port(serve: Serve) -> int:
    return int(serve(Scripted({"m": ["hello"]})).port)


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LocalHost", "[::1]:{}", "[::1]", "127.0.0.1:1"])
def test_names_of_this_machine_are_let_through(port: int, host: str) -> None:
    assert ask(port, "GET", "/v1/models", {"host": host.format(port)})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:{}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "0.0.0.0:{}",
            "2130706433",
        ),
        *("x@127.0.0.1", "127.0.0.1:80:80", "[::1].evil.example", "[::1", "127.0.0.1:evil", "localhost ", " "),
    ],
)
def test_other_names_are_not(port: int, host: str) -> None:
    status, document = ask(port, "GET", "/v1/models", {"host": host.format(port)})
    if host.strip() == "localhost":
        assert status == 200  # blanks around a value are not part of it
        return
    assert (status, document["error"]["code"]) == (400, "host_not_allowed")


def test_a_name_that_was_allowed_is(serve: Serve) -> None:
    running = serve(Scripted({"m": ["hello"]}), Rules.of(hosts=["Box.Local"]))
    assert ask(running.port, "GET", "/v1/models", {"host": f"box.local:{running.port}"})[0] == 200
    assert ask(running.port, "GET", "/v1/models", {"host": "other.local"})[0] == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "https://127.0.0.1", ""]
)
def test_pages_of_others_may_neither_ask_nor_read(port: int, origin: str) -> None:
    host = f"127.0.0.1:{port}"
    if not origin:
        assert ask(port, "POST", "/v1/chat/completions", {"host": host, **JSON}, BODY)[0] == 200
        return
    status, document = ask(port, "POST", "/v1/chat/completions", {"host": host, "origin": origin, **JSON}, BODY)
    assert (status, document["error"]["code"]) == (403, "origin_not_allowed")
    assert ask(port, "OPTIONS", "/v1/chat/completions", {"host": host, "origin": origin})[0] in (403, 405)


def test_the_page_itself_may_ask(port: int) -> None:
    host = f"localhost:{port}"
    assert ask(port, "POST", "/v1/chat/completions", {"host": host, "origin": f"http://{host}", **JSON}, BODY)[0] == 200


def test_an_origin_that_was_allowed_may_read(serve: Serve) -> None:
    running = serve(Scripted({"m": ["hello"]}), Rules.of(origins=["https://app.example/"]))
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request("OPTIONS", "/v1/models", headers={"origin": "https://app.example"})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, "https://app.example")
    answer.read()
    connection.request("GET", "/v1/models", headers={"origin": "https://other.example"})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (403, None)
    connection.close()


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"]
)
def test_what_a_form_can_send_is_refused(port: int, kind: str) -> None:
    headers = {"host": f"127.0.0.1:{port}", "content-type": kind}
    status, document = ask(port, "POST", "/v1/chat/completions", headers, BODY)
    assert (status, document["error"]["code"]) == (415, "unsupported_media_type")


def test_a_key_is_asked_for_where_there_is_one(serve: Serve) -> None:
    port = serve(Scripted({"m": ["hello"]}), Rules(api_key="secret")).port
    host = {"host": f"127.0.0.1:{port}"}
    for given, status in (
        ("", 401),
        ("Bearer wrong", 401),
        ("secret", 401),
        ("Bearer secret", 200),
        ("bearer  secret", 200),
    ):
        assert ask(port, "GET", "/v1/models", {**host, "authorization": given})[0] == status
    assert ask(port, "GET", "/health", host)[0] == 200
    assert ask(port, "GET", "/page", host)[0] == 401


def test_large_bodies_are_refused_with_or_without_their_length(port: int) -> None:
    host = {"host": f"127.0.0.1:{port}", **JSON}
    status, document = ask(port, "POST", "/render", host, json.dumps({"text": "x" * MAX_BODY_NBYTES}))
    assert (status, document["error"]["code"]) == (413, "request_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    pieces = (b"x" * 65536 for _ in range(20))
    connection.request("POST", "/render", body=pieces, headers=JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
