"""`weightops manifest` on folders that have one: how they were made is kept, as long as it is true."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fetching import FINAL, REPO, fetch, files
from hub import Hub
from support import write_checkpoint

import weightops
from weightops.cli.main import run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder that a command made, with losses to tell of."""
    torch.manual_seed(0)
    write_checkpoint(tmp_path / "source", {"a": torch.randn(4, 8), "b": torch.randn(3)})
    weightops.cast(tmp_path / "source", tmp_path / "made", dtype="bfloat16", digest=["md5"])
    return tmp_path / "made"


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FINAL).read_text())
    return found


def test_another_digest_keeps_what_is_known(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(made)
    assert before["losses"]
    assert run(["manifest", str(made), "--digest", "sha256", "--overwrite"]) == 0
    after = read(made)
    assert after | {"files": before["files"]} == before
    for name, entry in before["files"].items():
        assert after["files"][name]["digests"].items() > entry["digests"].items()
        assert after["files"][name]["digests"].keys() == {"xxh3_128", "md5", "sha256"}
    assert "left out" not in capsys.readouterr().err
    assert weightops.verify(made).verdict


def test_a_changed_note_beside_the_weights_changes_nothing_about_their_making(made: Path) -> None:
    before = read(made)
    (made / "README.md").write_text("new")
    assert run(["manifest", str(made), "--overwrite"]) == 0
    assert read(made)["recipe"] == before["recipe"]
    assert "README.md" in read(made)["files"]


def test_a_manifest_that_told_nothing_has_nothing_to_leave_out(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / FINAL).unlink()
    for value in (0.0, 1.0):
        write_checkpoint(made, {"a": torch.full((4, 8), value)})
        assert run(["manifest", str(made), "--overwrite"]) == 0
    assert "left out" not in capsys.readouterr().err


def test_other_tensors_were_not_made_so(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(made, {"a": torch.zeros(4, 8)})
    assert run(["manifest", str(made), "--overwrite"]) == 0
    assert read(made)["recipe"] == {"operation": "manifest"}
    assert "sources" not in read(made)
    assert "what it told of the making is left out" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_read_is_replaced(made: Path) -> None:
    (made / FINAL).write_text("{")
    assert run(["manifest", str(made)]) == 11
    assert run(["manifest", str(made), "--overwrite"]) == 0
    assert read(made)["content_id"]


def test_a_download_stays_one_and_what_lies_beside_it_stays_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {"a": torch.zeros(2, 3)})
    model = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with Hub() as hub:
        hub.add(REPO, model)
        fetch(hub, tmp_path / "out")
        (tmp_path / "out" / "mine.txt").write_text("precious")
        assert run(["manifest", str(tmp_path / "out"), "--digest", "sha256", "--overwrite"]) == 0
        assert read(tmp_path / "out")["recipe"]["operation"] == "download"
        assert read(tmp_path / "out")["content_id"]
        hub.log.clear()
        fetch(hub, tmp_path / "out")
        assert len(hub.log) == 1
        hub.add(REPO, {"config.json": model["config.json"]})
        fetch(hub, tmp_path / "out", prune=True)
        assert files(tmp_path / "out").keys() == {"config.json", "mine.txt"}


@pytest.mark.parametrize("option", ["--md5sums", "--sha256sums", "--xxh128sums"])
def test_a_checksum_list_is_no_json(made: Path, option: str) -> None:
    assert run(["manifest", str(made), option, "--json"]) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("weightops.api.prove.manifest", None)
    assert run(["manifest", str(made), "--overwrite"]) == 1


def test_a_link_to_nothing_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "gone").symlink_to("nowhere")
    assert run(["manifest", str(made), "--overwrite"]) == 10
    assert "gone: no such file" in capsys.readouterr().err


def test_an_unknown_digest_is_refused_before_the_work(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.api.prove.digest_tensors", None)
    assert run(["manifest", str(made), "--overwrite", "--digest", "crc32"]) == 2
