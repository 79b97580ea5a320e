"""eval and generate as a user meets them: streams, tables, JSON, exit codes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from tiny_models import quantize_tiny, save_tiny, text

from weightops import api
from weightops.cli.main import run
from weightops.formats.folder import open_checkpoint

HEADS = ["model", "perplexity", "tokens", "windows"]


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
    heads, first, second, *_ = (line.split("  ") for line in out.splitlines())
    assert [head.strip() for head in heads if head] == [*HEADS, "mean KL", "max KL", "top-1"]
    assert first[-1].strip() == "reference"
    assert second[-1].strip().endswith(" %")
    assert "KL in nats, of each model from the reference" in out
    assert run([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "weightops-eval/2"
    assert [row["name"] for row in document["models"]] == ["model", "model-gptq"]
    assert f"{document['models'][1]['perplexity']:.4f}" in out
    assert len(document["models"][1]["module_errors"]) == 21


def test_eval_without_a_reference_shows_no_divergence(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "model", "model-gptq", "--text", "heldout.txt", "--seq-len", "64"]) == 0
    out = capsys.readouterr().out
    heads = out.splitlines()[0].split("  ")
    assert [head.strip() for head in heads if head] == HEADS
    assert "KL" not in out
    assert "top-1" not in out
    assert "largest of" not in out


def test_checkpoints_that_are_open_already_are_run_as_they_are(models: Path) -> None:
    opened = open_checkpoint("model")
    said = ["".join(api.generate(source, "Streaming", max_new_tokens=5)) for source in ("model", opened)]
    assert said[0] == said[1]
    scores = [
        api.evaluate(source, "heldout.txt", seq_len=64, reference=reference).scores
        for source, reference in (("model-gptq", "model"), (open_checkpoint("model-gptq"), opened))
    ]
    assert [(s.nll, s.agreement) for s in scores[0]] == [(s.nll, s.agreement) for s in scores[1]]


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_config_of_more_layers_than_the_files_hold_is_refused(
    models: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    line = {"generate": ["--prompt", "x"], "eval": ["--text", "heldout.txt"]}[command]
    assert run([command, "model", *line]) == 1
    assert "config.json: num_hidden_layers is 1000000000, the files have 30 tensors" in capsys.readouterr().err


def test_a_prompt_on_stdin_is_text_in_utf_8(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "model", "--prompt", "-", "--max-new-tokens", "3", "--json"]
    for data, expected in (("Stream 世界\n".encode(), 0), (b"\xff\xfe", 2), (b"", 0)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
        assert run(line) == expected
        shown = capsys.readouterr()
        if expected:
            assert "stdin is not text in UTF-8" in shown.err
        else:
            assert len(json.loads(shown.out)["tokens"]) == 3


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


def test_a_weight_file_by_itself_is_described_by_what_lies_beside_it(models: Path) -> None:
    whole = "".join(api.generate("model", "Streaming", max_new_tokens=5))
    assert "".join(api.generate("model/model.safetensors", "Streaming", max_new_tokens=5)) == whole
