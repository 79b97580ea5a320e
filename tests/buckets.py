"""Object stores on 127.0.0.1: ministack, which keeps Amazon's rules, and rclone, which only pretends conditions."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from botocore.credentials import Credentials

from weightops.stores.s3.account import Account, Endpoint
from weightops.stores.s3.connection import S3
from weightops.stores.s3.refusals import parse_answer
from weightops.stores.web.policy import Policy

KEY, SECRET = "AKIATESTKEY", "secret-of-the-tests"
QUICK = Policy(attempts=3, timeout_s=5, first_delay_s=0.01)


@contextmanager
def ministack() -> Iterator[str]:
    """The endpoint of a server in memory."""
    if importlib.util.find_spec("ministack") is None:
        pytest.skip("ministack is not installed")
    port = _free_port()
    # It would listen on 0.0.0.0, and for MQTT as well.
    own = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3", "IOT_MTLS_ENABLED": "0"}
    with _running([sys.executable, "-m", "ministack"], port, own) as endpoint:
        yield endpoint


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """The endpoint of a server of the folders in a folder."""
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("rclone is not installed")
    port = _free_port()
    words = [found, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(folder)]
    with _running(words, port, {"RCLONE_CONFIG": str(folder.parent / "no.conf")}) as endpoint:
        yield endpoint


@contextmanager
def _running(words: Sequence[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    endpoint = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        words, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, f"{words[0]} has ended"
            time.sleep(0.05)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def account(endpoint: str, **options: int) -> Account:
    """The account of the tests at a server."""
    return Account(Credentials(KEY, SECRET), endpoint=Endpoint(endpoint, is_virtual=False), **options)


def connect(endpoint: str, policy: Policy = QUICK) -> S3:
    """Connections to a server, which are the caller's to close."""
    return S3(account(endpoint), policy)


def new_bucket(connection: S3) -> str:
    """The name of a bucket that is new."""
    name = f"bucket-{secrets.token_hex(6)}"
    connection.call("PUT", f"s3://{name}/")
    return name


def environment(endpoint: str) -> dict[str, str]:
    """What tells a command of a server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def uploads(connection: S3, bucket: str) -> list[str]:
    """The keys of uploads that have not ended."""
    root = parse_answer(connection.call("GET", f"s3://{bucket}/", {"uploads": ""}).data, bucket)
    return [each.findtext("Key") or "" for each in root.iterfind("Upload")]
