"""A web server that is not ours: nginx, with ranges, a limit on its rate, and a run that is killed half-way."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetching import MIB, WEIGHTS, assert_complete, content, wait_until

from weightops.cli.main import run
from weightops.stores.transfer.partial import STATE

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/root;
        location /slow/ {{ alias {folder}/root/; limit_rate 16m; }}
        location /whole/ {{ alias {folder}/root/; max_ranges 0; }}
        location /moved/ {{ return 302 /$arg_to; }}
    }}
}}
"""
DATA = content(24 * MIB + 11)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address, and the log of what was asked."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    (folder / "root").mkdir()
    (folder / "root" / WEIGHTS).write_bytes(DATA)
    (folder / "root" / "empty.txt").write_bytes(b"")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "conf").write_text(CONFIG.format(folder=folder, port=port) + ("user root;" if os.getuid() == 0 else ""))
    process = subprocess.Popen([NGINX, "-c", str(folder / "conf"), "-e", str(folder / "error.log")])
    try:
        wait_until(lambda: answers(port))
        yield f"http://127.0.0.1:{port}", folder / "access.log"
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("path", ["", "whole/"])
def test_a_file_with_ranges_and_without(server: tuple[str, Path], tmp_path: Path, path: str) -> None:
    url, _ = server
    assert run(["download", f"{url}/{path}{WEIGHTS}", "--out", str(tmp_path), "--quiet"]) == 0
    assert_complete(tmp_path, {WEIGHTS: DATA})
    assert run(["verify", str(tmp_path), "--quiet"]) == 0


def test_an_empty_file(server: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = server
    assert run(["download", f"{url}/empty.txt", "--out", str(tmp_path), "--quiet"]) == 0
    assert_complete(tmp_path, {"empty.txt": b""})


def test_a_list_of_files_some_of_which_moved(server: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = server
    listed = tmp_path / "list"
    digest = hashlib.sha256(DATA).hexdigest()
    listed.write_text(f"{digest}  {url}/{WEIGHTS}\n{digest}  {url}/moved/renamed.bin?to={WEIGHTS}\n")
    assert run(["download", str(listed), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert_complete(tmp_path / "out", {WEIGHTS: DATA, "renamed.bin": DATA})


def test_no_such_file(server: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = server
    assert run(["download", f"{url}/none", "--out", str(tmp_path)]) == 10


def test_a_run_that_was_killed_is_continued(server: tuple[str, Path], tmp_path: Path) -> None:
    url, log = server
    command = [sys.executable, "-m", "weightops", "download", f"{url}/slow/{WEIGHTS}", "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--quiet"])
    wait_until(lambda: any(len(path.read_bytes().splitlines()) > 3 for path in tmp_path.glob(f"{STATE}/*/journal")), 30)
    process.kill()
    process.wait()
    wait_until(lambda: sent_nbytes(log, "/slow/") > 1)  # nginx writes its log when the connection is over
    before = sent_nbytes(log, "/slow/")
    assert run(["download", f"{url}/slow/{WEIGHTS}", "--out", str(tmp_path), "--quiet"]) == 0
    assert_complete(tmp_path, {WEIGHTS: DATA})
    time.sleep(0.1)
    assert 8 * MIB < before < len(DATA)
    assert sent_nbytes(log, "/slow/") - before <= len(DATA) - 8 * MIB + 3


def sent_nbytes(log: Path, path: str) -> int:
    """Bytes of bodies that went out for this path, by the log in nginx's usual format."""
    return sum(int(line.split()[9]) for line in log.read_text().splitlines() if f'"GET {path}' in line)
