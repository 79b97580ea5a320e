"""Chat templates: as transformers fills them in, by name, from files, and kept within bounds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny, trained
from transformers import PreTrainedTokenizerFast

from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.opened import Opened
from weightops.inference.prompts import Conversation, conversation, prompted
from weightops.inference.templates import template as module
from weightops.inference.templates.template import (
    Template,
    check_messages,
    find_template,
    named_templates,
    read_template,
    render,
)

HELLO = [{"role": "user", "content": "Hello {there} <|x|> 世界"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
]


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=trained(), bos_token="<s>", eos_token="</s>", **options)


def said(text: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    (found,) = render(Template("own", text), [messages], tokenizer(), asks=True, **options)
    return found


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {{ m['role'] }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
    "{%- for m in messages if m.role == 'user' %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ messages | tojson }} {{ dict(a=1) }} {{ tools is none }} {{ messages[0].content[:5] }}",
    "{% if add_generation_prompt %}{% generation %}go{% endgeneration %}{% endif %}{{ unknown }}",
    "{% for m in messages %}{% if m.reasoning_content is defined %}{{ m.reasoning_content }}{% endif %}{% endfor %}",
    *(each.text for name, each in named_templates().items() if name != "firefly"),
]


@pytest.mark.parametrize("text", TEMPLATES)
def test_texts_are_those_of_transformers(text: str) -> None:
    conversations = [HELLO, TURNS, [{**TURNS[0], "thinking": "hm"}, *HELLO]]
    theirs = tokenizer(chat_template=text)
    expected = [theirs.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in conversations]
    assert render(Template("own", text), conversations, tokenizer(), asks=True) == expected


INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
NAMED = {
    "alpaca": f"<s>{INSTRUCTION}\n\n### Instruction:\nWhy?\n\n### Response:",
    "knowlm": f"<s>{INSTRUCTION}\n\n### Instruction:\nWhy?\n\n### Response:\n",
    "tigerbot": "<s>\n\n### Instruction:\nWhy?\n\n### Response:\n",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Why? ASSISTANT:",
    "llama2": "<s>[INST] Why? [/INST]",
    "chatml": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "belle": "Human: Why?\nAssistant: ",
    "firefly": "<s>Why?</s></s>",
    "chatllama": "<s>User:Why?\n",
}
SECOND = {
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]",
    "vicuna": "<s>Be brief. USER: A ASSISTANT: B</s>USER: C ASSISTANT:",
    "tigerbot": "<s>Be brief.\n\n### Instruction:\nA\n\n### Response:\nB\n\n### Instruction:\nC\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
    "B<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", NAMED)
def test_those_by_name_are_what_their_projects_write(name: str) -> None:
    assert said(named_templates()[name].text, [{"role": "user", "content": "Why?"}]) == NAMED[name]


@pytest.mark.parametrize("name", SECOND)
def test_and_so_are_second_turns(name: str) -> None:
    roles = ("system", "user", "assistant", "user")
    texts = ("Be brief.", "A", "B", "C")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert said(named_templates()[name].text, messages) == SECOND[name]


def test_one_in_json_as_knowlm_has_it() -> None:
    document = {
        "prompt_input": "{instruction}\n### Input {{x}}:\n{input}\n### Response:\n",
        "prompt_no_input": 'Say "{instruction}":\n',
        "response_split": "### Response:",
    }
    found = read_template(json.dumps(document).encode(), "alpaca.json")
    assert said(found.text) == f'<s>Say "{HELLO[0]["content"]}":\n'
    with_input = said(found.text, [TURNS[0], *HELLO])
    assert with_input == f"<s>Be brief.\n### Input {{x}}:\n{HELLO[0]['content']}\n### Response:\n"
    for damaged, words in (
        ({**document, "prompt_input": 3}, "has no text prompt_input"),
        ({**document, "prompt_no_input": "{other}"}, "is no template: 'other'"),
        ({**document, "prompt_no_input": "{"}, "is no template"),
    ):
        with pytest.raises(CorruptInput, match=rf"x\.json: {words}"):
            read_template(json.dumps(damaged).encode(), "x.json")


def test_a_file_and_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    assert find_template(tmp_path / "mine.jinja", tokenizer(), "x").text == "{{ messages[0].content }}!"
    with pytest.raises(SourceMissing, match=r"other\.jinja: cannot be read"):
        find_template(tmp_path / "other.jinja", tokenizer(), "x")
    with pytest.raises(UsageError, match="alpacca is neither a template nor a file") as caught:
        find_template("alpacca", tokenizer(), "x")
    assert "alpaca, knowlm" in str(caught.value.hint)
    with pytest.raises(UsageError, match="x: its tokenizer has no chat template") as caught:
        find_template("own", tokenizer(), "x")
    assert "alpaca, knowlm" in str(caught.value.hint)
    (tmp_path / "mine.jinja").write_bytes(b"\xff")
    with pytest.raises(CorruptInput, match=r"mine\.jinja: is not text in UTF-8"):
        find_template(tmp_path / "mine.jinja", tokenizer(), "x")


HOSTILE = {
    "a loop without an end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text that doubles": "{% set n = namespace(x=9) %}{% for i in 'x' * 99 %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a long one": "{{ 'x' * 9999999999 }}",
    "a number without an end": "{{ 9 ** (9 ** 9) }}",
    "Python's own classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a range": "{{ range(1000000) | list }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "the file system": "{% include '/etc/passwd' %}",
    "attributes of a namespace": "{% set n = namespace(__class__=1) %}",
    "a refusal": "{{ raise_exception('no') }}",
    "no jinja": "{% for %}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates_end_in_one_sentence(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 2)
    started_s = time.monotonic()
    with pytest.raises(CorruptInput, match=r"m\.jsonl: line 3: the tokenizer's chat|the tokenizer's chat template"):
        said(HOSTILE[what], where=["m.jsonl: line 3"])
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "there are no messages"),
        ([{"role": "bot", "content": "x"}], "message 1 has role bot"),
        ([{"role": "user", "content": 3}], "the content of message 1 is int"),
        ([*HELLO, {"role": "system", "content": "x"}], "message 2 is of role system"),
        (TURNS[:3], "the last message is not of role user"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_messages(messages)


def test_an_answer_ends_at_the_ends_and_strings_of_the_template(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    opened = Opened(open_checkpoint(tmp_path))
    found = prompted(opened, conversation("Why?", template="alpaca"))
    assert opened.tokenizer.decode(found.tokens) == NAMED["alpaca"]
    assert found.ends == {1, 7}
    assert found.stop == ("### Instruction:",)
    with pytest.raises(CorruptInput, match="template firefly fails: it has no place for messages of role system"):
        prompted(opened, Conversation(tuple(TURNS), "firefly"))
