"""The same prompts to several models: which answers are equal, and where and why the others part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import weightops
from weightops.errors import UsageError
from weightops.inference.answers import AnswersReport

TINY = Path(__file__).parents[1] / "data/tiny-llama"
PROMPTS = ["You may copy", "In the beginning", "The licensor"]
COUNT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama as `a`, a changed copy as `b`, prompts for both."""
    folder = tmp_path_factory.mktemp("answers")
    shutil.copytree(TINY, folder / "a")
    shutil.copytree(TINY, folder / "b")
    state = load_file(TINY / "model.safetensors")
    torch.manual_seed(0)
    for name in (name for name in state if "mlp" in name):
        state[name] = (state[name].float() * (1 + 0.15 * torch.randn(state[name].shape))).to(state[name].dtype)
    save_file(state, folder / "b/model.safetensors", {"format": "pt"})
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(folder)


def answers(*models: Path | str, prompts: Path | str = "prompts.txt", **settings: object) -> AnswersReport:
    given = {"max_new_tokens": COUNT, **settings}
    found = weightops.compare(models[0], models[1:], prompts=prompts, **given).answers  # type: ignore[arg-type]
    assert found is not None
    return found


def logprobs(folder: str, prompt: str, tokens: tuple[int, ...]) -> torch.Tensor:
    """What transformers gives each token after a prompt and tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [*AutoTokenizer.from_pretrained(folder)(prompt).input_ids, *tokens]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_they_part_at_the_first_other_token_with_the_log_probabilities_of_transformers() -> None:
    found = answers("a", "b", "a")
    parted = [each for each in found.prompts if each.against[0].equal is False]
    assert parted
    for each in parted:
        one, other, again = each.answers
        assert again.text == one.text
        parting = each.against[0].parting
        assert parting is not None
        assert parting.of_a is not None
        assert parting.of_model is not None
        at = parting.tokens
        assert at is not None
        assert one.tokens[:at] == other.tokens[:at]
        assert one.text[: parting.characters] == other.text[: parting.characters] == each.common
        for chosen, token in ((parting.of_a, one.tokens[at]), (parting.of_model, other.tokens[at])):
            assert chosen.token == token
            assert chosen.a == pytest.approx(float(logprobs("a", each.prompt, one.tokens[:at])[token]), abs=1e-3)
            assert chosen.model == pytest.approx(float(logprobs("b", each.prompt, one.tokens[:at])[token]), abs=1e-3)
        assert parting.of_a.token != parting.of_model.token
        assert parting.is_tie is False
    changed, same = found.agreed
    places = sorted(each.against[0].parting.tokens for each in parted)  # type: ignore[union-attr,type-var]
    assert (changed.prompts, changed.equal, changed.ties) == (3, 3 - len(parted), 0)
    assert changed.median_tokens in (places[len(places) // 2], sum(places) / len(places))  # type: ignore[arg-type]
    assert (same.prompts, same.equal, same.median_tokens) == (3, 3, None)


def test_what_a_rounding_may_turn_is_a_tie(tmp_path: Path) -> None:
    save_tiny(tmp_path / "one", "llama", eos_token_id=None)
    first = answers(tmp_path / "one", tmp_path / "one", max_new_tokens=1).prompts[0].answers[0].tokens[0]
    rival = 319 if first != 319 else 318
    for name, sign in (("one", -1), ("other", 1)):
        if name == "other":
            shutil.copytree(tmp_path / "one", tmp_path / "other")
        path = tmp_path / name / "model.safetensors"
        state = load_file(path)
        state["lm_head.weight"][rival] = state["lm_head.weight"][first] * (1 + sign * 2e-6)
        save_file(state, path, {"format": "pt"})
    (tmp_path / "p.txt").write_text(PROMPTS[0])
    found = answers(tmp_path / "one", tmp_path / "other", prompts=tmp_path / "p.txt", max_new_tokens=1)
    parting = found.prompts[0].against[0].parting
    assert parting is not None
    assert (parting.of_a and parting.of_a.token, parting.of_model and parting.of_model.token) == (first, rival)
    assert (parting.tokens, parting.is_tie, found.agreed[0].ties) == (0, True, 1)


def test_other_vocabularies_are_compared_as_text(tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", "llama")
    found = answers("a", tmp_path / "other")
    for each in found.prompts:
        parting = each.against[0].parting
        assert parting is not None
        assert (parting.tokens, parting.of_a, parting.is_tie) == (None, None, None)
        assert parting.characters == len(each.common)
    assert found.agreed[0].median_tokens is None


def test_lines_have_settings_of_their_own_and_a_prompt_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    lines = [
        {"prompt": PROMPTS[0], "max_new_tokens": 3, "id": "short", "logprobs": 2},
        {"prompt": PROMPTS[0], "max_new_tokens": 100_000},
        {"messages": [{"role": "user", "content": "hi"}], "template": "alpaca", "max_new_tokens": 2},
        {"prompt": PROMPTS[0], "temperature": 2.0, "seed": 1},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = answers("a", "b", prompts=path)
    short, failed, said, drawn = found.prompts
    assert short.id == "short"
    assert len(short.answers[0].tokens) == 3
    assert [len(each.top) for each in short.answers[0].logprobs or ()] == [2, 2, 2]
    assert [each.error and each.error.error for each in failed.answers] == ["PromptTooLong"] * 2
    assert failed.against[0].equal is None
    assert found.failed == 2
    assert said.prompt == "hi"
    assert len(said.answers[1].tokens) == 2
    assert drawn.against[0].parting is not None
    assert drawn.against[0].parting.is_tie is None
    assert found.agreed[0].prompts == 3


def test_a_notebook_shows_how_often_they_agree() -> None:
    found = weightops.compare("a", "a", prompts="prompts.txt", max_new_tokens=1)
    assert "Answers against a" in found._repr_html_()


def test_a_template_that_there_is_not_is_refused_for_all_prompts() -> None:
    with pytest.raises(UsageError, match="nope is neither a template nor a file"):
        answers("a", "b", template="nope")


def test_what_has_no_use_without_prompts_is_refused() -> None:
    with pytest.raises(UsageError, match="max_new_tokens has no use without prompts"):
        weightops.compare("a", "b", max_new_tokens=3)
