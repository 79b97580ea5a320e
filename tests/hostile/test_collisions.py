"""Names that the place they are meant for takes for one, or cannot hold: refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import systems
import torch
from fetching import FINAL, REPO, assert_complete, fetch
from hub import Hub
from support import digests, write_checkpoint
from systems import fold_case

import weightops
from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.io.paths import inside
from weightops.io.platform import names
from weightops.stores.transfer.partial import STATE


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def folded(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system to which case makes no difference."""
    (tmp_path / "drive/Disk").mkdir(parents=True)
    end = fold_case(str(tmp_path / "drive"))
    yield tmp_path / "drive/Disk"
    end()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A.json", "a.json"),
        ("Sub/a.json", "sub/b.json"),
        ("sub/a.json", "SUB"),
        (FINAL.upper(), FINAL),
        (f"{STATE.upper()}/x", STATE),
        ("caf\u00e9.json", "cafe\u0301.json"),
    ],
)
def test_a_download_is_refused_of_names_that_are_one(hub: Hub, folded: Path, one: str, other: str) -> None:
    hub.add(REPO, {"config.json": b"{}", **{name: name.encode() for name in (one, other)}}, lfs=())
    with pytest.raises(CorruptInput, match="differ in case only, and are one where") as caught:
        fetch(hub, folded / "out")
    assert "--exclude" in (caught.value.hint or "")
    assert list(folded.iterdir()) == []
    assert hub.bytes_sent() == 0
    fetch(hub, folded / "out", exclude=[one, f"{one.partition('/')[0]}/*"])


def test_an_empty_disk_is_asked_once_it_is_no_longer_empty(
    hub: Hub, folded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there tells names apart or takes them for one, so far."""
    answers = iter([False, True])
    monkeypatch.setattr("weightops.io.paths.folds_case", lambda folder: next(answers))
    hub.add(REPO, {"A.json": b"A", "a.json": b"a"})
    with pytest.raises(CorruptInput, match=r"'A\.json' and 'a\.json' differ in case only"):
        fetch(hub, folded / "out")
    assert list((folded / "out").iterdir()) == []


def test_a_file_of_other_letters_is_somebody_else_s(hub: Hub, folded: Path) -> None:
    hub.add(REPO, {"config.json": b"{}"})
    (folded / "Config.JSON").write_text("precious")
    with pytest.raises(WeightopsError, match=r"config\.json is there: no download brought it"):
        fetch(hub, folded)
    assert (folded / "Config.JSON").read_text() == "precious"


def test_what_a_download_brought_is_found_again(hub: Hub, folded: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", "sub/x": b"x"})
    fetch(hub, folded / "Out")
    assert_complete(folded / "Out", {"config.json": b"{}", "sub/x": b"x"})
    sent = hub.bytes_sent()
    fetch(hub, folded / "oUT")
    assert hub.bytes_sent() == sent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One with a licence twice."""
    folder = write_checkpoint(tmp_path / "Model", {"a": torch.ones(30), "b": torch.ones(30)}, shards=2)
    (folder / "LICENSE").write_text("free")
    (folder / "license").write_text("as in beer")
    return folder


@pytest.mark.skipif("folded" in systems.installed, reason="the source cannot have both names either")
def test_an_output_is_refused_of_names_that_are_one(model: Path, folded: Path) -> None:
    with pytest.raises(CorruptInput, match="'LICENSE' and 'license' differ in case only") as caught:
        weightops.shard(model, folded / "out")
    assert "choose an --out" in (caught.value.hint or "")
    assert list(folded.iterdir()) == []
    weightops.shard(model, model.parent / "elsewhere")
    (model / "license").unlink()
    weightops.shard(model, folded / "out")
    assert digests(folded / "out").keys() > {"LICENSE"}


@pytest.mark.parametrize("out", ["mODEL", "mODEL/inner", "."])
def test_an_output_in_other_letters_is_still_the_input(tmp_path: Path, folded: Path, out: str) -> None:
    source = write_checkpoint(folded / "Model", {"a": torch.ones(3)})
    before = digests(source)
    with pytest.raises(UsageError, match="lie inside one another"):
        weightops.shard(source, folded / out, overwrite=True)
    assert digests(source) == before


def test_two_outputs_in_other_letters_are_one(model: Path, folded: Path) -> None:
    (model / "license").unlink()
    outputs = {str(folded / name): {"from": "b"} for name in ("out", "OUT")}
    recipe = {"sources": {"a": str(model)}, "tensors": {"b": {"shard": {"source": "a"}}}, "outputs": outputs}
    with pytest.raises(UsageError, match="two outputs are the same folder"):
        weightops.run(recipe)
    assert list(folded.iterdir()) == []


ODD = ["aux.json", "sub/NUL", "ab:c", "what?", "dot.", "blank ", "com1.txt", "a|b", 'a"b']


@pytest.mark.parametrize("name", ODD)
def test_names_that_windows_lacks_are_refused_from_a_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(names, "_IS_WINDOWS", True)
    hub.add(REPO, {"config.json": b"{}", name: b"x"}, lfs=())
    with pytest.raises(CorruptInput, match="cannot be used on this system: Windows ") as caught:
        fetch(hub, tmp_path / "out")
    assert caught.value.hint == "--exclude leaves it out"
    assert list(tmp_path.iterdir()) == []
    fetch(hub, tmp_path / "out", include=["config.json"])


@pytest.mark.parametrize("name", ODD)
def test_and_neither_read_nor_written_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A manifest may name a device, or a stream behind a file."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    monkeypatch.setattr(names, "_IS_WINDOWS", True)
    with pytest.raises(CorruptInput, match="cannot be used on this system"):
        inside(tmp_path, name, "manifest")


def test_a_path_that_becomes_too_long_is_refused_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_IS_WINDOWS", True)
    hub.add(REPO, {"config.json": b"{}", f"{'d' * 120}/{'f' * 120}": b"x"}, lfs=())
    with pytest.raises(WeightopsError, match="the path is too long for this system") as caught:
        fetch(hub, tmp_path / "out")
    assert "choose a shorter --out" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_read_whatever_its_own_names_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what would be opened here is held against this system's names."""
    model = write_checkpoint(tmp_path / "model", {"a": torch.ones(3)})
    index = {"metadata": {}, "weight_map": {"a": "aux.safetensors"}}
    (model / "model.safetensors").rename(model / "aux.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(names, "_IS_WINDOWS", False)
    weightops.inspect(model)
    monkeypatch.setattr(names, "_IS_WINDOWS", True)
    with pytest.raises(CorruptInput, match="Windows keeps that name for a device"):
        weightops.inspect(model)
