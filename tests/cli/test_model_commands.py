"""eval and generate as a user meets them: streams, tables, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import quantize_tiny, save_tiny, text

from weightops.cli.main import run


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders that the help texts name."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", "llama")
    quantize_tiny(tmp_path / "model", tmp_path / "model-gptq")
    (tmp_path / "heldout.txt").write_text(text(25))
    return tmp_path


def test_eval_shows_a_table_and_its_convention(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "model-gptq", "--text", "heldout.txt", "--seq-len", "64", "--reference", "model"]
    assert run(line) == 0
    out = capsys.readouterr().out
    assert out.split()[:2] == ["model", "perplexity"]
    assert "model-gptq: largest of 21 modules" in out
    assert "63 predictions in each" in out
    assert run([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "weightops-eval/1"
    assert [row["name"] for row in document["models"]] == ["model", "model-gptq"]
    assert f"{document['models'][1]['perplexity']:.4f}" in out
    assert len(document["models"][1]["module_errors"]) == 21


def test_text_goes_to_stdout_and_notes_to_stderr(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "model", "--prompt", "Streaming", "--max-new-tokens", "9"]
    assert run(line) == 0
    whole = capsys.readouterr()
    assert whole.err == ""
    assert run([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert whole.out == document["text"] + "\n"
    assert len(document["tokens"]) == 9
    assert document["finish"] == "length"
    assert run([*line, "--max-memory", "382100KB"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out == whole.out
    assert "read from disk for every token, which is slow" in streamed.err


def test_a_quantised_model_stays_packed_where_it_does_not_fit_otherwise(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "model-gptq", "--prompt", "Streaming", "--max-new-tokens", "9"]
    assert run([*line, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["engine"] == "dequantized"
    assert run([*line, "--json", "--engine", "packed"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert (packed["engine"], packed["text"]) == ("packed", plain["text"])
    assert run([*line, "--max-memory", "382100KB"]) == 0
    saving = capsys.readouterr()
    assert saving.out == plain["text"] + "\n"
    assert "dequantised to float32 the model would take" in saving.err
    assert "its weights stay packed" in saving.err
    assert run(["generate", "model", "--prompt", "Streaming", "--engine", "packed"]) == 2
    assert "holds no quantised layer" in capsys.readouterr().err


def test_exit_codes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "model", "--text", "nowhere.txt"]) == 10
    assert run(["eval", "model", "--text", "model/model.safetensors"]) == 13
    assert run(["eval", "nowhere", "--text", "heldout.txt"]) == 10
    assert run(["eval", "model", "--text", "heldout.txt", "--seq-len", "2000"]) == 2
    assert run(["generate", "model", "--prompt", "x", "--max-memory", "1MB"]) == 16
    assert run(["generate", "model", "--prompt", "x", "--top-k", "4"]) == 2
    assert run(["generate", "model", "--prompt", "x", "--device", "tpu"]) == 2
    assert "Traceback" not in capsys.readouterr().err
