"""`weightops download` on a screen, in a script, under Ctrl-C, on a full disk, and twice at once."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetching import FINAL, MIB, REPO, WEIGHTS, assert_complete, content, fetch, files, wait_until
from hub import Fault, Hub
from systems import needs_itself

from weightops.cli.main import run
from weightops.errors import NetworkFailed, NoRoom, WeightopsError
from weightops.stores.transfer.partial import STATE

DATA, OTHER = content(10 * MIB), content(10 * MIB, seed=1)
MODEL = {"config.json": b"{}", WEIGHTS: DATA}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as hub:
        hub.add(REPO, MODEL)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "weightops", "download", REPO, "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(out: Path, *options: str) -> int:
    return run(["download", REPO, "--out", str(out), *options])


def test_off_a_terminal_there_is_a_line_for_each_file(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["wrote config.json (2 B)", f"wrote {WEIGHTS} (10.5 MB)"]
    assert shown.out.count("\n") == 1
    assert "2 files, 10.5 MB, 10.5 MB fetched" in shown.out
    assert command(tmp_path) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert command(tmp_path / "quiet", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_json_is_one_document_on_stdout_and_events_by_line_on_stderr(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add(REPO, MODEL)
    assert command(tmp_path, "--json", "--progress", "json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["schema"], found["complete"], found["commit"]) == ("weightops-download/1", True, commit)
    digests = {file["name"]: file["digests"] for file in found["files"]}
    assert digests[WEIGHTS]["sha256"] == hashlib.sha256(DATA).hexdigest()
    events = [json.loads(line) for line in shown.err.splitlines()]
    assert {event["schema"] for event in events} == {"weightops-progress/1"}
    assert [event["name"] for event in events if event["event"] == "done"] == ["config.json", WEIGHTS]
    assert [i for i, event in enumerate(events) if event["event"] == "stop"] == [len(events) - 1]
    assert events[-1]["nbytes"] == len(DATA) + 2


def test_errors_are_json_too(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["download", "org/none", "--out", str(tmp_path), "--json"]) == 14
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["error"]) == ("weightops-error/2", "AuthenticationFailed")
    assert found["exit_code"] == 14
    assert "HF_TOKEN" in found["hint"]


def test_what_is_counted_as_done_is_what_stays(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are fetched again after a fault count once."""
    hub.faults[WEIGHTS] = [Fault("cut", 5 * MIB), Fault("ignore_range"), Fault("flip", 7)]
    hub.faults[WEIGHTS] = [Fault("cut", 5 * MIB), Fault("ignore_range"), Fault("cut", 9 * MIB), Fault("flip", 7)]
    assert command(tmp_path, "--progress", "json") == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert events[-1]["nbytes"] == len(DATA) + 2


@needs_itself("fork")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_and_loses_nothing(hub: Hub, tmp_path: Path, number: int, code: int) -> None:
    hub.always[WEIGHTS] = Fault("stall", 9 * MIB, 60)
    process = start(tmp_path, "--workers", "1")
    wait_until(lambda: hub.bytes_sent(WEIGHTS) >= 9 * MIB, 30)
    time.sleep(0.3)
    process.send_signal(number)
    began = time.monotonic()
    _, said = process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert process.returncode == code
    assert "run the same command again to continue" in said
    assert files(tmp_path).keys() == {"config.json"}
    hub.always.clear()
    assert command(tmp_path) == 0
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) == 9 * MIB + len(DATA) - 8 * MIB


def test_a_signal_while_the_hub_keeps_silent(hub: Hub, tmp_path: Path) -> None:
    hub.always["api"] = Fault("stall", -1, 60)
    process = start(tmp_path)
    wait_until(lambda: len(hub.log) > 0, 30)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("out", ["file", "file/below", "n" * 300, "ro", "ro/below/deep"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "ro").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "ro")
    assert command(tmp_path / out) == (11 if out == "file" else 1)
    said = capsys.readouterr().err
    assert "cannot be written" in said or "is not a folder" in said
    assert "unexpected" not in said
    assert hub.bytes_sent() == 0


def test_a_complete_folder_need_not_be_writable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.static["a.bin"] = b"\0"
    url = f"{hub.endpoint}/static/files/a.bin"
    for out, source in (("a", REPO), ("b", url)):
        assert run(["download", source, "--out", str(tmp_path / out)]) == 0
        with monkeypatch.context() as patched:
            patched.setattr("os.access", lambda path, mode: False)
            patched.setattr("weightops.cli.options._Place.convert", lambda self, value, *_: Path(value))
            assert run(["download", source, "--out", str(tmp_path / out)]) == 0


def test_too_small_a_disk_is_found_out_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightops.operations.download.operation.free_disk", lambda _: len(DATA))
    assert command(tmp_path / "out") == 16
    assert hub.bytes_sent() == 0
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_ends_it_and_more_room_continues_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mounted)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        hub.add(REPO, {**MODEL, "model-2.safetensors": OTHER})
        monkeypatch.setattr("weightops.operations.download.operation.free_disk", lambda _: 1 << 40)
        with pytest.raises(NoRoom, match="the disk is full") as caught:
            fetch(hub, mounted)
        assert caught.value.exit_code == 16
        found = files(mounted)
        assert all(found[name] == {**MODEL, "model-2.safetensors": OTHER}[name] for name in found)
        assert not (mounted / FINAL).exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
        fetch(hub, mounted)
        assert_complete(mounted, {**MODEL, "model-2.safetensors": OTHER})
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_two_runs_at_once_share_the_work_and_no_file_ever_vanishes(hub: Hub, tmp_path: Path) -> None:
    repository = {f"{i}.bin": content(2 * MIB, i) for i in range(6)}
    hub.add(REPO, repository)
    hub.rate = 8 * MIB
    vanished: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        seen: set[str] = set()
        while not stop.is_set():
            there = {name for name in repository if (tmp_path / name).exists()}
            vanished.extend(seen - there)
            seen |= there
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    runs = [threading.Thread(target=fetch, args=(hub, tmp_path), kwargs={"workers": 2}) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    stop.set()
    watcher.join()
    assert vanished == []
    assert_complete(tmp_path, repository)
    assert hub.bytes_sent() == sum(map(len, repository.values()))


def test_two_versions_at_once_are_not_taken_for_one(hub: Hub, tmp_path: Path) -> None:
    """While a file of one version is fetched, another run puts another version of another file there."""
    old, new = hub.add(REPO, MODEL), hub.add(REPO, {**MODEL, "config.json": b"[]"})
    fetch(hub, tmp_path, f"{REPO}@{old}")
    (tmp_path / WEIGHTS).unlink()

    def interfere(name: str, offset: int) -> None:
        if name == WEIGHTS:
            hub.on_body = lambda name, offset: None
            fetch(hub, tmp_path, f"{REPO}@{new}", include=("config.json",))

    hub.on_body = interfere
    try:
        fetch(hub, tmp_path, f"{REPO}@{old}")
    except WeightopsError:
        fetch(hub, tmp_path, f"{REPO}@{old}")
    assert_complete(tmp_path, MODEL)


def test_a_run_that_waits_for_another_says_so(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults[WEIGHTS] = [Fault("stall", 5 * MIB, 1.5)]
    first = start(tmp_path)
    wait_until(lambda: hub.bytes_sent(WEIGHTS) >= 5 * MIB, 30)
    assert command(tmp_path) == 0
    assert f"{WEIGHTS} is being fetched by another run: waiting for it" in capsys.readouterr().err
    first.communicate(timeout=30)
    assert first.returncode == 0
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) == len(DATA)


def test_a_run_goes_on_with_what_a_killed_one_left(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault("stall", 9 * MIB, 60)]
    first = start(tmp_path)
    wait_until(lambda: hub.bytes_sent(WEIGHTS) >= 9 * MIB, 30)
    time.sleep(0.3)
    first.kill()
    first.communicate()
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) == 9 * MIB + len(DATA) - 8 * MIB


def test_chunks_that_the_disk_lost_are_fetched_again_and_no_others(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault("cut", 9 * MIB), Fault("status", 418)]
    with pytest.raises(NetworkFailed, match="status 418"):
        fetch(hub, tmp_path)
    (data,) = (tmp_path / STATE).glob("*.part/data")
    with data.open("r+b") as file:
        file.seek(MIB)
        file.write(b"rot")
    hub.log.clear()
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) == len(DATA) - 4 * MIB


PUBLISHED = {"config.json": b"{}", "pytorch_model.bin": DATA}


@pytest.fixture
def published(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published list of two files that the hub has."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "sources.json").write_text(json.dumps({"known": {"repository": REPO}}))
    lines = [f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in PUBLISHED.items()]
    (folder / "known.md5").write_text("".join(lines))
    (folder / "made.md5").write_text(lines[0])
    monkeypatch.setattr("weightops.formats.proofs.published._folder", lambda: folder)
    hub.add(REPO, PUBLISHED)
    return folder / "known.md5"


def spoil(published: Path) -> None:
    """What the hub has is no longer what was published."""
    right, wrong = (hashlib.md5(data).hexdigest() for data in (DATA, OTHER))
    published.write_text(published.read_text().replace(right, wrong))


def test_a_published_name_is_fetched_and_held_against_its_list(hub: Hub, tmp_path: Path, published: Path) -> None:
    out = tmp_path / "out"
    assert run(["download", "known", "--out", str(out)]) == 0
    assert_complete(out, PUBLISHED)
    recorded = json.loads((out / FINAL).read_text())
    assert recorded["files"]["pytorch_model.bin"]["digests"]["md5"] == hashlib.md5(DATA).hexdigest()
    assert run(["verify", str(out), "--manifest", "known"]) == 0
    assert run(["download", "made", "--out", str(out)]) == 10
    assert run(["download", "unknown", "--out", str(out)]) == 10


def test_a_file_that_is_not_the_published_one_is_refused(
    hub: Hub, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(published)
    out = tmp_path / "out"
    assert run(["download", "known", "--out", str(out)]) == 3
    assert (
        f"md5 is {hashlib.md5(DATA).hexdigest()}, expected {hashlib.md5(OTHER).hexdigest()}" in capsys.readouterr().err
    )
    assert files(out).keys() <= {"config.json"}


def test_a_file_that_was_fetched_without_the_list_is_held_against_it(hub: Hub, tmp_path: Path, published: Path) -> None:
    spoil(published)
    out = tmp_path / "out"
    assert run(["download", REPO, "--out", str(out)]) == 0
    assert run(["download", "known", "--out", str(out)]) == 3


def test_a_part_of_what_was_published(hub: Hub, tmp_path: Path, published: Path) -> None:
    assert run(["download", "known", "--include", "*.json", "--out", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out").keys() == {"config.json"}


def test_a_published_file_that_the_source_lacks_is_a_difference(hub: Hub, tmp_path: Path, published: Path) -> None:
    hub.add(REPO, {"config.json": b"{}"})
    assert run(["download", "known", "--out", str(tmp_path / "out")]) == 3
