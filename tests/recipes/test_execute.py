"""Recipes carried out: the same as their steps one by one, with what they were made from on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import digests, write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.errors import CorruptInput, Differs, OutputExists, UsageError
from weightops.formats.folder import open_checkpoint

MANIFEST = "weightops-manifest.json"


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.{n}.weight" for i in range(3) for n in "abc")]
    return {name: torch.randn(40, 50, generator=generator).half() for name in names}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "raw", state(0), {"torch_dtype": "float16"}, shards=2)
    write_checkpoint(tmp_path / "diff", state(1), {"torch_dtype": "float16"})
    (tmp_path / "recipe.yaml").write_text(
        """\
sources: {raw: ./raw, diff: ./diff}
tensors:
  base: {recover: {raw: raw, diff: diff}}
  few: {shard: {source: base, drop: "*.c.weight"}}
outputs:
  made/base: {from: base, format: torch-1.12, max_shard_size: 9KB}
  made/few: {from: few, max_shard_size: 20KB}
"""
    )
    return tmp_path


def manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_bytes())


def test_a_recipe_gives_what_its_steps_give_one_by_one(family: Path) -> None:
    results = weightops.run(family / "recipe.yaml")
    assert list(results) == [family / "made/base", family / "made/few"]
    weightops.recover(family / "raw", family / "diff", family / "one", format="torch-1.12", max_shard_size="9KB")
    weightops.shard(family / "one", family / "two", drop=["*.c.weight"], max_shard_size="20KB")
    for made, alone in (("base", "one"), ("few", "two")):
        left, right = digests(family / "made" / made), digests(family / alone)
        assert manifest(family / "made" / made)["content_id"] == manifest(family / alone)["content_id"]
        del left[MANIFEST], right[MANIFEST]
        assert left == right


def test_the_manifest_says_what_it_was_made_from(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weightops.run(family / "recipe.yaml")
    found = manifest(family / "made/few")
    ids = {role: weightops.manifest(family / role).content_id for role in ("raw", "diff")}
    assert found["sources"] == {role: {"name": role, "content_id": ids[role]} for role in ids}
    assert found["recipe"]["tensors"] == {
        "base": {"recover": {"raw": "raw", "diff": "diff"}},
        "few": {"shard": {"source": "base", "drop": "*.c.weight"}},
    }
    assert run(["inspect", str(family / "made/few")]) == 0
    text = capsys.readouterr().out
    assert f"raw = raw (content {ids['raw']})" in text
    assert text.index("base = recover(diff, raw)") < text.index("few = shard(drop: *.c.weight, source: base)")
    # What was read in full by way of another output counts as well, and what goes out as it came in.
    weightops.shard(family / "made/base", family / "copy")
    assert manifest(family / "copy")["sources"]["source"]["content_id"] == manifest(family / "made/base")["content_id"]


def test_a_source_of_which_a_part_was_not_read_has_no_content_id(family: Path) -> None:
    weightops.shard(family / "raw", family / "part", drop=["*.c.weight"])
    assert manifest(family / "part")["sources"] == {"source": {"name": "raw", "content_id": None}}


@pytest.mark.parametrize("verb", ["shard", "recover"])
def test_a_source_that_is_not_what_its_manifest_says_is_noticed(family: Path, verb: str) -> None:
    weightops.shard(family / "raw", family / "base")
    file = family / "base/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    others = {"shard": [], "recover": [family / "diff"]}[verb]
    with pytest.raises(CorruptInput, match=rf"base: .*c\.weight is not what {MANIFEST} beside it says: expected xxh3"):
        getattr(weightops, verb)(family / "base", *others, family / "out")
    assert not (family / "out").exists()


def test_a_manifest_of_other_tensors_says_nothing_of_these(family: Path) -> None:
    weightops.shard(family / "raw", family / "base")
    write_checkpoint(family / "base", {"x": torch.ones(3)})
    assert open_checkpoint(family / "base").content_id is None
    weightops.shard(family / "base", family / "out")
    (family / "base" / MANIFEST).write_text("{")
    assert open_checkpoint(family / "base").content_id is None


def test_no_output_appears_before_all_are_whole(family: Path) -> None:
    weightops.save(open_checkpoint(family / "raw"), family / "other")
    expected = family / "other" / MANIFEST
    text = (family / "recipe.yaml").read_text().replace("{from: base,", f"{{from: base, expect: {expected},")
    (family / "recipe.yaml").write_text(text)
    with pytest.raises(Differs, match="not as weightops-manifest"):
        weightops.run(family / "recipe.yaml", workers=1)
    assert not (family / "made/base").exists()
    assert not (family / "made/few").exists()
    assert not (family / "made/base.partial").exists()


def test_outputs_must_be_apart_and_new(family: Path) -> None:
    recipe: dict[str, Any] = {"sources": {"raw": str(family / "raw")}, "outputs": {str(family / "a"): {"from": "raw"}}}
    weightops.run(recipe)
    with pytest.raises(OutputExists, match="a exists"):
        weightops.run(recipe)
    weightops.run(recipe, overwrite=True)
    for other in (family / "b/c", family / "b/../b"):
        outputs = {str(family / "b"): {"from": "raw"}, str(other): {"from": "raw"}}
        with pytest.raises(UsageError, match=r"inside one another|the same folder"):
            weightops.run({**recipe, "outputs": outputs})


def test_a_dry_run_shows_sources_steps_and_outputs(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(family)
    assert run(["run", str(family / "recipe.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["raw", str(family / "raw"), "10", "40.0", "kB"]
    assert lines[5].split() == ["base", "recover", "raw,", "diff"]
    assert lines[6].split() == ["few", "shard", "base", "drop", "*.c.weight"]
    assert lines[9].split()[:6] == [str(family / "made/base"), "base", "as", "it", "is", "5"]
    assert lines[-2].startswith("writes ")
    assert digests(family) == before


def test_json_tells_of_every_output(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(family / "recipe.yaml"), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "weightops-run/2"
    assert [output["content_id"] for output in found["outputs"]] == [
        manifest(family / "made" / name)["content_id"] for name in ("base", "few")
    ]


def test_losses_are_those_of_each_output_however_they_are_written(family: Path) -> None:
    kinds = ("bfloat16", "float8_e5m2", "float32")
    recipe: dict[str, Any] = {
        "sources": {"raw": str(family / "raw")},
        "tensors": {"short": {"cast": {"source": "raw", "dtype": "bfloat16"}}},
        "outputs": {str(family / kind): {"from": "raw", "dtype": kind} for kind in kinds},
    }
    recipe["outputs"][str(family / "again")] = {"from": "short", "dtype": "float8_e5m2"}
    weightops.run(recipe)
    for kind in kinds:
        weightops.cast(family / "raw", family / "alone" / kind, dtype=kind)
        assert manifest(family / kind).get("losses") == manifest(family / "alone" / kind).get("losses")
    weightops.cast(family / "alone/bfloat16", family / "alone/again", dtype="float8_e5m2")
    assert manifest(family / "again")["losses"] == manifest(family / "alone/again")["losses"]
    assert manifest(family / "again")["losses"] != manifest(family / "float8_e5m2")["losses"]
