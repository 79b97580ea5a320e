"""What the functions of the API return fits a notebook's cell, however large the model and long its name."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from fetching import REPO, fetch
from hub import Hub
from signing_keys import save_key
from support import write_checkpoint
from tiny_models import save_tiny, text

import weightops
from weightops.operations.publish import Publication, PublishedFile
from weightops.recipes.recipe import read_recipe


def publication(source: Path) -> Publication:
    files = tuple(PublishedFile(f"{'x' * 90}-{i}", 1, "sent", "proven") for i in range(20))
    return Publication("model", "hf://org/model", "me", "private", "0" * 40, False, files, (), (), (), 20)


RESULTS: dict[str, Callable[[Path], Any]] = {
    "Result": lambda source: weightops.shard(source, source.with_name("shard"), dry_run=True),
    "Result of a recipe": lambda source: weightops.run(source.with_name("recipe.yaml"), dry_run=True).popitem()[1],
    "Plan": lambda source: weightops.shard(source, source.with_name("shard"), dry_run=True).plan,
    "Checkpoint": weightops.open_checkpoint,
    "LazyTensor": lambda source: next(iter(weightops.open_checkpoint(source).values())),
    "Inspection": weightops.inspect,
    "CheckReport": weightops.check,
    "TensorReport": lambda source: next(iter(weightops.check(source).tensors.values())),
    "Manifest": weightops.manifest,
    "VerifyReport": lambda source: weightops.verify(source, source.with_name("SHA256SUMS")),
    "Signed": lambda source: weightops.sign(source, key=source.with_name("signer.key"), dry_run=True),
    "Publication": publication,
    "Evaluation": lambda source: weightops.evaluate(source, source.with_name("text.txt"), reference=source),
    "Score": lambda source: weightops.evaluate(source, source.with_name("text.txt")).scores[0],
    "Generation": lambda source: weightops.generate(source, "x" * 40),
    "Quantization": lambda source: weightops.quantize(
        source, source.with_name("gptq"), method="rtn", group_size=32, dry_run=True
    ),
    "Recipe": lambda source: read_recipe(source.with_name("recipe.yaml")),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a" * 200)
    source = folder / ("b" * 200)
    save_tiny(source, "llama")
    (folder / "text.txt").write_text(text(200))
    save_key(folder, "signer")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    (folder / "recipe.yaml").write_text(f"sources: {{x: ./{source.name}}}\noutputs: {{./out: {{from: x}}}}\n")
    return source


def is_brief(result: object) -> bool:
    return len(repr(result)) < 400 and "\n" not in repr(result)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_one_short_line(source: Path, name: str) -> None:
    result = RESULTS[name](source)
    assert is_brief(result), repr(result)
    assert name.split()[0] in repr(result)


def test_a_download_is_one_short_line(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add(REPO, {f"{i}.json": b"{}" for i in range(50)})
        result = fetch(hub, tmp_path / "out")
    assert is_brief(result), repr(result)
    assert repr(result).startswith("Download(")


PICTURED = ["Result", "Checkpoint", "Inspection", "CheckReport", "VerifyReport", "Signed", "Evaluation"]


@pytest.mark.parametrize("name", PICTURED)
def test_a_notebook_shows_a_table_of_its_first_rows(source: Path, name: str) -> None:
    shown = RESULTS[name](source)._repr_html_()
    assert shown.count("<tr>") <= 21
    assert len(shown) < 12_000
    parsed = HTMLParser()
    parsed.feed(shown)
    parsed.close()


def test_names_in_a_notebook_are_harmless(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {"<script>alert(1)</script>\x1b[2J": torch.ones(2)})
    shown = weightops.open_checkpoint(tmp_path / "model")._repr_html_()
    assert "<script" not in shown
    assert "\x1b" not in shown
