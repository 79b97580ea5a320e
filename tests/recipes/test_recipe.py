"""A recipe that makes no sense is refused before anything is opened, by line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightops.errors import SourceMissing, UsageError
from weightops.io.yaml_document import Document, read_document
from weightops.recipes.recipe import parse_recipe, read_recipe
from weightops.recipes.steps import Location, Step

GOOD = """\
sources: {raw: ./raw, diff: "hf://org/diff", old: {path: /old, weights: "*.pth"}}
tensors:
  renamed: {shard: {source: base, rename: {a: b}, drop: x*}}
  base:
    recover:
      raw: raw
      diff: diff
      dtype: float16
  both: {diff: {raw: old, tuned: renamed}}
outputs:
  ./one: {from: base, format: torch-1.12, max_shard_size: 10GB, digest: [md5]}
  two: {from: both}
"""


def test_a_recipe_is_read_with_its_paths_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.sources == {
        "raw": Location(str(tmp_path / "raw")),
        "diff": Location("hf://org/diff"),
        "old": Location("/old", "*.pth"),
    }
    assert recipe.order() == ["base", "renamed", "both"]
    assert recipe.steps["base"] == Step("recover", {"raw": ("raw",), "diff": ("diff",)}, {"dtype": "float16"})
    assert list(recipe.outputs) == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert recipe.to_json(str(tmp_path / "one")) == {
        "tensors": {"base": {"recover": {"raw": "raw", "diff": "diff", "dtype": "float16"}}},
        "output": {"from": "base"},
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sources:", "source:", r"r\.yaml:1: source: unknown field"),
        ("raw: raw\n", "raw: rau\n", r"r\.yaml:6: tensors\.base\.recover\.raw: there is no rau"),
        ("raw: raw\n", "raw: [raw, diff]\n", r"r\.yaml:6: .*raw: expected one name, found 2"),
        ("raw: raw\n", "raw: 3\n", r"r\.yaml:6: .*raw: expected text, found 3"),
        ("dtype: float16", "dtype: float17", r"r\.yaml:8: .*dtype: unknown dtype 'float17'"),
        ("dtype: float16", "dtype: 16", r"r\.yaml:8: .*dtype: expected the name of a dtype, found 16"),
        ("dtype: float16", "vocabulary: mean", r"r\.yaml:8: .*vocabulary: unknown field"),
        ("rename: {a: b}", "rename: [a]", r"r\.yaml:3: .*rename: expected object, got array"),
        ("rename: {a: b}", "tie: maybe", r"r\.yaml:3: .*tie: expected bool, got str"),
        ("    recover:", "    recovver:", r"r\.yaml:4: tensors\.base: unknown operation 'recovver'"),
        ("      diff: diff\n", "", r"r\.yaml:5: tensors\.base\.recover: lacks diff"),
        ("  base:\n", "  raw:\n", r"r\.yaml:4: tensors\.raw: is the name of a source already"),
        ("raw: old", "raw: both", r"tensors\.both: is made of itself \(both -> both\)"),
        ("tuned: renamed", "tuned: base", r"r\.yaml:3: tensors\.renamed: is used by no output"),
        ("raw: old", "raw: raw", r"r\.yaml:1: sources\.old: is used by no output"),
        ("{from: both}", "{}", r"r\.yaml:12: outputs\.two: lacks from"),
        ("{from: both}", "{from: both, cast: x}", r"r\.yaml:12: outputs\.two\.cast: unknown field"),
        ("max_shard_size: 10GB", "max_shard_size: ten", r"r\.yaml:11: .*max_shard_size: cannot read the size 'ten'"),
        ("max_shard_size: 10GB", "max_shard_size: 1.5", r"r\.yaml:11: .*max_shard_size: expected a size"),
        ("digest: [md5]", "card: 3", r"r\.yaml:11: .*card: expected true or false"),
        ("  two:", "  hf://org/two:", r"r\.yaml:12: .*nothing can be written there"),
        ("  two: {from: both}", "  ./one: {from: both}", r"r\.yaml:12: outputs\.\./one: is given twice"),
        ("{path: /old, ", "{file: /old, ", r"r\.yaml:1: sources\.old\.file: unknown field"),
        ("  base:\n", "  base: {cast: {}, shard: {}}\n  x:\n", r"r\.yaml:4: tensors\.base: expected one operation"),
        ("raw: ./raw,", "raw: ./raw, raw: ./x,", r"r\.yaml:1: sources\.raw: is given twice"),
        ("raw: ./raw", "raw: &a ./raw, b: *a", r"r\.yaml:1: holds an alias"),
        ("raw: ./raw,", "raw: ./raw", r"r\.yaml:1: not YAML"),
        ("digest: [md5]", "card: !!bool maybe", r"r\.yaml:11: .*card: 'maybe' is no bool"),
        ("digest: [md5]", "card: !!int 0x", r"r\.yaml:11: .*card: '0x' is no int"),
        ("digest: [md5]", "card: !!int ''", r"r\.yaml:11: .*card: '' is no int"),
        ("digest: [md5]", "card: !!float a.b", r"r\.yaml:11: .*card: 'a\.b' is no float"),
        ("digest: [md5]", "card: " + "9" * 5000, r"r\.yaml:11: .*card: .* is no int"),
        ("raw: ./raw", "raw: [./raw]", r"r\.yaml:1: sources\.raw: expected text, found a list"),
        ("raw: ./raw", "raw: !!python/name:os.system x", r"cannot|no such|tag|expected"),
    ],
)
def test_what_makes_no_sense_is_refused_by_line_and_field(old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new)
    if "python/name" in new:  # is text like any other, and never run
        assert parse_recipe(read_document(text, "r.yaml")).sources["raw"].path == "x"
        return
    with pytest.raises(UsageError, match=message):
        parse_recipe(read_document(text, "r.yaml"))


def test_circles_are_found_and_empty_parts() -> None:
    steps = {"a": {"shard": {"source": "b"}}, "b": {"shard": {"source": "a"}}}
    recipe = {"sources": {"s": "x"}, "tensors": steps, "outputs": {"o": {"from": "a"}}}
    with pytest.raises(UsageError, match=r"tensors\.a: is made of itself \(a -> b -> a\)"):
        parse_recipe(Document(recipe, "recipe"))
    for name in ("sources", "outputs"):
        with pytest.raises(UsageError, match=f"has no {name}"):
            parse_recipe(Document({**recipe, name: {}}, "recipe"))
    with pytest.raises(UsageError, match="expected a mapping, found a list"):
        read_document("[1]", "r.yaml")


def test_a_recipe_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match=r"none\.yaml: no such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="too long"):
        read_document("#" * 2_000_000, "r.yaml")
    with pytest.raises(UsageError, match="nested too deep"):
        read_document("a: " + "[" * 500 + "]" * 500, "r.yaml")
