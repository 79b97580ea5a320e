"""kill -9: at random moments of large downloads, and at every change to the disk of small ones."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fetching import FINAL, MIB, REPO, WEIGHTS, content, wait_until
from hub import Hub
from systems import needs_itself

from weightops.cli.main import run

TESTS = Path(__file__).parents[2]


@dataclass
class Server:
    """tests/hub.py in a process of its own."""

    endpoint: str
    root: Path

    def sent_nbytes(self) -> int:
        with urllib.request.urlopen(f"{self.endpoint}/_bytes") as answer:
            return sum(json.load(answer).values())

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "weightops", "download", REPO, "--out", str(out), "--quiet"]
        return subprocess.Popen(command, env={**os.environ, "HF_ENDPOINT": self.endpoint})


def serve(folder: Path, sizes: dict[str, int], rate: int) -> Iterator[Server]:
    root, port = folder / "root", folder / "port"
    for name, nbytes in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            for start in range(0, nbytes, 64 * MIB):
                file.write(os.urandom(min(64 * MIB, nbytes - start)))
    command = [sys.executable, str(TESTS / "hub.py"), "--root", str(root), "--repo", REPO]
    process = subprocess.Popen([*command, "--port-file", str(port), "--rate", str(rate)])
    try:
        wait_until(port.exists, 60)
        yield Server(f"http://127.0.0.1:{port.read_text()}", root)
    finally:
        process.kill()
        process.wait()


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != FINAL:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def kill_again_and_again(server: Server, out: Path, kills: int, longest_s: float, seed: int) -> None:
    """Rounds of one process and of two at once, each until that many kills have met a process at work."""
    chosen = random.Random(seed)
    expected = digests(server.root)
    nbytes = sum(path.stat().st_size for path in server.root.rglob("*") if path.is_file())
    done = rounds = 0
    while done < kills:
        rounds += 1
        at_once = 2 if rounds % 3 == 2 else 1
        target, sent_before, killed = out / str(rounds), server.sent_nbytes(), 0
        running: list[subprocess.Popen[bytes]] = []
        while killed < 4:
            running += [server.start(target) for _ in range(at_once - len(running))]
            time.sleep(chosen.uniform(0.3, longest_s))
            if any(process.poll() is not None for process in running):
                break
            victim = running.pop(chosen.randrange(at_once))
            victim.kill()
            victim.wait()
            killed += 1
        for process in running:
            assert process.wait() == 0
        done += killed
        assert server.start(target).wait() == 0
        assert digests(target) == expected
        assert {path.name for path in target.iterdir()} == {*(name.partition("/")[0] for name in expected), FINAL}
        assert run(["verify", str(target), "--quiet"]) == 0
        if at_once == 1:
            assert server.sent_nbytes() - sent_before - nbytes <= killed * 64 * MIB


@pytest.mark.slow
def test_killed_at_random_moments_a_download_ends_right_and_fetches_little_twice(tmp_path: Path) -> None:
    sizes = {"config.json": 500, "tokenizer/merges.txt": 100_000, "a.safetensors": 9 * MIB + 3}
    sizes |= {"b.safetensors": 60 * MIB, "c.safetensors": 21 * MIB - 1}
    for server in serve(tmp_path, sizes, rate=25 * MIB):
        kill_again_and_again(server, tmp_path / "out", kills=5, longest_s=1.5, seed=0)


@pytest.mark.slow
def test_the_same_with_a_gibibyte_and_twenty_kills(tmp_path: Path) -> None:
    sizes = {"config.json": 500, "a.safetensors": 700 * MIB, "b.safetensors": 300 * MIB + 1, "c.bin": 24 * MIB}
    for server in serve(tmp_path, sizes, rate=150 * MIB):
        kill_again_and_again(server, tmp_path / "out", kills=20, longest_s=4, seed=1)


OLD = {"config.json": b"{}", WEIGHTS: content(5 * MIB), "gone.txt": b"old", "sub/same.txt": b"same"}
NEW = {"config.json": b"[]", WEIGHTS: content(5 * MIB, seed=1), "sub/same.txt": b"same", "sub/empty.txt": b""}


@needs_itself("fork")
@pytest.mark.parametrize("before", [False, True], ids=["new", "update"])
@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change_to_the_disk_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, before: bool, step: int
) -> None:
    with Hub() as hub:
        old, new = hub.add(REPO, OLD), hub.add(REPO, NEW)
        command = [sys.executable, str(Path(__file__).with_name("killer.py")), str(tmp_path / "out")]
        environment: dict[str, Any] = {**os.environ, "HF_ENDPOINT": hub.endpoint}
        done = subprocess.run(
            [*command, old if before else "-", new, str(step)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] > 80
    assert found["wrong"] == []
