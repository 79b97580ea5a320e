"""weightops compare as a person and as a program sees it: sentence, table, exit codes, page."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hub import Hub
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer, text

import weightops
from weightops.checkpoint import Checkpoint
from weightops.cli.main import run
from weightops.formats.folder import open_checkpoint

HOSTILE = 'x\x1b[31m"><script>alert(1)</script>\u202e'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one with a head scaled, and one with other weights."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny(folder / "base", "llama")
    save_tiny(folder / "other", "llama", seed=1)
    shutil.copytree(folder / "base", folder / "head")
    state = load_file(folder / "head/model.safetensors")
    state["model.layers.1.self_attn.v_proj.weight"][16:] *= 2
    save_file(state, folder / "head/model.safetensors", {"format": "pt"})
    (folder / "text.txt").write_text(text(40))
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("base base", 0),
        ("base other", 0),
        ("base base --tolerance 0 --strict", 0),
        ("base head --tolerance 0.5", 3),
        ("base head --tolerance 1.5", 0),
        ("base base head --tolerance 0", 3),
        ("base", 2),
        ("base base --seq-len 32", 2),
        ("base base --strict", 2),
        ("base nowhere", 10),
        ("base base --html nowhere/page.html", 2),
    ],
)
def test_exit_codes(line: str, code: int) -> None:
    assert run(["compare", *line.split(), "--quiet"]) == code


def test_the_sentence_comes_first_and_the_table_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "base", "head"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A is base, B is head. B is A but for 1 of 30 tensors, by ")
    assert lines[1] == "  heads: model.layers.1.self_attn.v_proj.weight: of its 2 heads, head 1 (times 2) changed"
    assert lines[3].split() == ["tensor", "kind", "‖B-A‖/‖A‖", "1-cos", "max", "|d|", "changed", "signs"]
    assert lines[4].split()[:2] == ["model.layers.1.self_attn.v_proj.weight", "heads"]


def test_several_are_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "base", "head", "other", "base", "--tolerance", "0"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [["head", "29", "1"], ["other", "0", "30"], ["base", "30", "0"]]
    assert [line for line in lines if "tolerance" in line].count("equal within the tolerance") == 1


def test_outputs_are_those_of_eval(capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    options = ["--text", "text.txt", "--seq-len", "32", "--json", "--quiet"]
    assert run(["compare", "base", "head", *options]) == 0
    compared = json.loads(capsys.readouterr().out)["outputs"]
    assert run(["eval", "head", "--reference", "base", *options]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    for document in (compared, evaluated):
        for model in document["models"]:
            del model["elapsed_s"]
    assert compared == evaluated
    assert compared["models"][1]["divergence"]["kl"]["mean"] == compared["models"][1]["kl_mean"] > 0


def test_text_shows_where_the_two_part(capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    assert run(["compare", "base", "head", "--text", "text.txt", "--seq-len", "32", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["compare", "base", "head", "--text", "text.txt", "--seq-len", "32"]) == 0
    shown = capsys.readouterr().out
    for words in ("perplexity ratio", "RMS Δp", "same top token", "99.9 %", "The first that is no tie: token"):
        assert words in shown


def test_other_tokenizers_are_refused_for_text_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("base", tmp_path / "cut")
    path = tmp_path / "cut/tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = document["model"]["merges"][:5]
    path.write_text(json.dumps(document))
    assert run(["compare", "base", str(tmp_path / "cut"), "--text", "text.txt", "--seq-len", "32"]) == 1
    said = capsys.readouterr().err
    assert "its tokenizer cuts the text into other tokens" in said
    assert "leave out --text" in said


def test_weights_texts_and_answers_come_of_models_that_are_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Weight files by themselves too, which are described by what lies beside them."""
    prompts, opened = tmp_path / "prompts.txt", []
    prompts.write_text("the licence")

    def once(place: Path, *rest: object) -> Checkpoint:
        opened.append(place)
        return open_checkpoint(place, *rest)  # type: ignore[arg-type]  # whatever compare hands on

    for module in ("comparison", "models"):
        monkeypatch.setattr(f"weightops.api.{module}.open_checkpoint", once)
    files = [Path(name) / "model.safetensors" for name in ("base", "head")]
    found = weightops.compare(*files, text="text.txt", seq_len=32, prompts=prompts, max_new_tokens=2)
    assert opened == files
    assert found.outputs is not None
    assert found.answers is not None


def test_answers_are_shown_from_where_they_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, html = tmp_path / "prompts.txt", tmp_path / "page.html"
    prompts.write_text(f"the weights\n{HOSTILE}\n")
    line = ["compare", "base", "head", "base", "--prompts", str(prompts), "--max-new-tokens", "8"]
    assert run([*line, "--json", "--quiet"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers["models"] == ["base", "head", "base"]
    assert answers["agreed"][0]["equal"] == 0
    assert run([*line, "--html", str(html), "--tolerance", "9"]) == 0
    shown, page = capsys.readouterr().out, html.read_text()
    first = answers["prompts"][0]
    parting = first["against"][0]["parting"]
    assert "Prompt 1: the weights\n" in shown
    assert f"    It parts from A after {parting['tokens']} equal tokens: A has “" in shown
    assert f"(log-probability {parting['of_a']['a']:.3f} to A, " in shown
    assert shown.count("    The same text as A's.") == 2
    assert page.count("<mark>") == 4
    for where in (shown, page):
        assert "\x1b[31m" not in where
        assert "\u202e" not in where
        assert "<script" not in page


def test_a_prompt_without_an_answer_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the", "max_new_tokens": 2}\n{"prompt": "the", "max_new_tokens": 9999}\n')
    assert run(["compare", "base", "base", "--prompts", str(prompts)]) == 1
    shown = capsys.readouterr().out
    assert "(length, 2 tokens)" in shown
    assert "(no answer: PromptTooLong: " in shown
    assert run(["compare", "base", "other", "--prompts", str(prompts), "--tolerance", "0"]) == 3


def test_a_hub_is_a_place_like_any_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Hub() as hub:
        hub.add("org/name", {path.name: path.read_bytes() for path in Path("head").iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert run(["compare", "base", "hf://org/name", "--json", "--quiet"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert found["kinds"] == {"identical": 29, "heads": 1}


def test_derived_checkpoints_are_compared_without_being_written() -> None:
    from weightops.operations.cast import cast
    from weightops.spec import DType

    base = weightops.open_checkpoint("base")
    found = weightops.compare(base, cast(base, dtype=DType.BF16), tolerance=0)
    assert found.comparisons[0].relation == "B is A rounded to bfloat16, exactly."
    assert found.differs
    assert "rounded to bfloat16" in found._repr_html_()


def test_hostile_names_reach_neither_terminal_nor_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in "ab":
        (tmp_path / side).mkdir()
        save_tokenizer(tmp_path / side)
        layers = {f"model.layers.{i}.{HOSTILE}.weight": torch.full((4, 4), float(i)) for i in range(3)}
        layers[f"only{side}{HOSTILE}"] = torch.ones(2)
        if side == "b":
            layers[f"model.layers.1.{HOSTILE}.weight"][0, 0] = math.nan
            (tmp_path / side / "chat_template.jinja").write_text(HOSTILE)
        save_file(layers, tmp_path / side / "model.safetensors")
        (tmp_path / side / "config.json").write_text(json.dumps({HOSTILE: side, "eos_token_id": HOSTILE + side}))
    html = tmp_path / "page.html"
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(html)]) == 0
    shown, page = capsys.readouterr().out, html.read_text()
    for where in (shown, page):
        assert "\x1b[31m" not in where
        assert "\u202e" not in where
    assert "<script" not in page
    assert "alert(1)" in page
