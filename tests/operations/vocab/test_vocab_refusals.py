"""What has no vocabulary to change, or one that contradicts itself, is refused by name before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import quantize_tiny, save_tiny
from vocabularies import KINDS, document, write_model

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError, WeightopsError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Options = dict[str, Any]


def with_tensors(source: Path, **changed: torch.Tensor) -> None:
    tensors = load_file(source / "model.safetensors") | {name.replace("__", "."): x for name, x in changed.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def with_config(source: Path, name: str = "config.json", **changed: Any) -> None:
    (source / name).write_text(json.dumps({**document(source, name), **changed}))


def tied_apart(source: Path) -> None:
    with_config(source, tie_word_embeddings=True)


def tied_apart_in_a_part(source: Path) -> None:
    with_config(source, tie_word_embeddings=True, text_config={"tie_word_embeddings": False})


def nan_in_padding(source: Path) -> None:
    matrix = load_file(source / "model.safetensors")[HEAD]
    matrix[-1, 2] = torch.nan
    with_tensors(source, **{HEAD: matrix})


def other_rows(source: Path) -> None:
    with_tensors(source, **{HEAD: torch.zeros(900, 8).bfloat16()})


def eight_bits(source: Path) -> None:
    with_tensors(source, **{HEAD: torch.zeros(911, 8).to(torch.float8_e4m3fn)})


def without_tokenizer(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()


def draft_maps(source: Path) -> None:
    with_tensors(source, d2t=torch.zeros(5, dtype=torch.int64))


def no_embedding(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({"x.weight": tensors[EMBEDDING]}, source / "model.safetensors")


def unknown_head(source: Path) -> None:
    with_tensors(source, model__value_of_tokens=torch.zeros(911).bfloat16())


def delta(source: Path) -> None:
    (source / "weightops-delta.json").write_text("{}")


def adapter(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text("{}")


def torn_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text('{"model": {"vocab": 5}}')


def few_rows(source: Path) -> None:
    tensors = {name: x[:903] if x.ndim == 2 else x for name, x in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    with_config(source, vocab_size=903)


TRIM = {"trim": "corpus.txt"}
CASES: list[tuple[Callable[[Path], object], Options, type[WeightopsError], str]] = [
    (tied_apart, {"rows": 920}, IncompatibleInputs, f"ties {HEAD} to {EMBEDDING}.*differ"),
    (tied_apart_in_a_part, TRIM, IncompatibleInputs, "ties lm_head"),
    (nan_in_padding, {"rows": 920}, IncompatibleInputs, f"{HEAD}: row 910 holds NaN"),
    (other_rows, {"rows": 920}, IncompatibleInputs, f"{HEAD} is .*expected 911 rows as {EMBEDDING}"),
    (eight_bits, {"rows": 920}, IncompatibleInputs, f"{HEAD}.*"),
    (lambda s: with_config(s, vocab_size=905), TRIM, IncompatibleInputs, "vocab_size 905, model.embed.* has 911 rows"),
    (without_tokenizer, TRIM, UsageError, "model: has no tokenizer"),
    (draft_maps, {"rows": 920}, IncompatibleInputs, "d2t maps tokens of a draft model"),
    (no_embedding, {"rows": 920}, IncompatibleInputs, "no input embedding that is known"),
    (unknown_head, {"rows": 920}, IncompatibleInputs, "value_of_tokens is .* may have a row for each token"),
    (delta, {"rows": 920}, IncompatibleInputs, "is a delta"),
    (adapter, {"rows": 920}, IncompatibleInputs, "is a LoRA adapter"),
    (torn_tokenizer, TRIM, CorruptInput, r"tokenizer\.json: has no vocabulary"),
    (lambda s: (s / "config.json").unlink(), {"rows": 920}, UsageError, "has no config.json"),
    (few_rows, TRIM, IncompatibleInputs, "2 tokens that are kept have no row, "),
    (few_rows, {"add_token": "<a>", "rows": 904}, UsageError, "has 906 tokens, and 904 rows are asked for"),
    (few_rows, {"chat_template": "corpus.txt"}, IncompatibleInputs, "905 tokens, the embedding 903 rows"),
    (lambda s: with_config(s, eos_token_id=2000), TRIM, IncompatibleInputs, r"config\.json: eos_token_id is 2000"),
    (
        lambda s: with_config(s, eos_token_id=[2, 915]),
        {"rows": 912},
        IncompatibleInputs,
        "eos_token_id is 915",
    ),
    (lambda s: None, {"rows": 900}, UsageError, "has 905 tokens, and 900 rows"),
    (lambda s: None, {}, UsageError, "nothing is to be changed"),
    (lambda s: None, {"rows": 920, "multiple": 8}, UsageError, "both say how many rows"),
    (lambda s: None, {"rows": 0}, UsageError, "--rows is 0"),
    (lambda s: None, {"multiple": -8}, UsageError, "--multiple is -8"),
    (lambda s: None, {"rows": 920, "init": "magic"}, UsageError, "--init magic: there is no such rule"),
    (lambda s: None, {"rows": 920, "init": "copy:<none>"}, UsageError, "<none> is no token"),
    (lambda s: None, {"ends_turn": True, "rows": 920}, UsageError, "--ends-turn is about a token"),
    (lambda s: None, {"rows": 920, "method": "mean"}, UsageError, "--method is about another tokenizer"),
    (lambda s: None, {"rows": 920, "k": 4}, UsageError, "--k is about another tokenizer"),
    (lambda s: None, {"add_token": " "}, UsageError, "' ' is no token"),
    (lambda s: None, {"trim": "nowhere.txt"}, SourceMissing, r"nowhere\.txt: no such file"),
    (lambda s: None, {"chat_template": "nowhere.txt"}, SourceMissing, r"nowhere\.txt: no such file"),
    (lambda s: (s.parent / "corpus.txt").write_text(" \n"), TRIM, UsageError, "holds no text"),
    (lambda s: (s.parent / "corpus.txt").write_bytes(b"\xff\xfe"), TRIM, CorruptInput, "not UTF-8"),
    (lambda s: None, {"tokenizer": "model", **TRIM}, UsageError, "two steps"),
    (lambda s: None, {"tokenizer": "model", "method": "most"}, UsageError, "invalid enum value"),
    (lambda s: None, {"tokenizer": "model", "method": "mean", "override": {"a": "b"}}, UsageError, "--override gives"),
    (lambda s: None, {"tokenizer": "model", "override": {"nothing": "b"}}, UsageError, "nothing is no token"),
    (lambda s: None, {"tokenizer": "model", "override": {"<|im_end|>": ""}}, UsageError, "a text without tokens"),
]


@pytest.mark.parametrize(("change", "options", "error", "message"), CASES)
def test_refused_by_name_with_nothing_written(
    change: Callable[[Path], object],
    options: Options,
    error: type[WeightopsError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_model(tmp_path / "model", KINDS["byte BPE"]())
    (tmp_path / "corpus.txt").write_text("merging the weights\n")
    change(source)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message) as found:
        weightops.vocab(source, tmp_path / "out", **options)
    assert found.value.hint or change is torn_tokenizer or "enum" in message
    left = {path.name for path in tmp_path.iterdir()} - {*before}
    assert not any(path.endswith("out") for path in left)


def test_quantised_models_name_dequantize(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "llama")
    quantize_tiny(tmp_path / "plain", tmp_path / "gptq")
    with pytest.raises(IncompatibleInputs, match=r"down_proj\.weight is quantised \(gptq") as found:
        weightops.vocab(tmp_path / "gptq", tmp_path / "out", rows=400)
    assert "dequantize" in str(found.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_many_rows_in_a_layer_is_no_matter(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"](), model_type="unknown")
    with_tensors(source, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(911, 8).bfloat16()})
    weightops.vocab(source, tmp_path / "out", rows=920)
    assert load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape == (911, 8)
