"""`weightops verify` for CI: reports that are always written, verdicts that are never lost."""

from __future__ import annotations

import hashlib
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from systems import mkfifo

from weightops.cli.main import run
from weightops.errors import NoRoom


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"a")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'a').hexdigest()}  a.bin\n")
    return folder


def counts(report: Path) -> tuple[str | None, ...]:
    (suite,) = ET.parse(report).getroot()
    return tuple(suite.get(name) for name in ("tests", "failures", "errors"))


def test_there_is_a_report_whatever_comes_out(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    command = ["verify", str(folder), "--junit", str(report), "-q"]
    assert run(command) == 0
    assert counts(report) == ("1", "0", "0")
    (folder / "a.bin").write_bytes(b"b")
    assert run(command) == 3
    assert counts(report) == ("1", "1", "0")
    (folder / "SHA256SUMS").write_text("prose\n")
    assert run(command) == 13
    assert counts(report) == ("1", "0", "1")
    (folder / "SHA256SUMS").unlink()
    assert run(command) == 10
    assert counts(report) == ("1", "0", "1")
    assert "holds no manifest" in report.read_text()
    assert run(["verify", str(tmp_path / "none"), "--junit", str(report)]) == 10
    assert "no such folder" in report.read_text()


@pytest.mark.parametrize("target", ["none/report.xml", "a.bin/report.xml", "pipe", "link"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/null")
    assert run(["verify", str(folder), "--junit", str(folder / target)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is no regular file" in shown.err or "no such folder to write it to" in shown.err
    assert (folder / "link").is_symlink()


def test_a_folder_that_is_read_only_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert run(["verify", str(folder), "--junit", str(folder / "report.xml")]) == 1
    assert "cannot be written (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(("data", "code"), [(b"a", 16), (b"b", 3)])
def test_a_verdict_survives_a_report_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes, code: int
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise NoRoom("report.xml: the disk is full")

    (folder / "a.bin").write_bytes(data)
    monkeypatch.setattr("weightops.io.atomic.write_whole", fail)
    assert run(["verify", str(folder), "--junit", str(folder / "report.xml")]) == code
    shown = capsys.readouterr()
    assert "SHA256SUMS says" in shown.out
    assert "the disk is full" in shown.err


def test_what_is_passed_over_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = folder / "SHA256SUMS"
    listed.write_text(f"{listed.read_text()}{'0' * 64}  ./SHA256SUMS\n")
    assert run(["verify", str(folder)]) == 0
    assert "line 2: the line for the list itself is passed over" in capsys.readouterr().err


def test_a_list_in_a_folder_below_passes_over_its_own_line(folder: Path) -> None:
    (folder / "sums").mkdir()
    listed = folder / "sums" / "SHA256SUMS"
    listed.write_text((folder / "SHA256SUMS").read_text() + f"{'0' * 64}  ./sums/SHA256SUMS\n")
    assert run(["verify", str(folder), "--manifest", str(listed)]) == 0
