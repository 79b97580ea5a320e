"""Whose bucket, and where: what the environment and ~/.aws say, as Amazon's own programs read it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import AuthenticationFailed, UsageError
from weightops.stores.s3.account import Account, Endpoint, open_account
from weightops.stores.s3.places import address, located, parse_place

Told = Callable[..., Account]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Opens the account that a text for ~/.aws/config and variables describe."""

    def tell(config: str = "", **variables: str) -> Account:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        (tmp_path / "config").write_text(config)
        own = {"CONFIG_FILE": str(tmp_path / "config"), "SHARED_CREDENTIALS_FILE": os.devnull}
        own["EC2_METADATA_DISABLED"] = "true"
        for name, value in {**own, **variables}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        return open_account()

    return tell


def where(account: Account) -> str:
    return account.signed("GET", "b", "a key/ü+%", {}, {}, "0" * 64)[0]


KEYS = {"ACCESS_KEY_ID": "AKIAKEY", "SECRET_ACCESS_KEY": "secret"}


@pytest.mark.parametrize(
    ("config", "variables", "url"),
    [
        ("", {}, "https://b.s3.us-east-1.amazonaws.com"),
        ("", {"REGION": "eu-west-1"}, "https://b.s3.eu-west-1.amazonaws.com"),
        ("", {"DEFAULT_REGION": "cn-north-1"}, "https://b.s3.cn-north-1.amazonaws.com.cn"),
        ("[default]\nregion = eu-north-1\n", {}, "https://b.s3.eu-north-1.amazonaws.com"),
        ("", {"ENDPOINT_URL": "http://127.0.0.1:9000/"}, "http://127.0.0.1:9000/b"),
        ("", {"ENDPOINT_URL": "http://a", "ENDPOINT_URL_S3": "http://c"}, "http://c/b"),
        ("[profile p]\nendpoint_url = http://d\n", {"PROFILE": "p"}, "http://d/b"),
        ("[default]\nservices = s\n[services s]\ns3 =\n  endpoint_url = http://e\n", {}, "http://e/b"),
        ("[default]\nendpoint_url = http://f\ns3 =\n  addressing_style = virtual\n", {}, "http://b.f"),
        ("[default]\ns3 =\n  addressing_style = path\n", {}, "https://s3.us-east-1.amazonaws.com/b"),
    ],
)
def test_a_bucket_is_where_it_is_said_to_be(told: Told, config: str, variables: dict[str, str], url: str) -> None:
    account = told(config, **KEYS, **variables)
    assert where(account) == f"{url}/a%20key/%C3%BC%2B%25"


def test_requests_are_signed_with_the_keys_and_by_nobody_without(told: Told) -> None:
    _, headers = told(**KEYS, SESSION_TOKEN="token").signed(
        "PUT", "b", "k", {"a": ""}, {"If-None-Match": "*"}, "0" * 64
    )
    assert re.match(r"AWS4-HMAC-SHA256 Credential=AKIAKEY/\d{8}/us-east-1/s3/aws4_request", headers["Authorization"])
    assert "if-none-match" in headers["Authorization"]
    assert headers["X-Amz-Security-Token"] == "token"
    assert headers["X-Amz-Content-SHA256"] == "0" * 64
    account = told()
    assert account.is_anonymous
    assert account.signed("GET", "b", "k", {}, {"Range": "bytes=0-1"}, "0" * 64)[1] == {"Range": "bytes=0-1"}


def test_how_many_ranges_are_on_their_way(told: Told) -> None:
    assert told().ranges == 4
    assert told("[default]\ns3 =\n  max_concurrent_requests = 9\n").ranges == 9


def test_what_is_no_account_is_said_in_a_sentence(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("127.0.0.1:9000", "ftp://a", "http://a?token=secret"):
        with pytest.raises(UsageError, match="endpoint for buckets") as caught:
            told(ENDPOINT_URL=url)
        assert "secret" not in str(caught.value)
    with pytest.raises(AuthenticationFailed, match="nobody"):
        told(PROFILE="nobody")
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(UsageError, match="botocore"):
        told()


def test_a_bucket_with_dots_stands_in_the_path() -> None:
    assert Endpoint().of("a.b", "us-east-1") == "https://s3.us-east-1.amazonaws.com/a.b"


@given(st.text(min_size=1))
def test_an_address_is_of_one_key_whatever_is_in_it(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        return
    found = address("bucket", key)
    assert located(found) == ("bucket", key)
    assert not {"?", "#"} & set(found)
    assert found.isascii()


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://b",
        "s3://user:word@bucket/k",
        "s3://bucket/k?X-Amz-Signature=word",
        "s3://bucket/../k",
        "s3://b/k",
    ],
)
def test_what_is_no_place_is_refused_and_secrets_are_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match=r"bucket|name") as caught:
        parse_place(text)
    assert "word" not in str(caught.value)
