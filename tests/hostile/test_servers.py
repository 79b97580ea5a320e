"""Hubs and servers that mislead, fish for tokens, or talk to the terminal: refused in one sentence, nothing leaks."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fetching import FINAL, MIB, QUICK, REPO, WEIGHTS, assert_complete, content, fetch, files
from hub import Fault, Hub

from weightops import api
from weightops.cli.main import run
from weightops.engine.control import Control
from weightops.errors import AuthenticationFailed, CorruptInput, Differs, NetworkFailed, SourceMissing, WeightopsError
from weightops.stores.web.urls import check_redirect, is_private
from weightops.stores.web.web import Web

DATA = content(5 * MIB)
MODEL = {"config.json": b"{}", WEIGHTS: DATA}
NASTY = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, MODEL)
        yield hub


def assert_one_clean_sentence(error: BaseException) -> None:
    assert str(error).isprintable()
    assert "unexpected" not in str(error)


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//",
        "http://",
        "http://[bad",
        "http://127.0.0.1:99999/",
        "http://user:password@127.0.0.1/",
        f"http://127.0.0.1:1/{NASTY}",
        None,
    ],
)
def test_redirects_to_nowhere_good_are_not_followed(hub: Hub, tmp_path: Path, target: str | None) -> None:
    hub.always["resolve"] = Fault("redirect", value=target)
    with pytest.raises(WeightopsError, match=r"redirect|Connection refused|no URL") as caught:
        fetch(hub, tmp_path)
    assert_one_clean_sentence(caught.value)
    if NASTY not in str(target):
        assert isinstance(caught.value, CorruptInput)
        assert caught.value.exit_code == 13
    assert files(tmp_path).keys() <= {"config.json"}


def test_redirects_without_a_target_end(hub: Hub, tmp_path: Path) -> None:
    hub.always[WEIGHTS] = Fault("status", 302)
    with pytest.raises(CorruptInput, match="more than 10 redirects"):
        fetch(hub, tmp_path)


PUBLIC = {"hub.example": "93.184.216.34", "cdn.example": "151.101.1.1", "8.8.8.8": "8.8.8.8"}
PRIVATE = {
    "localhost": "127.0.0.1",
    "metadata.example": "169.254.169.254",
    "intranet.example": "10.0.0.1",
    "2130706433": "127.0.0.1",
    "router": "fe80::1%eth0",
    "[::1]": "::1",
    "[::ffff:127.0.0.1]": "::ffff:127.0.0.1",
    "192.168.0.1": "192.168.0.1",
}


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        if host not in PUBLIC | PRIVATE:
            raise socket.gaierror("no such host")
        return [(0, 0, 0, "", ((PUBLIC | PRIVATE)[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    is_private.cache_clear()
    yield
    is_private.cache_clear()


@pytest.mark.usefixtures("resolver")
@pytest.mark.parametrize("host", PRIVATE)
def test_redirects_do_not_lead_from_public_hosts_into_private_networks(host: str) -> None:
    with pytest.raises(CorruptInput, match="from a public host to a private one"):
        check_redirect("https://hub.example/x", f"https://{host}/x")
    check_redirect("https://localhost:8080/x", f"https://{host}/x")


@pytest.mark.usefixtures("resolver")
def test_redirects_among_public_hosts_are_followed_up_to_lesser_schemes() -> None:
    for host in (*PUBLIC, "unknown.example"):
        check_redirect("https://hub.example/x", f"https://{host}/x")
        check_redirect("http://hub.example/x", f"https://{host}/x")
        with pytest.raises(CorruptInput, match="from https to http"):
            check_redirect("https://hub.example/x", f"http://{host}/x")


def test_the_token_goes_to_the_hub_and_nowhere_else(tmp_path: Path) -> None:
    with Hub(token="secret") as hub, Hub() as other:
        hub.add(REPO, MODEL)
        other.static |= {"a.bin": DATA, WEIGHTS: DATA}
        hub.static["b.bin"] = b""
        hub.faults["b.bin"] = [Fault("redirect", value=f"{other.endpoint}/static/files/a.bin")] * 2
        fetch(hub, tmp_path / "model")
        fetch(hub, tmp_path / "url", f"{other.endpoint}/static/files/{WEIGHTS}")
        fetch(hub, tmp_path / "moved", f"{hub.endpoint}/static/files/b.bin")
        assert_complete(tmp_path / "model", MODEL)
        assert_complete(tmp_path / "moved", {"b.bin": DATA})
        hub.faults["api"] = [Fault("redirect", value=f"{other.endpoint}/api/models/{REPO}/revision/main")] * 9
        with pytest.raises(WeightopsError, match="status 401"):
            fetch(hub, tmp_path / "api")
        told = {(r.server, r.headers.get("authorization")) for r in hub.log}
        assert told == {("hub", "Bearer secret"), ("cdn", None)}
        assert len(other.log) > 4
        assert {r.headers.get("authorization") for r in other.log} == {None}
    assert not any("secret" in path.read_text() for path in tmp_path.rglob(FINAL))


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        (WEIGHTS, Fault("status", 403, headers={"X-Error-Message": NASTY})),
        (WEIGHTS, Fault("status", 404, headers={"X-Error-Message": NASTY})),
        (WEIGHTS, Fault("headers", headers={"Content-Range": NASTY})),
        ("resolve", Fault("redirect", value=f"ftp://host/{NASTY}")),
        ("api", Fault("status", 400, headers={"X-Error-Message": NASTY, "X-Request-Id": NASTY}, body=NASTY.encode())),
        ("api", Fault("status", 403, headers={"X-Error-Message": NASTY})),
        ("api", Fault("status", 200, body=json.dumps({"id": REPO, "sha": NASTY, "siblings": []}).encode())),
        ("api", Fault("status", 200, body=NASTY.encode())),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_servers_say_is_shown_harmless(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    fault: Fault,
    as_json: bool,
) -> None:
    monkeypatch.setattr("weightops.stores.web.policy.Policy.delay_s", lambda self, failures: 0.0)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.always[key] = fault
    assert run(["download", REPO, "--out", str(tmp_path), *(["--json"] if as_json else [])]) in (1, 10, 13, 14)
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    assert "unexpected" not in shown.err


HEADERS = [
    {"Retry-After": "²"},
    {"Retry-After": "9" * 5000},
    {"Retry-After": "Mon, 01 Jan 99999 00:00:00 GMT"},
    {"Retry-After": "Mon, 01 Jan 0001 00:00:00 -0000"},
    {"Retry-After": "-1"},
    {"Retry-After": "nan"},
]


@pytest.mark.parametrize("headers", HEADERS, ids=str)
@pytest.mark.parametrize("key", ["api", WEIGHTS])
def test_a_wait_that_makes_no_sense_is_none(hub: Hub, tmp_path: Path, headers: dict[str, str], key: str) -> None:
    hub.always[key] = Fault("status", 503, headers=headers)
    with pytest.raises(
        NetworkFailed, match=r"status 503.*; (gave up after 4 attempts|the server asks to wait)"
    ) as caught:
        fetch(hub, tmp_path)
    assert_one_clean_sentence(caught.value)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "²"},
        {"Content-Length": "-1"},
        {"Content-Length": "9" * 5000},
        {"Content-Range": "bytes 0-0/" + "9" * 5000},
        {"Content-Range": "bytes ²-²/²"},
        {"Content-Range": "bytes 5-1/7"},
        {"Transfer-Encoding": "chunked"},
        {"Content-Encoding": "br"},
        {"ETag": '"' + "x" * 60_000},
    ],
    ids=lambda headers: str(headers)[:40],
)
def test_headers_that_make_no_sense_are_a_failure_of_the_network(
    hub: Hub, tmp_path: Path, headers: dict[str, str]
) -> None:
    hub.add(REPO, {WEIGHTS: content(9 * MIB)})
    hub.always[WEIGHTS] = Fault("headers", headers=headers)
    try:
        fetch(hub, tmp_path)
    except (NetworkFailed, Differs) as error:
        assert_one_clean_sentence(error)
        assert files(tmp_path) == {}
    else:
        assert_complete(tmp_path, {WEIGHTS: content(9 * MIB)})


ENTRY = {"type": "file", "path": "a.bin", "size": 5, "oid": "0" * 40}
LISTINGS = {
    "negative size": [{**ENTRY, "size": -5}],
    "size as text": [{**ENTRY, "size": "5"}],
    "fractional size": [{**ENTRY, "size": 0.5}],
    "no size": [{**ENTRY, "size": None}],
    "more than any disk": [{**ENTRY, "size": 1 << 62}],
    "more than any file": [{**ENTRY, "size": 1 << 70}],
    "no digest": [{**ENTRY, "oid": None}],
    "digest that is none": [{**ENTRY, "oid": NASTY}],
    "digest as number": [{**ENTRY, "lfs": {"oid": 7, "size": 5, "pointerSize": 1}}],
    "name as number": [{**ENTRY, "path": 7}],
    "no name": [{"type": "file"}],
    "twice": [ENTRY, ENTRY],
    "nothing": [],
    "no list": {"error": "x"},
}


@pytest.mark.parametrize("listing", LISTINGS)
def test_listings_that_make_no_sense_are_refused(hub: Hub, tmp_path: Path, listing: str) -> None:
    commit = hub.add(REPO, {"a.bin": b"12345"}, lfs=())
    hub.always["api"] = Fault("status", 200, body=json.dumps(LISTINGS[listing]).encode())
    says = r"an answer without sense|without a size or digest|twice|no file|more bytes are needed"
    with pytest.raises(WeightopsError, match=says) as caught:
        fetch(hub, tmp_path, f"{REPO}@{commit}")
    assert_one_clean_sentence(caught.value)
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "target", ["?recursive=true", "http://127.0.0.1:1/", "http://[bad", "file:///etc/passwd", f"ftp://x/{NASTY}"]
)
def test_a_listing_that_goes_on_in_circles_or_elsewhere_is_given_up(hub: Hub, tmp_path: Path, target: str) -> None:
    commit = hub.add(REPO, MODEL)
    hub.always["api"] = Fault("status", 200, headers={"Link": f'<{target}>; rel="next"'}, body=b"[]")
    with pytest.raises(CorruptInput, match=r"goes on in circles|is not followed") as caught:
        fetch(hub, tmp_path, f"{REPO}@{commit}")
    assert_one_clean_sentence(caught.value)


JSON = {"Content-Type": "application/json"}
GATES = {
    "in the header": Fault(
        "status", 403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "It awaits a review."}
    ),
    "in the body": Fault(
        "status", 403, headers={"Content-Type": "application/json"}, body=b'{"error": "It awaits a review."}'
    ),
}


@pytest.mark.parametrize("place", GATES)
def test_what_a_hub_says_of_its_gate_is_passed_on(hub: Hub, tmp_path: Path, place: str) -> None:
    hub.always[WEIGHTS] = GATES[place]
    with pytest.raises(AuthenticationFailed, match=r"status 403 \(.*It awaits a review\.\)") as caught:
        fetch(hub, tmp_path)
    assert "HF_TOKEN" in (caught.value.hint or "")
    assert_one_clean_sentence(caught.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"error": 7}', b"[" * 4000, b'{"error": "\\u001b[2J"}', b"\xff"])
def test_what_a_refusal_holds_does_no_harm(hub: Hub, tmp_path: Path, body: bytes) -> None:
    hub.always[WEIGHTS] = Fault("status", 403, headers=JSON, body=body)
    with pytest.raises(AuthenticationFailed, match="status 403") as caught:
        fetch(hub, tmp_path)
    assert_one_clean_sentence(caught.value)


def private(hub: Hub) -> str:
    hub.token = "secret"
    return REPO


def gated(hub: Hub) -> str:
    hub.gated.add(REPO)
    return REPO


def no_file(hub: Hub) -> str:
    hub.always[WEIGHTS] = Fault("status", 404)
    return REPO


CODES: dict[str, tuple[Callable[[Hub], str], str | None, type[WeightopsError], int]] = {
    "no token for a private repository": (private, None, AuthenticationFailed, 14),
    "wrong token": (private, "other", AuthenticationFailed, 14),
    "gated, and no token": (gated, None, AuthenticationFailed, 14),
    "gated, and terms not accepted": (gated, "secret", AuthenticationFailed, 14),
    "no such repository": (lambda hub: "org/none", "secret", SourceMissing, 10),
    "no such revision": (lambda hub: f"{REPO}@v9", None, SourceMissing, 10),
    "no such commit": (lambda hub: f"{REPO}@{'0' * 40}", None, SourceMissing, 10),
    "no such file": (no_file, None, SourceMissing, 10),
    "no such URL": (lambda hub: f"{hub.endpoint}/static/files/none", None, SourceMissing, 10),
}


@pytest.mark.parametrize("case", CODES)
def test_what_is_refused_or_missing_has_its_exit_code_at_once(hub: Hub, tmp_path: Path, case: str) -> None:
    prepare, token, kind, code = CODES[case]
    source = prepare(hub)
    with Web(replace(QUICK, first_delay_s=60, max_delay_s=60), endpoint=hub.endpoint, token=token) as web:
        with pytest.raises(kind, match=r"status 40[134]") as caught:
            api.download(source, tmp_path, control=Control(web=web))
    assert caught.value.exit_code == code
    assert_one_clean_sentence(caught.value)
    if kind is AuthenticationFailed:
        assert caught.value.hint
