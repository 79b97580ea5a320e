"""Files of prompts: what each line may be, one load for all, and what is left when a run is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny, save_tokenizer

import weightops
from weightops.cli.main import run
from weightops.errors import CorruptInput, Locked, OutputExists, PlanDiffers, UsageError
from weightops.inference import batch
from weightops.inference.loaded import Loaded
from weightops.inference.prompt_file import read_prompts
from weightops.inference.prompts import Conversation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "model"
    save_tiny(folder, "llama")
    save_tokenizer(folder, chat_template="{% for m in messages %}{{ m.content }};{% endfor %}")
    return folder


def answers(out: Path) -> list[dict[str, Any]]:
    header, *lines = out.read_text().splitlines()
    assert json.loads(header)["schema"] == "weightops-answers/1"
    return [json.loads(line) for line in lines]


LINES: list[dict[str, Any] | str] = [
    "Streaming tensors,",
    {"prompt": "the weights", "id": "w", "max_new_tokens": 3},
    {"messages": [{"role": "user", "content": "Why?"}], "id": 7},
    {"prompt": "why", "system": "Be brief.", "stop": ["a"], "temperature": 0.7, "seed": 2},
    {"prompt": "x" * 400},
    {"prompt": "logprobs", "logprobs": 2, "max_new_tokens": 2},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return path


def test_each_prompt_has_the_answer_that_it_has_alone(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    done = weightops.generate_all(model, prompts, out, max_new_tokens=8)
    found = answers(out)
    assert sorted(each["index"] for each in found) == list(range(6))
    by_index = {each["index"]: each for each in found}
    alone = [
        "".join(weightops.generate(model, "Streaming tensors,", max_new_tokens=8)),
        "".join(weightops.generate(model, "the weights", max_new_tokens=3)),
        "".join(weightops.generate(model, "Why?", chat=True, max_new_tokens=8)),
        "".join(
            weightops.generate(model, "why", system="Be brief.", stop="a", temperature=0.7, seed=2, max_new_tokens=8)
        ),
    ]
    assert [by_index[i]["text"] for i in range(4)] == alone
    assert (by_index[1]["id"], by_index[2]["id"], by_index[0]["id"]) == ("w", 7, None)
    assert by_index[4]["finish"] == "failed"
    assert by_index[4]["error"]["error"] == "PromptTooLong"
    assert [len(each["top"]) for each in by_index[5]["logprobs"]] == [2] * len(by_index[5]["tokens"])
    assert (done.prompts, done.resumed, done.failed) == (6, 0, 1)
    before = out.read_bytes()
    again = weightops.generate_all(model, prompts, out, max_new_tokens=8)
    assert (again.resumed, again.finishes) == (6, done.finishes)
    assert out.read_bytes() == before


def test_the_model_is_loaded_once(model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = Loaded.__init__
    monkeypatch.setattr(Loaded, "__init__", lambda *args, **options: loads.append(1) or load(*args, **options))
    weightops.generate_all(model, prompts, tmp_path / "out", max_new_tokens=4)
    weightops.generate_all(model, prompts, tmp_path / "out", max_new_tokens=4)
    assert loads == [1]


def test_cut_anywhere_it_goes_on_with_the_same_answers(model: Path, prompts: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    weightops.generate_all(model, prompts, whole, max_new_tokens=4)
    data = whole.read_bytes()
    first = data.index(b"\n")
    for cut in (0, 5, first, first + 1, first + 30, data.index(b"\n", first + 1) + 1, len(data) - 1):
        out.write_bytes(data[:cut])
        done = weightops.generate_all(model, prompts, out, max_new_tokens=4)
        assert done.resumed == max(0, data[:cut].count(b"\n") - 1)
        timeless = [
            sorted(({**each, "elapsed_s": 0} for each in answers(path)), key=lambda each: each["index"])
            for path in (out, whole)
        ]
        assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_after_a_kill(model: Path, prompts: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom weightops.inference import batch\nfrom weightops.cli.main import run\n"
        "write, n = batch._write, 0\n"
        "def dying(out, fd, document):\n    global n\n    n += 1\n    if n == 4:\n"
        "        os.write(fd, batch._line(document)[:20])\n        os._exit(9)\n    write(out, fd, document)\n"
        "batch._write = dying\nrun(sys.argv[1:])"
    )
    words = ["generate", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert subprocess.run([sys.executable, "-c", code, *words], check=False).returncode == 9
    assert not (tmp_path / "out").read_bytes().endswith(b"\n")
    assert run(words) == 1  # one prompt is too long
    assert sorted(each["index"] for each in answers(tmp_path / "out")) == list(range(6))


def test_a_file_of_another_job_is_refused(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weightops.generate_all(model, prompts, out, max_new_tokens=4)
    before = out.read_bytes()
    with pytest.raises(PlanDiffers, match="has answers of another job"):
        weightops.generate_all(model, prompts, out, max_new_tokens=5)
    save_tiny(tmp_path / "other", "llama", seed=1)
    save_tokenizer(tmp_path / "other", chat_template="{% for m in messages %}{{ m.content }};{% endfor %}")
    words = ["generate", str(tmp_path / "other"), "--prompts", str(prompts), "--max-new-tokens", "4"]
    assert run([*words, "--out", str(out)]) == 12
    with pytest.raises(OutputExists, match="is there, and is no file of answers"):
        weightops.generate_all(model, prompts, prompts, max_new_tokens=4)
    assert out.read_bytes() == before


def test_while_another_run_writes_it_waits_for_nobody(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    answer = batch._answer

    def meanwhile(*args: Any) -> Any:
        with pytest.raises(Locked, match="another run writes to it"):
            weightops.generate_all(model, prompts, out, max_new_tokens=4)
        return answer(*args)

    monkeypatch.setattr(batch, "_answer", meanwhile)
    weightops.generate_all(model, prompts, out, max_new_tokens=4)


def test_the_command_says_how_they_ended(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_bytes("one\r\n\n世界\n".encode())
    words = ["generate", str(model), "--prompts", "prompts.txt", "--out", "out.jsonl", "--max-new-tokens", "2"]
    assert run(words) == 0
    assert "2 prompts: 2 length; written to out.jsonl" in capsys.readouterr().err
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 2
    assert run([*words[:2], "--prompt", "x", *words[2:]]) == 2
    assert run(words[:4]) == 2
    assert "give --prompt, or --prompts with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "expected a string, or an object"),
        ('{"prompt": "x", "messages": []}', "expected a string, or an object"),
        ('{"text": "x"}', "expected a string, or an object"),
        ('{"prompt": 3}', "prompt is int, expected text"),
        ('{"prompt": "x", "id": []}', "id is list"),
        ('{"prompt": "x", "temprature": 1}', "has a field temprature, which there is not"),
        ('{"prompt": "x", "top_k": "three"}', r"Expected `int \| null`, got `str`"),
        ('{"messages": 3}', "messages are no list of objects"),
        ('{"prompt": "x"', "not JSON"),
    ],
)
def test_lines_that_are_no_prompts_are_refused_by_number(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"one"\n{line}\n')
    with pytest.raises(CorruptInput, match=rf"p\.jsonl: line 2: .*{words}"):
        read_prompts(path, {})


def test_settings_that_cannot_be_meant_are_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "top_k": 3}')
    with pytest.raises(UsageError, match=r"line 1: --top-k, --top-p and --min-p say what to draw from"):
        read_prompts(tmp_path / "p.jsonl", {})
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="has no prompt"):
        read_prompts(tmp_path / "p.txt", {})


def test_a_system_message_is_put_before_those_that_have_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "x"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in (own, own[1:])))
    found = read_prompts(tmp_path / "p.jsonl", {}, system="shared", template="alpaca")
    prompts = [each.prompt for each in found]
    assert all(isinstance(each, Conversation) and each.template == "alpaca" for each in prompts)
    assert [each.messages[0]["content"] for each in prompts if isinstance(each, Conversation)] == ["own", "shared"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """As in test_generate.py."""
