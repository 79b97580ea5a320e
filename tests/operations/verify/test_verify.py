from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from systems import mkfifo

from weightops.engine.control import Control, Silent
from weightops.errors import CorruptInput, Interrupted, SourceMissing, UsageError, WeightopsError
from weightops.formats.proofs import manifest as own
from weightops.formats.proofs.manifest import FileEntry, Manifest, TensorEntry, content_id
from weightops.io.digests import hash_file
from weightops.operations.verify.operation import TensorDigests, verify
from weightops.operations.verify.report import FileResult, VerifyReport
from weightops.spec import DType, TensorSpec

SPEC = TensorSpec(DType.F16, (2, 3))
TENSORS = {"a": (SPEC, "0" * 32), "b": (SPEC, "1" * 32)}
FILES = {"config.json": b"{}", "model-1.bin": b"one" * 1000, "sub/model-2.bin": b"two" * 2000}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that blocks on a FIFO or device ends the run, with a traceback of every thread."""
    faulthandler.dump_traceback_later(60, exit=True, file=2)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files without a manifest."""
    root = tmp_path / "model"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_manifest(root: Path, *algorithms: str, tensors: Mapping[str, tuple[TensorSpec, str]] = TENSORS) -> Path:
    files = {}
    for name in FILES:
        nbytes, digests = hash_file(root / name, algorithms or ("xxh3_128",))
        files[name] = FileEntry(nbytes=nbytes, digests=digests)
    manifest = Manifest(
        schema=own.SCHEMA,
        content_id=content_id(tensors),
        files=files,
        tensors={
            n: TensorEntry(dtype=s.dtype, shape=s.shape, xxh3_128=d, file="model-1.bin")
            for n, (s, d) in tensors.items()
        },
    )
    path = root / own.NAME
    path.write_bytes(manifest.to_bytes())
    return path


def write_list(root: Path, name: str = "MD5SUMS", tool: str = "md5sum") -> Path:
    printed = subprocess.run([tool, *FILES], cwd=root, capture_output=True, check=True).stdout
    (root / name).write_bytes(printed)
    return root / name


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def statuses(report: VerifyReport) -> dict[str, str]:
    return {file.name: file.status for file in report.files}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_own_manifest(folder: Path) -> None:
    write_manifest(folder, "md5", "sha256", "xxh3_128")
    report = verify(folder)
    assert (report.verdict, statuses(report)) == (True, dict.fromkeys(FILES, "ok"))
    assert report.counts == {"ok": 3, "differs": 0, "missing": 0, "extra": 0, "unreadable": 0}
    assert report.nbytes == sum(map(len, FILES.values()))
    assert (report.mode, report.content_equal, report.elapsed_s > 0) == ("full", None, True)
    assert report.files[0].expected == report.files[0].found
    assert f"md5 {hashlib.md5(b'{}').hexdigest()}, sha256 " in report.files[0].expected


@pytest.mark.parametrize("name", ["MD5SUMS", "checklist.chk", "SHA256SUMS", "mine.sha256"])
def test_checksum_list(folder: Path, name: str) -> None:
    path = write_list(folder, name, "sha256sum" if "256" in name.lower() else "md5sum")
    report = verify(folder, path if name == "mine.sha256" else None)
    assert report.verdict
    assert report.manifest == str(path)
    assert statuses(report) == dict.fromkeys(FILES, "ok")


def test_own_manifest_comes_before_lists(folder: Path) -> None:
    write_list(folder)
    assert verify(folder).manifest == str(folder / "MD5SUMS")
    write_manifest(folder)
    assert verify(folder).manifest == str(folder / own.NAME)


def test_sizes_come_first(folder: Path) -> None:
    write_manifest(folder)
    with (folder / "model-1.bin").open("ab") as file:
        file.write(b"x")
    (folder / "sub/model-2.bin").unlink()
    report = verify(folder)
    assert not report.verdict
    assert report.files[1] == FileResult("model-1.bin", "differs", "3000 bytes", "3001 bytes")
    assert (report.files[2].status, report.files[2].expected[:9]) == ("missing", "xxh3_128 ")
    assert report.nbytes == 2


def test_flipped_bit(folder: Path) -> None:
    path = write_list(folder)
    flip(folder / "sub/model-2.bin")
    report = verify(folder, path)
    assert [file.status for file in report.files] == ["ok", "ok", "differs"]
    assert report.files[2].expected == f"md5 {hashlib.md5(FILES['sub/model-2.bin']).hexdigest()}"
    assert report.files[2].found == f"md5 {hash_file(folder / 'sub/model-2.bin', ['md5']).digests['md5']}"


def test_one_of_several_digests(folder: Path) -> None:
    path = write_manifest(folder, "md5", "xxh3_128")
    document = json.loads(path.read_text())
    document["files"]["config.json"]["digests"]["md5"] = "0" * 32
    edit(path, files=document["files"])
    assert not verify(folder).verdict
    assert verify(folder, algorithm="xxh3_128").verdict
    with pytest.raises(UsageError, match=r"has no sha256 digest for 'config\.json', only md5, xxh3_128"):
        verify(folder, algorithm="sha256")


def test_algorithm_of_a_list_with_a_wrong_name(folder: Path) -> None:
    path = write_list(folder, "x.md5", "sha256sum")
    with pytest.raises(CorruptInput, match="expected 32 digits"):
        verify(folder, path)
    assert verify(folder, path, algorithm="sha256").verdict


def test_md5_and_xxh128_mixed_up(folder: Path) -> None:
    """Nothing in the digits tells them apart, so every file differs; the tags of BSD lists do tell."""
    path = write_list(folder, "x.xxh128")
    assert verify(folder, path).counts["differs"] == 3
    assert verify(folder, path, algorithm="md5").verdict


def test_extra_files(folder: Path) -> None:
    write_manifest(folder)
    ours = (".hidden", ".git/config", "x.md5", "o.partial/x")
    for name in ("a.lock", "b.partial", "extra.bin", "sub/more", "sub/deep/er", *ours):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    mkfifo(folder / "pipe")
    (folder / "elsewhere").symlink_to("/", target_is_directory=True)
    extra = ["a.lock", "b.partial", "elsewhere", "extra.bin", "pipe", "sub/deep/er", "sub/more"]
    report = verify(folder)
    assert [file.name for file in report.files if file.status == "extra"] == extra
    assert report.verdict
    assert not verify(folder, extra="fail").verdict
    assert verify(folder, extra="ignore").counts["extra"] == 0


def test_extra_names_that_are_not_text(folder: Path) -> None:
    write_manifest(folder)
    (folder / os.fsdecode(b"bad\xff\nname")).write_bytes(b"")
    report = verify(folder)
    assert report.files[-1].name == "bad\\xff\nname"
    json.dumps(report.to_json(), ensure_ascii=False).encode()
    assert b"bad\\xff\\nname" in report.to_junit()


def test_listed_file_behind_a_linked_folder_is_not_extra(folder: Path) -> None:
    path = write_list(folder)
    (folder / "sub").rename(folder / ".store")
    (folder / "sub").symlink_to(".store")
    report = verify(folder, path, extra="fail")
    assert report.verdict, report


def test_manifest_under_another_name_is_not_extra(folder: Path) -> None:
    path = write_manifest(folder).rename(folder / "v1.json")
    assert verify(folder, path, extra="fail").verdict


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "outside", "loop", "dangling out", "chain out"])
def test_what_is_not_a_file_inside_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    write_manifest(folder)
    target = folder / "model-1.bin"
    copy = target.rename(tmp_path / "copy")
    if kind == "folder":
        target.mkdir()
    elif kind == "fifo":
        mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/zero")
    elif kind == "outside":
        target.symlink_to(copy)
    elif kind == "loop":
        target.symlink_to(target.name)
    elif kind == "dangling out":
        target.symlink_to("../absent")
    else:
        (folder / "hop").symlink_to(tmp_path)
        target.symlink_to("hop/copy")
    for quick in (False, True):
        report = verify(folder, quick=quick)
        assert statuses(report)["model-1.bin"] == "unreadable"
        assert next(file for file in report.files if file.name == "model-1.bin").detail
        assert not report.verdict


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_manifest_that_is_no_file_is_refused(folder: Path, kind: str) -> None:
    path = folder / "MD5SUMS"
    if kind == "fifo":
        mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CorruptInput, match=r"not a regular file|leaves the folder"):
        verify(folder)
    with pytest.raises(CorruptInput, match="not a regular file"):
        verify(folder, path)


def test_file_in_place_of_a_folder(folder: Path) -> None:
    path = write_list(folder)
    (folder / "sub/model-2.bin").unlink()
    (folder / "sub").rmdir()
    (folder / "sub").write_bytes(b"")
    assert statuses(verify(folder, path))["sub/model-2.bin"] == "missing"


def test_hugging_face_cache_links(folder: Path, tmp_path: Path) -> None:
    path = write_list(folder).rename(tmp_path / "x.md5")
    root = tmp_path / "hub" / "models--a--b"
    snapshot = root / "snapshots" / ("0" * 40)
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot / "sub").mkdir()
    for i, name in enumerate(FILES):
        (folder / name).rename(root / "blobs" / str(i))
        (snapshot / name).symlink_to(os.path.relpath(root / "blobs" / str(i), (snapshot / name).parent))
    assert verify(snapshot, path).verdict


def test_changed_while_hashed(folder: Path) -> None:
    path = write_list(folder)

    class Meddling(Control):
        def check(self) -> None:
            (folder / "model-1.bin").write_bytes(os.urandom(4000))

    report = verify(folder, path, workers=1, control=Meddling())
    assert statuses(report)["model-1.bin"] in ("unreadable", "differs")
    assert not report.verdict


def test_interrupted(folder: Path) -> None:
    write_manifest(folder)
    control = Control()
    control.cancel(15)
    with pytest.raises(Interrupted, match="interrupted") as caught:
        verify(folder, control=control)
    assert caught.value.exit_code == 143


def test_progress(folder: Path) -> None:
    write_manifest(folder)
    calls: list[object] = []

    class Listening(Silent):
        def start(self, what: str, total_nbytes: int) -> None:
            calls.append((what, total_nbytes))

        def advance(self, nbytes: int) -> None:
            calls.append(nbytes)

        def stop(self) -> None:
            calls.append("stop")

    verify(folder, control=Control(Listening()), workers=1)
    assert calls == [("verifying", 9002), 6000, 3000, 2, "stop"]


def test_tensors_are_compared_when_files_differ(folder: Path) -> None:
    write_manifest(folder)
    asked = []

    def tensors(path: Path) -> Mapping[str, tuple[TensorSpec, str]]:
        asked.append(path)
        return TENSORS

    assert verify(folder, tensors=tensors).content_equal is None
    assert asked == []
    (folder / "model-1.bin").unlink()
    assert verify(folder, tensors=tensors, quick=True).content_equal is None
    assert asked == []
    report = verify(folder, tensors=tensors)
    assert (asked, report.content_equal, report.verdict) == ([folder], True, False)


def test_differing_tensors_are_named(folder: Path) -> None:
    write_manifest(folder)
    flip(folder / "model-1.bin")
    found = {"a": (TensorSpec(DType.BF16, (2, 3)), "0" * 32), "c": TENSORS["b"]}
    report = verify(folder, tensors=lambda _: found)
    named = (report.content_equal, report.tensors_differ, report.tensors_missing, report.tensors_extra)
    assert named == (False, ("a",), ("b",), ("c",))


def test_content_reads_tensors_only(folder: Path) -> None:
    write_manifest(folder)
    (folder / "model-1.bin").unlink()
    report = verify(folder, content=True, tensors=lambda _: dict(reversed(TENSORS.items())))
    assert (report.mode, report.verdict, report.files, report.nbytes) == ("content", True, (), 24)
    assert not verify(folder, content=True, tensors=lambda _: {"a": TENSORS["a"]}).verdict


def failing(error: WeightopsError) -> TensorDigests:
    def tensors(_: Path) -> Mapping[str, tuple[TensorSpec, str]]:
        raise error

    return tensors


def test_tensors_that_cannot_be_read(folder: Path) -> None:
    write_manifest(folder)
    (folder / "model-1.bin").unlink()
    for content in (False, True):
        report = verify(folder, content=content, tensors=failing(CorruptInput("model-1.bin: a shard is missing")))
        assert (report.verdict, report.content_equal) == (False, None)
        assert report.problems == ("model-1.bin: a shard is missing",)


def test_interrupt_while_reading_tensors(folder: Path) -> None:
    write_manifest(folder)
    with pytest.raises(Interrupted, match="interrupted"):
        verify(folder, content=True, tensors=failing(Interrupted(2)))


def test_quick(folder: Path) -> None:
    write_manifest(folder)
    flip(folder / "model-1.bin")
    report = verify(folder, quick=True, structure=lambda _: ())
    assert (report.verdict, report.mode, report.nbytes) == (True, "quick", 0)
    report = verify(folder, quick=True, structure=lambda path: [f"{path.name}: the index lacks a tensor"])
    assert (report.verdict, report.problems) == (False, ("model: the index lacks a tensor",))
    os.truncate(folder / "model-1.bin", 5)
    assert statuses(verify(folder, quick=True))["model-1.bin"] == "differs"


def test_bad_requests(folder: Path) -> None:
    with pytest.raises(SourceMissing, match="holds no manifest"):
        verify(folder)
    listed = write_list(folder)
    for kwargs, message in (
        ({"quick": True, "content": True}, "quick reads no tensors"),
        ({"extra": "maybe"}, "unknown policy 'maybe'"),
        ({"content": True}, "knows tensors"),
        ({"content": True, "algorithm": "md5"}, "have one algorithm"),
        ({"workers": 0}, "0 workers"),
        ({"algorithm": "crc32"}, "unknown digest algorithm"),
    ):
        with pytest.raises(UsageError, match=message):
            verify(folder, listed, **kwargs)
    with pytest.raises(SourceMissing, match="no such folder or file"):
        verify(folder / "absent")
    with pytest.raises(SourceMissing, match="no such file"):
        verify(folder, folder / "absent.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "lists no files"),
        ({"a": {"nbytes": 1, "digests": {}}}, "gives no digest for 'a'"),
        ({"a": {"nbytes": 1, "digests": {"md5": "00"}}}, "'00' for 'a' is no md5 digest"),
        ({"a": {"nbytes": 1, "digests": {"md5": "0" * 31 + "g"}}}, "is no md5 digest"),
        ({"a": {"nbytes": 1, "digests": {"md5": "A" * 32}}}, "is no md5 digest"),
        ({"a": {"nbytes": 1, "digests": {"tiger": "0" * 32}}}, "is no tiger digest"),
        ({"../a": {"nbytes": 1, "digests": {"md5": "0" * 32}}}, "not a plain path"),
    ],
)
def test_bad_manifests_are_refused(folder: Path, files: object, message: str) -> None:
    edit(write_manifest(folder), files=files)
    with pytest.raises(CorruptInput, match=message):
        verify(folder)
