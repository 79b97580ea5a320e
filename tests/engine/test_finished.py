"""With if_exists="skip" an output is left alone that this very call makes, and nothing else is taken for one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from meta_model import meta_download
from support import digests, write_checkpoint
from tiny_models import save_tiny, text

import weightops
from weightops.cli.main import run
from weightops.engine.control import Control
from weightops.engine.finished import PLAN
from weightops.errors import OutputExists, UsageError
from weightops.stores.web.web import Web

NAME = "weightops-manifest.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {"a": torch.linspace(0, 1, 1 << 17), "b": torch.ones(16, 8)}
    folder = write_checkpoint(tmp_path / "source", tensors, shards=2)
    (folder / "generation_config.json").write_text('{"top_k": 1}')
    return folder


def cast(source: Path, **options: Any) -> weightops.api.Result:
    return weightops.cast(source, source.parent / "out", **{"dtype": "bfloat16", "if_exists": "skip", **options})


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether anything in a folder was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_same_call_again_finds_its_output(source: Path) -> None:
    first = cast(source)
    before = stamps(first.out)
    again = cast(source)
    assert (first.skipped, again.skipped) == (False, True)
    assert again.manifest == first.manifest
    assert stamps(first.out) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["out", "source"]
    with pytest.raises(OutputExists, match=r"out exists"):
        cast(source, if_exists="fail")


def test_neither_place_nor_dates_of_the_sources_matter(source: Path) -> None:
    made = cast(source)
    elsewhere = source.parent / "elsewhere" / "source"
    shutil.copytree(source, elsewhere)
    for path in elsewhere.iterdir():
        os.utime(path, ns=(1, 1))
    weightops.manifest(elsewhere)
    assert run(["manifest", str(elsewhere)]) == 0
    again = weightops.cast(elsewhere, made.out, dtype="bfloat16", if_exists="skip")
    assert again.skipped
    other = weightops.cast(elsewhere, source.parent / "other", dtype="bfloat16")
    found = json.loads((other.out / NAME).read_text())
    assert found["provenance"] == json.loads((made.out / NAME).read_text())["provenance"]


def keep_date(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file so that neither its size nor its date tells."""
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(change(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_weights(folder: Path) -> None:
    path = next(folder.glob("*1-of-2.safetensors"), None) or sorted(folder.glob("*.safetensors"))[0]
    keep_date(path, lambda data: data[:-4] + b"\x00\x00\x00@")


def other_config(folder: Path) -> None:
    keep_date(folder / "generation_config.json", lambda data: data.replace(b"1", b"2"))


def without_marks(out: Path) -> None:
    document = json.loads((out / NAME).read_text())
    del document["provenance"][PLAN]
    (out / NAME).write_text(json.dumps(document))


OTHERS: list[tuple[str, Callable[[Path, Path], object], dict[str, Any], str]] = [
    ("another type", lambda source, out: None, {"dtype": "float16"}, "another plan"),
    ("another option", lambda source, out: None, {"keep": "b"}, "another plan"),
    ("other files", lambda source, out: None, {"max_shard_size": "1KB"}, "another plan"),
    ("another kind of files", lambda source, out: None, {"format": "torch"}, "another plan"),
    ("another digest", lambda source, out: None, {"digest": "md5"}, "another plan"),
    ("a card", lambda source, out: None, {"card": True}, "another plan"),
    ("other weights", lambda source, out: other_weights(source), {}, "its sources held something else"),
    ("another config", lambda source, out: other_config(source), {}, r"its generation_config\.json is not the one"),
    (
        "a lost file",
        lambda source, out: (out / "config.json").unlink(),
        {},
        r"config\.json is missing, and its",
    ),
    (
        "a cut file",
        lambda source, out: os.truncate(out / "model.safetensors", 9),
        {},
        "has 9 bytes, and its manifest",
    ),
    (
        "no manifest",
        lambda source, out: (out / NAME).unlink(),
        {},
        r"it has no weightops-manifest\.json",
    ),
    ("a damaged manifest", lambda source, out: os.truncate(out / NAME, 9), {}, "that can be read"),
    ("a manifest of before", lambda source, out: without_marks(out), {}, "does not say by which plan"),
]


@pytest.mark.parametrize(("change", "options", "why"), [each[1:] for each in OTHERS], ids=[each[0] for each in OTHERS])
def test_anything_else_is_refused_and_overwritten_if_it_may_be(
    source: Path, change: Callable[[Path, Path], object], options: dict[str, Any], why: str
) -> None:
    out = cast(source).out
    change(source, out)
    before = digests(out)
    with pytest.raises(OutputExists, match=f"out exists, and is not what this command makes: .*{why}"):
        cast(source, **options)
    assert digests(out) == before
    made = cast(source, **options, overwrite=True)
    assert not made.skipped
    assert cast(source, **options).skipped


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_is_no_output_is_refused(source: Path, kind: str) -> None:
    out = source.parent / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(source)
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExists, match=r"out (exists|is a link)"):
        cast(source)


def test_nothing_there_and_an_empty_folder_are_no_output(source: Path) -> None:
    (source.parent / "out").mkdir()
    assert not cast(source).skipped
    assert cast(source).skipped


def test_only_what_is_missing_of_several_outputs_is_written(source: Path) -> None:
    dtypes = {"f": "float16", "b": "bfloat16"}
    outputs = {str(source.parent / name): {"from": "x", "dtype": dtype} for name, dtype in dtypes.items()}
    recipe = {"sources": {"x": str(source)}, "outputs": outputs}
    weightops.run(recipe)
    before = stamps(source.parent / "f")
    shutil.rmtree(source.parent / "b")
    made = weightops.run(recipe, if_exists="skip")
    assert {out.name: result.skipped for out, result in made.items()} == {"f": True, "b": False}
    assert stamps(source.parent / "f") == before
    assert all(result.skipped for result in weightops.run(recipe, if_exists="skip").values())


def test_a_single_file_is_an_output_too(tmp_path: Path) -> None:
    meta_download(tmp_path / "one")

    def convert(**options: Any) -> weightops.api.Result:
        settings = {"to": "gguf", "set": {"context_length": "2048"}, "if_exists": "skip"}
        return weightops.convert(tmp_path / "one", tmp_path / "x.gguf", **{**settings, **options})

    assert not convert().skipped
    assert convert().skipped
    with pytest.raises(OutputExists, match="another plan"):
        convert(dtype="float16")
    (tmp_path / "x.gguf").unlink()
    assert not convert(overwrite=True).skipped  # its manifest is still there


def test_quantize_finds_its_output_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(text(60))

    def quantize(**options: Any) -> weightops.api.Quantization:
        settings = {"group_size": 32, "calibration": tmp_path / "text.txt", "samples": 2, "seq_len": 32}
        return weightops.quantize(tmp_path / "model", tmp_path / "out", **{**settings, "if_exists": "skip", **options})

    assert quantize().result is not None
    before = stamps(tmp_path / "out")
    again = quantize()
    assert (again.skipped, again.result) == (True, None)
    assert stamps(tmp_path / "out") == before
    for options in ({"bits": 3}, {"seed": 1}, {"max_shard_size": "1MB"}):
        with pytest.raises(OutputExists, match="another plan"):
            quantize(**options)
    line = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--group-size", "32", "--samples", "2"]
    line += ["--calibration", str(tmp_path / "text.txt"), "--seq-len", "32", "--if-exists", "skip"]
    assert run(line) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert run([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] is True
    (tmp_path / "model/generation_config.json").write_text("{}")
    with pytest.raises(OutputExists, match="another plan"):
        quantize()
    (tmp_path / "text.txt").write_text(text(61)[::-1])
    assert quantize(overwrite=True).result is not None


def test_sources_on_servers_are_told_by_their_digests(source: Path) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with Hub() as hub, Web(endpoint=hub.endpoint) as web:
        hub.add("org/name", files)

        def fetch() -> weightops.api.Result:
            control = Control(web=web)
            return weightops.shard("hf://org/name", source.parent / "out", if_exists="skip", control=control)

        assert not fetch().skipped
        fetched = sum(hub.bytes_sent(name) for name in files if name.endswith(".safetensors"))
        assert fetch().skipped
        assert sum(hub.bytes_sent(name) for name in files if name.endswith(".safetensors")) < 2 * fetched
        name = next(name for name in files if name.endswith(".safetensors"))
        hub.add("org/name", {**files, name: files[name][:-4] + b"\x00\x00\x00@"})
        with pytest.raises(OutputExists, match="its sources held something else"):
            fetch()


def test_the_command_says_so_in_one_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["cast", str(source), "--dtype", "bfloat16", "--out", str(source.parent / "out"), "--if-exists", "skip"]
    assert run(line) == 0
    capsys.readouterr()
    assert run(line) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    assert "out: is there, made by this very plan" in shown.out
    assert run([*line, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    for options in ([], ["--dry-run"]):
        assert run([*line, "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["skipped"], found["written"], len(found["content_id"])) == (True, False, 64)
    assert run([*line, "--keep", "b"]) == 11


def test_another_word_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="if_exists is 'ignore', expected one of fail, skip"):
        cast(source, if_exists="ignore")
