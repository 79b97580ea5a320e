"""Chat templates of merges: by name, the commonest, or a text; and what those with names make of a conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from merging import evaluated, model, stage
from merging_tokenizers import bpe, files

from weightops.checkpoint import Checkpoint, Written
from weightops.errors import UsageError
from weightops.operations.merge.chat_templates import TEMPLATES
from weightops.operations.merge.vocabulary import aligned

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Who are you?\n"},
]
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nWho are you?\n<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s> [INST] Be brief.\n\nHello [/INST] Hi!</s> [INST] Who are you?\n [/INST]", ""),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi!\n\n### Instruction:\nWho are you?\n\n",
        "### Response:\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi![|endofturn|]\n[|user|]Who are you?\n\n",
        "[|assistant|]",
    ),
}


def render(template: str, messages: list[dict[str, str]], *, answer: bool = False) -> str:
    """As transformers does it."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return environment.from_string(template).render(messages=messages, add_generation_prompt=answer, **tokens)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_makes_of_a_conversation_what_models_of_its_family_expect(name: str) -> None:
    said, begun = EXPECTED[name]
    assert render(TEMPLATES[name], [SYSTEM, *TURNS]) == said
    assert render(TEMPLATES[name], [SYSTEM, *TURNS], answer=True) == said + begun


def test_all_have_an_expectation() -> None:
    assert set(TEMPLATES) == set(EXPECTED)


def test_without_a_system_message() -> None:
    found = {name: render(template, TURNS[:1]) for name, template in TEMPLATES.items()}
    assert found == {
        "chatml": "<|im_start|>user\nHello<|im_end|>\n",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
        "mistral": "<s> [INST] Hello [/INST]",
        "alpaca": "### Instruction:\nHello\n\n",
        "exaone": "[|system|][|endofturn|]\n[|user|]Hello\n",
    }


def test_mistral_takes_turns() -> None:
    with pytest.raises(TemplateError, match="must take turns"):
        render(TEMPLATES["mistral"], [TURNS[0], TURNS[0]])


def owner(name: str, template: Any = None, more: dict[str, bytes] | None = None) -> Checkpoint:
    said = {"chat_template": template} if template is not None else {}
    beside = {**files(bpe(), **said), **(more or {})}
    return model(name, 1, sidecars={file: Written(data) for file, data in beside.items()}, vocab_size=7)


def chosen(wanted: str, *owners: Checkpoint, tokens: bool = False) -> tuple[str, dict[str, Any]]:
    """The template that is written, and tokenizer_config.json beside it."""
    listed = ", ".join(f"{{model: {each.name}}}" for each in owners)
    text = f"merge_method: linear\nmodels: [{listed}]\nparameters: {{weight: 1}}\nchat_template: {json.dumps(wanted)}\n"
    text += "tokenizer: {source: union, tokens: {<new>: {}}}\n" if tokens else ""
    found = aligned(stage(text), {each.name: each for each in owners}, evaluated)
    assert found is not None
    template, config = found.sidecars["chat_template.jinja"], found.sidecars["tokenizer_config.json"]
    assert isinstance(template, Written)
    assert isinstance(config, Written)
    return template.data.decode(), json.loads(config.data)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_name_or_a_text_in_place_of_what_the_model_had(tokens: bool) -> None:
    old = owner("a", "{{ old }}", {"chat_template.json": b'{"chat_template": "{{ older }}"}'})
    for wanted, expected in (("chatml", TEMPLATES["chatml"]), ("{{ mine }}", "{{ mine }}")):
        template, config = chosen(wanted, old, owner("b"), tokens=tokens)
        assert template == expected
        assert "chat_template" not in config
        assert config["bos_token"] == "<s>"


def test_auto_is_the_commonest_and_of_equally_common_ones_the_first() -> None:
    assert chosen("auto", owner("a", "{{ 1 }}"), owner("b", "{{ 2 }}"), owner("c", "{{ 2 }}"))[0] == "{{ 2 }}"
    assert chosen("auto", owner("a", "{{ 1 }}"), owner("b", "{{ 2 }}"))[0] == "{{ 1 }}"
    assert chosen("auto", owner("a"), owner("b", "{{ 2 }}"))[0] == "{{ 2 }}"


def test_a_models_own_template_wherever_it_keeps_it() -> None:
    several = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ 3 }}"}]
    places: dict[str, Checkpoint] = {
        "{{ 1 }}": owner("b", "{{ in the config }}", {"chat_template.jinja": b"{{ 1 }}"}),
        "{{ 2 }}": owner("b", None, {"chat_template.json": b'{"chat_template": "{{ 2 }}"}'}),
        "{{ 3 }}": owner("b", several),
    }
    for template, having in places.items():
        assert chosen("auto", owner("a"), having)[0] == template


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [("auto", "no model has a template"), ("chatlm", "is neither the name of a template nor a template")],
)
def test_what_names_no_template_is_refused_with_its_line(wanted: str, problem: str) -> None:
    with pytest.raises(UsageError, match=rf"m\.yml:4: chat_template.*{problem}") as caught:
        chosen(wanted, owner("a"), owner("b"))
    assert "llama3" in str(caught.value.hint)
