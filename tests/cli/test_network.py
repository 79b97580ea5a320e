"""What the environment says of the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightops.cli.network import open_web, proxy_for
from weightops.errors import NetworkFailed, UsageError

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
