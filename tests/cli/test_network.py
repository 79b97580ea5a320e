"""What the environment says of the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightops.cli.main import run
from weightops.cli.network import hub_endpoint, open_web, proxy_for
from weightops.errors import AuthenticationFailed, NetworkFailed, UsageError

HUB = "https://huggingface.co/org/name"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "url", "proxy"),
    [
        ({}, HUB, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, HUB, "http://proxy:3128"),
        ({"https_proxy": "proxy:3128"}, HUB, "http://proxy:3128"),
        ({"ALL_PROXY": "https://proxy"}, HUB, "https://proxy"),
        ({"HTTP_PROXY": "http://proxy"}, HUB, None),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "huggingface.co"}, HUB, None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "localhost:8080"}, "http://localhost:8080/x", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "localhost:8080"}, "http://localhost:80/x", "http://proxy"),
    ],
)
def test_proxies(environment: pytest.MonkeyPatch, settings: dict[str, str], url: str, proxy: str | None) -> None:
    for name, value in settings.items():
        environment.setenv(name, value)
    assert proxy_for(url) == proxy


@pytest.mark.parametrize(
    ("exceptions", "url", "listed"),
    [
        ("*", "https://hub.example/x", True),
        ("", "https://hub.example/x", False),
        (" , ", "https://hub.example/x", False),
        ("hub.example", "https://hub.example/x", True),
        ("hub.example", "https://cdn.hub.example/x", True),
        ("hub.example", "https://github.example/x", False),
        (".hub.example", "https://hub.example/x", True),
        (".hub.example", "https://cdn.hub.example/x", True),
        ("*.hub.example", "https://cdn.hub.example/x", True),
        ("HUB.Example.", "https://hub.EXAMPLE./x", True),
        ("a.example, hub.example", "https://hub.example/x", True),
        ("a.example hub.example", "https://hub.example/x", True),
        ("example", "https://hub.example/x", True),
        ("hub.example:443", "https://hub.example/x", True),
        ("hub.example:8443", "https://hub.example/x", False),
        ("hub.example:8443", "https://cdn.hub.example:8443/x", True),
        ("10.0.0.0/8", "http://10.1.2.3/x", True),
        ("10.0.0.0/8", "http://11.1.2.3/x", False),
        ("10.1.2.3/8", "http://10.9.9.9:8080/x", True),
        ("10.0.0.0/8", "http://hub.example/x", False),
        ("10.1.2.3", "http://10.1.2.3:9/x", True),
        ("10.1.2.3:80", "http://10.1.2.3/x", True),
        ("10.1.2.3:80", "http://10.1.2.3:81/x", False),
        ("2.3", "http://10.1.2.3/x", False),
        ("::1", "http://[::1]/x", True),
        ("[::1]", "http://[::1]:8080/x", True),
        ("[::1]:8080", "http://[::1]:8080/x", True),
        ("[::1]:8080", "http://[::1]/x", False),
        ("fe80::/10", "http://[fe80::7]/x", True),
        ("10.0.0.0/99,nonsense:port,:,[", "http://10.0.0.1/x", False),
    ],
)
def test_hosts_that_need_no_proxy(environment: pytest.MonkeyPatch, exceptions: str, url: str, listed: bool) -> None:
    environment.setenv("ALL_PROXY", "http://proxy:3128")
    environment.setenv("NO_PROXY", exceptions)
    assert proxy_for(url) == (None if listed else "http://proxy:3128")


@pytest.mark.parametrize("proxy", ["http://", "http://proxy:port", "http://user:pa/ss@proxy:3128", "http://pro xy:1"])
def test_a_proxy_that_is_no_url_is_refused(environment: pytest.MonkeyPatch, proxy: str) -> None:
    environment.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UsageError, match="the proxy for https is no URL"):
        proxy_for(HUB)


def test_a_password_that_hides_the_host_is_not_shown(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTPS_PROXY", "http://user:sec/ret@proxy:3128")
    with pytest.raises(UsageError, match="http://proxy:3128 stands after") as caught:
        proxy_for(HUB)
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_\u200babc", "hf abc", "hf_é", "hf_\x1b[2J", "hf_\u202e"])
def test_a_token_that_can_be_none_is_refused_by_its_odd_character(environment: pytest.MonkeyPatch, token: str) -> None:
    environment.setenv("HF_TOKEN", token)
    with pytest.raises(AuthenticationFailed, match="a character that no token has") as caught:
        open_web()
    assert str(caught.value).isascii()
    assert "HF_TOKEN" in (caught.value.hint or "")


def test_a_token_file_that_cannot_be_read(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "token"):
        environment.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
        with pytest.raises(AuthenticationFailed, match="the file with the hub's token cannot be read"):
            open_web()


ENDPOINTS = ["hf-mirror.com", "ftp://hub", "http://", "http://hub:port", "http://hu b", "http://h\u200b"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_endpoint_that_is_no_url_is_named(
    environment: pytest.MonkeyPatch, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="the hub \\(--endpoint\\) is no URL"):
        hub_endpoint(endpoint)
    environment.setenv("HF_ENDPOINT", endpoint)
    assert run(["download", "org/name", "--out", "out"]) == 2
    assert "the hub (HF_ENDPOINT) is no URL" in capsys.readouterr().err


def test_blanks_around_an_endpoint_are_no_part_of_it(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HF_ENDPOINT", " http://127.0.0.1:1 \n")
    assert hub_endpoint() == "http://127.0.0.1:1"
    environment.setenv("HF_ENDPOINT", " ")
    assert hub_endpoint() == "https://huggingface.co"


def test_a_socks_proxy_is_refused_by_kind_alone(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALL_PROXY", "socks5://user:secret@proxy")
    with pytest.raises(UsageError, match="socks5") as caught:
        proxy_for(HUB)
    assert "secret" not in str(caught.value)


def test_the_token_is_that_of_the_environment_or_none(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with open_web() as web:
        assert (web.token, web.endpoint) == (None, "https://huggingface.co")
    environment.setenv("HF_TOKEN", "hf_secret")
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:1/")
    with open_web() as web:
        assert (web.token, web.endpoint) == ("hf_secret", "http://127.0.0.1:1")
    environment.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with open_web(endpoint="http://127.0.0.1:2") as web:
        assert (web.token, web.endpoint) == (None, "http://127.0.0.1:2")


def test_offline_is_an_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(NetworkFailed, match="HF_HUB_OFFLINE is set"):
        open_web()
