"""An output that is one file: it appears whole, with its manifest beside it, and takes the place of nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from meta_model import meta_download
from support import write_checkpoint

import weightops
from weightops.engine import run, staging, targets
from weightops.errors import OutputExists, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.formats.proofs.manifest import read_manifest
from weightops.plan import Plan, make_plan

MANIFEST = "x.st.weightops-manifest.json"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_checkpoint(tmp_path / "model", {"a": torch.arange(5000.0), "b": torch.ones(3)})
    made = make_plan(replace(open_checkpoint(tmp_path / "model"), sidecars={}), {}, is_file=True)
    return replace(made, shards=(replace(made.shards[0], name="x.st"),))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "model")


def test_the_file_and_its_manifest_appear(tmp_path: Path, plan: Plan) -> None:
    run.run(plan, tmp_path / "new/x.st")
    assert names(tmp_path / "new") == ["x.st", MANIFEST]
    assert (tmp_path / "new/x.st").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    assert read_manifest(tmp_path / "new" / MANIFEST).files.keys() == {"x.st"}


@pytest.mark.parametrize("name", ["x.st", MANIFEST])
@pytest.mark.parametrize(
    ("make", "can_be_replaced"),
    [
        (lambda path: path.write_text("old"), True),
        (lambda path: path.mkdir(), False),
        (lambda path: path.symlink_to("/dev/null"), False),
        (lambda path: path.symlink_to("nowhere"), False),
    ],
    ids=["file", "folder", "link", "dangling"],
)
def test_only_a_file_is_replaced_and_only_on_request(
    tmp_path: Path, plan: Plan, name: str, make: Callable[[Path], object], can_be_replaced: bool
) -> None:
    make(tmp_path / name)
    for overwrite in (False, True):
        if overwrite and can_be_replaced:
            run.run(plan, tmp_path / "x.st", overwrite=True)
            assert names(tmp_path) == ["x.st", MANIFEST]
        else:
            with pytest.raises(OutputExists, match=r"x\.st"):
                run.run(plan, tmp_path / "x.st", overwrite=overwrite)
            assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["x.st", MANIFEST])
@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, name: str, has_links: bool
) -> None:
    original = staging.Staging.finish

    def finish(self: staging.Staging) -> None:
        original(self)
        (tmp_path / name).write_text("theirs")

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "finish", finish)
        if not has_links:
            without_links(patch)
        with pytest.raises(OutputExists, match="appeared while this run was at work"):
            run.run(plan, tmp_path / "x.st")
    assert (tmp_path / name).read_text() == "theirs"
    (tmp_path / name).unlink()
    (tmp_path / MANIFEST).unlink(missing_ok=True)
    assert run.run(plan, tmp_path / "x.st").resumed == ("x.st",)
    assert names(tmp_path) == ["x.st", MANIFEST]


def without_links(patch: pytest.MonkeyPatch) -> None:
    def link(source: Path, path: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    patch.setattr(os, "link", link)


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    run.run(plan, tmp_path / "x.st")
    assert names(tmp_path) == ["x.st", MANIFEST]


@pytest.mark.parametrize("after", ["publish", "half"])
def test_a_run_that_died_around_the_publishing_is_finished_by_the_next(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    with monkeypatch.context() as patch:
        if after == "publish":
            patch.setattr(staging.Staging, "clean", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            original = targets.give_name
            calls = iter(range(10))

            def give_name(source: Path, path: Path) -> None:
                if next(calls):
                    raise KeyboardInterrupt
                original(source, path)

            patch.setattr(targets, "give_name", give_name)
        with pytest.raises(KeyboardInterrupt):
            run.run(plan, tmp_path / "x.st")
    if after == "half":
        (tmp_path / MANIFEST).unlink()  # refused as somebody's otherwise, which is safe, if no help
    assert run.run(plan, tmp_path / "x.st").resumed == ("x.st",)
    assert names(tmp_path) == ["x.st", MANIFEST]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".gguf"])
def test_the_name_of_a_file_is_no_name_for_a_folder(tmp_path: Path, plan: Plan, suffix: str) -> None:
    with pytest.raises(UsageError, match=r"is the name of a file, and this writes a folder of \.safetensors files"):
        weightops.shard(tmp_path / "model", tmp_path / f"out{suffix}")
    assert names(tmp_path) == []


def test_a_model_is_converted_to_one_gguf_file(tmp_path: Path) -> None:
    source = tmp_path / "model"
    meta_download(source)
    (source / "LICENSE").write_text("free")
    convert = partial(weightops.convert, source, to="gguf", set={"context_length": "2048"})
    folder = convert(tmp_path / "folder")
    result = convert(tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_bytes() == (folder.out / "model.gguf").read_bytes()
    assert names(tmp_path) == ["folder", "tiny.gguf", "tiny.gguf.weightops-manifest.json"]
    assert any("a single file has no place for LICENSE" in warning for warning in result.warnings)
    with pytest.raises(UsageError, match="a model card needs a folder"):
        convert(tmp_path / "other.gguf", card=True)
